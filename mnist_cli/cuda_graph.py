"""A training step as a CUDA graph: recorded once, then replayed without Python.

A step of a small model is some thirty kernels, and Python takes longer to ask a GPU for one of them
than the GPU takes to run it. A graph asks for all at once. It has no arguments, so what changes
from step to step lies in tables on the device: the step finds its samples and its learning rate by
a counter, leaves its loss beside them, and advances the counter itself. Only the seed of dropout is
set from outside before each replay, as for any other step.

Source: PyTorch, "CUDA semantics", section "CUDA Graphs" (whole-network capture).
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from mnist_cli import runtime
from mnist_cli.console import Console
from mnist_cli.errors import UsageError, is_out_of_memory, one_line
from mnist_cli.learner import REPLAYED_STEPS, Learner
from mnist_cli.options import PluginLossConfig, PluginModelConfig
from mnist_cli.train_step import compute_gradients, diverged, lr_of, take_step, update_weights

# Steps taken one by one before the recording: in them the libraries set themselves up, and the
# optimizer makes its state.
WARM_UP_STEPS = 3
CAPTURABLE = ("sgd", "momentum", "adam", "adamw", "rmsprop", "adadelta")


@contextlib.contextmanager
def replaying(learner: Learner, console: Console) -> Iterator[None]:
    """Let `learner` replay its steps in the block, if cuda_graph=true asks for it and it can."""
    if learner.config.cuda_graph:
        reason = obstacle(learner)
        if reason is None:
            learner.replay = StepGraph(learner, CaptureStream(learner.device))
        else:
            console.warn(f"cuda_graph=true does nothing here: {reason}; steps are taken one by one")
    try:
        yield
    finally:
        learner.replay = None  # and with it the graph, which must not die while another is recorded


def obstacle(learner: Learner) -> str | None:
    """What keeps the steps of `learner` from being recorded, in words."""
    config = learner.config
    if learner.device.type != "cuda":
        return f"the device is {learner.device}"
    if config.optim.name not in CAPTURABLE:
        return f"optim={config.optim.name} needs the CPU in each step"
    if config.precision == "float16":
        return "precision=float16 looks at each gradient before it takes a step"
    if config.compile:
        return "compile=true makes steps of its own"
    for option in (config.model, config.loss):
        if isinstance(option, PluginModelConfig | PluginLossConfig):
            return f"{option.name} comes from a plugin, and may need the CPU in each step"
    return None


class Stream(Protocol):
    """Where steps are warmed up and recorded."""

    def run(self, step: Callable[[], None]) -> None:
        """Call `step` there."""

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        """Call `step` there, but only note what it asks for: the function that does all of it."""


class CaptureStream:
    """A CUDA stream beside that of all other work: libraries set themselves up for each stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def run(self, step: Callable[[], None]) -> None:
        others = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(others)
        with torch.cuda.stream(self._stream):
            step()
        others.wait_stream(self._stream)

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        gc.collect()  # the death of an older graph would spoil the recording
        try:
            with torch.cuda.device(self._device), torch.cuda.graph(graph, stream=self._stream):
                step()
        except RuntimeError as error:
            cause = error.__context__ or error  # what went wrong first, before the recording did
            if is_out_of_memory(cause):
                raise cause from None
            raise UsageError(
                f"cuda_graph=true fails here: {one_line(str(cause))}", "type cuda_graph=false"
            ) from error
        return graph.replay


class StepGraph:
    """The steps of a learner out of a graph: `Learner.replay`.

    All full steps are the same graph. What is left at the end of an epoch is another shape, and is
    taken as a step of its own.
    """

    def __init__(self, learner: Learner, stream: Stream) -> None:
        self._learner, self._stream = learner, stream
        self._batch_size = learner.config.batch_size * learner.config.grad_accum
        self._num_taken = 0
        self._replay: Callable[[], None] | None = None

        def table(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=learner.device)

        self._indices = table(REPLAYED_STEPS, self._batch_size, dtype=torch.int64)
        self._lrs = table(REPLAYED_STEPS)
        self._losses = table(REPLAYED_STEPS)
        self._row = table(1, dtype=torch.int64)  # of the tables, for the next step
        self._lr = table()
        self._make_capturable(learner.optimizer)

    def _make_capturable(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the optimizer read its learning rate and its counters on the device."""
        for group in optimizer.param_groups:
            group["lr"] = self._lr
            if "capturable" in group:
                group["capturable"] = self._lr.is_cuda
        for state in optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].to(self._lr.device)

    def __call__(self, batches: Sequence[Tensor], step: int) -> list[float]:
        """Take a step on each of at most REPLAYED_STEPS batches; their mean losses, before it.

        Raises:
            DivergedError: a loss is not finite. The steps after it were taken all the same.
        """
        full = [indices for indices in batches if len(indices) == self._batch_size]
        losses = self._take(full, step) if full else []
        for number, loss in enumerate(losses, step):
            if not math.isfinite(loss):
                raise diverged(self._learner, "loss", loss, number)
        rest = enumerate(batches[len(full) :], step + len(full))
        return losses + [take_step(self._learner, indices, number) for number, indices in rest]

    def _take(self, full: Sequence[Tensor], step: int) -> list[float]:
        learner, numbers = self._learner, range(step, step + len(full))
        self._indices[: len(full)] = torch.stack(list(full))
        self._lrs[: len(full)] = torch.tensor([lr_of(learner, number) for number in numbers])
        self._row.zero_()
        for number in numbers:
            seed = runtime.counted_seed(learner.config.seed, "step", number)
            runtime.reseed(learner.device, seed)
            self._advance()
        losses: list[float] = self._losses[: len(full)].tolist()  # waits for the device
        return losses

    def _advance(self) -> None:
        if self._replay is None and self._num_taken == WARM_UP_STEPS:
            self._replay = self._stream.record(self._step)
        if self._replay is not None:
            self._replay()
        else:
            self._stream.run(self._step)
            self._num_taken += 1

    def _step(self) -> None:
        """What is recorded: a step on the current row of the tables."""
        self._lr.copy_(self._lrs.index_select(0, self._row).squeeze(0))
        indices = self._indices.index_select(0, self._row).squeeze(0)
        parts = compute_gradients(self._learner, indices)
        self._losses.index_copy_(0, self._row, torch.stack(parts).detach().sum(0, keepdim=True))
        update_weights(self._learner)
        self._row.add_(1)
