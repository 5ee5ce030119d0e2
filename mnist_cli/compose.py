"""Composing: from overrides to a checked configuration.

A plain run is composed and run here, through Hydra's compose API, with what the jobs of a sweep
need as well: `multirun.py` runs the lines with `-m`, `hydra_main.py` those that speak of Hydra.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from mnist_cli import command, conf, cpu, logger, plugin
from mnist_cli.config import (
    TrainConfig,
    absolute,
    demo_config,
    eval_config,
    export_config,
    flatten,
    predict_config,
    report_config,
    to_plain,
    train_config,
)
from mnist_cli.console import Console
from mnist_cli.errors import UsageError, shown
from mnist_cli.explain import hydra_errors, no_such_key
from mnist_cli.line import Line
from mnist_cli.options import EmnistConfig, ImageFilesConfig
from mnist_cli.run import quoted
from mnist_cli.signals import held
from mnist_cli.typed import UnknownKeyError, unknown_key

IS_13 = hydra.__version__.startswith("1.3")
PATHS_KEYS = ("images", "run")  # of several paths
LIST_KEYS = ("plugin", "logger", *PATHS_KEYS)  # one may be typed without brackets
PATH_KEYS = (
    *PATHS_KEYS, "checkpoint", "out", "resume", "sweep.resume", "dataset.root", "dataset.mirror",
)  # fmt: skip
FOLDER_KEYS = (  # of Hydra, which has no part in ours
    *("hydra.run", "hydra.run.dir", "hydra.sweep", "hydra.sweep.dir", "hydra.sweep.subdir"),
    "hydra.output_subdir",
)
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
    overrides = overrides_of(line)
    with held(), hydra_errors(line), initialized(line):
        parsed = parse(overrides)
        _refuse_sweep_keys(parsed)
        _refuse_sweep_values(line, parsed)
        config = checked(line, compose(line, [*_groups_of_run(line), *overrides]))
    document = command.run(config, typed_keys(parsed, config), console, started_s)
    if document is not None:
        console.document(document)
    command.draw_report(config, document, console)
    return 0


@contextlib.contextmanager
def initialized(line: Line) -> Iterator[None]:
    """Hydra's compose API, ready for the configuration of `line`."""
    arguments = {"version_base": "1.3"} if IS_13 else {}
    with hydra.initialize_config_dir(
        str(conf.conf_dir()), job_name=line.command or "", **arguments
    ):
        # Not by hydra.searchpath, of which a `glob()` knows nothing.
        loader = GlobalHydra.instance().config_loader()
        path = loader.get_search_path()
        for folder in line.config_dirs:
            path.prepend("user", _address(folder), SearchPathQuery(provider="schema"))  # the last
        loader.repository.initialize_sources(path)  # type: ignore[attr-defined]
        yield


def parse(overrides: Sequence[str]) -> list[Override]:
    """What Hydra reads. Inside of `initialized`: a `glob()` goes over the options of a group."""
    loader = GlobalHydra.instance().config_loader()
    return OverridesParser.create(loader).parse_overrides(list(overrides))


def compose(line: Line, overrides: Sequence[str]) -> DictConfig:
    """What Hydra makes of `overrides`."""
    return hydra.compose(line.command, list(overrides))


def searched(folders: Sequence[str]) -> list[str]:
    """The override that makes Hydra search `folders`, if there are any."""
    search = [quoted(_address(folder)) for folder in folders]
    return [f"hydra.searchpath=[{','.join(search)}]"] if search else []


def _address(folder: str) -> str:
    return f"file://{Path(folder).absolute()}"


def checked(line: Line, composed: DictConfig) -> Any:
    """The typed configuration of what Hydra composed. Raises UsageError."""
    data = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(data, dict)
    data.pop("sweep", None)  # a job knows nothing of its sweep
    for key, value in data.items():
        if value == "???":
            value = {"images": "PATH", "checkpoint": "RUN", "run": "RUN"}.get(str(key), "VALUE")
            raise UsageError(
                f"{key!s}= is required", f"type mnist-cli {line.command} {key!s}={value}"
            )
    for word in line.overrides:
        key, _, value = word.lstrip("+~").partition("=")
        if key in conf.GROUPS and value.startswith("["):
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
        config = _with_absolute_root(config)
        logger.require(config.logger)
        _check_allowed(line, config)
        _check_patience(config)
        _check_precision(config)
    return config


