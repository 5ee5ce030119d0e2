"""What learns: a model with its data, its loss, its optimizer and how far it has come."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mnist_cli import optim, runtime
from mnist_cli.checkpoint import Checkpoint, Progress
from mnist_cli.config import TrainConfig
from mnist_cli.dataset import Dataset, Normalise
from mnist_cli.loss import Loss

REPLAYED_STEPS = 50  # at most, between two looks at losses, signals and the clock

Replay = Callable[[Sequence[Tensor], int], list[float]]


@dataclass
class Learner:
    """A model with its data, its loss, its optimizer, and how far it has come.

    Attributes:
        forward: the model, compiled where that was asked for.
        backprop: computes the loss of (inputs, targets) and leaves its gradients in the parameters;
            None where autograd does.
        replay: takes steps as `take_steps` does, out of a CUDA graph; None where there is none.
    """

    config: TrainConfig
    device: torch.device
    data: Dataset
    normalise: Normalise
    model: nn.Module
    forward: nn.Module
    loss: Loss
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    progress: Progress
    times: dict[str, float]
    backprop: Callable[[Tensor, Tensor], Tensor] | None = None
    replay: Replay | None = None

    @functools.cached_property
    def parameters(self) -> list[nn.Parameter]:
        """Those of the model: to find them takes longer than to do something to each."""
        return list(self.model.parameters())

    @functools.cached_property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.data.train) / (self.config.batch_size * self.config.grad_accum))

    def checkpoint(self) -> Checkpoint:
        return Checkpoint(
            config=self.config,
            spec=self.data.spec,
            progress=self.progress,
            host=runtime.Host.of(self.device),
            model=self.model.state_dict(),
            optim=optim.state_tensors(self.optimizer, self.model),
        )
