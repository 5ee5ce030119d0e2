"""Hydra's side of the door: compose the configuration, turn Hydra's errors into ours, run the job.

A plain run and a plain sweep are composed here, once per job, through Hydra's compose API. Whatever
speaks of Hydra itself (`--cfg`, `--info`, a launcher, a sweeper, a `hydra.` key) goes through
`hydra.main`, so that all of Hydra works as its documentation says.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import (
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mnist_cli import conf
from mnist_cli.config import (
    EvalConfig,
    TrainConfig,
    eval_config,
    export_config,
    train_config,
)
from mnist_cli.console import Console
from mnist_cli.errors import MnistCliError, UsageError, shown
from mnist_cli.line import Line
from mnist_cli.typed import UnknownKeyError, nearest, unknown_key

IS_13 = hydra.__version__.startswith("1.3")
HYDRA_ARGUMENTS: dict[str, Any] = (
    {"version_base": "1.3"} if IS_13 else {"execution_whitelist": ["mnist_cli.*"]}
)
PATH_KEYS = ("checkpoint", "out", "resume", "dataset.root", "dataset.mirror")
PARSERS: dict[str, Callable[[object], Any]] = {
    "train": train_config,
    "eval": eval_config,
    "export": export_config,
}


def run(line: Line, console: Console, started_s: float) -> int:
    """Compose what `line` asks for and run it.

    Raises:
        UsageError: nothing was composed, and nothing written.
        MnistCliError: whatever the command raises.
    """
    overrides = [_quoted(word, line.is_multirun) for word in line.overrides]
    with _hydra_errors(line):
        if _speaks_of_hydra(line):
            return _run_hydra(line, overrides, console)
        with _initialized(line):
            parsed = OverridesParser.create().parse_overrides(overrides)
            if line.is_multirun:
                return _run_sweep(line, parsed, console, started_s)
            _refuse_sweep_values(parsed)
            config = _compose(line, overrides)
    document = _command(line, config, _keys(parsed), console, started_s)
    console.document(document)
    return 0


def _command(
    line: Line, config: Any, typed: Sequence[str], console: Console, started_s: float | None = None
) -> dict[str, Any]:
    """Run the command. torch is imported here, after everything that can be wrong was said."""
    if isinstance(config, TrainConfig):
        from mnist_cli import train

        return train.run(config, console, typed, started_s)
    if isinstance(config, EvalConfig):
        from mnist_cli import evaluate

        return evaluate.run(config, console)
    from mnist_cli import export

    return export.run(config, console)


# --- composing -----------------------------------------------------------------------------------


@contextlib.contextmanager
def _initialized(line: Line) -> Iterator[None]:
    arguments = {"version_base": "1.3"} if IS_13 else {}
    with hydra.initialize_config_dir(
        str(conf.conf_dir()), job_name=line.command or "", **arguments
    ):
        yield


def _compose(line: Line, overrides: Sequence[str]) -> Any:
    """The validated configuration of one job."""
    search = [f"file://{Path(folder).absolute()}" for folder in line.config_dirs]
    if search:
        overrides = [*overrides, f"hydra.searchpath=[{','.join(map(_quote, search))}]"]
    return _validated(line, hydra.compose(line.command, list(overrides)))


def _validated(line: Line, config: DictConfig) -> Any:
    data = OmegaConf.to_container(config, resolve=True)
    assert isinstance(data, dict)
    for key, value in data.items():
        if value == "???":
            raise UsageError(f"{key!s}= is required", f"type mnist-cli {line.command} {key!s}=RUN")
    try:
        return PARSERS[line.command or ""](data)
    except UnknownKeyError as error:
        raise unknown_key(
            error.key, conf.known_keys(line.command or "", line.config_dirs)
        ) from None


def _keys(parsed: Sequence[Override]) -> list[str]:
    """The keys that the user typed, without `+` and `~`."""
    return [override.key_or_group for override in parsed]


def _refuse_sweep_values(parsed: Sequence[Override]) -> None:
    for override in parsed:
        if override.is_sweep_override():
            word = override.input_line or ""
            key, _, value = word.partition("=")
            raise UsageError(
                f"{shown(word)} gives several values to {key}",
                f"add -m to try each, or type a list as '{key}=[{value}]'",
            )


def _quoted(word: str, is_multirun: bool) -> str:
    """`word` with its value quoted where it is a path: people type runs/lr=0.1 without thinking."""
    key, equals, value = word.partition("=")
    plain = not value or value == "null" or value[0] in "'\"" or value.startswith("${")
    if not equals or key.lstrip("+") not in PATH_KEYS or plain:
        return word
    parts = value.split(",") if is_multirun else [value]
    return f"{key}={','.join(_quote(part) for part in parts)}"


def _quote(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


# --- sweeps --------------------------------------------------------------------------------------


def _run_sweep(line: Line, parsed: Sequence[Override], console: Console, started_s: float) -> int:
    """Compose and check every job before the first one starts, then run them in order."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    from mnist_cli import sweep

    batches = BasicSweeper.split_arguments(list(parsed), None)
    jobs = [sweep.Job(tuple(words), _compose(line, words)) for words in batches[0]]
    return sweep.run(
        jobs,
        console,
        lambda job, console: _command(
            line, job.config, [w.partition("=")[0] for w in job.words], console
        ),
    )