def _with_absolute_root(config: TrainConfig) -> TrainConfig:
    """`config` with a `dataset.root` that means the same from any folder: checkpoints keep it."""
    data = config.dataset
    if not isinstance(data, ImageFilesConfig | EmnistConfig) or data.root is None:
        return config
    return dataclasses.replace(config, dataset=dataclasses.replace(data, root=absolute(data.root)))


def _check_allowed(line: Line, config: TrainConfig) -> None:
    """Raises UsageError: `resume_allow` names what is neither a key, of any option, nor a block.

    Not part of `train_config`, which reads checkpoints too: their words were right when typed.
    """
    if not config.resume_allow:
        return
    known = conf.known_keys("train", line.config_dirs)
    keys = {*known, *flatten(to_plain(config))}
    blocks = {key.partition(".")[0] for key in keys}
    for name in config.resume_allow:
        if name not in keys | blocks:
            raise unknown_key(name, known)


def _check_patience(config: TrainConfig) -> None:
    """Raises UsageError: an early stop longer than the run.

    Not part of `train_config`: a run that is resumed may have more epochs than are typed.
    """
    patience = config.early_stop.patience
    if config.resume in (None, "auto") and patience is not None and patience > config.epochs:
        raise UsageError(
            f"early_stop.patience={patience} can't end a run of epochs={config.epochs}",
            "type early_stop.patience=null, or more epochs",
        )


def _check_precision(config: TrainConfig) -> None:
    """Raises UsageError: this CPU has no bfloat16. With device=auto only torch knows the device.

    Not part of `train_config`: a checkpoint may come from another machine.
    """
    is_new = config.resume in (None, "auto")
    if is_new and (config.precision, config.device) == ("bfloat16", "cpu") and not cpu.has_amx():
        raise UsageError(
            "precision=bfloat16 needs CUDA or a CPU with AMX, and device=cpu has none",
            "type precision=float32",
        )


def _groups_of_run(line: Line) -> list[str]:
    """With `resume=RUN`: the options that the run has chosen, for the groups that aren't typed.

    So that `resume=RUN model.hidden=[32]` finds the key in the model of the run.
    """
    words = dict(word.partition("=")[::2] for word in line.overrides)
    run = words.get("resume", "").strip("'\"")
    if run in ("", "auto", "null"):
        return []
    chosen = conf.read(Path(os.path.expanduser(run)) / "config.yaml").keys
    names = {key.path.removesuffix(".name"): str(key.value) for key in chosen}
    return [
        f"{group}={names[group]}"
        for group in conf.GROUPS
        if group not in words and names.get(group) in conf.options(group, line.config_dirs)
    ]


def typed_keys(parsed: Sequence[Override], config: Any) -> list[str]:
    """The keys that were typed. An option of `--config-dir` counts as typing all that it sets."""
    keys = [override.key_or_group for override in parsed]
    values = flatten(to_plain(config))
    for override in parsed:
        group = override.key_or_group
        if group in conf.GROUPS and values.get(f"{group}.name") != override.value():
            keys += [key for key in values if key.startswith(f"{group}.")]
    return keys


def is_sweep_key(override: Override) -> bool:
    return override.key_or_group.partition(".")[0] == "sweep"


def _refuse_sweep_keys(parsed: Sequence[Override]) -> None:
    for override in parsed:
        if is_sweep_key(override):
            raise UsageError(
                f"{override.key_or_group}= is for a sweep, and this is one run",
                "add -m to run a sweep",
            )


def _refuse_sweep_values(line: Line, parsed: Sequence[Override]) -> None:
    for override in parsed:
        if override.is_sweep_override():
            word = override.input_line or ""
            key, _, value = word.partition("=")
            is_list = conf.takes_list(line.command or "", key, line.config_dirs)
            as_list = f", or type a list as '{key}=[{value}]'" if is_list else ""
            raise UsageError(
                f"{shown(word)} gives several values to {key}", f"add -m to try each{as_list}"
            )


def overrides_of(line: Line) -> list[str]:
    """The overrides of `line` as Hydra reads them. Raises UsageError: one is without effect."""
    for word in line.overrides:
        key = word.lstrip("+~").partition("=")[0]
        if key in FOLDER_KEYS:
            raise UsageError(f"{key}= doesn't name the folder of a run", "type out=DIR")
    return [_with_quoted_path(word, line.is_multirun) for word in line.overrides]


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
    is_one = os.path.lexists(os.path.expanduser(value))  # maybe with a comma in its name
    parts = [value] if is_one else value.split(",")
    paths = [value] if plain else [quoted(part) for part in parts]
    return (
        f"{key}={','.join(f'[{path}]' for path in paths)}"
        if is_multirun
        else (f"{key}=[{','.join(paths)}]")
    )
