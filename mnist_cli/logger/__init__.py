"""Loggers: what a run tells TensorBoard, MLflow or Weights & Biases, where that was asked for.

    tensorboard  event files in the run folder
    mlflow       a run in a store that many runs share
    wandb        an offline run in the run folder

A logger hears each epoch's row of metrics.csv and, in the end, the result. It is told after the
run's own files are written and changes nothing in a run: one that fails is left out, with a
warning. When a run is resumed, a logger hears the rows of metrics.csv first, so that it holds each
epoch once, however the run was cut off and whenever the logger joined.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol

from mnist_cli.config import FREE_KEYS, TrainConfig, flatten, to_plain
from mnist_cli.console import Console
from mnist_cli.errors import Interrupted, PrunedError, UsageError, one_line
from mnist_cli.run import RunFolder

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mnist_cli.dataset import Dataset

Row = Mapping[str, float | int | None]
Status = Literal["completed", "failed", "interrupted"]

# The modules that each logger needs; the extra of the same name brings them.
NEEDS = {
    "tensorboard": ("tensorboard",),
    "mlflow": ("mlflow", "sqlalchemy", "alembic", "pandas"),
    "wandb": ("wandb",),
}


@dataclass(frozen=True)
class Finished:
    """A completed run.

    Attributes:
        result: what result.json holds.
        model: the selected weights, in evaluation mode.
        outputs: of `model` on the test split, (N, K) float32.
    """

    result: dict[str, Any]
    model: nn.Module
    data: Dataset
    outputs: Tensor

    @property
    def epoch(self) -> int:
        """The selected one."""
        return int(self.result["best"]["epoch"])


class Logger(Protocol):
    """One kind of log. Any exception means that it can't go on."""

    where: str  # the folder or address that a person opens

    def log(self, row: Row) -> None:
        """An epoch is over: its row of metrics.csv."""

    def finish(self, finished: Finished) -> None:
        """The run is complete; no row follows."""

    def close(self, status: Status) -> None:
        """The end, however it came. Nothing may be left running."""


class Loggers:
    """The loggers of one run: closed at the end of the block, whatever ends it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._open: dict[str, Logger] = {}
        self._failed: set[str] = set()

    def start(self, config: TrainConfig, folder: RunFolder) -> None:
        """Open those that `config` names, and tell them what has been logged before."""
        rows = folder.read_metrics() if config.logger else []
        for name in dict.fromkeys(map(str, config.logger)):
            self._guarded(name, partial(self._start, name, config, folder, rows))
        for name, logger in self._working():
            self._console.detail(f"logger   {name}: {_without_secrets(logger.where)}")

    def _start(
        self, name: str, config: TrainConfig, folder: RunFolder, rows: Sequence[Row]
    ) -> None:
        self._open[name] = _build(name, config, folder)
        for row in rows:
            self._open[name].log(row)

    def log(self, row: Row) -> None:
        """An epoch is over and saved."""
        for name, logger in self._working():
            self._guarded(name, partial(logger.log, row))

    def finish(self, finished: Finished) -> None:
        """The run is complete and its result is written."""
        for name, logger in self._working():
            self._guarded(name, partial(logger.finish, finished))

    def __enter__(self) -> Loggers:
        return self

    def __exit__(
        self, kind: object, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        status: Status = "completed" if error is None else "failed"
        if isinstance(error, Interrupted | PrunedError):
            status = "interrupted"
        for name, logger in self._open.items():
            self._guarded(name, partial(logger.close, status))

    def _working(self) -> list[tuple[str, Logger]]:
        return [(name, logger) for name, logger in self._open.items() if name not in self._failed]

    def _guarded(self, name: str, call: Callable[[], None]) -> None:
        """Let a logger work; the first time that one fails is said."""
        try:
            with _quietly():
                call()
        except Exception as error:
            if name not in self._failed:
                reason = one_line(_without_secrets(str(error) or type(error).__name__), 200)
                self._console.warn(f"logger={name} failed and is left out from now on: {reason}")
            self._failed.add(name)


def require(names: Sequence[str]) -> None:
    """Raise UsageError where a logger of `names` isn't installed. Nothing is imported."""
    for name in names:
        if not all(_is_installed(module) for module in NEEDS[name]):
            raise UsageError(
                f"logger={name} needs packages that aren't installed",
                f"type pip install 'mnist-cli[{name}]'",
            )


def params_of(config: TrainConfig) -> dict[str, bool | int | float | str]:
    """What decides the numbers of a run, by key, and its device; no paths and no addresses."""
    kept = {
        key.removesuffix(".name"): value
        for key, value in flatten(to_plain(config)).items()
        if key == "device" or key not in FREE_KEYS
    }
    return {
        key: value if isinstance(value, bool | int | float | str) else json.dumps(value)
        for key, value in kept.items()
    }


def numbers_of(row: Row) -> dict[str, float]:
    """The measured values of an epoch by their column; the position is not among them."""
    return {
        name: value
        for name, value in row.items()
        if value is not None and name not in ("epoch", "step")
    }


def finals_of(result: Mapping[str, Any]) -> dict[str, float]:
    """The numbers in the blocks `val` and `test` of result.json, as `test/accuracy`."""
    return {
        f"{split}/{name}": value
        for split in ("val", "test")
        for name, value in (result[split] or {}).items()
        if isinstance(value, int | float) and name != "n"
    }


def _build(name: str, config: TrainConfig, folder: RunFolder) -> Logger:
    match name:
        case "tensorboard":
            from mnist_cli.logger.tensorboard import TensorBoard

            return TensorBoard(config, folder)
        case "mlflow":
            from mnist_cli.logger.mlflow import MLflow

            return MLflow(config, folder)
        case _:
            from mnist_cli.logger.wandb import Wandb

            return Wandb(config, folder)


def _is_installed(module: str) -> bool:
    """A mere folder of the same name, as wandb leaves it in the current one, has no origin."""
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None


def _without_secrets(text: str) -> str:
    """`text` without the `user:password@` of an address."""
    return re.sub(r"(?<=://)[^/@\s]+@", "", text)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Nothing that a library prints, warns of or logs gets between the lines of a run."""
    before, nowhere = logging.root.manager.disable, io.StringIO()
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
