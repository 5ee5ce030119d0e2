"""Lines that speak of Hydra itself, handed whole to `hydra.main`."""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from mnist_cli import command, compose, conf, durable, multirun, plugin, sweep
from mnist_cli.config import SweepConfig, TrainConfig
from mnist_cli.console import Console
from mnist_cli.errors import Interrupted, UsageError, shown
from mnist_cli.explain import LAUNCHER, hydra_errors, raised_in_full
from mnist_cli.line import Line
from mnist_cli.run import quoted
from mnist_cli.signals import held
from mnist_cli.sweep import each
from mnist_cli.sweep.job import Job, difference, folder_of, shared_words

ARGUMENTS: dict[str, Any] = (
    {"version_base": "1.3"} if compose.IS_13 else {"execution_whitelist": ["mnist_cli.*"]}
)
BASIC = "basic"  # Hydra's own launcher: one job after the other, in this process
SHOWING = {"-c", "--cfg", "-i", "--info", "--hydra-help"}


def run(line: Line, console: Console) -> int:
    """Run `line` through `hydra.main`. Raises what the command raises, and UsageError."""
    overrides = compose.overrides_of(line)
    if line.hydra_flags & SHOWING:
        return _show(line, overrides, console)
    if line.is_multirun:
        return _run_sweep(line, overrides, console)
    outcome: list[tuple[Any, Any]] = []
    holding = contextlib.ExitStack()

    def task(composed: DictConfig) -> None:
        holding.close()
        # Kept, not raised: Hydra would add lines of its own.
        try:
            config = compose.checked(line, composed)
            typed = compose.typed_keys(compose.parse(_words_of_job()), config)
            outcome.append((config, command.run(config, typed, console)))
        except Exception as error:
            outcome.append((None, error))

    with hydra_errors(line), holding:
        holding.enter_context(held())
        _hydra_main(line, overrides, task)
    for config, document in outcome:
        if isinstance(document, Exception):
            raise document
        if document is not None:
            console.document(document)
        command.draw_report(config, document, console)
    return 0


def _show(line: Line, overrides: Sequence[str], console: Console) -> int:
    """`--cfg`, `--info` and the like: what Hydra prints, or the same as a JSON document."""
    with held(), hydra_errors(line), compose.initialized(line):
        for override in compose.parse(overrides):
            if override.is_sweep_override():
                word = shown(override.input_line or "")
                raise UsageError(f"{word} gives several values", "type the one to be shown")
    printed, complaints = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complaints):
        try:
            with held(), hydra_errors(line):
                _hydra_main(line, overrides, lambda composed: None)
        except SystemExit as end:
            if end.code not in (None, 0):
                last = (complaints.getvalue().strip().splitlines() or ["Hydra can't show this"])[-1]
                raise UsageError(last, f"type mnist-cli {line.command} --help") from end
    text = printed.getvalue().rstrip("\n")
    is_yaml = {"-c", "--cfg"} & line.hydra_flags
    data = OmegaConf.to_container(OmegaConf.create(text)) if is_yaml else {"output": text}
    console.answer(text, data)
    return 0


