"""What a checked configuration asks for: its command, and the report of what that left."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mnist_cli import conf, find
from mnist_cli import run as runs
from mnist_cli.config import DemoConfig, EvalConfig, PredictConfig, ReportConfig, TrainConfig
from mnist_cli.console import Console
from mnist_cli.errors import Interrupted, UsageError, one_line
from mnist_cli.imports import importing
from mnist_cli.options import plugin_words
from mnist_cli.run import RunFolder


def run(config: Any, typed: Sequence[str], console: Console, started_s: float | None = None) -> Any:
    """Run the command of `config` and return its document: a list of `predict`, None of `demo`,
    which has printed it, else a dict.

    torch is imported here, after all that can be wrong was said.

    Raises:
        UsageError: `out=` is a file.
        ResourceError: the answers of a command could not be printed.
        MnistCliError: whatever the command raises.
    """
    out = getattr(config, "out", None)
    if out is not None:
        out = os.path.expanduser(out)
        config = dataclasses.replace(config, out=out)
        if os.path.isfile(out):
            raise UsageError(f"out={out} is a file", "name a folder: out=DIR")
    _look(config)
    with importing():
        run_it = _imported(config)
    if isinstance(config, TrainConfig):
        return run_it(config, console, typed, started_s)
    document = run_it(config, console)
    if isinstance(config, EvalConfig | PredictConfig):
        console.require_delivered()
    return document


def _look(config: Any) -> None:
    """Say now of a path what the command would say after torch is imported. Raises as it does."""
    if isinstance(config, TrainConfig):
        if find.run_to_resume(config) is not None or config.out is None:
            return
        with contextlib.suppress(OSError):
            if runs.holds_run(Path(config.out)):
                with runs.create(config.out, "", config.resume == "auto"):
                    pass
    elif not isinstance(config, ReportConfig):
        find.checkpoint(config.checkpoint)


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
    with _never_failing("run", folder.path, config, console):
        from mnist_cli import report

        report.draw(folder, console)


def draw_sweep(config: Any, folder: Path, console: Console) -> None:
    """Draw what a sweep left, unless `report=false` is typed. Raises what `draw_report` does.

    Args:
        config: of any of its jobs.
    """
    if not config.report:
        return
    with _never_failing("sweep", folder, config, console):
        from mnist_cli import report

        report.draw_sweep(folder, console)


@contextlib.contextmanager
def _never_failing(
    what: str, folder: Path, config: TrainConfig, console: Console
) -> Iterator[None]:
    """Turn what goes wrong with a report into a warning, and a signal into what it interrupts."""
    again = f"type mnist-cli report {shlex.join([f'run={folder}', *plugin_words(config.plugin)])}"
    try:
        yield
    except Interrupted as error:
        raise Interrupted(
            error.exit_code - 128, f"the {what} is complete, its report isn't: {folder}", again
        ) from None
    except Exception as error:
        console.warn(f"no report was drawn: {one_line(str(error))}; {again}")
