"""Jobs of a sweep trained as one stack, each with its own run folder, as if it had been alone.

Times in a job's records are its share: those of all jobs of a stack add up to what has passed. Only
`total_s` is what has passed from the job's start to its end.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch

from mnist_cli import dataset, loop, outcome, stacked, train
from mnist_cli.console import Console
from mnist_cli.dataset import Dataset
from mnist_cli.errors import Interrupted, ResourceError, is_out_of_memory
from mnist_cli.options import DatasetConfig
from mnist_cli.outcome import Run
from mnist_cli.signals import SignalWatch
from mnist_cli.sweep.job import Document, TrainJob, failed, failure

MAX_DATA_BYTES = 2**30  # of the data of a stack, which has a copy for each seed

OnEpoch = Callable[[TrainJob, int, float | None], object]
OnEnd = Callable[[TrainJob, Document], None]


def run(jobs: Sequence[TrainJob], signals: SignalWatch, on_epoch: OnEpoch, on_end: OnEnd) -> None:
    """Train jobs of one group together, whatever happens to some of them.

    Jobs that were cut off at different steps, and those whose data together would take too much
    memory, are trained in several stacks, one after the other.

    Args:
        signals: the watch of a process that runs job after job.
        on_epoch: told the number and the monitored value of each job's epoch, when all is saved.
        on_end: told the result of each job, or its failure.

    Raises:
        Interrupted: by a signal, after checkpoints were written.
    """
    left = sorted(jobs, key=_seed)
    while left:
        with contextlib.ExitStack() as held:
            members = sorted(_open(left, held, signals, on_end), key=_step)
            for _, alike in itertools.groupby(members, _step):
                _Stack(list(alike), signals, on_epoch, on_end).train()


@dataclass(frozen=True, eq=False)
class _Member:
    """A job of the sweep, its run, and what holds the run's folder."""

    job: TrainJob
    run: Run
    held: contextlib.ExitStack


def _seed(job: TrainJob) -> int:
    return job.config.seed


def _step(member: _Member) -> int:
    return member.run.learner.progress.step


def _open(
    left: list[TrainJob], held: contextlib.ExitStack, signals: SignalWatch, on_end: OnEnd
) -> list[_Member]:
    """Take from `left` what goes into memory, and hold its run folders.

    Raises:
        Interrupted: by a signal; nothing was trained that isn't saved.
    """
    official = functools.cache(dataset.official)

    @functools.cache
    def load(config: DatasetConfig, seed: int, device: torch.device) -> Dataset:
        return dataset.hold_back(official(config), config, seed).to(device)

    members: list[_Member] = []
    while left:
        if members:
            data, last = members[-1].run.learner.data, members[-1].run.learner.config
            splits = (data.train, data.val, data.test)
            num_bytes = sum(split.inputs.nbytes + split.targets.nbytes for split in splits)
            num_loaded = load.cache_info().currsize
            if _seed(left[0]) != last.seed and (num_loaded + 1) * num_bytes > MAX_DATA_BYTES:
                break
        job, console = left.pop(0), Console(quiet=True)
        try:
            opening = train.opened(job.config, console, job.typed, time.monotonic(), load)
            own = held.enter_context(contextlib.ExitStack())
            with signals.at_once():
                found = own.enter_context(opening)
        except Exception as error:
            on_end(job, failed(error, job))
            continue
        except Interrupted as error:
            for each in (*(member.job for member in members), job, *left):
                on_end(each, failure(error, each))
            raise
        if isinstance(found, Run):
            members.append(_Member(job, found, own))
        else:
            on_end(job, found)
    official.cache_clear()
    for name in ("startup_s", "data_s"):
        shared_s = sum(member.run.learner.times[name] for member in members)
        for member in members:
            member.run.learner.times[name] = shared_s / len(members)
    return members


class _Stack:
    """Jobs that are at the same step."""

    def __init__(
        self, members: list[_Member], signals: SignalWatch, on_epoch: OnEpoch, on_end: OnEnd
    ) -> None:
        self._left = members
        self._signals, self._on_epoch, self._on_end = signals, on_epoch, on_end

    def train(self) -> None:
        """Train all to their ends. Raises Interrupted by a signal, when all is saved."""
        num_jobs = len(self._left)
        for member in list(self._left):
            with self._ended_by_failure(member), outcome.recorded(member.run):
                outcome.begin(member.run)
                member.run.console.detail(
                    f"fused    one of {num_jobs} jobs that are trained as one stack: as alone but"
                    " for rounding"
                )
        self._conclude()
        try:
            for trained in stacked.rounds([m.run.learner for m in self._left], self._signals):
                self._keep(trained)
                self._conclude()
                if self._signals.received:
                    break
        except Exception as error:
            self._fail(error)
        if self._left:
            self._stop()

    def _keep(self, trained: Sequence[stacked.Member]) -> None:
        """Record and save what was trained, or what went wrong."""
        of = {id(member.run.learner): member for member in self._left}
        for each in trained:
            member, run = of[id(each.learner)], of[id(each.learner)].run
            with self._ended_by_failure(member), outcome.recorded(run):
                if each.error is not None:
                    raise each.error
                if not each.row:  # cut off in the middle of an epoch
                    loop.save(run.learner, run.folder.last)
                    continue
                loop.keep(run.learner, run.folder, each.row, run.console)
                value = each.row[run.learner.config.monitored]
                self._on_epoch(member.job, each.row["epoch"], value)
            each.is_over = member not in self._left

    def _conclude(self) -> None:
        """Test and record those that have no epoch left."""
        for member in [each for each in self._left if loop.is_over(each.run.learner)]:
            if self._signals.received:
                return
            result = None
            with self._ended_by_failure(member):
                try:
                    with outcome.recorded(member.run):
                        reason = loop.end(member.run.learner, member.run.folder)
                        result = outcome.conclude(member.run, self._signals).result
                except Interrupted:
                    return
                outcome.show(member.run, result, reason)
            if result is not None and member in self._left:
                self._end(member, result)

    @contextlib.contextmanager
    def _ended_by_failure(self, member: _Member) -> Iterator[None]:
        """A failure of the block ends `member`, and no other."""
        try:
            yield
        except Exception as error:
            member.held.close()
            self._end(member, failed(error, member.job))

    def _end(self, member: _Member, document: Document) -> None:
        member.held.close()
        self._left.remove(member)
        self._on_end(member.job, document)

    def _fail(self, error: Exception) -> None:
        """Record a failure of the stack, which is one of all its members."""
        if is_out_of_memory(error):
            message = f"out of memory with {len(self._left)} jobs in one stack"
            error = ResourceError(message, "type sweep.fused=false")
        for member in list(self._left):
            with self._ended_by_failure(member), outcome.recorded(member.run):
                raise error

    def _stop(self) -> NoReturn:
        """Record that a signal ended those that are left."""
        stopped = None
        for member in list(self._left):
            try:
                with outcome.recorded(member.run):
                    loop.stop_if_asked(self._signals, member.run.learner, member.run.folder)
            except Interrupted as error:
                self._end(member, failure(error, member.job))
                stopped = error
        assert stopped is not None
        raise stopped
