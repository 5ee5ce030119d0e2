"""Composing: from overrides to a checked configuration, and on to the command.

A plain run and a plain sweep are composed here, once per job, through Hydra's compose API. Whatever
speaks of Hydra itself (`--cfg`, `--info`, a launcher, a sweeper, a `hydra.` key) goes through
`hydra_main.py`, so that all of Hydra works as its documentation says.
"""

from __future__ import annotations

import contextlib
import copy
import re
import shlex
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    IntervalSweep,
    Override,
    OverrideType,
    RangeSweep,
    Sweep,
)
from omegaconf import DictConfig, OmegaConf

from mnist_cli import conf, logger, plugin
from mnist_cli.config import (
    DemoConfig,
    EvalConfig,
    PredictConfig,
    ReportConfig,
    SweepConfig,
    TrainConfig,
    demo_config,
    eval_config,
    export_config,
    predict_config,
    report_config,
    sweep_config,
    train_config,
)
from mnist_cli.console import Console
from mnist_cli.errors import Interrupted, UsageError, one_line, shown
from mnist_cli.explain import hydra_errors, no_such_key
from mnist_cli.imports import uncollected
from mnist_cli.line import Line
from mnist_cli.run import RunFolder, quoted
from mnist_cli.sweep import Job
from mnist_cli.sweep.search import Choice, Numbers, words_of
from mnist_cli.typed import UnknownKeyError

IS_13 = hydra.__version__.startswith("1.3")
LIST_KEYS = ("plugin", "logger")  # one name may be typed without brackets
PATHS_KEYS = ("images", "run")  # of several paths
PATH_KEYS = (
    *PATHS_KEYS, "checkpoint", "out", "resume", "sweep.resume", "dataset.root", "dataset.mirror",
)  # fmt: skip
SEARCH_KEYS = tuple(f"sweep.{key}" for key in ("trials", "sampler", "pruner", "objectives"))
PARSERS: dict[str, Callable[[object], Any]] = {
    "train": train_config,
    "eval": eval_config,
    "export": export_config,
    "predict": predict_config,
    "demo": demo_config,
    "report": report_config,
}


def run(line: Line, console: Console, started_s: float) -> int:
    """Compose what `line` asks for and run it.

    Raises:
        UsageError: nothing was composed, and nothing written.
        MnistCliError: whatever the command raises.
    """
    if line.is_multirun and line.command == "demo":
        raise UsageError("demo shows one checkpoint, and -m asks for several", "leave -m away")
    overrides = [_with_quoted_path(word, line.is_multirun) for word in line.overrides]
    if _speaks_of_hydra(line):
        from mnist_cli import hydra_main

        return hydra_main.run(line, overrides, console)
    with hydra_errors(line), initialized(line):
        parsed = OverridesParser.create().parse_overrides(overrides)
        if line.is_multirun:
            settings = sweep_settings(line, parsed)
            is_search = settings is not None and settings.search == "optuna"
            jobs = [] if is_search else sweep_jobs(line, parsed)
        else:
            _refuse_sweep_keys(parsed)
            _refuse_sweep_values(parsed)
            config = checked(line, _compose(line, [*_groups_of_run(line), *overrides]))
    if line.is_multirun:
        from mnist_cli import sweep

        if settings is not None and settings.search == "optuna":
            return _search(line, parsed, settings, console)
        if settings is not None:
            return sweep.run(jobs, settings, console, draw_typed, draw_sweep)
        return sweep.each(jobs, console, lambda job, inner: command(job.config, job.typed, inner))
    typed = [override.key_or_group for override in parsed]
    document = command(config, typed, console, started_s)
    if document is not None:
        console.document(document)
    draw_report(config, document, console)
    return 0


def draw_typed(job: Job, document: dict[str, Any], console: Console) -> None:
    """Draw the report of a job of a sweep only where that was typed: it takes a second."""
    if "report" in job.typed and document.get("status") == "completed":
        draw_report(job.config, document, console)


