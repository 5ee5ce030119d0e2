"""`--help`, `<command> --help` and `list`: plain text of at most 100 columns.

All that they say about commands, groups, options and keys comes from `conf`. Standard library only.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mnist_cli import conf
from mnist_cli.errors import UsageError, shown

WIDTH = 100

EXAMPLES = {
    "": (
        "mnist-cli train model=cnn optim=adam dataset=digits",
        "mnist-cli train -m optim.lr=0.1,0.01 seed=0,1,2",
        "mnist-cli eval checkpoint=outputs/train/RUN",
    ),
    "train": (
        "mnist-cli train model=mlp optim=momentum optim.lr=0.05 epochs=20",
        "mnist-cli train dataset=digits 'model.hidden=[64,32]' model=mlp out=runs/small",
        "mnist-cli train -m model=linear,cnn seed=0,1,2",
    ),
    "eval": (
        "mnist-cli eval checkpoint=outputs/train/RUN",
        "mnist-cli eval checkpoint=outputs/train/RUN/last.safetensors split=val",
        "mnist-cli eval checkpoint=model.onnx device=cpu --json",
    ),
    "export": (
        "mnist-cli export checkpoint=outputs/train/RUN format=onnx",
        "mnist-cli export checkpoint=outputs/train/RUN format=onnx quantize=int8 out=deploy",
        "mnist-cli export checkpoint=outputs/train/RUN format=torch_export overwrite=true",
    ),
    "predict": (
        "mnist-cli predict checkpoint=outputs/train/RUN images=three.png,photos",
        "mnist-cli predict checkpoint=model.onnx images='scans/*.jpg' out=labels",
        "mnist-cli predict checkpoint=outputs/train/RUN images=- --json < three.png",
    ),
    "demo": (
        "mnist-cli demo checkpoint=outputs/train/RUN",
        "mnist-cli demo checkpoint=model.onnx port=8000",
        "mnist-cli demo checkpoint=outputs/train/RUN open=false --json",
    ),
    "report": (
        "mnist-cli report run=outputs/train/RUN",
        "mnist-cli report run=runs/cnn,runs/mlp out=compared",
        "mnist-cli report run=outputs/sweep/SWEEP --json",
    ),
    "list": ("mnist-cli list", "mnist-cli list optim=adam", "mnist-cli list --json"),
}


EXIT_CODES = (
    "Exit codes: 0 done, 1 fault of the program, 2 usage, 3 data, 4 checkpoint, 5 diverged, 6 out"
    " of memory or disk, 7 run folder in use, 8 export differs, 130 and 143 interrupted"
)


def usage() -> str:
    """What `mnist-cli --help` prints."""
    about = (
        "Train, evaluate and export small PyTorch baselines from the command line. A run is"
        " composed of one option from each group (model=cnn optim=adam ...); any key of the"
        " configuration can be set as key=value, and swept over with -m key=a,b."
    )
    return _join(
        "usage: mnist-cli COMMAND [group=option ...] [key=value ...] [flags]",
        textwrap.fill(about, _width()),
        "Commands (mnist-cli COMMAND --help shows what each takes):\n"
        + _rows(conf.COMMANDS.items()),
        "Flags, anywhere on the line:\n" + _rows(conf.FLAGS.items()),
        "Completion of commands, options and keys, for a shell's start-up file:\n"
        + _rows(
            [
                ("bash", 'eval "$(mnist-cli -sc install=bash)"'),
                ("zsh", 'eval "$(mnist-cli -sc install=zsh)"'),
                ("fish", "mnist-cli -sc install=fish | source"),
            ]
        ),
        _examples(""),
        textwrap.fill(EXIT_CODES, _width()),
    )


def command_usage(command: str, config_dirs: Sequence[str | Path] = ()) -> str:
    """What `mnist-cli COMMAND --help` prints, the options in `config_dirs` included."""
    chosen = conf.default_options(command)
    keys = conf.command_keys(command)
    parts = [f"usage: mnist-cli {_synopsis(command, keys)}", f"{conf.COMMANDS[command]}."]
    if command == "list":
        parts.append("Groups:\n" + _rows((group, "") for group in (*conf.GROUPS, conf.EXPERIMENT)))
    for group, default in chosen.items():
        options = conf.options(group, config_dirs)
        rows = [(name, option.description) for name, option in options.items()]
        parts.append(f"{group}=  (default {default})\n{_rows(rows)}")
        keys += options[default].keys if default in options else ()
    experiments = conf.options(conf.EXPERIMENT, config_dirs) if chosen else {}
    if experiments:
        rows = [(name, recipe.description) for name, recipe in experiments.items()]
        parts.append(f"+{conf.EXPERIMENT}=  (a recipe that chooses all of these)\n{_rows(rows)}")
    if keys:
        title = "Keys, their defaults and meanings"
        if chosen:
            title += " (mnist-cli list model=mlp shows those of another option)"
        parts.append(f"{title}:\n{_key_rows(keys)}")
    return _join(*parts, _examples(command), "Flags: " + " ".join(conf.FLAGS))


def list_data(
    what: str | None = None, config_dirs: Sequence[str | Path] = ()
) -> dict[str, list[dict[str, Any]]]:
    """What can be chosen, for `list --json`: group -> [{name, description, keys: {key: default}}].

    Args:
        what: GROUP or GROUP=OPTION; None for all.

    Raises:
        UsageError: there is no such group, or no such option in it.
    """
    return {
        group: [
            {
                "name": option.name,
                "description": option.description,
                "keys": {key.path: key.value for key in option.keys},
            }
            for option in options
        ]
        for group, options in _chosen(what, config_dirs).items()
    }


def list_text(what: str | None = None, config_dirs: Sequence[str | Path] = ()) -> str:
    """What can be chosen, one line each; of one option its keys. As `list_data` otherwise."""
    parts = []
    for group, options in _chosen(what, config_dirs).items():
        rows = _rows([(each.name, each.description) for each in options], is_wrapped=False)
        plus = "+" if group == conf.EXPERIMENT else ""
        parts.append(f"{plus}{group}=\n{rows}" if rows else "")
        if "=" in (what or ""):
            parts.append(_key_rows(options[0].keys))
    return _join(*parts)


def _chosen(what: str | None, config_dirs: Sequence[str | Path]) -> dict[str, list[conf.Option]]:
    """The options that `what` names, by group."""
    group, equals, name = (what or "").partition("=")
    groups = (*conf.GROUPS, conf.EXPERIMENT)
    if what is not None and group not in groups:
        from mnist_cli.typed import nearest

        meant = f"did you mean {best}? " if (best := nearest(group, list(groups))) else ""
        raise UsageError(f"unknown group {shown(group)}", f"{meant}groups are: {', '.join(groups)}")
    found = {
        each: list(conf.options(each, config_dirs).values())
        for each in (groups if what is None else (group,))
    }
    if not equals:
        return found
    chosen = [option for option in found[group] if option.name == name]
    if not chosen:
        names = ", ".join(option.name for option in found[group])
        raise UsageError(f"there is no {group} {shown(name)}", f"there are: {names}")
    return {group: chosen}


def _synopsis(command: str, keys: Iterable[conf.Key]) -> str:
    if command == "list":
        return "list [group | group=option] [flags]"
    required = [f"{key.path}=VALUE" for key in keys if key.default == "???"]
    groups = ["[group=option ...]"] if conf.default_options(command) else []
    return " ".join([command, *required, *groups, "[key=value ...]", "[flags]"])


def _key_rows(keys: Iterable[conf.Key]) -> str:
    defaults = {"???": "(required)"}
    return _rows((f"{key.path}={defaults.get(key.default, key.default)}", key.text) for key in keys)


def _examples(command: str) -> str:
    return "Examples:\n" + "\n".join(f"  {line}" for line in EXAMPLES[command])


def _width() -> int:
    """That of the terminal, but no more than WIDTH; in a pipe WIDTH."""
    try:
        return min(WIDTH, os.get_terminal_size(1).columns)
    except OSError:
        return WIDTH


def _rows(rows: Iterable[tuple[str, str]], is_wrapped: bool = True) -> str:
    """Two columns; the right one is wrapped, or has a line for each row."""
    rows = list(rows)
    column = 4 + max((len(left) for left, _ in rows), default=0)
    room = max(_width() - column, 20)
    lines = []
    for left, right in rows:
        first, *rest = (textwrap.wrap(right, room) if is_wrapped else []) or [right]
        lines.append(f"  {left}".ljust(column) + first)
        lines += [" " * column + line for line in rest]
    return "\n".join(line.rstrip() for line in lines)


def _join(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part)
