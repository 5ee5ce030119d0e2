"""Sweeps: many runs from one line, in one folder, with a leaderboard.

    job          its folder, how it is run, how its failure is recorded
    pool         one job after the other here, or several at once in worker processes
    group        which jobs are trained as one stack, unless sweep.fused=false
    fused        such a stack
    worker       such a process
    search       Optuna in place of a list of jobs
    space        what it may choose from
    study        what Optuna knows of it
    board        what a person sees meanwhile
    leaderboard  what came of it, made of what lies in the folder
    display      the same as people read it

A failed job never stops the rest. Randomness is counted and every job builds all that it uses, so a
job of a sweep gives the same numbers as the same run alone with as many threads; one of a stack
gives them but for rounding, since sums are taken in another order.
"""

from __future__ import annotations

import shlex
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mnist_cli import durable
from mnist_cli.config import EvalConfig, SweepConfig, TrainConfig
from mnist_cli.console import Console
from mnist_cli.errors import Interrupted, MnistCliError, SweepError
from mnist_cli.run import RunFolder
from mnist_cli.signals import SignalWatch
from mnist_cli.sweep import display, group, leaderboard, pool, study
from mnist_cli.sweep import search as searching
from mnist_cli.sweep.board import Board
from mnist_cli.sweep.job import (
    Document,
    Job,
    difference,
    failure,
    folder_of,
    has_failed,
    placed,
    record,
    refuse_same_files,
    result_of,
    run_job,
    shared_words,
)
from mnist_cli.sweep.search import Search
from mnist_cli.sweep.space import Space

DrawSweep = Callable[[Any, Path, Console], None]  # of the configuration of a job, and the folder

__all__ = [
    "Job",
    "difference",
    "each",
    "finish",
    "finish_each",
    "folder_of",
    "outcome_of",
    "record_cut_off",
    "refuse_same_files",
    "run",
    "run_launched",
    "run_search",
    "shared_words",
]


def run(
    jobs: Sequence[Job],
    settings: SweepConfig,
    console: Console,
    draw: Callable[[Job, Document, Console], None],
    draw_sweep: DrawSweep,
) -> int:
    """Run every job of a sweep of `train`, whatever happens to the others.

    Args:
        draw: called for each job in the end, to draw its report where that is wanted.
        draw_sweep: called at the very end, to draw that of the sweep where that is wanted.

    Returns:
        The exit code: 0, 1 where jobs failed, 130 or 143 where a signal ended it.

    Raises:
        UsageError: the folder doesn't fit; nothing was written.
        LockedError: another process runs the sweep.
    """
    group.check(_configs(jobs), settings)
    folder = folder_of(jobs, settings)
    assert folder is not None
    with durable.locked(folder):
        labels: dict[str, tuple[Job, str]] = {}
        shared = shared_words(jobs)
        for job in jobs:
            label = difference(job, shared)
            there = placed(job, folder, label)
            labels.setdefault(_out(there), (there, label))
        with console.live_table() as live:
            board = Board(console, live, len(labels))
            grid = Grid([job for job, _ in labels.values()], settings, board)
            for reason, count in grid.alone().items():
                console.say(f"alone    {count} of {len(labels)} jobs: {reason} can't be stacked")
            for number, (job, label) in enumerate(labels.values(), 1):
                board.add(job, label or "as it stands", number)
            stopped_by = pool.run(grid, settings.jobs)
        documents = [grid.documents[out] for out in labels if out in grid.documents]
        if stopped_by is None:
            for out, (job, _) in labels.items():
                if out in grid.documents:
                    draw(job, grid.documents[out], console)
        started = {result.parent for result in folder.glob("*/result.json")}
        waiting = [job for out, (job, _) in labels.items() if Path(out) not in started]
        code = finish(console, folder, documents, len(labels), stopped_by, waiting=waiting)
        if stopped_by is None:
            draw_sweep(jobs[0].config, folder, console)
        return code


