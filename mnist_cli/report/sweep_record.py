"""What a sweep left behind, read and checked: leaderboard.json, and the metrics of its runs.

The folder may come from anybody. leaderboard.json is parsed into the classes below or refused;
where there is none yet, as of a sweep that still runs, it is made of the run folders. Optuna's own
journal is not opened: leaderboard.json holds what Optuna had to say.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from mnist_cli import strict_json
from mnist_cli.config import OBJECTIVES
from mnist_cli.errors import CheckpointError, UsageError
from mnist_cli.run import LARGEST_METRIC, RunFolder
from mnist_cli.sweep import leaderboard
from mnist_cli.typed import Range, known, parse

MAX_BYTES = 64 * 2**20  # some ten thousand configurations

_Count = Annotated[int, Range(least=0, most=2**53)]
_Scalar = bool | int | float | str
Value = _Scalar | tuple[_Scalar, ...] | None
Metric = Literal["val_accuracy", "val_loss", "val_mse"]
Number = Annotated[float, Range(least=-LARGEST_METRIC, most=LARGEST_METRIC)]


@dataclass(frozen=True)
class Unfinished:
    """A run that was not completed, and why."""

    job: str
    state: str
    error: str | None


@dataclass(frozen=True)
class Row:
    """A configuration, its seeds folded into one; see `leaderboard.build`."""

    rank: _Count | None
    config: dict[str, Value]
    state: str
    n: _Count
    metric: Metric | None
    mean: Number | None
    std: Number | None
    best_so_far: Number | None
    test_metric: Literal["accuracy", "mse"] | None
    test_mean: Number | None
    test_std: Number | None
    train_s: Number | None
    jobs: tuple[str, ...]
    failed: tuple[Unfinished, ...]
    command: str | None


@dataclass(frozen=True)
class Trial:
    """What Optuna tried: `values` of the objectives, None where it was not completed."""

    trial: _Count
    state: str
    values: tuple[Number, ...] | None
    job: str | None


@dataclass(frozen=True)
class Point:
    """A trial that no other beats in all objectives."""

    config: dict[str, Value]
    values: dict[str, Number]


@dataclass(frozen=True)
class SearchRecord:
    """What a search adds; `objectives` says which way each of them is better."""

    objectives: dict[str, Literal["minimize", "maximize"]]
    sampler: str
    pruner: str
    importance: dict[str, Number]
    pareto: tuple[Point, ...]
    history: tuple[Trial, ...]


@dataclass(frozen=True)
class _Board:
    ranked_by: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class SweepRecord:
    """A sweep, ready to be drawn.

    Attributes:
        columns: the keys that tell the configurations apart.
        rows: the configurations, the best one first, those without a rank last.
        search: None where the jobs were listed.
    """

    path: Path
    ranked_by: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    search: SearchRecord | None

    @property
    def winner(self) -> Row | None:
        return self.rows[0] if self.rows and self.rows[0].rank is not None else None

    def epochs(self, job: str) -> list[dict[str, float]]:
        """The rows of metrics.csv of a job, by its column names; empty where there are none."""
        return RunFolder(self.path / job).read_metrics() if _is_name(job) else []

    def dataset(self) -> str | None:
        """The dataset of the best run, as its command has it."""
        job = next((job for row in self.rows for job in row.jobs), "")
        return leaderboard.command_in(self.path / job).get("dataset") if _is_name(job) else None


def _is_name(job: str) -> bool:
    """Whether this names a folder in the folder of the sweep, and nothing outside."""
    return job not in ("", "..") and Path(job).name == job


def is_sweep(folder: Path) -> bool:
    """Whether `folder` holds runs, or says what came of them, and is no run itself."""
    try:
        if RunFolder(folder).best.exists() or RunFolder(folder).last.exists():
            return False
        return (folder / leaderboard.JSON).exists() or any(folder.glob("*/result.json"))
    except (OSError, ValueError):  # a name that is too long, or holds a zero byte
        return False


def load(folder: Path) -> SweepRecord:
    """Read the folder of a sweep. Raises CheckpointError where it is damaged or foreign."""
    path = folder / leaderboard.JSON
    try:
        found = strict_json.read(path, MAX_BYTES) if path.exists() else leaderboard.build(folder)
        board = parse(_Board, known(_Board, found))
        search = parse(SearchRecord, known(SearchRecord, found)) if "objectives" in found else None
        if search is not None:
            _check(search)
    except (OSError, ValueError, UsageError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise CheckpointError(
            f"{path} can't be used: {reason}",
            "name the folder of a sweep that mnist-cli train left",
        ) from error
    return SweepRecord(folder, board.ranked_by, board.columns, board.rows, search)


def _check(search: SearchRecord) -> None:
    """Raises ValueError where trials have other values than there are objectives."""
    names = set(search.objectives)
    if not names or not names <= set(OBJECTIVES):
        raise ValueError("its objectives are unknown")
    if any(set(point.values) != names for point in search.pareto):
        raise ValueError("its front is not of its objectives")
    if any(trial.values and len(trial.values) != len(names) for trial in search.history):
        raise ValueError("its history is not of its objectives")
