"""A job of a sweep: its place in the folder of the sweep, and how it is run and recorded.

The folder of a job ends in the hash of its configuration. So the same job is found again when a
sweep goes on, whatever else the sweep tries by then.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from mnist_cli import __version__, durable
from mnist_cli import run as runs
from mnist_cli.config import Config, SweepConfig, TrainConfig, config_hash
from mnist_cli.console import Console
from mnist_cli.errors import (
    Interrupted,
    LockedError,
    MnistCliError,
    PrunedError,
    UsageError,
    one_line,
)
from mnist_cli.imports import importing
from mnist_cli.run import RunFolder
from mnist_cli.signals import SignalWatch
from mnist_cli.sweep import leaderboard

SWEEPS = "outputs/sweep"
JOURNAL = "search.journal"  # of a search, in the folder of its sweep
Document = dict[str, Any]


ConfigT = TypeVar("ConfigT", bound=Config)


class Job(NamedTuple, Generic[ConfigT]):
    """One job: the overrides that make it, and the configuration that came of them."""

    words: tuple[str, ...]
    config: ConfigT

    @property
    def typed(self) -> list[str]:
        """The keys that the user named."""
        return [word.lstrip("+~").partition("=")[0] for word in self.words]


TrainJob = Job[TrainConfig]


def folder_of(jobs: Sequence[TrainJob], settings: SweepConfig) -> Path:
    """The folder of a sweep, made if need be.

    Raises:
        UsageError: two folders are named, or one that doesn't fit; nothing was written.
    """
    if jobs[0].config.resume is not None:
        raise UsageError(
            "resume= names one run, -m asks for many", "type sweep.resume=DIR to go on with a sweep"
        )
    names = {job.config.out for job in jobs}
    if len(names) > 1:
        raise UsageError("out= names one folder for the whole sweep", "type out=DIR once")
    out = names.pop()
    if settings.resume is not None:
        if out is not None:
            raise UsageError(
                f"sweep.resume={settings.resume} and out={out} name two folders",
                "drop out=: a sweep goes on in its own folder",
            )
        folder = Path(os.path.expanduser(settings.resume))
        if not folder.is_dir() or runs.holds_run(folder):
            what = "the folder of one run" if folder.is_dir() else "not a folder"
            raise UsageError(
                f"sweep.resume={folder} is {what}",
                "name the folder of a sweep: sweep.resume=outputs/sweep/SWEEP",
            )
        if settings.search == "grid" and (folder / JOURNAL).exists():
            raise UsageError(
                f"sweep.resume={folder} is the folder of a search",
                "add sweep.search=optuna to go on with it, or name another folder: out=DIR",
            )
        if not any(job.words for job in jobs) and not any(folder.glob(f"*{_ending(jobs[0])}")):
            raise UsageError(
                f"sweep.resume={folder} alone would train the defaults there",
                "type the words of the sweep again, with sweep.resume=DIR in place of out=",
            )
        return folder
    if out is None:
        return runs.unique_folder(Path(SWEEPS))
    folder = Path(os.path.expanduser(out))
    with durable.writing(folder):
        is_file = folder.is_file()
    if is_file:
        raise UsageError(f"out={folder} is a file", "name a folder: out=DIR")
    if runs.holds_run(folder) or any(runs.holds_run(job) for job in folder.glob("*-*/")):
        raise UsageError(
            f"out={folder} holds runs already",
            f"type sweep.resume={folder} to go on with a sweep, or name another folder",
        )
    durable.make_folder(folder)
    return folder


def shared_words(jobs: Sequence[Job[Any]]) -> frozenset[str]:
    """The overrides that all jobs share; of a single job all."""
    return frozenset.intersection(*(frozenset(job.words) for job in jobs))


def difference(job: Job[Any], shared: frozenset[str]) -> str:
    """What tells `job` from the others: its overrides without the `shared` ones."""
    return " ".join(word for word in job.words if word not in shared)


def placed(job: TrainJob, folder: Path, label: str) -> TrainJob:
    """`job` with a run folder of its own: its `label`, as far as it goes, and a hash of everything.

    A folder of the same hash is continued, as `resume=auto` does.
    """
    slug = re.sub(r"[^A-Za-z0-9.=_+-]+", "_", label.replace(" ", ","))[:60]
    path = folder / f"{slug.strip('_.') or 'job'}{_ending(job)}"
    if not path.exists():  # the words may be others than they were; the hash knows no device
        found = sorted(folder.glob(f"*{_ending(job)}"))
        path = next((p for p in found if _device_of(p) == job.config.device), path)
    resume = "auto" if path.exists() else None
    return Job(job.words, dataclasses.replace(job.config, out=str(path), resume=resume))


def place_of(job: TrainJob) -> str:
    """The folder of a job that is `placed`: no other has it."""
    return str(job.config.out)


def _ending(job: TrainJob) -> str:
    return f"-{config_hash(job.config)[:8]}"


def _device_of(folder: Path) -> str | None:
    """`device` of the run in `folder`."""
    return leaderboard.command_in(folder).get("device")


def result_of(job: TrainJob, with_pruned: bool = False) -> Document | None:
    """result.json of a job that is done, or was given up; None if it has still to run."""
    result = RunFolder(Path(place_of(job))).read_result()
    if result is None or result["config_hash"] != config_hash(job.config):
        return None
    done = ("completed", "pruned") if with_pruned else ("completed",)
    return result if leaderboard.state_of(result) in done else None


def run_job(
    job: TrainJob,
    console: Console,
    signals: SignalWatch,
    should_stop: Callable[[int, float | None], bool] | None = None,
) -> Document:
    """Train, whatever happens: result.json, or the document of a failure. torch is imported here.

    Raises:
        Interrupted: by a signal, after a checkpoint was written.
    """
    with importing():
        from mnist_cli import train

    config, started_s = job.config, time.monotonic()
    watch = {} if should_stop is None else {"should_stop": should_stop}
    try:
        return train.run(config, console, job.typed, started_s, signals=signals, **watch)
    except Exception as error:
        return failed(error, job)


def run_jobs(
    jobs: Sequence[TrainJob],
    signals: SignalWatch,
    on_epoch: Callable[[TrainJob, int, float | None], bool],
    on_end: Callable[[TrainJob, Document], None],
) -> None:
    """Train one job, or several as one stack.

    Args:
        signals: the watch of a process that runs job after job.
        on_epoch: `should_stop` of each job; a stack tells it, and goes on.
        on_end: told each job's result, or its failure.

    Raises:
        Interrupted: by a signal, after checkpoints were written and `on_end` was told.
    """
    if len(jobs) > 1:
        with importing():
            from mnist_cli.sweep import fused

        return fused.run(jobs, signals, on_epoch, on_end)
    [job] = jobs
    try:
        on_end(job, run_job(job, Console(quiet=True), signals, partial(on_epoch, job)))
    except Interrupted as error:
        on_end(job, failure(error, job))
        raise


def failed(error: Exception, job: TrainJob) -> Document:
    """The document of a job that `error` has ended, which is recorded in its folder."""
    config, document = job.config, failure(error, job)
    if isinstance(error, PrunedError):
        return RunFolder(Path(config.out or "")).read_result() or document
    if document["exit_code"] != LockedError.exit_code:  # else the folder is somebody else's
        record(config, document["error"], "".join(traceback.format_exception(error)))
    return document


def failure(error: BaseException, job: Job[Any] | None) -> Document:
    """The document of a job that failed, or that a signal stopped; None for one without a place."""
    where = {"run_dir": None if job is None else job.config.out}
    if isinstance(error, MnistCliError | Interrupted):
        document = getattr(error, "document", None)
        answers = {} if document is None else {"answers": document}
        return where | answers | {
            "error": error.message, "hint": error.hint, "exit_code": error.exit_code,
        }  # fmt: skip
    message = f"{type(error).__name__}: {one_line(str(error))}"
    return where | {"error": message, "hint": "this is a fault of mnist-cli", "exit_code": 1}


def has_failed(document: Document) -> bool:
    """Whether a job counts as failed; one that a search gave up does not."""
    return "exit_code" in document or (
        "status" in document and leaderboard.state_of(document) not in ("completed", "pruned")
    )


def record(config: TrainConfig, message: str, details: str) -> None:
    """Leave a failure in the folder of the job, where the run itself could not.

    The result of a run that was completed stands: nothing of it is lost.

    Args:
        details: a traceback, or what else there is to say, for train.log.
    """
    path = Path(config.out or "")
    with contextlib.suppress(MnistCliError, OSError):
        path.mkdir(parents=True, exist_ok=True)
        with runs.reopen(path) as folder:
            before = folder.read_result()
            if before is None:
                folder.write_config(config)
            if before is None or (
                before["status"] != "completed" and before.get("error") != message
            ):
                folder.write_result((before or _nothing(config)) | {
                    "status": "failed", "error": message,
                })  # fmt: skip
            with open(path / "train.log", "a", encoding="utf-8") as log:
                log.write(details)


def _nothing(config: TrainConfig) -> Document:
    """result.json of a run that never began."""
    return {
        "schema": runs.SCHEMA,
        "command": "train",
        "config_hash": config_hash(config),
        "seed": config.seed,
        "device": config.device,
        "run_dir": config.out,
        "versions": {"mnist_cli": __version__, "torch": None, "python": None},
        "dataset": {"name": config.dataset.name},
        "model": {"name": config.model.name},
        "best": None,
        "val": None,
        "test": None,
        "time": None,
        "samples_per_s": None,
    }