def draw_report(config: Any, document: dict[str, Any], console: Console) -> None:
    """Draw what a training left. Its result stands already, so no failure here is one of the run.

    Raises:
        Interrupted: by a signal.
    """
    if not isinstance(config, TrainConfig):
        return
    folder = RunFolder(Path(document["run_dir"]))
    # Of a run that was resumed, its own configuration says whether it has a page.
    keys = {key.path: key.value for key in conf.read(folder.path / "config.yaml").keys}
    if keys.get("report") is not True or folder.has_report():
        return
    with _never_failing("run", folder.path, console):
        from mnist_cli import report

        report.draw(folder, console)


def draw_sweep(config: Any, folder: Path, console: Console) -> None:
    """Draw what a sweep left, unless `report=false` is typed. Raises what `draw_report` does.

    Args:
        config: of any of its jobs.
    """
    if not config.report:
        return
    with _never_failing("sweep", folder, console):
        from mnist_cli import report

        report.draw_sweep(folder, console)


@contextlib.contextmanager
def _never_failing(what: str, folder: Path, console: Console) -> Iterator[None]:
    """Turn what goes wrong with a report into a warning, and a signal into what it interrupts."""
    again = f"type mnist-cli report {shlex.quote(f'run={folder}')}"
    try:
        yield
    except (Interrupted, KeyboardInterrupt) as error:
        number = error.exit_code - 128 if isinstance(error, Interrupted) else signal.SIGINT
        raise Interrupted(
            number, f"the {what} is complete, its report isn't: {folder}", again
        ) from None
    except Exception as error:
        console.warn(f"no report was drawn: {one_line(str(error))}; {again}")


def command(
    config: Any, typed: Sequence[str], console: Console, started_s: float | None = None
) -> Any:
    """Run the command of `config` and return its document: a list of `predict`, None of `demo`,
    which has printed it, else a dict.

    torch is imported here, after all that can be wrong was said.
    """
    with uncollected():
        run = _imported(config)
    if isinstance(config, TrainConfig):
        return run(config, console, typed, started_s)
    return run(config, console)


def _imported(config: Any) -> Callable[..., Any]:
    """What runs the command of `config`."""
    if isinstance(config, TrainConfig):
        from mnist_cli import train

        return train.run
    if isinstance(config, EvalConfig):
        from mnist_cli import evaluate

        return evaluate.run
    if isinstance(config, PredictConfig):
        from mnist_cli import predict

        return predict.run
    if isinstance(config, DemoConfig):
        from mnist_cli import demo

        return demo.run
    if isinstance(config, ReportConfig):
        from mnist_cli import report

        return report.run
    from mnist_cli import export

    return export.run


@contextlib.contextmanager
def initialized(line: Line) -> Iterator[None]:
    """Hydra's compose API, ready for the configuration of `line`."""
    arguments = {"version_base": "1.3"} if IS_13 else {}
    with hydra.initialize_config_dir(
        str(conf.conf_dir()), job_name=line.command or "", **arguments
    ):
        yield


def _compose(line: Line, overrides: Sequence[str]) -> DictConfig:
    """What Hydra makes of `overrides`."""
    return hydra.compose(line.command, [*overrides, *searched(line.config_dirs)])


def _compose_each(line: Line, jobs: Sequence[Sequence[str]]) -> Iterator[DictConfig]:
    """As `_compose` of each, which takes a tenth of a second: jobs that only set the same keys to
    other values take the configuration of the first and set theirs, as Hydra does in the end.
    """
    parser, alike = OverridesParser.create(), dict[tuple[str | None, ...], DictConfig]()
    for words in jobs:
        parsed = parser.parse_overrides(list(words))
        values = [override for override in parsed if _sets_value(line, override)]
        shape = tuple(
            override.key_or_group if override in values else override.input_line
            for override in parsed
        )
        if shape not in alike:
            alike[shape] = _compose(line, words)
        config = copy.deepcopy(alike[shape])
        for override in values:
            OmegaConf.update(config, override.key_or_group, override.value())
        yield config


def _sets_value(line: Line, override: Override) -> bool:
    """Whether `override` surely does no more: a foreign folder may hold groups of any name, and a
    dict is merged into what is there.
    """
    is_key = override.package is None and override.key_or_group not in conf.GROUPS
    is_value = override.type is OverrideType.CHANGE and not isinstance(override.value(), dict)
    return is_key and is_value and not line.config_dirs


