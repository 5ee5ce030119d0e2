"""A sweep of a command that writes no run folder, as `eval`: job after job, and a word on each."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mnist_cli.config import Config, EvalConfig, ExportConfig, PredictConfig, ReportConfig, absolute
from mnist_cli.console import Console
from mnist_cli.errors import MnistCliError, SweepError, UsageError, shown
from mnist_cli.sweep.job import Document, Job, difference, failure, shared_words


def run(
    jobs: Sequence[Job[Any]], console: Console, command: Callable[[Job[Any], Console], Any]
) -> int:
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
    return finish(console, documents)


def refuse_same_files(jobs: Sequence[Job[Any]]) -> None:
    """Refuse jobs of which one would write over what another wrote.

    Raises:
        UsageError: nothing was written.
    """
    seen: dict[tuple[object, ...], Job[Any]] = {}
    for job in jobs:
        file = _file_of(job.config)
        if file is None:
            continue
        other = seen.setdefault(file, job)
        if other is not job:
            shared = shared_words([other, job])
            first, second = difference(other, shared), difference(job, shared)
            hint = "run them one by one, each with an out=DIR of its own"
            if second.startswith("checkpoint="):
                hint = "type a folder for each: 'out=DIR/${checkpoint}'"
            raise UsageError(
                f"two jobs would write the same file in {shown(file[0])}: {first} and {second}",
                hint,
            )


def _file_of(config: Config) -> tuple[object, ...] | None:
    """What a job of another command than `train` writes: the folder, and what names the file there.

    None for one that writes nothing.
    """
    match config:
        case ExportConfig():
            source = Path(config.checkpoint)
            run = source.parent if source.suffix == ".safetensors" else source
            folder = config.out or str(run)
            return absolute(folder), config.format, config.quantize
        case EvalConfig(out=str(out)) | PredictConfig(out=str(out)):
            return (absolute(out),)
        case ReportConfig(out=str(out)):
            return absolute(out), len(config.run)
    return None


def outcome_of(job: Job[Any], call: Callable[[], Any], console: Console) -> Document:
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


def finish(console: Console, documents: Sequence[Document]) -> int:
    """The end of a sweep that has no folder."""
    document: dict[str, Any] = {"sweep_dir": None, "jobs": list(documents)}
    failed = [document for document in documents if "exit_code" in document]
    if not failed:
        console.document(document)
        return 0
    message = f"{len(failed)} of {len(documents)} jobs failed"
    error = SweepError(message, "run the first of them alone to see more")
    console.error(error.message, error.hint, error.exit_code, document)
    return error.exit_code
