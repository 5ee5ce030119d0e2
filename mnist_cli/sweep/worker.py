"""A worker of a sweep: a process that loads torch once and takes job after job.

One JSON document a line, in both directions:

    in   {"jobs": [{"words": [...], "config": {...}}, ...], "asks": bool}
                                            a job, or several to be trained as one stack
         {"stop": bool}                     the answer to an epoch, where `asks`
    out  {"job": N, "epoch": N, "value": V}  an epoch of the N-th job is over and saved
         {"job": N, "ended": {...}}          its result, or its failure

When the input ends, which it also does when the sweep is killed, the job is saved and the worker
ends. SIGTERM and SIGINT do the same.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import sys
import threading
from typing import Any

from mnist_cli import plugin
from mnist_cli.config import train_config
from mnist_cli.errors import Interrupted
from mnist_cli.imports import importing
from mnist_cli.signals import STOP_SIGNALS, SignalWatch
from mnist_cli.sweep.job import Document, TrainJob, run_jobs


def main() -> int:
    with SignalWatch() as signals:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)  # whatever prints must not get between the lines
        lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=_read, args=(lines, signals), daemon=True).start()
        try:
            return _work(lines, out, signals)
        except Interrupted as error:  # by a second signal
            return error.exit_code


def _read(lines: queue.SimpleQueue[bytes], signals: SignalWatch) -> None:
    """Hand on what comes in. The end of it, an empty line, also ends the job that is running.

    Python's own stdin would be locked by this thread when the process ends.
    """
    rest = b""
    while chunk := os.read(0, 2**16):
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            lines.put(line)
    signals.ask(signal.SIGTERM)
    lines.put(b"")


def _work(lines: queue.SimpleQueue[bytes], out: Any, signals: SignalWatch) -> int:
    with importing():
        import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    try:
        while not signals.received and (line := lines.get()):
            _train(json.loads(line), lines, out, signals)
    except Interrupted as error:
        return error.exit_code
    return 0


def _train(
    order: dict[str, Any], lines: queue.SimpleQueue[bytes], out: Any, signals: SignalWatch
) -> None:
    """Train the jobs of an order, as a stack if they are several. Raises Interrupted."""
    jobs = []
    for each in order["jobs"]:
        plugin.use(each["config"]["plugin"])  # they were typed for the sweep
        jobs.append(TrainJob(tuple(each["words"]), train_config(each["config"])))

    def should_stop(job: TrainJob, epoch: int, value: float | None) -> bool:
        _write(out, {"job": jobs.index(job), "epoch": epoch, "value": value})
        answer = lines.get() if order["asks"] else b""
        return bool(answer and json.loads(answer)["stop"])

    def ended(job: TrainJob, document: Document) -> None:
        _write(out, {"job": jobs.index(job), "ended": document})

    run_jobs(jobs, signals, should_stop, ended)


def _write(out: Any, message: dict[str, Any]) -> None:
    with contextlib.suppress(BrokenPipeError):  # the sweep is gone: the input ends as well
        out.write(json.dumps(message, allow_nan=False) + "\n")
        out.flush()


if __name__ == "__main__":
    sys.exit(main())