def searched(folders: Sequence[str]) -> list[str]:
    """The override that makes Hydra search `folders`, if there are any."""
    search = [quoted(f"file://{Path(folder).absolute()}") for folder in folders]
    return [f"hydra.searchpath=[{','.join(search)}]"] if search else []


def checked(line: Line, composed: DictConfig) -> Any:
    """The typed configuration of what Hydra composed. Raises UsageError."""
    data = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(data, dict)
    data.pop("sweep", None)  # a job knows nothing of its sweep
    for key, value in data.items():
        if value == "???":
            needed = "images=PATH" if key == "images" else f"{key!s}=RUN"
            raise UsageError(f"{key!s}= is required", f"type mnist-cli {line.command} {needed}")
    for word in line.overrides:
        key = word.lstrip("+~").partition("=")[0]
        if key in conf.GROUPS and "[" in word:
            raise UsageError(
                f"{shown(word)} names several options of {key}", f"type one, or -m {key}=a,b"
            )
        if key.endswith(".name") and key.removesuffix(".name") in conf.GROUPS:
            raise no_such_key(line, key)
    plugin.use(line.plugins)
    for key in LIST_KEYS:
        if isinstance(data.get(key), str):
            data[key] = [data[key]]
    try:
        config = PARSERS[line.command or ""](data)
    except UnknownKeyError as error:
        raise no_such_key(line, error.key) from None
    if isinstance(config, TrainConfig):
        logger.require(config.logger)
    return config


def _groups_of_run(line: Line) -> list[str]:
    """With `resume=RUN`: the options that the run has chosen, for the groups that aren't typed.

    So that `resume=RUN model.hidden=[32]` finds the key in the model of the run.
    """
    words = dict(word.partition("=")[::2] for word in line.overrides)
    chosen = conf.read(Path(words.get("resume", "").strip("'\"")) / "config.yaml").keys
    names = {key.path.removesuffix(".name"): str(key.value) for key in chosen}
    return [
        f"{group}={names[group]}"
        for group in conf.GROUPS
        if group not in words and names.get(group) in conf.options(group, line.config_dirs)
    ]


def sweep_settings(line: Line, parsed: Sequence[Override]) -> SweepConfig | None:
    """The keys `sweep.*`, which only `train` has. Raises UsageError."""
    own = [override for override in parsed if is_sweep_key(override)]
    for override in own:
        if override.is_sweep_override():
            raise UsageError(
                f"{shown(override.input_line)} gives several values to a key of the whole sweep",
                "type one value",
            )
    words = [_first_word(override) for override in parsed]
    data = OmegaConf.to_container(_compose(line, words), resolve=True)
    assert isinstance(data, dict)
    settings = sweep_config(data["sweep"]) if "sweep" in data else None
    for override in own:
        if override.key_or_group in SEARCH_KEYS and settings and settings.search == "grid":
            raise UsageError(
                f"{shown(override.input_line)} is for a search, and sweep.search=grid tries all",
                "add sweep.search=optuna",
            )
    return settings


def sweep_jobs(line: Line, parsed: Sequence[Override]) -> list[Job]:
    """Every job of a sweep, composed and checked before the first one starts."""
    swept = [override for override in parsed if not is_sweep_key(override)]
    for override in swept:
        if override.is_interval_sweep():
            raise UsageError(
                f"{shown(override.input_line)} can't be counted",
                "type a list of values, or add sweep.search=optuna to search in it",
            )
    combinations = BasicSweeper.split_arguments(swept, None)[0]
    distinct = dict.fromkeys(tuple(words) for words in combinations)
    composed = _compose_each(line, list(distinct))
    jobs = [Job(words, checked(line, one)) for words, one in zip(distinct, composed, strict=True)]
    if not jobs:
        raise UsageError("the sweep has no jobs: a key has no values", "type key=a,b with -m")
    return jobs