def _run_sweep(line: Line, overrides: Sequence[str], console: Console) -> int:
    """A sweep by one of Hydra's sweepers and launchers, wherever they run its jobs."""
    if line.plugins and any("glob(" in word for word in overrides):
        raise UsageError(
            f"glob() doesn't see the options of a plugin where {LAUNCHER}= runs the jobs",
            "type their names",
        )
    jobs, settings, launcher = _check_jobs(line, overrides)
    folder = None if settings is None else folder_of(jobs, settings)
    if folder is None and launcher != BASIC:
        raise UsageError(
            f"{LAUNCHER}={launcher} is for train: nothing brings back what {line.command} prints",
            f"leave {LAUNCHER}= out",
        )
    own = list(overrides)
    if folder is not None:  # a process on another machine may stand in another folder
        own = [word for word in overrides if not word.startswith(("out=", "sweep."))]
        own.append(f"hydra.sweep.dir={quoted(str(folder.absolute()))}")
    here: list[dict[str, Any]] = []
    num_jobs, shared = len(jobs), shared_words(jobs)

    def task(composed: DictConfig) -> float:
        # Failures are kept, not raised: Hydra would add lines of its own. NaN tells a sweeper.
        config = HydraConfig.get()
        words = tuple(config.overrides.task)

        job = Job(words, compose.checked(line, composed))
        if isinstance(job.config, TrainConfig):
            label, number = difference(job, shared), config.job.num + 1
            place = Path(config.sweep.dir)
            document = sweep.run_launched(job, place, label, number, num_jobs, console)
            multirun.draw_typed(job, document, console)
        else:
            call = partial(command.run, job.config, job.typed, console)
            document = each.outcome_of(job, call, console)
        here.append(document)
        value = (document.get("best") or {}).get("value")
        return math.nan if value is None else float(value)

    if folder is None:  # only train has a folder for all jobs
        each.refuse_same_files(jobs)
        with durable.temporary_folder() as nowhere, raised_in_full():
            _hydra_main(line, [*own, f"hydra.sweep.dir={quoted(str(nowhere))}"], task)
        return each.finish(console, here)
    stopped_by, gave_up = None, None
    if launcher != BASIC:
        console.say(f"launch   {num_jobs} jobs by {LAUNCHER}={launcher}, in {folder}")
    with durable.locked(folder):
        try:
            with raised_in_full():
                _hydra_main(line, own, task)
        except Interrupted as error:
            stopped_by = error.exit_code - 128
        except Exception as error:  # of the launcher: no job raises, and all of them were composed
            reason = " ".join(str(error).splitlines()[:2])  # below them submitit quotes whole logs
            gave_up = f"{LAUNCHER}={launcher} gave up: {type(error).__name__}: {reason}"
            sweep.record_cut_off(jobs, folder, "its process ended before the job was done")
        if stopped_by is not None:
            return sweep.finish(console, folder, here or None, num_jobs, stopped_by)
        if gave_up is not None:
            code = sweep.give_up(console, folder, here or None, gave_up)
        else:
            code = sweep.finish(console, folder, here or None)
        command.draw_sweep(jobs[0].config, folder, console)
        return code


def _check_jobs(
    line: Line, overrides: Sequence[str]
) -> tuple[list[Job[Any]], SweepConfig | None, str]:
    """Compose every job before one starts; the first alone where values are searched for.

    Returns:
        The jobs, the keys `sweep.*` of `train`, and the launcher.
    """
    with held(), hydra_errors(line), compose.initialized(line):
        parsed = compose.parse(overrides)
        of_hydra = [o for o in parsed if re.match(r"hydra\b", o.key_or_group)]
        plain = [o for o in parsed if not re.match(r"hydra\b", o.key_or_group)]
        listed = [o for o in plain if not o.is_sweep_override() or o.is_discrete_sweep()]
        _refuse_own_keys(listed)
        composer = multirun.Composer(line, listed)
        settings = multirun.sweep_settings(composer, [*listed, *of_hydra])
        launchers = [o.value() for o in of_hydra if o.key_or_group == LAUNCHER]
        return multirun.sweep_jobs(composer, listed), settings, str([BASIC, *launchers][-1])


def _refuse_own_keys(parsed: Sequence[Override]) -> None:
    """Of the keys `sweep.*` only the folder means something to a launcher of Hydra."""
    for override in parsed:
        if compose.is_sweep_key(override) and override.key_or_group != "sweep.resume":
            raise UsageError(
                f"{shown(override.input_line)} doesn't go with hydra. keys: Hydra runs the jobs",
                "leave either out",
            )


def _hydra_main(line: Line, overrides: Sequence[str], task: Callable[[DictConfig], Any]) -> None:
    if compose.IS_13 and sys.version_info >= (3, 14):
        # hydra#3121: its help text fails argparse's check
        argparse.ArgumentParser._check_help = lambda self, action: None  # type: ignore[attr-defined]
    search = compose.searched(plugin.folders(line.plugins))
    arguments, sys.argv = sys.argv, ["mnist-cli", *line.hydra, *search, *overrides]
    try:
        main = hydra.main(config_path=str(conf.conf_dir()), config_name=line.command, **ARGUMENTS)
        main(task)()
    finally:
        sys.argv = arguments


def _words_of_job() -> list[str]:
    """The overrides that the user typed, as Hydra tells a job."""
    return list(HydraConfig.get().overrides.task)
