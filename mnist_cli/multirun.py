"""What `-m` asks for: every job of a sweep, or the space of a search.

Each job is composed and checked before the first one starts; of a search the ends of every range
and each choice.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    IntervalSweep,
    Override,
    OverrideType,
    RangeSweep,
)
from omegaconf import DictConfig, OmegaConf

from mnist_cli import command, compose, conf, sweep
from mnist_cli.compose import is_sweep_key
from mnist_cli.config import SweepConfig, sweep_config
from mnist_cli.console import Console
from mnist_cli.errors import UsageError, shown
from mnist_cli.explain import hydra_errors
from mnist_cli.line import Line
from mnist_cli.signals import held
from mnist_cli.sweep import each, search
from mnist_cli.sweep.job import Job, TrainJob
from mnist_cli.sweep.space import Choice, Numbers, words_of

SEARCH_KEYS = tuple(f"sweep.{key}" for key in ("trials", "sampler", "pruner", "objectives"))


def run(line: Line, console: Console) -> int:
    """Run what `line` asks for, and return the exit code.

    Raises:
        UsageError: nothing was started, and nothing written.
    """
    with held(), hydra_errors(line), compose.initialized(line):
        parsed = compose.parse(compose.overrides_of(line))
        composer = Composer(line, parsed)
        settings = sweep_settings(composer, parsed)
        is_search = settings is not None and settings.search == "optuna"
        jobs = [] if is_search else sweep_jobs(composer, parsed)
    if settings is None:
        return each.run(jobs, console, lambda job, inner: command.run(job.config, job.typed, inner))
    if is_search:
        return _search(composer, parsed, settings, console)
    return sweep.run(jobs, settings, console, draw_typed, command.draw_sweep)


def draw_typed(job: TrainJob, document: dict[str, Any], console: Console) -> None:
    """Draw the report of a job of a sweep only where that was typed: it takes a second."""
    if "report" in job.typed and document.get("status") == "completed":
        command.draw_report(job.config, document, console)


class Composer:
    """Composes what a sweep asks for, most of it without Hydra, which takes a tenth of a second.

    Words that only set the same keys to other values take the configuration of the first such and
    set theirs, as Hydra does in the end.

    Args:
        parsed: the overrides of `line`. Its keys `sweep.*` are composed with every job, so that the
            configuration in which they are looked up is that of the first job too.
    """

    def __init__(self, line: Line, parsed: Sequence[Override]) -> None:
        self.line, self._parser = line, OverridesParser.create()
        self._own = [o.input_line or "" for o in parsed if is_sweep_key(o)]
        self._alike: dict[tuple[str, ...], DictConfig] = {}

    def job(self, words: Sequence[str]) -> Job[Any]:
        """The job of `words`, checked. Raises UsageError."""
        return Job(tuple(words), compose.checked(self.line, self.composed(words)))

    def composed(self, words: Sequence[str]) -> DictConfig:
        """What Hydra makes of `words` and the line's `sweep.*`."""
        parsed = self._parser.parse_overrides([*self._own, *words])
        values = [override for override in parsed if self._sets_value(override)]
        shape = tuple(
            (override.key_or_group if override in values else override.input_line) or ""
            for override in parsed
        )
        if shape not in self._alike:
            self._alike[shape] = compose.compose(self.line, [*self._own, *words])
        config = copy.deepcopy(self._alike[shape])
        for override in values:
            OmegaConf.update(config, override.key_or_group, override.value())
        return config

    def _sets_value(self, override: Override) -> bool:
        """Whether `override` surely does no more: a foreign folder may hold groups of any name, and
        a dict is merged into what is there. What is Hydra's own isn't in a configuration.
        """
        is_key = override.package is None and override.key_or_group not in conf.GROUPS
        is_value = override.type is OverrideType.CHANGE and not isinstance(override.value(), dict)
        is_ours = not override.is_hydra_override() and not self.line.config_dirs
        return is_key and is_value and is_ours


# --- the jobs of a sweep -------------------------------------------------------------------------


def sweep_settings(composer: Composer, parsed: Sequence[Override]) -> SweepConfig | None:
    """The keys `sweep.*`, which only `train` has. Raises UsageError."""
    own = [override for override in parsed if is_sweep_key(override)]
    for override in own:
        if override.is_sweep_override():
            raise UsageError(
                f"{shown(override.input_line)} gives several values to a key of the whole sweep",
                "type one value",
            )
    words = [_first_word(override) for override in parsed if not is_sweep_key(override)]
    data = OmegaConf.to_container(composer.composed(words), resolve=True)
    assert isinstance(data, dict)
    settings = sweep_config(data["sweep"]) if "sweep" in data else None
    for override in own:
        if override.key_or_group in SEARCH_KEYS and settings and settings.search == "grid":
            raise UsageError(
                f"{shown(override.input_line)} is for a search, and sweep.search=grid tries all",
                "add sweep.search=optuna",
            )
    return settings


