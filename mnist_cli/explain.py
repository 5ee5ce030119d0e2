"""What Hydra and OmegaConf raise, as one line of what is wrong and one of what to type."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shlex
from collections.abc import Iterator

from hydra.errors import MissingConfigException, OverrideParseException

from mnist_cli import conf
from mnist_cli.errors import MnistCliError, UsageError, shown
from mnist_cli.line import Line
from mnist_cli.typed import nearest, unknown_key

LAUNCHER = "hydra/launcher"
EXTRA_OF = {  # the extra of this package that brings a launcher of Hydra
    "submitit_local": "submitit", "submitit_slurm": "submitit", "ray": "ray",
}  # fmt: skip


@contextlib.contextmanager
def hydra_errors(line: Line) -> Iterator[None]:
    """Explain what Hydra raises while it reads and composes `line`. Run no command inside."""
    try:
        with raised_in_full():
            yield
    except MnistCliError:
        raise
    except Exception as error:  # plain ones too, where a group is given something that is no name
        if isinstance(error, OSError) and error.errno == errno.EMFILE:
            raise
        raise _explained(line, error) from error


@contextlib.contextmanager
def raised_in_full() -> Iterator[None]:
    """Let Hydra raise what goes wrong, instead of printing it and leaving the program."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        os.environ.pop("HYDRA_FULL_ERROR")
        if before is not None:
            os.environ["HYDRA_FULL_ERROR"] = before


def no_such_key(line: Line, key: str) -> UsageError:
    """The error for a key that doesn't exist at all, or not in the option that is chosen."""
    known = conf.known_keys(line.command or "", line.config_dirs)
    group, _, rest = key.partition(".")
    if group == "hydra":
        options = [word for word in line.overrides if word.startswith(f"{LAUNCHER}=")]
        words = " ".join(["train", *options, "--cfg hydra"])
        return UsageError(f"Hydra has no key {shown(key)}", f"type mnist-cli {words}")
    if group in conf.GROUPS and rest == "name":
        return UsageError(f"{key} is fixed by the option", f"choose another one: {group}=OPTION")
    owners = [
        name
        for name, option in conf.options(group, line.config_dirs).items()
        if key in [known_key.path for known_key in option.keys]
    ]
    if owners:
        typed = _word_of(line, group).partition("=")[2].split(",")
        without = [name for name in typed if name in conf.options(group, line.config_dirs)]
        without = [f"{group}={name}" for name in without if name not in owners]
        return UsageError(
            f"{' and '.join(without) or f'the chosen {group}'} has no key {shown(key)}",
            f"{key} belongs to {group}={', '.join(owners)}",
        )
    beside = [other for other in known if other.startswith(f"{group}.")]
    return unknown_key(key, beside if group in conf.GROUPS and rest and beside else known)


def _explained(line: Line, error: Exception) -> UsageError:
    text = str(error).strip()
    if type(error).__module__.startswith("yaml."):
        where = " ".join(part.strip() for part in text.splitlines() if part.strip())
        return UsageError(f"a configuration file is not sound YAML: {where}", "mend that file")
    if isinstance(error, OverrideParseException):
        return _unreadable(line, error.override)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return _unknown_option(line, group, name, sorted(error.options or []))
    if match := re.match(r"Could not override '([^'@]+)'", text):
        if match[1] == conf.EXPERIMENT:
            return UsageError(
                "experiment is not part of the defaults", f"type +{_word_of(line, match[1])}"
            )
        return no_such_key(line, match[1])
    if match := re.match(r"Could not delete from config. '([^']+)'", text):
        return no_such_key(line, match[1])
    if match := re.search(r"Multiple values for (\S+)\.", text):
        hint = f"type {match[1]}=OPTION without the +"
        if match[1] == conf.EXPERIMENT:
            hint = f"type one +{match[1]}=NAME"
        return UsageError(f"{match[1]} is chosen twice", hint)
    if match := re.match(r"Could not append to config. An item is already at '([^']+)'", text):
        return UsageError(
            f"{shown(match[1])} is there already", f"type {match[1]}=VALUE without the +"
        )
    for group, _, name in (word.partition("=") for word in line.overrides):
        options = list(conf.options(group, line.config_dirs)) if group in conf.GROUPS else []
        if options and name not in options:
            return _unknown_option(line, group, name, options)
    first = text.splitlines()[0] if text else type(error).__name__
    words = shown(" ".join(line.overrides))
    return UsageError(f"can't compose {words}: {first}", f"type mnist-cli {line.command} --help")


def _word_of(line: Line, key: str) -> str:
    return next((w for w in line.overrides if w.startswith(f"{key}=")), f"{key}=NAME")


def _unreadable(line: Line, word: str) -> UsageError:
    key, equals, value = word.partition("=")
    if not equals:
        hints = {
            "eval": f"type checkpoint={word}",
            "export": f"type checkpoint={word}",
            "demo": f"type checkpoint={word}",
            "report": f"type run={word}",
            "predict": f"type {_missing_of_predict(line, word)}",
        }
        return UsageError(
            f"{shown(word)} is not an override",
            hints.get(line.command or "", "overrides look like key=value: optim.lr=0.01"),
        )
    bare = f"{key.strip()}={value.strip(' =')}"
    if bare != word:
        return UsageError(f"can't read {shown(word)}", f"type {shlex.quote(bare)}")
    return UsageError(f"can't read the value of {shown(word)}", f"quote it: \"{key}='{value}'\"")


def _missing_of_predict(line: Line, word: str) -> str:
    """What `word` alone was meant for, by what else was typed."""
    keys = {each.partition("=")[0] for each in line.overrides}
    if "images" in keys:
        return f"checkpoint={word}"
    return f"images={word}" if "checkpoint" in keys else f"checkpoint=RUN images={word}"


def _unknown_option(line: Line, group: str, name: str, options: list[str]) -> UsageError:
    if not options:
        return no_such_key(line, group or name)
    if group == LAUNCHER and name in EXTRA_OF:
        return UsageError(
            f"{LAUNCHER}={name} needs a package that isn't installed",
            f"type pip install 'mnist-cli[{EXTRA_OF[name]}]'",
        )
    best = nearest(name, options)
    plus = "+" if group == conf.EXPERIMENT else ""
    meant = f"did you mean {plus}{group}={best}? " if best else ""
    return UsageError(
        f"there is no {group} {shown(name)}", f"{meant}there are: {', '.join(options)}"
    )