def search_space(parsed: Sequence[Override]) -> list[Choice | Numbers]:
    """What a search may choose from: each word with several values. Raises UsageError."""
    space: list[Choice | Numbers] = []
    for override in parsed:
        if not override.is_sweep_override():
            continue
        key, value = override.get_key_element(), override.value()
        if override.key_or_group == "seed":
            raise UsageError(
                f"{shown(override.input_line)}: a search doesn't choose the seed", "type one seed"
            )
        tags = value.tags if isinstance(value, Sweep) else set()
        if isinstance(value, IntervalSweep):
            assert value.start is not None and value.end is not None
            part: Choice | Numbers = Numbers(key, value.start, value.end, None, "log" in tags)
        elif isinstance(value, RangeSweep):
            counted = list(value.range())
            if not counted:
                raise UsageError(f"{shown(override.input_line)} has no values", "turn it around")
            part = Numbers(key, min(counted), max(counted), abs(value.step), "log" in tags)
        else:
            part = Choice(key, tuple(dict.fromkeys(override.sweep_string_iterator())))
        if isinstance(part, Numbers) and (part.low > part.high or (part.is_log and part.low <= 0)):
            raise UsageError(
                f"{shown(override.input_line)} is no range to search in",
                "type the smaller end first"
                if part.low > part.high
                else "a log needs ends above 0",
            )
        space.append(part)
    if not space:
        raise UsageError(
            "sweep.search=optuna has nothing to choose",
            "give a key several values: 'optim.lr=tag(log, interval(1e-4, 1e-1))'",
        )
    return space


def _search(line: Line, parsed: Sequence[Override], settings: SweepConfig, console: Console) -> int:
    """A search, once the ends of every range and each choice are known to compose."""
    from mnist_cli import sweep

    last = {override.key_or_group: override for override in parsed if not is_sweep_key(override)}
    swept = list(last.values())  # of a key that is typed twice the last value counts
    fixed = [override.input_line or "" for override in swept if not override.is_sweep_override()]

    def make_job(words: Sequence[str]) -> Job:
        with hydra_errors(line), initialized(line):
            return Job((*fixed, *words), checked(line, _compose(line, [*fixed, *words])))

    space = search_space(swept)
    middle = {part.key: part.ends[0] for part in space}
    first = make_job(words_of(space, middle))
    for part in space:
        for end in part.ends[1:]:
            make_job(words_of(space, middle | {part.key: end}))
    return sweep.run_search(space, first, make_job, settings, console, draw_typed, draw_sweep)


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


def is_sweep_key(override: Override) -> bool:
    return override.key_or_group.partition(".")[0] == "sweep"


def _refuse_sweep_keys(parsed: Sequence[Override]) -> None:
    for override in parsed:
        if is_sweep_key(override):
            raise UsageError(
                f"{shown(override.input_line)} is for a sweep, and this is one run",
                "add -m to run a sweep",
            )


def _refuse_sweep_values(parsed: Sequence[Override]) -> None:
    for override in parsed:
        if override.is_sweep_override():
            word = override.input_line or ""
            key, _, value = word.partition("=")
            as_list = "" if key in conf.GROUPS else f", or type a list as '{key}=[{value}]'"
            raise UsageError(
                f"{shown(word)} gives several values to {key}", f"add -m to try each{as_list}"
            )


def _with_quoted_path(word: str, is_multirun: bool) -> str:
    """`word` with its value quoted where it is a path: people type runs/lr=0.1 without thinking.

    Several paths, as `images` takes them, become a list. With -m a comma means one job for each, as
    with any key.
    """
    key, equals, value = word.partition("=")
    if not equals or key.lstrip("+") not in PATH_KEYS or not value or value == "null":
        return word
    plain = value[0] in "'\"" or value.startswith("${")
    if key.lstrip("+") not in PATHS_KEYS:
        parts = value.split(",") if is_multirun else [value]
        return word if plain else f"{key}={','.join(quoted(part) for part in parts)}"
    if value[0] == "[" and value[-1] == "]":
        return word
    paths = [value] if plain else [quoted(part) for part in value.split(",")]
    return (
        f"{key}={','.join(f'[{path}]' for path in paths)}"
        if is_multirun
        else (f"{key}=[{','.join(paths)}]")
    )


def _speaks_of_hydra(line: Line) -> bool:
    """Whether the line asks for more of Hydra than composing."""
    plain = {"-m", "--multirun", "-cd", "--config-dir", "-r", "--run"}
    words = (re.match(r"[+~]{0,2}hydra[./=@]", word) for word in line.overrides)
    return not line.hydra_flags <= plain or any(words)
