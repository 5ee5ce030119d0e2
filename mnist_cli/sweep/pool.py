"""Going through the jobs of a sweep: one after the other in this process, or in several at once.

A plan says what comes next and is told what happens. Either way of running asks it in the same
words, so that no result depends on how many jobs run at a time, or in which order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import json
import os
import re
import selectors
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from mnist_cli.config import to_plain
from mnist_cli.errors import Interrupted, SweepError
from mnist_cli.signals import STOP_SIGNALS, SignalWatch
from mnist_cli.sweep.job import Document, TrainJob, failure, record, run_jobs

TICK_S = 0.2  # how often the live table counts on


class Plan(Protocol):
    """What is to be run, and what is to be done about it."""

    asks: bool  # whether a job has to wait for the answer of `should_stop`
    names_gpu: bool  # whether jobs name a GPU, as device=cuda:1

    def next_jobs(self) -> Sequence[TrainJob]:
        """What to start now, several as one stack.

        Empty when there is nothing at the moment; for good, where no job is running.
        """

    def should_stop(self, job: TrainJob, epoch: int, value: float | None) -> bool:
        """An epoch is over, with this monitored value: whether the job is to be given up."""

    def ended(self, job: TrainJob, document: Document) -> None:
        """A job is over, with its result or its failure."""

    def tick(self) -> None:
        """Time has passed."""


def run(plan: Plan, num_jobs: int) -> int | None:
    """Run all of `plan`, `num_jobs` at a time; the number of the signal that ended it early."""
    return _run_here(plan) if num_jobs == 1 else _run_in_workers(plan, num_jobs)


def _run_here(plan: Plan) -> int | None:
    """One watch for all jobs: a signal while one ends is not lost on the next."""
    with SignalWatch() as signals:
        try:
            while True:
                with signals.at_once():
                    jobs = plan.next_jobs()
                if not jobs:
                    return None
                run_jobs(jobs, signals, plan.should_stop, plan.ended)
        except Interrupted as error:
            return error.exit_code - 128


# --- several at once -----------------------------------------------------------------------------


@dataclasses.dataclass
class Worker:
    """A process that takes jobs, its slot (0 .. num_jobs - 1), and what it is at.

    Attributes:
        jobs: what it was given last, several as one stack.
        left: the places in `jobs` of those that have not ended.
    """

    process: subprocess.Popen[bytes]
    slot: int
    jobs: Sequence[TrainJob] = ()
    left: set[int] = dataclasses.field(default_factory=set)
    rest: bytes = b""

    def send(self, message: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        if self.process.stdin.closed:  # it was let go, and ends of itself
            return
        with contextlib.suppress(BrokenPipeError):  # that it is dead shows at its other end
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()

    def messages(self) -> Iterator[dict[str, Any]]:
        """What has come in; raises EOFError when the process is gone."""
        assert self.process.stdout is not None
        chunk = os.read(self.process.stdout.fileno(), 2**16)
        *lines, self.rest = (self.rest + chunk).split(b"\n")
        yield from map(json.loads, lines)
        if not chunk:
            raise EOFError

    def let_go(self) -> None:
        """Close its input: it saves what it is at, and ends."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()

    def bury(self) -> int:
        """Wait for its end, and return how it ended."""
        assert self.process.stdout is not None
        self.let_go()
        self.process.stdout.close()
        return self.process.wait()


def _run_in_workers(plan: Plan, num_jobs: int) -> int | None:
    workers: list[Worker] = []
    with SignalWatch() as signals, selectors.DefaultSelector() as selector:
        try:
            _serve(plan, num_jobs, workers, selector, signals)
        finally:  # nothing is left but by an exception
            for worker in workers:
                worker.process.kill()
                worker.bury()
    return signals.received


def _serve(
    plan: Plan,
    num_jobs: int,
    workers: list[Worker],
    selector: selectors.BaseSelector,
    signals: SignalWatch,
) -> None:
    is_stopping = False
    while True:
        while not signals.received and len(workers) < num_jobs and (jobs := plan.next_jobs()):
            slot = min({*range(num_jobs)} - {worker.slot for worker in workers})
            gpus = [] if plan.names_gpu else _gpus()
            worker = Worker(_start(share_of(slot, num_jobs, gpus)), slot)
            workers.append(worker)
            selector.register(_stdout(worker), selectors.EVENT_READ, worker)
            _give(worker, jobs, plan)
        if signals.received and not is_stopping:
            is_stopping = True
            for worker in workers:
                worker.let_go()
        if not workers:
            return
        for key, _ in selector.select(TICK_S):
            worker = key.data
            try:
                for message in worker.messages():
                    _hear(worker, message, plan, signals)
            except EOFError:
                selector.unregister(_stdout(worker))
                workers.remove(worker)
                _note_end(worker, plan, signals)
        plan.tick()


def _stdout(worker: Worker) -> Any:
    return worker.process.stdout


def _give(worker: Worker, jobs: Sequence[TrainJob], plan: Plan) -> None:
    worker.jobs, worker.left = jobs, set(range(len(jobs)))
    listed = [{"words": job.words, "config": to_plain(job.config)} for job in jobs]
    worker.send({"jobs": listed, "asks": plan.asks})


def _hear(worker: Worker, message: dict[str, Any], plan: Plan, signals: SignalWatch) -> None:
    job = worker.jobs[message["job"]]
    if "ended" not in message:
        stop = plan.should_stop(job, message["epoch"], message["value"])
        if plan.asks:
            worker.send({"stop": stop})
        return
    worker.left.remove(message["job"])
    plan.ended(job, message["ended"])
    if worker.left:
        return
    following = () if signals.received else plan.next_jobs()
    if following:
        _give(worker, following, plan)
    else:
        worker.let_go()


def _note_end(worker: Worker, plan: Plan, signals: SignalWatch) -> None:
    """What is left to do for a process that has ended; the jobs that it was at have failed."""
    code = worker.bury()
    if not worker.left or (code >= 0 and signals.received):
        return
    how = f"exit code {code}" if code >= 0 else f"signal {-code} ({_name(-code)})"
    hint = "if memory ran out, type a smaller sweep.jobs= or batch_size="
    error = SweepError(f"the process of the job was ended by {how}", hint)
    for place in sorted(worker.left):
        job = worker.jobs[place]
        record(job.config, error.message, f"error: {error.message}\nhint: {error.hint}\n")
        plan.ended(job, failure(error, job))


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"


def _start(share: dict[str, str]) -> subprocess.Popen[bytes]:
    """A worker that finds the same modules as this process, with `share` of the machine."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # until it can note them
    try:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "mnist_cli.sweep.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **share},
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def share_of(slot: int, num_jobs: int, gpus: Sequence[str]) -> dict[str, str]:
    """The environment that gives the worker `slot` its share of cores and GPUs.

    Cores are divided, at least one for each; a smaller OMP_NUM_THREADS stands. GPUs are taken in
    turn, so that more jobs than GPUs share them evenly.
    """
    threads = max(1, _num_cores() // num_jobs)
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdecimal() and int(given) > 0:
        threads = min(threads, int(given))
    share = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    if len(gpus) > 1:
        share["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    return share


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _gpus() -> list[str]:
    """The GPUs that this process may use, without loading torch."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip()]
    found = [path for path in glob.glob("/dev/nvidia*") if re.fullmatch(r"/dev/nvidia\d+", path)]
    return [str(number) for number in range(len(found))]
