"""The space of a search: for each key the values that Optuna may choose, and what is then typed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from mnist_cli.errors import UsageError

if TYPE_CHECKING:
    import optuna


class Choice(NamedTuple):
    """One of `values`, as they are typed."""

    key: str
    values: tuple[str, ...]

    @property
    def told(self) -> str:
        """What may be chosen, in words."""
        return ",".join(self.values)

    @property
    def ends(self) -> tuple[Any, ...]:
        """The values to check before a search starts."""
        return self.values

    def points(self) -> Sequence[Any]:
        """The values one by one, for sampler=grid."""
        return self.values

    def suggest(self, trial: optuna.Trial) -> None:
        """Let the sampler choose a value."""
        trial.suggest_categorical(self.key, self.values)


class Numbers(NamedTuple):
    """A number from `low` to `high`, both included, in steps where `step` says so."""

    key: str
    low: float
    high: float
    step: float | None
    is_log: bool

    @property
    def told(self) -> str:
        """What may be chosen, in words."""
        scale = " on a log scale" if self.is_log else ""
        step = f" in steps of {self.step!r}" if self.step else ""
        return f"{self.low!r} to {self.high!r}{scale}{step}"

    @property
    def ends(self) -> tuple[Any, ...]:
        """The two ends and one number between: it shows which keys take whole numbers only."""
        if isinstance(self.low, int) and isinstance(self.high, int):
            return (self.low, self.high)
        between = self.low + (self.step or (self.high - self.low) / math.pi)
        return (self.low, self.high, min(between, self.high))

    def points(self) -> Sequence[Any]:
        """All values. Raises UsageError: the numbers of an interval can't be counted."""
        if self.step is None:
            raise UsageError(
                f"sweep.sampler=grid can't count the values of {self.key}, an interval",
                "type a list or range(), or take another sampler",
            )
        count = math.floor((self.high - self.low) / self.step + 1e-9) + 1
        return [self.low + position * self.step for position in range(count)]

    def suggest(self, trial: optuna.Trial) -> None:
        """Let the sampler choose a number."""
        if isinstance(self.low, int) and isinstance(self.high, int):
            whole = 1 if self.is_log else int(self.step or 1)
            trial.suggest_int(self.key, self.low, self.high, step=whole, log=self.is_log)
        else:
            step = None if self.is_log else self.step
            trial.suggest_float(self.key, self.low, self.high, step=step, log=self.is_log)


Space = Sequence[Choice | Numbers]


def as_run(value: Any) -> Any:
    """A value as it is run after Optuna chose it: of its 17 digits a float keeps six."""
    return float(_typed(value, 6)) if isinstance(value, float) else value


def words_of(space: Space, values: Mapping[str, Any], digits: int = 6) -> tuple[str, ...]:
    """The overrides that choose `values`; with six digits they are what is run."""
    return tuple(f"{part.key}={_typed(values[part.key], digits)}" for part in space)


def _typed(value: Any, digits: int) -> str:
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)
