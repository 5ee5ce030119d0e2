"""What a training step is made of: each part alone, on tensors of its shapes, beside the whole.

    python benchmarks/step.py [--only mlp]

prints one JSON line for each work. What is left of the step when its parts are taken away is what
torch's dispatcher, Python and, for the CNNs, autograd take, and what the parts lose in each other's
company.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mnist_cli import compose, line, runtime, train, train_step
from mnist_cli.learner import Learner
from mnist_cli.model.dropout import Dropout

ROUNDS, STEPS = 7, 60
MLP = ("model=mlp", "model.hidden=[512,256]", "model.dropout=0.2", "optim=adam")
WORKS = {
    "linear, batch 128": ("model=linear", "optim=adam", "batch_size=128"),
    "mlp, Adam, batch 64": (*MLP, "batch_size=64"),
    "mlp, Adam, batch 256": (*MLP, "batch_size=256"),
    "cnn, Adam, batch 64": ("model=cnn", "optim=adam", "batch_size=64"),
    "cnn_dropout, Adadelta, batch 64": ("model=cnn_dropout", "optim=adadelta", "batch_size=64"),
}
PRODUCTS = ("addmm", "mm", "convolution", "convolution_backward")
ACTIVATIONS = (
    "relu", "relu_", "threshold_backward",
    "max_pool2d_with_indices", "max_pool2d_with_indices_backward",
)  # fmt: skip

Call = Callable[[], object]


def prepared(words: tuple[str, ...]) -> Learner:
    """The learner that `train` would run."""
    typed = line.parse_line(["train", *words, "device=cpu"])
    runtime.set_up_cpu()
    with compose.initialized(typed):
        config = compose.checked(typed, compose.compose(typed, typed.overrides))
    return train.prepare(config, None, time.monotonic())


def parts(learner: Learner) -> dict[str, Callable[[int], object]]:
    """The whole step and each part of it, as functions of the step's number."""
    train, rows = learner.data.train, learner.config.batch_size
    indices = torch.randperm(len(train)).split(rows)[:STEPS]
    learner.model.train()
    operations, dropped = recorded(learner, indices[0])

    def whole(step: int) -> object:
        return train_step.take_step(learner, indices[step], step)

    def batch(step: int) -> object:
        train.targets.index_select(0, indices[step])
        return learner.normalise(train.inputs.index_select(0, indices[step]))

    def those(names: tuple[str, ...]) -> list[Call]:
        return [call for name, call in operations if name in names]

    products, activations = those(PRODUCTS), those(ACTIVATIONS)
    return {
        "whole": whole,
        "products": lambda step: [call() for call in products],
        "optimizer": lambda step: learner.optimizer.step(),
        "activations": lambda step: [call() for call in activations],
        "batch": batch,
        "dropout": lambda step: [call() for call in dropped],
    }


def recorded(learner: Learner, indices: Tensor) -> tuple[list[tuple[str, Call]], list[Call]]:
    """What a step on `indices` asks of torch, by name, and what its dropouts are asked for.

    Each can be called again, on the same tensors.
    """
    operations: list[tuple[str, Call]] = []
    dropped: list[Call] = []

    class Recording(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            call = functools.partial(function, *args, **(kwargs or {}))
            operations.append((function.overloadpacket.__name__, call))
            return call()

    mask = Dropout.mask

    def noted(layer: Dropout, values: Tensor) -> Tensor:
        dropped.append(functools.partial(layer.forward, values.detach()))
        return mask(layer, values)

    with mock.patch.object(Dropout, "mask", noted), Recording():
        train_step.compute_gradients(learner, indices)
    train_step.update_weights(learner)
    return operations, dropped


def measure(work: str, words: tuple[str, ...]) -> dict[str, Any]:
    """Microseconds of a step and of its parts: medians of rounds in which all run in turn."""
    calls = parts(prepared(words))
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            with torch.set_grad_enabled(name == "whole"):
                started = time.perf_counter()
                for step in range(STEPS):
                    call(step)
                found[name].append((time.perf_counter() - started) / STEPS * 1e6)
    return {"work": work} | {name: statistics.median(each[1:]) for name, each in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="")
    only = parser.parse_args().only
    for work, words in WORKS.items():
        if only in work:
            print(json.dumps(measure(work, words)))


if __name__ == "__main__":
    main()
