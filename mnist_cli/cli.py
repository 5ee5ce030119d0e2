"""The door: from the words on the command line to a command, and from its end to an exit code.

Nothing heavy is imported here. `--help`, `--version`, `list`, completion and an unknown command are
answered from file names; only a command that composes a configuration imports Hydra, and only one
that trains, evaluates or exports imports torch.
"""

from __future__ import annotations

import errno
import io
import os
import sys
import time

from mnist_cli import __version__
from mnist_cli.console import Console
from mnist_cli.errors import (
    Interrupted,
    MnistCliError,
    UsageError,
    is_out_of_memory,
    one_line,
    shown,
)
from mnist_cli.line import Line, parse_line
from mnist_cli.signals import raise_them


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` and return its exit code."""
    started_s = time.monotonic()
    words = sys.argv[1:] if argv is None else argv
    _mend_streams()
    if any(word in ("-sc", "--shell-completion") for word in words):
        from mnist_cli import completion

        return completion.main(words)
    console = Console(quiet=bool({"--quiet", "-q"} & set(words)), as_json="--json" in words)
    raise_them()
    try:
        code = _dispatch(parse_line(words), console, started_s)
        sys.stdout.flush()
        return code
    except MnistCliError as error:
        console.error(error.message, error.hint, error.exit_code, instead=error.document)
        return error.exit_code
    except Interrupted as error:
        console.error(error.message, error.hint, error.exit_code)
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if is_out_of_memory(error):
            console.error("out of memory", "type a smaller batch_size=, or take a smaller model", 6)
            return 6
        if isinstance(error, OSError) and error.errno == errno.EMFILE:
            console.error("too many files are open", "allow more with ulimit -n 1024", 6)
            return 6
        import traceback

        traceback.print_exc()
        message = f"{type(error).__name__}: {one_line(str(error))}"
        console.error(message, "this is a fault of mnist-cli: please report the lines above", 1)
        return 1


def _mend_streams() -> None:
    """Let a closed stream swallow what is written, and one of a small alphabet escape it."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - it stays open until the end
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - it stays open until the end
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _dispatch(line: Line, console: Console, started_s: float) -> int:
    from mnist_cli import help as usage

    for folder in line.typed_dirs:
        _check_config_dir(line.command or "", folder)
    if "version" in line.own:
        console.answer(f"mnist-cli {__version__}", {"version": __version__})
    elif line.command is None:
        console.answer(usage.usage(), {"help": usage.usage()})
    elif "help" in line.own:
        text = usage.command_usage(line.command, line.config_dirs)
        console.answer(text, {"help": text})
    elif line.command == "list":
        named = [word.lstrip("+") for word in line.overrides if not word.startswith("plugin=")]
        if useless := line.hydra_flags - {"-cd", "--config-dir"}:
            raise UsageError(
                f"list composes nothing, so {min(useless)} has nothing to act on",
                "type mnist-cli list",
            )
        if len(named) > 1:
            raise UsageError("list takes one group at most", "type mnist-cli list model")
        what = named[0] if named else None
        data = usage.list_data(what, line.config_dirs)
        console.answer(usage.list_text(what, line.config_dirs), data)
    else:
        return _run(line, console, started_s)
    return 0


def _check_config_dir(command: str, folder: str) -> None:
    """Raises UsageError: it can't be read, or Hydra would pass over an option in it."""
    from mnist_cli import conf

    if not os.path.isdir(folder):
        raise UsageError(
            f"--config-dir {shown(folder)} is not a folder",
            "name a folder with options of your own, such as DIR/optim/NAME.yaml",
        )
    if not os.access(folder, os.R_OK | os.X_OK):
        raise UsageError(
            f"--config-dir {shown(folder)} can't be read: Permission denied",
            "make it readable, or name another folder",
        )
    for path, reason, instead in conf.passed_over(command, folder):
        raise UsageError(f"{shown(str(path), 1000)} would not be read: {reason}", instead)


def _run(line: Line, console: Console, started_s: float) -> int:
    """Run a command that has a configuration. Hydra is imported here.

    Whatever speaks of Hydra itself (`--cfg`, `--info`, a launcher, a sweeper, a `hydra.` key) goes
    through `hydra.main`, so that all of Hydra works as its documentation says.
    """
    from mnist_cli.imports import importing

    if line.is_multirun and line.command == "demo":
        raise UsageError("demo shows one checkpoint, and -m asks for several", "leave -m out")
    with importing():
        from mnist_cli import compose
    if line.speaks_of_hydra:
        from mnist_cli import hydra_main

        return hydra_main.run(line, console)
    if line.is_multirun:
        from mnist_cli import multirun

        return multirun.run(line, console)
    return compose.run(line, console, started_s)
