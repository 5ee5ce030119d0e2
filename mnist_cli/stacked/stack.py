"""One optimizer step of many learners."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mnist_cli import runtime, schedule
from mnist_cli.learner import Learner
from mnist_cli.model.linear import Linear
from mnist_cli.model.mlp import Mlp
from mnist_cli.options import ScheduleConfig
from mnist_cli.stacked.loss import build_losses
from mnist_cli.stacked.network import Network
from mnist_cli.stacked.optimizer import Optimizer

AHEAD = 500  # steps for which the optimizer's numbers are computed at once


class Stack:
    """Learners of one group, those of one seed side by side.

    Their parameters are views of the stack's from here on.
    """

    def __init__(self, learners: Sequence[Learner]) -> None:
        self.learners = learners
        first = learners[0]
        groups = itertools.groupby(learners, lambda learner: learner.config.seed)
        by_seed = [list(own) for _, own in groups]
        is_even = len({len(own) for own in by_seed}) == 1
        self._lanes = [own[0] for own in by_seed] if is_even else learners
        self._generators = [torch.Generator(first.device) for _ in self._lanes]
        models = [each.model for each in learners if isinstance(each.model, Linear | Mlp)]
        self._network = Network(models, len(self._lanes))
        self._parameters = [tensor for layer in self._network.layers for tensor in layer]
        losses = [learner.config.loss for learner in learners]
        self._losses = build_losses(losses, first.data.spec.task, first.device)
        clips = [learner.config.grad_clip or math.inf for learner in learners]
        self._clips = any(map(math.isfinite, clips))
        self._largest_norms = torch.tensor(clips, device=first.device)
        named = zip(*(model.parameters() for model in models), strict=True)
        self._optimizer = Optimizer(
            [learner.config.optim for learner in learners],
            [learner.optimizer for learner in learners],
            list(zip(self._parameters, named, strict=True)),
        )
        self._planned = range(0)

    def compute_gradients(
        self, orders: Mapping[int, Tensor], rows: slice, step: int
    ) -> list[float]:
        """Compute each learner's gradient of its mean loss, and return these losses.

        Args:
            orders: for each seed, the order of the epoch, (N,) int64.
            rows: which part of it is the batch of `step`.
        """
        first, num_lanes = self.learners[0], len(self._lanes)
        batch_size = rows.stop - rows.start
        inputs = first.data.train.inputs.new_empty(
            (num_lanes, batch_size, *first.data.spec.input_shape)
        )
        targets: list[Tensor] = []
        for lane, generator, place in zip(self._lanes, self._generators, inputs, strict=True):
            seed, train = lane.config.seed, lane.data.train
            indices = orders[seed][rows]
            # Not train.inputs[indices], which takes ten times as long for rows of bytes.
            torch.index_select(train.inputs, 0, indices, out=place)
            labels = train.targets.index_select(0, indices)
            targets += [labels] * (len(self.learners) // num_lanes)
            if self._network.drops:
                generator.manual_seed(runtime.counted_seed(seed, "step", step))
        normalised = first.normalise(inputs.flatten(0, 1)).view(num_lanes, batch_size, -1)
        outputs = self._network.forward(normalised, self._generators)
        losses = self._losses(outputs, torch.stack(targets))
        # No learner's loss depends on another's weights, so each gets its own gradient.
        for parameter in self._parameters:
            parameter.grad = None
        # Not losses.backward(torch.ones_like(losses)): that imports sympy, a third of a second.
        losses.sum().backward()
        if self._clips:
            self._clip()
        values: list[float] = losses.tolist()
        return values

    def take_step(self, step: int) -> None:
        """Take an optimizer step with the learning rate that each learner has at `step`."""
        if step not in self._planned:
            num_left = self.learners[0].steps_per_epoch - step % self.learners[0].steps_per_epoch
            self._planned = range(step, step + min(AHEAD, num_left))
            self._optimizer.plan(_learning_rates(self.learners, self._planned))
        self._optimizer.step()

    def _clip(self) -> None:
        """As torch.nn.utils.clip_grad_norm_, the norm being that of each learner's own gradient."""
        grads = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        norms = torch.stack([grad.flatten(1).norm(dim=1) for grad in grads]).norm(dim=0)  # (K,)
        shares = (self._largest_norms / (norms + 1e-6)).clamp(max=1.0)
        for grad in grads:
            grad.mul_(shares.view(-1, *(1 for _ in grad.shape[1:])))


def _learning_rates(learners: Sequence[Learner], steps: range) -> Tensor:
    """As `train_step.lr_of`: (steps, K) float64. Those of one schedule share the work."""
    factors: dict[tuple[ScheduleConfig, int], Tensor] = {}
    for learner in learners:
        config, per_epoch = learner.config, learner.steps_per_epoch
        if (config.schedule, config.epochs) not in factors:
            total = config.epochs * per_epoch
            own = [schedule.lr_factor(config.schedule, step, per_epoch, total) for step in steps]
            factors[config.schedule, config.epochs] = torch.tensor(own, dtype=torch.float64)
    configs = [learner.config for learner in learners]
    each = [config.optim.lr * factors[config.schedule, config.epochs] for config in configs]
    return torch.stack(each, dim=1)