# --- through hydra.main --------------------------------------------------------------------------


def _speaks_of_hydra(line: Line) -> bool:
    """Whether the line asks for more of Hydra than composing."""
    plain = {"-m", "--multirun", "-cd", "--config-dir", "-r", "--run"}
    return not _flags(line) <= plain or any(
        re.match(r"[+~]{0,2}hydra[./=@]", word) for word in line.overrides
    )


def _flags(line: Line) -> set[str]:
    return {word.split("=", 1)[0] for word in line.hydra if word.startswith("-")}


def _run_hydra(line: Line, overrides: Sequence[str], console: Console) -> int:
    """Hand the whole line to `hydra.main`."""
    if line.is_multirun:
        return _run_hydra_sweep(line, overrides, console)
    outcome: list[Any] = []

    def task(composed: DictConfig) -> None:
        config, typed = _validated(line, composed), _typed_words(HydraConfig.get())
        outcome.append(_captured(lambda: _command(line, config, typed, console)))

    shows = {"-c", "--cfg", "-i", "--info", "--hydra-help"} & _flags(line)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed) if shows else contextlib.nullcontext():
        _hydra_main(line, overrides, task)
    for document in outcome:
        if isinstance(document, BaseException):
            raise document
        console.document(document)
    if shows:
        text = printed.getvalue().rstrip("\n")
        is_yaml = {"-c", "--cfg"} & _flags(line)
        data = OmegaConf.to_container(OmegaConf.create(text)) if is_yaml else {"output": text}
        console.answer(text, data)
    return 0


def _run_hydra_sweep(line: Line, overrides: Sequence[str], console: Console) -> int:
    """A sweep by one of Hydra's sweepers and launchers, wherever they run its jobs."""
    from mnist_cli import sweep

    folder = sweep.folder_of(line.overrides)
    quoted = _quote(str(folder))
    own = [word for word in overrides if not re.match("(out|hydra.sweep.dir)=", word)]

    def task(composed: DictConfig) -> Any:
        hydra_config = HydraConfig.get()
        job = sweep.Job(tuple(hydra_config.overrides.task), _validated(line, composed))
        if isinstance(job.config, TrainConfig):
            job = sweep.placed(job, Path(hydra_config.sweep.dir), [job])
        document = _command(line, job.config, _typed_words(hydra_config), console)
        return (document.get("best") or {}).get("value")

    failure = None
    try:
        _hydra_main(line, [*own, f"hydra.sweep.dir={quoted}"], task)
    except MnistCliError as error:
        failure = error
    jobs = sweep.results_in(folder)
    if failure is not None and not jobs:
        raise failure
    return sweep.finish(console, folder, jobs)