def run_search(
    space: Space,
    first: Job,
    make_job: Callable[[Sequence[str]], Job],
    settings: SweepConfig,
    console: Console,
    draw: Callable[[Job, Document, Console], None],
    draw_sweep: DrawSweep,
) -> int:
    """Let Optuna choose the jobs, out of `space`; see `search.py`.

    Args:
        first: a job like those that will be made.
        make_job: composes and checks the job of the overrides that were chosen.
        draw, draw_sweep: as in `run`.

    Returns:
        The exit code, as `run` does.

    Raises:
        UsageError: nothing was written.
    """
    assert isinstance(first.config, TrainConfig)
    objectives = searching.check(settings, space, first.config)
    folder = folder_of([first], settings)
    assert folder is not None
    with durable.SharedFolder(folder) as shared:
        with shared.door():
            plan = Search(shared, space, make_job, settings, objectives, first.config)
        with console.live_table() as live:
            plan.board = Board(console, live, settings.trials, plan.study.num_done)
            stopped_by = pool.run(plan, settings.jobs)
        if stopped_by is None:
            for document in plan.documents:
                draw(first, document, console)
        with shared.door():  # the last of several that end writes what all have left
            documents, summary = plan.documents, plan.study.summary()
            code = finish(
                console, folder, documents, plan.study.num_own, stopped_by, of_search=summary
            )
            if stopped_by is None:
                draw_sweep(first.config, folder, console)
            return code


class Grid:
    """The plan of a sweep whose jobs are known: stack after stack, what is done left out."""

    asks = False

    def __init__(self, jobs: Sequence[Job], settings: SweepConfig, board: Board) -> None:
        self._settings, self._board = settings, board
        configs = _configs(jobs)
        self._groups = group.planned(configs, settings)
        self._left = [[jobs[place] for place in each.members] for each in reversed(self._groups)]
        self.names_gpu = any(config.device.startswith("cuda:") for config in configs)
        self.documents: dict[str, Document] = {}

    def alone(self) -> Counter[str]:
        """With sweep.fused=true: how many jobs train alone nevertheless, by reason."""
        if self._settings.fused != "true":
            return Counter()
        return Counter(each.alone_because for each in self._groups if each.alone_because)

    def next_jobs(self) -> Sequence[Job]:
        while self._left:
            jobs = []
            for job in self._left.pop():
                done = result_of(job)
                if done is None:
                    jobs.append(job)
                else:
                    self.documents[_out(job)] = done
                    self._board.skipped(job, done)
            if jobs:
                self._board.started(jobs)
                return jobs
        return []

    def should_stop(self, job: Job, epoch: int, value: float | None) -> bool:
        self._board.epoch(job, epoch, value)
        return False

    def ended(self, job: Job, document: Document) -> None:
        self.documents[_out(job)] = document
        self._board.ended(job, document)
        if self._settings.fail_fast and has_failed(document):
            self._left.clear()

    def tick(self) -> None:
        self._board.draw()


def run_launched(
    job: Job, folder: Path, label: str, number: int, num_jobs: int, console: Console
) -> Document:
    """Run a job that a launcher of Hydra has brought into this process.

    Raises:
        Interrupted: by a signal, after a checkpoint was written.
    """
    job = placed(job, folder, label)
    board = Board(console, None, num_jobs)
    board.add(job, label or "as it stands", number)
    done = result_of(job)
    if done is not None:
        board.skipped(job, done)
        return done
    board.started([job])
    with SignalWatch() as signals:
        document = run_job(job, Console(quiet=True), signals)
        board.ended(job, document)
        with signals.at_once():  # one that came while the job ended
            return document


def record_cut_off(jobs: Sequence[Job], folder: Path, error: str) -> None:
    """Leave `error` with the jobs that ended without a word, as after a SIGKILL."""
    for job in jobs:
        there = placed(job, folder, "").config
        assert isinstance(there, TrainConfig) and there.out is not None
        if Path(there.out).is_dir():
            result = RunFolder(Path(there.out)).read_result() or {}
            if result.get("status") != "completed" and result.get("error") is None:
                # But not where it still runs: that folder is locked.
                record(there, error, f"error: {error}\n")


def _configs(jobs: Sequence[Job]) -> list[TrainConfig]:
    return [job.config for job in jobs if isinstance(job.config, TrainConfig)]


def _out(job: Job) -> str:
    assert isinstance(job.config, TrainConfig)
    return str(job.config.out)


