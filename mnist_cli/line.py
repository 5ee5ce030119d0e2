"""The words of a command line: the command, the flags, which may stand anywhere, the overrides."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from mnist_cli.conf import COMMANDS
from mnist_cli.errors import UsageError, shown

# Hydra's own flags, and whether a value follows as a word of its own.
HYDRA_FLAGS = {
    "-m": False, "--multirun": False, "--run": False, "-r": False, "--resolve": False,
    "--hydra-help": False, "-c": True, "--cfg": True, "-p": True, "--package": True,
    "-cd": True, "--config-dir": True, "-cp": True, "--config-path": True,
    "-cn": True, "--config-name": True, "-i": False, "--info": False,
}  # fmt: skip
CFG_TOPICS = ("job", "hydra", "all")
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
    def plugins(self) -> tuple[str, ...]:
        """The names that were typed as `plugin=a` or `plugin=[a,b]`."""
        return typed_plugins(self.overrides)

    @property
    def typed_dirs(self) -> tuple[str, ...]:
        """The folders of --config-dir."""
        folders, words = [], iter(self.hydra)
        for word in words:
            flag, equals, value = word.partition("=")
            if HYDRA_FLAGS.get(flag) and not equals:
                value = next(words)
            if flag in ("-cd", "--config-dir"):
                folders.append(value)
        return tuple(folders)

    @property
    def config_dirs(self) -> tuple[str, ...]:
        """The folders of --config-dir, and of the plugins. Raises UsageError: no such plugin."""
        if not self.plugins:
            return self.typed_dirs
        from mnist_cli import plugin

        return (*self.typed_dirs, *plugin.folders(self.plugins))

    @property
    def hydra_flags(self) -> set[str]:
        """Hydra's flags without their values."""
        return {word.split("=", 1)[0] for word in self.hydra if word.startswith("-")}

    @property
    def is_multirun(self) -> bool:
        return bool({"-m", "--multirun"} & self.hydra_flags) or "hydra.mode=MULTIRUN" in (
            self.overrides
        )

    @property
    def speaks_of_hydra(self) -> bool:
        """Whether the line asks for more of Hydra than composing."""
        plain = {"-m", "--multirun", "-cd", "--config-dir", "-r", "--run"}
        words = (re.match(r"[+~]{0,2}hydra[./=@]", word) for word in self.overrides)
        return not self.hydra_flags <= plain or any(words)


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
        elif word in ("-i", "--info"):
            topic = queue.pop(0) if queue and queue[0] in INFO_TOPICS else "all"
            hydra += [word, topic]
        elif flag in HYDRA_FLAGS:
            hydra.append(word)
            if HYDRA_FLAGS[flag] and "=" not in word:
                if not queue:
                    raise UsageError(f"{word} needs a value", "type mnist-cli --help")
                hydra.append(queue.pop(0))
            topic = hydra[-1].split("=", 1)[-1]
            if flag in ("-c", "--cfg") and topic not in CFG_TOPICS:
                raise UsageError(
                    f"--cfg {shown(topic)} is not a choice", f"type --cfg {', '.join(CFG_TOPICS)}"
                )
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


def typed_plugins(words: Iterable[str]) -> tuple[str, ...]:
    """The names in `plugin=a` or `plugin=[a,b]`; of several such words the last one counts."""
    values = [word for word in words if word.lstrip("+").startswith("plugin=")]
    return tuple(
        dict.fromkeys(re.findall(r"[\w.-]+", values[-1].partition("=")[2] if values else ""))
    )


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
