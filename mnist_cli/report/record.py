"""What a run left behind, read and checked: all that a page can be drawn from.

A run folder may come from anybody. The configuration comes out of a checkpoint, which is verified;
result.json and metrics.csv are read as numbers and short texts, or not at all.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor

from mnist_cli import checkpoint as checkpoints
from mnist_cli import runtime, scoring, strict_json
from mnist_cli.checkpoint import Checkpoint
from mnist_cli.config import TrainConfig
from mnist_cli.console import Console
from mnist_cli.dataset import Dataset, DatasetSpec, Split
from mnist_cli.dataset.again import load_again
from mnist_cli.errors import CheckpointError, MnistCliError, UsageError, one_line
from mnist_cli.run import MAX_BYTES, RunFolder
from mnist_cli.sweep import leaderboard
from mnist_cli.typed import Range, known, parse

_Count = Annotated[int, Range(least=0, most=2**53)]
_Share = Annotated[float, Range(least=0, most=1)]
_Seconds = Annotated[float, Range(least=0)]


@dataclass(frozen=True)
class ClassRow:
    """A class in the test block of result.json."""

    label: str
    index: _Count
    precision: _Share
    recall: _Share
    f1: _Share
    support: _Count


@dataclass(frozen=True)
class ClassScores:
    """A block `val` or `test` of a classification; `confusion[truth][answer]` counts samples."""

    n: Annotated[int, Range(least=1, most=2**53)]
    loss: float
    accuracy: _Share
    accuracy_ci95: tuple[_Share, _Share]
    precision: _Share
    recall: _Share
    f1: _Share
    auc: _Share | None
    ece: _Share
    per_class: tuple[ClassRow, ...]
    confusion: tuple[tuple[_Count, ...], ...]


@dataclass(frozen=True)
class NumberScores:
    """A block `val` or `test` of a regression."""

    n: Annotated[int, Range(least=1, most=2**53)]
    loss: float
    mse: float
    mae: float
    r2: float | None


Scores = ClassScores | NumberScores


@dataclass(frozen=True)
class Versions:
    mnist_cli: str
    torch: str
    python: str


@dataclass(frozen=True)
class Sizes:
    """How many samples each split has."""

    n_train: _Count
    n_val: _Count
    n_test: _Count


@dataclass(frozen=True)
class Model:
    num_params: _Count


@dataclass(frozen=True)
class Times:
    total_s: _Seconds
    startup_s: _Seconds
    data_s: _Seconds
    train_s: _Seconds
    eval_s: _Seconds


@dataclass(frozen=True)
class Result:
    """What a page shows of result.json, but for its scores."""

    status: str
    error: str | None
    device: str
    versions: Versions
    dataset: Sizes
    model: Model
    time: Times
    samples_per_s: _Seconds | None


@dataclass(frozen=True)
class Record:
    """A run, ready to be drawn.

    Attributes:
        path: the run folder.
        checkpoint: the selected weights, or the last ones where nothing is selected.
        config: of the whole run. One that was resumed may have gone on with other settings than
            those of the checkpoint.
        val, test: the scores in result.json, None where they weren't measured.
        epochs: the rows of metrics.csv, by its column names.
        split: the test split, or None where it isn't to be had.
        outputs: of the checkpoint on `split`, (N, K) float32 on the CPU, or None likewise.
        missing: why there is no `split`; empty where there is.
    """

    path: Path
    checkpoint: Checkpoint
    config: TrainConfig
    result: Result
    val: Scores | None
    test: Scores | None
    epochs: list[dict[str, float]]
    split: Split | None
    outputs: Tensor | None
    missing: str

    @property
    def spec(self) -> DatasetSpec:
        return self.checkpoint.spec

    def column(self, name: str) -> tuple[list[float], list[float]]:
        """The epochs that have a value in a column of metrics.csv, and the values."""
        rows = [row for row in self.epochs if "epoch" in row and name in row]
        return [row["epoch"] for row in rows], [row[name] for row in rows]

    def weights(self) -> dict[str, Tensor]:
        """The parameters by name, in the order of the layers; a file holds them in another."""
        return self.checkpoint.build_model(torch.device("cpu")).state_dict()


def load(name: str, root: str | None, console: Console) -> Record:
    """Read the run folder `name`, and let its model answer the test split once more.

    Raises:
        CheckpointError: it isn't a run folder, or what lies in it is damaged or foreign.
    """
    folder = folder_of(name)
    found = checkpoints.load(folder.best if folder.best.exists() else folder.last)
    result, val, test = _read_result(folder, found.spec)
    config, epochs = _config_of(folder, found), folder.read_metrics()
    answers = _answers(found, root, console)
    return Record(folder.path, found, config, result, val, test, epochs, *answers)


def _config_of(folder: RunFolder, selected: Checkpoint) -> TrainConfig:
    """That of the last checkpoint; of the selected one where the last is no more."""
    try:
        return checkpoints.load(folder.last).config
    except CheckpointError:
        return selected.config


def folder_of(name: str) -> RunFolder:
    """The run folder `name`. Raises CheckpointError where there is none."""
    folder = RunFolder(Path(os.path.expanduser(name)))
    hint = "name a run folder: mnist-cli report run=outputs/train/RUN"
    try:
        is_folder = folder.path.is_dir()
    except (OSError, ValueError):  # a name that is too long, or holds a zero byte
        is_folder = False
    if not is_folder:
        raise CheckpointError(f"run={one_line(name, 200)} is not a run folder", hint)
    try:
        holds_one = folder.best.exists() or folder.last.exists()
    except OSError as error:
        raise CheckpointError(f"can't open {folder.path}: {error.strerror}", hint) from error
    if not holds_one:
        if (folder.path / leaderboard.JSON).exists():
            hint = "the page of a sweep stands alone: name one sweep, or two runs"
        raise CheckpointError(f"run={folder.path} holds no checkpoint", hint)
    return folder


def _read_result(
    folder: RunFolder, spec: DatasetSpec
) -> tuple[Result, Scores | None, Scores | None]:
    """result.json with its blocks `val` and `test`, checked. Raises CheckpointError."""
    try:
        found = strict_json.read(folder.result, MAX_BYTES)
        result = parse(Result, known(Result, found))
        return result, _scores(found.get("val"), spec), _scores(found.get("test"), spec)
    except (OSError, ValueError, UsageError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise CheckpointError(
            f"{folder.result} can't be used: {reason}",
            "name a run folder that mnist-cli train wrote",
        ) from error


def _scores(block: object, spec: DatasetSpec) -> Scores | None:
    """A block `val` or `test`. Raises ValueError or UsageError."""
    if block is None:
        return None
    if spec.task == "regression":
        return parse(NumberScores, known(NumberScores, block))
    scores = parse(ClassScores, known(ClassScores, block))
    k = len(spec.classes)
    if {k} != {len(scores.per_class), len(scores.confusion), *map(len, scores.confusion)}:
        raise ValueError(f"its scores aren't of {k} classes")
    return scores


def _answers(
    found: Checkpoint, root: str | None, console: Console
) -> tuple[Split | None, Tensor | None, str]:
    """The test split and what the checkpoint answers to it, or why there is none."""
    try:
        data: Dataset = load_again(found.config, found.spec, root, console, may_download=False)
    except MnistCliError as error:
        return None, None, error.message
    if data.spec.digest != found.spec.digest:
        return None, None, f"the {found.spec.name} data here is not what the run used"
    device = runtime.resolve_device("auto")
    outputs = scoring.answers(found.build_model(device), found.spec, data.test.to(device)).cpu()
    if not torch.isfinite(outputs).all():
        return None, None, "the answers of the checkpoint are not finite"
    return data.test, outputs, ""