def _first_word(override: Override) -> str:
    """`override` with the first of its values."""
    if not override.is_sweep_override():
        return override.input_line or ""
    value = override.value()
    if isinstance(value, IntervalSweep):
        return f"{override.get_key_element()}={value.start!r}"
    first = next(iter(override.sweep_string_iterator()), None)
    if first is None:
        raise UsageError("the sweep has no jobs: a key has no values", "type key=a,b with -m")
    return f"{override.get_key_element()}={first}"


def sweep_jobs(composer: Composer, parsed: Sequence[Override]) -> list[Job[Any]]:
    """Every job of a sweep. Raises UsageError."""
    swept = [override for override in parsed if not is_sweep_key(override)]
    for override in swept:
        if override.is_interval_sweep():
            raise UsageError(
                f"{shown(override.input_line)} can't be counted",
                "type a list of values, or add sweep.search=optuna to search in it",
            )
    combinations = BasicSweeper.split_arguments(swept, None)[0]
    jobs = [composer.job(words) for words in dict.fromkeys(map(tuple, combinations))]
    if not jobs:
        raise UsageError("the sweep has no jobs: a key has no values", "type key=a,b with -m")
    return jobs


# --- a search ------------------------------------------------------------------------------------


def _search(
    composer: Composer, parsed: Sequence[Override], settings: SweepConfig, console: Console
) -> int:
    """A search, once the ends of every range and each choice are known to compose."""
    last = {override.key_or_group: override for override in parsed if not is_sweep_key(override)}
    swept = list(last.values())  # of a key that is typed twice the last value counts
    fixed = [override.input_line or "" for override in swept if not override.is_sweep_override()]

    def make_job(words: Sequence[str]) -> Job[Any]:
        with held(), hydra_errors(composer.line), compose.initialized(composer.line):
            return composer.job([*fixed, *words])

    space = search_space(swept)
    middle = {part.key: part.ends[0] for part in space}
    first = make_job(words_of(space, middle))
    for part in space:
        for end in part.ends[1:]:
            try:
                job = make_job(words_of(space, middle | {part.key: end}))
            except UsageError as error:
                if not (isinstance(part, Numbers) and part.step is None and "whole" in error.hint):
                    raise
                whole = f"range({math.ceil(part.low)},{math.floor(part.high) + 1})"
                whole = f"tag(log,{whole})" if part.is_log else whole
                raise UsageError(
                    f"{part.key} takes whole numbers, and an interval gives others too",
                    f"type '{part.key}={whole}'",
                ) from error
            search.check(settings, space, job.config, first.config)
    return sweep.run_search(
        space, first, make_job, settings, console, draw_typed, command.draw_sweep
    )


def search_space(parsed: Sequence[Override]) -> list[Choice | Numbers]:
    """What a search may choose from: each word with several values. Raises UsageError."""
    space = [_part(override) for override in parsed if override.is_sweep_override()]
    if not space:
        raise UsageError(
            "sweep.search=optuna has nothing to choose",
            "give a key several values: 'optim.lr=tag(log, interval(1e-4, 1e-1))'",
        )
    return space


def _part(override: Override) -> Choice | Numbers:
    """What a search may choose for one key: Hydra's ranges and lists in our words."""
    key, value, typed = override.get_key_element(), override.value(), shown(override.input_line)
    if override.key_or_group == "seed":
        raise UsageError(f"{typed}: a search doesn't choose the seed", "type one seed")
    if not isinstance(value, IntervalSweep | RangeSweep):
        return Choice(key, tuple(dict.fromkeys(override.sweep_string_iterator())))
    is_log = "log" in value.tags
    if isinstance(value, IntervalSweep):
        assert value.start is not None and value.end is not None
        part = Numbers(key, value.start, value.end, None, is_log)
    else:
        counted = list(value.range())
        if not counted:
            raise UsageError(f"{typed} has no values", "turn it around")
        part = Numbers(key, min(counted), max(counted), abs(value.step), is_log)
    if part.low > part.high:
        raise UsageError(f"{typed} is no range to search in", "type the smaller end first")
    if is_log and part.low <= 0:
        raise UsageError(f"{typed} is no range to search in", "a log needs ends above 0")
    return part