def _hydra_main(line: Line, overrides: Sequence[str], task: Callable[[DictConfig], Any]) -> None:
    if IS_13 and sys.version_info >= (3, 14):  # hydra#3121: its help text fails argparse's check
        argparse.ArgumentParser._check_help = lambda self, action: None  # type: ignore[attr-defined]
    arguments, sys.argv = sys.argv, ["mnist-cli", *line.hydra, *overrides]
    try:
        main = hydra.main(
            config_path=str(conf.conf_dir()), config_name=line.command, **HYDRA_ARGUMENTS
        )
        main(task)()
    except SystemExit as end:
        if end.code not in (None, 0):
            raise UsageError("Hydra can't read the flags", "type mnist-cli --help") from end
    finally:
        sys.argv = arguments


def _typed_words(hydra_config: Any) -> list[str]:
    """The keys that the user named, as Hydra tells a job."""
    return [word.lstrip("+~").partition("=")[0] for word in hydra_config.overrides.task]


def _captured(call: Callable[[], Any]) -> Any:
    """The result of `call`, or its error: Hydra would add lines of its own to what is raised."""
    try:
        return call()
    except (MnistCliError, Exception) as error:
        return error


# --- errors --------------------------------------------------------------------------------------


@contextlib.contextmanager
def _hydra_errors(line: Line) -> Iterator[None]:
    """Turn what Hydra and OmegaConf raise into one line of what is wrong and one to type."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise _explained(line, error) from error
    finally:
        if before is None:
            os.environ.pop("HYDRA_FULL_ERROR", None)


def _explained(line: Line, error: Exception) -> UsageError:
    text = str(error).strip()
    if isinstance(error, OverrideParseException):
        return _unreadable(line, error.override)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return _unknown_option(line, group, name, sorted(error.options or []))
    if match := re.match(r"Could not override '([^'@]+)'", text):
        key = match[1]
        if key == "experiment":
            return UsageError(
                "experiment is not part of the defaults", f"type +{_word_of(line, 'experiment')}"
            )
        return _unknown_key(line, key)
    if match := re.match(r"Could not delete from config. '([^']+)'", text):
        return _unknown_key(line, match[1])
    if match := re.search(r"Multiple values for (\S+)\.", text):
        return UsageError(f"{match[1]} is chosen twice", f"type {match[1]}=OPTION without the +")
    first = text.splitlines()[0] if text else type(error).__name__
    return UsageError(first, f"type mnist-cli {line.command} --help")


def _word_of(line: Line, key: str) -> str:
    return next((w for w in line.overrides if w.startswith(f"{key}=")), f"{key}=NAME")


def _unreadable(line: Line, word: str) -> UsageError:
    key, equals, value = word.partition("=")
    if not equals:
        main_key = {"train": None, "eval": "checkpoint", "export": "checkpoint"}[line.command or ""]
        hint = (
            f"type {main_key}={word}"
            if main_key
            else "overrides look like key=value: optim.lr=0.01"
        )
        return UsageError(f"{shown(word)} is not an override", hint)
    return UsageError(f"can't read the value of {shown(word)}", f"quote it: \"{key}='{value}'\"")


def _unknown_option(line: Line, group: str, name: str, options: list[str]) -> UsageError:
    if not options:
        return _unknown_key(line, group or name)
    best = nearest(name, options)
    plus = "+" if group == conf.EXPERIMENT else ""
    meant = f"did you mean {plus}{group}={best}? " if best else ""
    return UsageError(
        f"there is no {group} {shown(name)}", f"{meant}there are: {', '.join(options)}"
    )


def _unknown_key(line: Line, key: str) -> UsageError:
    """A key that doesn't exist at all, or not in the option that is chosen."""
    known = conf.known_keys(line.command or "", line.config_dirs)
    group = key.partition(".")[0]
    owners = [
        name
        for name, option in conf.options(group, line.config_dirs).items()
        if key in [known_key.path for known_key in option.keys]
    ]
    if owners:
        return UsageError(
            f"the chosen {group} has no key {shown(key)}",
            f"{key} belongs to {group}={', '.join(owners)}",
        )
    return unknown_key(key, known)
