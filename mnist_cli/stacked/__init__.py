"""Many runs trained as one: what a step costs besides its arithmetic is paid once for all.

    stack      one step of all of them
    network    their forward pass
    loss       their losses
    optimizer  their optimizers

A member is an ordinary `Learner`: its parameters are views of the stacked ones while it trains
here, its optimizer's state is its own, and its randomness is counted as ever. So at the end of any
epoch it can be selected, saved and measured, or go on alone.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mnist_cli import loop, runtime, scoring
from mnist_cli.errors import DivergedError
from mnist_cli.learner import Learner
from mnist_cli.signals import SignalWatch
from mnist_cli.stacked.stack import Stack
from mnist_cli.train_step import check_weights, diverged

__all__ = ["Member", "rounds"]


@dataclass(eq=False)
class Member:
    """A learner in a stack.

    Attributes:
        learner: its progress is as it is to be saved.
        row: of metrics.csv, once an epoch is done. Its seconds are the member's share, so that
            those of all members sum up to the time that has passed.
        error: why it can't go on.
        is_over: to be set by the caller where it shall not go on, as after a failed `save`.
    """

    learner: Learner
    row: dict[str, Any] = dataclasses.field(default_factory=dict)
    error: DivergedError | None = None
    is_over: bool = False
    loss_sum: float = 0.0
    epoch_s: float = 0.0

    @property
    def is_done(self) -> bool:
        return self.is_over or self.error is not None or loop.is_over(self.learner)


def rounds(learners: Sequence[Learner], signals: SignalWatch) -> Iterator[list[Member]]:
    """Train learners of one group together, all from the same step on.

    Yields:
        After each epoch, the members that were in it: with a `row`, to be selected and saved by
        the caller, or with an `error`. After a signal in the middle of an epoch: the members
        without a row, to be saved. The generator ends after a signal.
    """
    members = [
        Member(learner, loss_sum=learner.progress.loss_sum, epoch_s=learner.progress.epoch_s)
        for learner in sorted(learners, key=lambda learner: learner.config.seed)
    ]
    while members := [member for member in members if not member.is_done]:
        for member in members:
            member.row = {}
        _train_epoch(members, signals)
        yield members
        if signals.received:
            return


def _train_epoch(members: Sequence[Member], signals: SignalWatch) -> None:
    """Train to the end of the epoch, or until a signal comes."""
    first = members[0].learner
    num_rows, batch_size = len(first.data.train), first.config.batch_size
    step, num_steps = first.progress.step, first.steps_per_epoch
    epoch, position = divmod(step, num_steps)
    orders = {
        seed: runtime.permutation(seed, epoch, num_rows).to(first.device)
        for seed in {member.learner.config.seed for member in members}
    }
    running, stack = members, Stack([member.learner for member in members])
    since_s = time.perf_counter()
    while running and position < num_steps:
        rows = slice(position * batch_size, min((position + 1) * batch_size, num_rows))
        losses = stack.compute_gradients(orders, rows, step)
        is_well = all(map(math.isfinite, losses))
        if not is_well:
            since_s = _share_time(running, since_s)
        for member, loss in zip(running, losses, strict=True):
            member.loss_sum += loss * (rows.stop - rows.start)
            if not math.isfinite(loss):
                member.error = _divergence(member.learner, loss, step)
        stack.take_step(step)
        step += 1
        position += 1
        if not is_well and (running := [member for member in running if member.error is None]):
            stack = Stack([member.learner for member in running])
        if signals.received:
            break
    _share_time(running, since_s)
    if running and position == num_steps:
        _end_epoch(running, step)
        return
    for member in running:
        member.learner.progress = dataclasses.replace(
            member.learner.progress, step=step, loss_sum=member.loss_sum, epoch_s=member.epoch_s
        )


def _share_time(members: Sequence[Member], since_s: float) -> float:
    """Give each its share of the time that has passed, and return the time."""
    now_s = time.perf_counter()
    for member in members:
        member.epoch_s += (now_s - since_s) / len(members)
    return now_s


def _divergence(learner: Learner, loss: float, step: int) -> DivergedError:
    """The error of a learner whose loss is not finite at `step`."""
    try:
        check_weights(learner, step - 1)
    except DivergedError as error:
        return error
    return diverged(learner, "loss", loss, step)


def _end_epoch(members: Sequence[Member], step: int) -> None:
    """Measure the members on their validation splits, and give them the rows of the epoch."""
    since_s, outputs = time.perf_counter(), _answers([member.learner for member in members])
    for member, own in zip(members, outputs, strict=True):
        learner, epoch_s = member.learner, member.epoch_s
        train_s = learner.progress.train_s + epoch_s
        learner.progress = dataclasses.replace(
            learner.progress, step=step, loss_sum=0.0, epoch_s=0.0, train_s=train_s
        )
        try:
            scores = loop.score(learner, own)
        except DivergedError as error:
            member.error = error
            continue
        member.row = loop.row_of(learner, member.loss_sum, epoch_s, scores)
        member.loss_sum = member.epoch_s = 0.0
    eval_s = (time.perf_counter() - since_s) / len(members)
    for member in members:
        member.learner.times["eval_s"] += eval_s


def _answers(learners: Sequence[Learner]) -> list[Tensor]:
    """Each learner's outputs on its validation split, (N, C); those of a seed share the inputs."""
    outputs: list[Tensor] = []
    for _, alike in itertools.groupby(learners, lambda learner: learner.config.seed):
        own = list(alike)
        models = [learner.model for learner in own]
        outputs += scoring.answers_of_all(models, own[0].data.spec, own[0].data.val)
    return outputs
