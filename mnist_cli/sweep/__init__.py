"""Sweeps: many runs from one line, in one folder, with a leaderboard.

    job          its folder, how it is run, how its failure is recorded
    grid         which jobs come next, where all of them are known
    search       Optuna in place of a list of jobs
    space        what it may choose from
    study        what Optuna knows of it
    pool         one job after the other here, or several at once in worker processes
    worker       such a process
    group        which jobs are trained as one stack, unless sweep.fused=false
    fused        such a stack
    board        what a person sees meanwhile
    leaderboard  what came of it, made of what lies in the folder
    display      the same as people read it
    each         jobs of a command that has no such folder

A failed job never stops the rest. Randomness is counted and every job builds all that it uses, so a
job of a sweep gives the same numbers as the same run alone with as many threads; one of a stack
gives them but for rounding, since sums are taken in another order.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mnist_cli import durable
from mnist_cli.config import SweepConfig, TrainConfig
from mnist_cli.console import Console
from mnist_cli.errors import Interrupted, SweepError
from mnist_cli.run import RunFolder
from mnist_cli.signals import SignalWatch
from mnist_cli.sweep import display, group, leaderboard, pool, study
from mnist_cli.sweep import search as searching
from mnist_cli.sweep.board import Board
from mnist_cli.sweep.grid import Grid
from mnist_cli.sweep.job import (
    Document,
    TrainJob,
    difference,
    folder_of,
    has_failed,
    place_of,
    placed,
    record,
    result_of,
    run_job,
    shared_words,
)
from mnist_cli.sweep.search import Search
from mnist_cli.sweep.space import Space
from mnist_cli.sweep.study import Study

DrawSweep = Callable[[TrainConfig, Path, Console], None]  # of a job's configuration; the folder


def run(
    jobs: Sequence[TrainJob],
    settings: SweepConfig,
    console: Console,
    draw: Callable[[TrainJob, Document, Console], None],
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
    group.check([job.config for job in jobs], settings)
    folder = folder_of(jobs, settings)
    with durable.locked(folder):
        labels: dict[str, tuple[TrainJob, str]] = {}
        shared = shared_words(jobs)
        for job in jobs:
            label = difference(job, shared)
            there = placed(job, folder, label)
            labels.setdefault(place_of(there), (there, label))
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
    first: TrainJob,
    make_job: Callable[[Sequence[str]], TrainJob],
    settings: SweepConfig,
    console: Console,
    draw: Callable[[TrainJob, Document, Console], None],
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
    objectives = searching.check(settings, space, first.config, first.config)
    folder = folder_of([first], settings)
    with durable.SharedFolder(folder) as shared:
        with shared.door():
            fixed, seed = searching.fixed(first.config, space), first.config.seed
            known = Study(folder, space, settings, objectives, fixed, seed, shared.arrive())
        with console.live_table() as live:
            board = Board(console, live, settings.trials, known.num_done)
            names_gpu = first.config.device.startswith("cuda:")
            plan = Search(shared, known, board, space, make_job, settings, names_gpu)
            stopped_by = pool.run(plan, settings.jobs)
        if stopped_by is None:
            for document in plan.documents:
                draw(first, document, console)
        with shared.door():  # the last of several that end writes what all have left
            documents, summary = plan.documents, known.summary()
            code = finish(console, folder, documents, known.num_own, stopped_by, of_search=summary)
            if stopped_by is None:
                draw_sweep(first.config, folder, console)
            return code


def run_launched(
    job: TrainJob, folder: Path, label: str, number: int, num_jobs: int, console: Console
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


def record_cut_off(jobs: Sequence[TrainJob], folder: Path, error: str) -> None:
    """Leave `error` with the jobs that ended without a word, as after a SIGKILL."""
    for job in jobs:
        there = placed(job, folder, "")
        path = Path(place_of(there))
        if path.is_dir():
            result = RunFolder(path).read_result() or {}
            if result.get("status") != "completed" and result.get("error") is None:
                # But not where it still runs: that folder is locked.
                record(there.config, error, f"error: {error}\n")


def finish(
    console: Console,
    folder: Path,
    documents: Sequence[Document] | None,
    num_jobs: int | None = None,
    stopped_by: int | None = None,
    *,
    of_search: dict[str, Any] | None = None,
    waiting: Sequence[TrainJob] = (),
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
        logs = (Path(job["run_dir"], "train.log") for job in failed if job["run_dir"])
        log = next((path for path in logs if path.exists()), None)
        why = f"see {shlex.quote(str(log))} for why, then " if log else ""
        return _fail(console, SweepError(message, f"{why}{_again(folder)}"), document)
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
    waiting: Sequence[TrainJob] = (),
) -> tuple[list[Document], dict[str, Any]]:
    """Write and show it; the documents of the jobs that failed, and that of the sweep."""
    if documents is None:
        documents = leaderboard.results_in(folder)
    failed = [document for document in documents if has_failed(document)]
    failures = {Path(d["run_dir"] or "").name: d["error"] for d in failed if "exit_code" in d}
    board = leaderboard.build(folder, failures, [job.config for job in waiting]) | (of_search or {})
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
