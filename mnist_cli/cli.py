"""The door: from the words on the command line to a command, and from its end to an exit code.

Nothing heavy is imported here. `--help`, `--version`, `list`, completion and an unknown command are
answered from file names; only a command that composes a configuration imports Hydra (`compose.py`),
and only one that trains, evaluates or exports imports torch.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
import types
from typing import NamedTuple

from mnist_cli import __version__
from mnist_cli.conf import COMMANDS
from mnist_cli.console import Console
from mnist_cli.errors import Interrupted, MnistCliError, UsageError, shown

# Hydra's own flags, and whether a value follows as a word of its own.
HYDRA_FLAGS = {
    "-m": False, "--multirun": False, "--run": False, "-r": False, "--resolve": False,
    "--hydra-help": False, "-c": True, "--cfg": True, "-p": True, "--package": True,
    "-cd": True, "--config-dir": True, "-cp": True, "--config-path": True,
    "-cn": True, "--config-name": True, "-i": False, "--info": False,
}  # fmt: skip
INFO_TOPICS = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
OWN_FLAGS = {"--help": "help", "-h": "help", "--version": "version", "--json": "json",
             "--quiet": "quiet", "-q": "quiet"}  # fmt: skip


class Line(NamedTuple):
    """A command line, taken apart. Flags may stand anywhere on it."""

    command: str | None
    own: frozenset[str]
    hydra: tuple[str, ...]
    overrides: tuple[str, ...]

    @property
    def config_dirs(self) -> tuple[str, ...]:
        pairs = itertools.pairwise(word for flag in self.hydra for word in flag.split("=", 1))
        return tuple(value for flag, value in pairs if flag in ("-cd", "--config-dir"))

    @property
    def is_multirun(self) -> bool:
        return bool({"-m", "--multirun"} & set(self.hydra))


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` and return its exit code."""
    started_s = time.monotonic()
    words = sys.argv[1:] if argv is None else argv
    if any(word in ("-sc", "--shell-completion") for word in words):
        from mnist_cli import completion

        return completion.main(words)
    console = Console(quiet=bool({"--quiet", "-q"} & set(words)), as_json="--json" in words)
    signal.signal(signal.SIGTERM, _stop)
    try:
        code = _dispatch(parse_line(words), console, started_s)
        sys.stdout.flush()
        return code
    except MnistCliError as error:
        console.error(error.message, error.hint, error.exit_code)
        return error.exit_code
    except Interrupted as error:
        console.error(error.message, error.hint, error.exit_code)
        return error.exit_code
    except KeyboardInterrupt:
        console.error("interrupted by SIGINT", "type the command again to start over", 130)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _stop(number: int, frame: types.FrameType | None) -> None:
    raise Interrupted(number, "interrupted by SIGTERM", "type the command again to start over")


def _dispatch(line: Line, console: Console, started_s: float) -> int:
    from mnist_cli import help as usage

    if "version" in line.own:
        console.answer(f"mnist-cli {__version__}", {"version": __version__})
    elif line.command is None:
        console.answer(usage.usage(), {"help": usage.usage()})
    elif "help" in line.own:
        text = usage.command_usage(line.command, line.config_dirs)
        console.answer(text, {"help": text})
    elif line.command == "list":
        group = line.overrides[0] if line.overrides else None
        if len(line.overrides) > 1 or (line.hydra and not line.config_dirs):
            raise UsageError("list takes one group at most", "type mnist-cli list model")
        data = usage.list_data(group, line.config_dirs)
        console.answer(usage.list_text(group, line.config_dirs), data)
    else:
        from mnist_cli import compose

        return compose.run(line, console, started_s)
    return 0


def parse_line(words: list[str]) -> Line:
    """Take the command line apart.

    Raises:
        UsageError: an unknown command or flag, or a word that is neither flag nor override.
    """
    own: set[str] = set()
    hydra: list[str] = []
    rest: list[str] = []
    queue = list(words)
    while queue:
        word = queue.pop(0)
        flag = word.split("=", 1)[0]
        if word in OWN_FLAGS:
            own.add(OWN_FLAGS[word])
        elif flag in HYDRA_FLAGS:
            hydra.append(word)
            takes_value = HYDRA_FLAGS[flag] or (
                flag in ("-i", "--info") and queue[:1] and queue[0] in INFO_TOPICS
            )
            if takes_value and "=" not in word:
                if not queue:
                    raise UsageError(f"{word} needs a value", "type mnist-cli --help")
                hydra.append(queue.pop(0))
        elif word.startswith("-") and word not in ("-", "--"):
            raise _unknown_flag(word, queue)
        else:
            rest.append(word)
    command = rest.pop(0) if rest else None
    if command is not None and command not in COMMANDS:
        raise _unknown_command(command)
    if command is None and hydra:
        raise UsageError(f"{hydra[0]} needs a command", f"type mnist-cli train {hydra[0]}")
    return Line(command, frozenset(own), tuple(hydra), tuple(rest))


def _unknown_command(word: str) -> UsageError:
    from difflib import get_close_matches

    close = get_close_matches(word, COMMANDS, n=1)
    if "=" in word:
        return UsageError(
            f"{shown(word)} stands where the command should", f"type mnist-cli train {word}"
        )
    hint = f"did you mean {close[0]}?" if close else "type mnist-cli --help"
    return UsageError(f"unknown command {shown(word)}; commands are: {', '.join(COMMANDS)}", hint)


def _unknown_flag(word: str, rest: list[str]) -> UsageError:
    bare = word.lstrip("-")
    key, equals, value = bare.partition("=")
    value = value if equals else (rest[0] if rest and "=" not in rest[0] else "VALUE")
    return UsageError(
        f"unknown flag {shown(word)}",
        f"overrides have no dashes: {key}={value}; flags: mnist-cli --help",
    )
