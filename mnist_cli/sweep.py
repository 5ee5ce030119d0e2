"""A sweep: its folder, the folder of each job, and the jobs in order.

A failed job never stops the rest. Randomness is counted and every job builds all that it uses, so a
job of a sweep gives the same numbers as the same run alone.
"""

from __future__ import annotations

import dataclasses
import re
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from mnist_cli.config import Config, TrainConfig, config_hash
from mnist_cli.console import Console
from mnist_cli.errors import MnistCliError, SweepError, UsageError, one_line
from mnist_cli.run import RunFolder, unique_folder

SWEEPS = "outputs/sweep"


class Job(NamedTuple):
    """One job: the overrides that make it, and the configuration that came of them."""

    words: tuple[str, ...]
    config: Config

    @property
    def typed(self) -> list[str]:
        """The keys that the user named."""
        return [word.lstrip("+~").partition("=")[0] for word in self.words]


def run(jobs: Sequence[Job], console: Console, command: Callable[[Job, Console], Any]) -> int:
    """Run every job, whatever happens to the others, and return the exit code."""
    folder = folder_of(jobs)
    inner = Console(quiet=console.quiet, as_json=console.as_json, brief=True)
    documents = []
    for number, job in enumerate(jobs, 1):
        console.say(f"job {number}/{len(jobs)}  {_difference(job, jobs) or 'as it stands'}")
        placed_job = placed(job, folder, jobs) if folder is not None else job
        documents.append(outcome_of(partial(command, placed_job, inner), console))
    labels = [_difference(job, jobs) or "-" for job in jobs]
    return finish(console, folder, list(zip(labels, documents, strict=True)))


def outcome_of(call: Callable[[], Any], console: Console) -> dict[str, Any]:
    """The document of a job, or one of its failure: a failed job never stops the rest.

    A list, as `predict` gives it, comes under the key `answers`.
    """
    try:
        document = call()
        return {"answers": document} if isinstance(document, list) else document
    except MnistCliError as error:
        console.say(f"failed: {error.message}")
        answers = {} if error.document is None else {"answers": error.document}
        failure = {"error": error.message, "hint": error.hint, "exit_code": error.exit_code}
        return failure | answers
    except Exception as error:
        message = f"{type(error).__name__}: {one_line(str(error))}"
        console.say(f"failed: {message}")
        traceback.print_exc()
        return {"error": message, "hint": "this is a fault of mnist-cli", "exit_code": 1}


def finish(
    console: Console, folder: Path | None, jobs: Sequence[tuple[str, dict[str, Any]]]
) -> int:
    """Show what became of the jobs, (label, document) each, and return the exit code."""
    rows = [(label, *_outcome(document)) for label, document in jobs]
    console.table(("job", "selected by", "value", "test", "seconds"), rows)
    where = None if folder is None else str(folder)
    if where is not None:
        console.say(f"sweep    {where}")
    document = {"sweep_dir": where, "jobs": [document for _, document in jobs]}
    failed = [label for label, document in jobs if _has_failed(document)]
    if not failed:
        console.document(document)
        return 0
    error = SweepError(
        f"{len(failed)} of {len(jobs)} jobs failed" + (f" in {where}" if where else ""),
        f"the first was {failed[0]}: run it alone to see more",
    )
    console.error(error.message, error.hint, error.exit_code, document)
    return error.exit_code


def results_in(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """Label and result.json of the jobs that a launcher left in `folder`."""
    paths = sorted(folder.glob("*/result.json"))
    return [(path.parent.name, RunFolder(path.parent).read_result() or {}) for path in paths]


def _has_failed(document: dict[str, Any]) -> bool:
    return "exit_code" in document or document.get("status", "completed") != "completed"


def folder_of(jobs: Sequence[Job]) -> Path | None:
    """The folder of a sweep of `train`; the other commands write nothing of their own."""
    if not isinstance(jobs[0].config, TrainConfig):
        return None
    if jobs[0].config.resume is not None:
        raise UsageError("resume= names one run, -m asks for many", "leave -m or resume= away")
    names = {job.config.out for job in jobs}
    if len(names) > 1:
        raise UsageError("out= names one folder for the whole sweep", "type out=DIR once")
    name = names.pop()
    return Path(name) if name is not None else unique_folder(Path(SWEEPS))


def placed(job: Job, folder: Path, jobs: Sequence[Job]) -> Job:
    """`job` with a run folder of its own: a slug of what differs, and a hash of everything."""
    assert isinstance(job.config, TrainConfig)
    slug = re.sub(r"[^A-Za-z0-9.=_+-]+", "_", _difference(job, jobs).replace(" ", ","))[:60].strip(
        "_."
    )
    name = f"{slug or 'job'}-{config_hash(job.config)[:8]}"
    return Job(job.words, dataclasses.replace(job.config, out=str(folder / name)))


def _difference(job: Job, jobs: Sequence[Job]) -> str:
    """The overrides that not all jobs share; of a single job, all of its overrides."""
    shared = (
        set(jobs[0].words).intersection(*(other.words for other in jobs))
        if len(jobs) > 1
        else set()
    )
    return " ".join(word for word in job.words if word not in shared)


def _outcome(document: dict[str, Any]) -> tuple[str, str, str, str]:
    """The cells of a job: what selected, its value, the test metric, the seconds."""
    if _has_failed(document):
        return ("failed", "", "", "")
    if "best" not in document:
        return ("done", "", "", "")
    best, test = document["best"], document["test"]
    value = "" if best["value"] is None else f"{best['value']:.4f}"
    metric = test["accuracy"] if "accuracy" in test else test["mse"]
    return (
        best["monitor"] or "last epoch",
        value,
        f"{metric:.4f}",
        f"{document['time']['total_s']:.1f}",
    )
