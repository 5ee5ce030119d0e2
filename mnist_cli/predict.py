"""The command `predict`: labels and probabilities of image files."""

from __future__ import annotations

import csv
import glob
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mnist_cli import durable, pictures, trained
from mnist_cli.config import PredictConfig
from mnist_cli.console import Console
from mnist_cli.errors import DataError, one_line
from mnist_cli.scoring import BATCH_SIZE
from mnist_cli.trained import Trained

STDIN = "-"


def run(config: PredictConfig, console: Console) -> list[dict[str, Any]]:
    """The command `predict`.

    Returns:
        The JSON document, in the order of the sorted paths: path, label, index,
        probability, and probabilities in the order of the classes.

    Raises:
        CheckpointError: the checkpoint can't be used.
        UsageError: it answers with numbers, or the device isn't there.
        DataError: some pictures have no answer; its `document` is the whole list, with `error` in
            place of an answer.
    """
    model = trained.load(config.checkpoint, config.device, console)
    model.check_takes_pictures()
    found = find(config.images)
    document: list[dict[str, Any]] = []
    with console.bar() as bar:
        for start in range(0, len(found), BATCH_SIZE):  # so that no more lie in memory at once
            bar.show(start, len(found), "predict", "")
            document += _answers(found[start : start + BATCH_SIZE], model, config.preprocess)
    if config.out is not None:
        _write(document, Path(config.out))
    _show(document, model, console)
    failed = [answer for answer in document if "error" in answer]
    if failed:
        first = f"{one_line(failed[0]['path'], 200)} {failed[0]['error']}"
        message = f"{len(failed)} of {len(document)} pictures have no answer: {first}"
        raise DataError(message if len(document) > 1 else first, pictures.HINT, document)
    return document


def find(names: Sequence[str]) -> list[tuple[str, str | None]]:
    """The files that `names` mean, sorted, each once; with each what is wrong with it, if anything.

    A name is a file, a folder (its image files, by their suffixes, without hidden ones), a glob, or
    `-` for the standard input.
    """
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found |= dict.fromkeys(_files(name))
        except DataError as error:
            found[name] = error.message
    return sorted(found.items())


def _files(name: str) -> list[str]:
    if name == STDIN:
        return [name]
    name = os.path.expanduser(name)
    try:
        if os.path.isdir(name):
            paths = [os.path.join(name, file) for file in os.listdir(name) if file[0] != "."]
            inside = [
                path
                for path in paths
                if path.lower().endswith(pictures.SUFFIXES) and not os.path.isdir(path)
            ]
            if not inside:
                raise DataError(f"holds no {', '.join(pictures.SUFFIXES)} files", pictures.HINT)
            return inside
        if glob.has_magic(name) and not os.path.lexists(name):
            matches = [path for path in glob.glob(name, recursive=True) if not os.path.isdir(path)]
            if not matches:
                raise DataError("matches no file", pictures.HINT)
            return matches
    except (OSError, ValueError) as error:  # the latter: a path with a zero byte
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise DataError(f"can't be read: {reason}", pictures.HINT) from error
    return [name]


def _answers(
    files: Sequence[tuple[str, str | None]], model: Trained, preprocess: pictures.Preprocess
) -> list[dict[str, Any]]:
    """The entries of the document for some files; the model sees those that can be read as one
    batch."""
    entries: list[dict[str, Any]] = []
    inputs = []
    for path, wrong in files:
        try:
            if wrong is not None:
                raise DataError(wrong, pictures.HINT)
            image = pictures.decode(_stdin() if path == STDIN else pictures.read(path))
            inputs.append(pictures.prepare(image, model.spec, preprocess))
            entries.append({"path": path})
        except DataError as error:
            entries.append({"path": path, "error": error.message})
    labels = iter(model.label(inputs) if inputs else [])
    return [entry if "error" in entry else entry | next(labels) for entry in entries]


def _stdin() -> bytes:
    if sys.stdin is None or sys.stdin.isatty():
        raise DataError("is the standard input, where no file comes in", "type ... < a.png")
    return sys.stdin.buffer.read(pictures.MAX_FILE_BYTES + 1)


def _write(document: list[dict[str, Any]], folder: Path) -> None:
    """predictions.json, and without the probabilities of the other classes predictions.csv."""
    columns = ("path", "label", "index", "probability", "error")
    table = io.StringIO()
    writer = csv.DictWriter(table, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(document)
    durable.make_folder(folder)
    durable.write(folder / "predictions.json", (json.dumps(document, indent=2) + "\n").encode())
    # A file's name may hold bytes that are no text: they are written as they are.
    durable.write(folder / "predictions.csv", table.getvalue().encode(errors="surrogateescape"))


def _show(document: list[dict[str, Any]], model: Trained, console: Console) -> None:
    rows = []
    for entry in (entry for entry in document if "error" not in entry):
        probabilities = entry["probabilities"]
        order = sorted(range(len(probabilities)), key=probabilities.__getitem__, reverse=True)
        second = [f"{model.spec.classes[i]} ({probabilities[i]:.2%})" for i in order[1:2]]
        path = one_line(entry["path"])
        rows.append((path, entry["label"], f"{entry['probability']:.2%}", *(second or [""])))
    if rows:
        console.table(("path", "label", "probability", "runner-up"), rows)
    for entry in document if len(document) > 1 else ():  # of a single one, the error says it
        if "error" in entry:
            console.say(f"no answer: {one_line(entry['path'])} {entry['error']}")