def finish(
    console: Console,
    folder: Path,
    documents: Sequence[Document] | None,
    num_jobs: int | None = None,
    stopped_by: int | None = None,
    *,
    of_search: dict[str, Any] | None = None,
    waiting: Sequence[Job] = (),
) -> int:
    """Write and show the leaderboard of all that lies in `folder`, and return the exit code.

    Args:
        documents: of the jobs of this command; None where they ran elsewhere: all in the folder.
        num_jobs: how many were asked for, None for as many as there are documents.
        stopped_by: the number of the signal that ended the sweep early.
        of_search: what a search adds to leaderboard.json.
        waiting: jobs that were not started: there is no result of theirs in `folder`.
    """
    failed, document = _leaderboard(console, folder, documents, of_search, waiting)
    num_jobs = len(document["jobs"]) if num_jobs is None else num_jobs
    if stopped_by is not None:
        left = num_jobs - len(document["jobs"]) + len(failed)
        message = f"interrupted with {left} of {num_jobs} jobs left; what is done is in {folder}"
        error = Interrupted(stopped_by, message, f"{_again(folder)} to go on")
        return _fail(console, error, document)
    if failed:
        message = f"{len(failed)} of {num_jobs} jobs failed in {folder}"
        return _fail(console, SweepError(message, _again(folder)), document)
    console.document(document)
    return 0


def give_up(
    console: Console, folder: Path, documents: Sequence[Document] | None, reason: str
) -> int:
    """As `finish`, where a launcher of Hydra didn't see all jobs to their end."""
    _, document = _leaderboard(console, folder, documents)
    hint = f"see that none of its jobs is left, then {_again(folder)}"
    return _fail(console, SweepError(reason, hint), document)


def _leaderboard(
    console: Console,
    folder: Path,
    documents: Sequence[Document] | None,
    of_search: dict[str, Any] | None = None,
    waiting: Sequence[Job] = (),
) -> tuple[list[Document], dict[str, Any]]:
    """Write and show it; the documents of the jobs that failed, and that of the sweep."""
    if documents is None:
        documents = leaderboard.results_in(folder)
    failed = [document for document in documents if has_failed(document)]
    failures = {Path(d["run_dir"] or "").name: d["error"] for d in failed if "exit_code" in d}
    board = leaderboard.build(folder, failures, _configs(waiting)) | (of_search or {})
    leaderboard.write(folder, board)
    display.show(board, console)
    nowhere = Counter(document["error"] for document in failed if document["run_dir"] is None)
    for error, count in nowhere.items():
        console.say(f"failed   {count} without a folder: {error}")
    if of_search is not None:
        study.show(board, console.say)
    console.say(f"sweep    {folder}")
    return failed, {
        "sweep_dir": str(folder),
        "jobs": [_with_result(document) for document in documents],
        "leaderboard": board["rows"],
        "winner": board["winner"],
    }


def _again(folder: Path) -> str:
    return f"type the command again with {shlex.quote(f'sweep.resume={folder}')}"


def _fail(console: Console, error: Interrupted | SweepError, document: dict[str, Any]) -> int:
    console.error(error.message, error.hint, error.exit_code, document)
    return error.exit_code


def _with_result(document: Document) -> Document:
    """`document`, and of a failure what its run left in result.json."""
    if "exit_code" not in document or document["run_dir"] is None:
        return document
    return (RunFolder(Path(document["run_dir"])).read_result() or {}) | document


def each(jobs: Sequence[Job], console: Console, command: Callable[[Job, Console], Any]) -> int:
    """Run every job of a command that writes no run folder, as `eval`, and return the exit code.

    Raises:
        UsageError: two jobs would write the same file; none was run.
    """
    refuse_same_files(jobs)
    is_eval = isinstance(jobs[0].config, EvalConfig)  # whose first line says what counts
    inner = Console(quiet=console.quiet, as_json=console.as_json, brief=is_eval)
    documents, shared = [], shared_words(jobs)
    for number, job in enumerate(jobs, 1):
        console.say(f"job {number}/{len(jobs)}  {difference(job, shared) or 'as it stands'}")
        documents.append(outcome_of(job, partial(command, job, inner), console))
    return finish_each(console, documents)


def finish_each(console: Console, documents: Sequence[Document]) -> int:
    """The end of a sweep that has no folder."""
    document: dict[str, Any] = {"sweep_dir": None, "jobs": list(documents)}
    failed = [document for document in documents if "exit_code" in document]
    if not failed:
        console.document(document)
        return 0
    message = f"{len(failed)} of {len(documents)} jobs failed"
    return _fail(console, SweepError(message, "run the first of them alone to see more"), document)


def outcome_of(job: Job, call: Callable[[], Any], console: Console) -> Document:
    """The document of a job, or one of its failure: a failed job never stops the rest.

    A list, as `predict` gives it, comes under the key `answers`.
    """
    try:
        document = call()
        return {"answers": document} if isinstance(document, list) else document
    except Exception as error:
        document = failure(error, job)
        console.say(f"failed: {document['error']}")
        if not isinstance(error, MnistCliError):
            traceback.print_exc()
        return document
