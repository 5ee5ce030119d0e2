"""What a training step is made of: each part alone, on tensors of its shapes, beside the whole.

    python benchmarks/step.py [--only mlp]

prints one JSON line for each work. What is left of the step when its parts are taken away is what
autograd, torch's dispatcher and Python take, and what the parts lose in each other's company.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from mnist_cli import compose, line, runtime, train, train_step
from mnist_cli.job import Job
from mnist_cli.model.dropout import Dropout

ROUNDS, STEPS = 7, 60
DROPOUT = 0.2


class Shape(NamedTuple):
    """A stack of linear layers, trained with Adam on MNIST."""

    name: str
    hidden: tuple[int, ...]
    batch_size: int


SHAPES = (
    Shape("linear, batch 128", (), 128),
    Shape("mlp, Adam, batch 64", (512, 256), 64),
    Shape("mlp, Adam, batch 256", (512, 256), 256),
)


def prepared(shape: Shape) -> Job:
    """The job that `train` would run."""
    hidden = ",".join(map(str, shape.hidden))
    model = [f"model.hidden=[{hidden}]", f"model.dropout={DROPOUT}"] if hidden else []
    typed = line.parse_line([
        "train", f"model={'mlp' if hidden else 'linear'}", *model, "optim=adam",
        f"batch_size={shape.batch_size}", "device=cpu",
    ])  # fmt: skip
    runtime.set_up_cpu()
    with compose.initialized(typed):
        config = compose.checked(typed, compose.compose(typed, typed.overrides))
    return train.prepare(config, None, time.monotonic())


def parts(shape: Shape, job: Job) -> dict[str, Callable[[int], object]]:
    """The whole step and each part of it, as functions of the step's number."""
    rows, data = shape.batch_size, job.data.train
    indices = torch.randperm(len(data)).split(rows)[:STEPS]
    products = list(matrix_products(shape))
    dropout = Dropout(DROPOUT)
    activations = [torch.rand(rows, width) for width in shape.hidden]

    def whole(step: int) -> object:
        return train_step.take_step(job, indices[step], step)

    def batch(step: int) -> object:
        data.targets.index_select(0, indices[step])
        return job.normalise(data.inputs.index_select(0, indices[step]))

    return {
        "whole": whole,
        "products": lambda step: [torch.mm(a, b, out=c) for a, b, c in products],
        "optimizer": lambda step: job.optimizer.step(),
        "batch": batch,
        "dropout": lambda step: [dropout(values) for values in activations],
    }


def matrix_products(shape: Shape) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Factors and result of each: outputs, gradients of weights, gradients of inputs."""
    rows = shape.batch_size
    widths = (784, *shape.hidden, 10)
    for number, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
        x, weight, grad = (
            torch.rand(rows, fan_in),
            torch.rand(fan_out, fan_in),
            torch.rand(rows, fan_out),
        )
        yield x, weight.t(), torch.empty(rows, fan_out)
        yield grad.t(), x, torch.empty(fan_out, fan_in)
        if number:  # nobody asks for the gradient of the images
            yield grad, weight, torch.empty(rows, fan_in)


def measure(shape: Shape) -> dict[str, Any]:
    """Microseconds of a step and of its parts: medians of rounds in which all run in turn."""
    calls = parts(shape, prepared(shape))
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            started = time.perf_counter()
            for step in range(STEPS):
                call(step)
            found[name].append((time.perf_counter() - started) / STEPS * 1e6)
    return {"work": shape.name} | {
        name: statistics.median(values[1:]) for name, values in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="")
    only = parser.parse_args().only
    for shape in SHAPES:
        if only in shape.name:
            print(json.dumps(measure(shape)))


if __name__ == "__main__":
    main()
