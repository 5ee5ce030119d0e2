"""What stands in `conf/`: commands, groups, options, keys, and what each is for.

Help, completion, `list` and the hints of usage errors read it here within milliseconds, without
Hydra or a YAML parser. The files are kept simple enough for that, and a test compares with a real
parser. The first comment of a file describes it; the comment behind a key explains the key.

Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

COMMANDS = {
    "train": "Train a model, select it on the validation split, test it once",
    "eval": "Measure a checkpoint, or an exported .onnx file, on a split of its data",
    "export": "Write a deployable file and prove that it answers as the checkpoint does",
    "predict": "Label image files, with probabilities",
    "demo": "Open a page to draw on, and see what a checkpoint answers",
    "report": "Draw a page about a run or a sweep, or about two runs beside each other",
    "list": "Show what can be chosen, one line each",
}

FLAGS = {
    "--help": "show this help, or that of the command on the line",
    "--version": "show the version",
    "--json": "write one JSON document to stdout, everything else to stderr",
    "--quiet": "write only errors",
    "-m": "short for --multirun",
    "--multirun": "run once for each combination of comma-separated values",
    "--cfg": "print the composed configuration and don't run: --cfg job",
    "--info": "print what Hydra knows and don't run: --info defaults",
    "--config-dir": "folder with options of your own: --config-dir DIR",
}

GROUPS = ("model", "optim", "loss", "dataset", "schedule")
EXPERIMENT = "experiment"

# Options in the order in which to show them; one that isn't named here comes after these.
_ORDER = {
    "model": ("linear", "mlp", "cnn", "cnn_dropout", "cnn_deep"),
    "optim": ("sgd", "momentum", "adam", "adamw", "rmsprop", "adagrad", "adadelta"),
    "loss": ("cross_entropy", "mse", "kl_div", "bce"),
    "dataset": ("mnist", "fashion_mnist", "kmnist", "emnist", "cifar10", "digits", "linear"),
    "schedule": ("constant", "step", "cosine", "onecycle"),
}

_KEY = re.compile(
    r"""( *)([\w.]+): *("[^"]*"|'[^']*'|\[.*?\]|\{.*?\}|[^#]*?)(?:\s+#\s*(.*))?\s*$"""
)
_DEFAULT = re.compile(r" *- *(?:override )?/?([\w/]+): *([\w/]+)")

Value = bool | int | float | str | list["Value"] | None


class Key(NamedTuple):
    """A key as typed (`optim.lr`), its default as written, and what it means."""

    path: str
    default: str
    text: str

    @property
    def value(self) -> Value:
        """The default as a plain value."""
        return _value(self.default)


class Option(NamedTuple):
    """A choice within a group: `conf/<group>/<name>.yaml`."""

    name: str
    description: str
    keys: tuple[Key, ...]


class File(NamedTuple):
    """A configuration file: its head comment, its defaults list as (group, option), its keys."""

    description: str
    defaults: tuple[tuple[str, str], ...]
    keys: tuple[Key, ...]


def conf_dir() -> Path:
    """The packaged configuration: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def options(group: str, config_dirs: Sequence[str | Path] = ()) -> dict[str, Option]:
    """The options of `group` by name; a packaged one isn't replaced by one in `config_dirs`."""
    found: dict[str, Option] = {}
    for folder in (conf_dir(), *map(Path, config_dirs)):
        paths = {path.stem: path for path in (folder / group).glob("*.yaml")}
        for name in sorted(paths, key=lambda name: (_rank(group, name), name)):
            if name not in found:
                found[name] = _option(group, paths[name])
    return found


def passed_over(command: str, folder: str | Path) -> Iterator[tuple[Path, str, str]]:
    """The files of a user's folder that seem to be meant for `command` but that Hydra won't read.

    Yields:
        The file, why not, and what to do instead.
    """
    path = Path(folder) / f"{command}.yaml"
    if path.is_file() and (conf_dir() / path.name).is_file():
        instead = f"put it into {EXPERIMENT}/NAME.yaml, and type +{EXPERIMENT}=NAME"
        yield path, f"{command} has its defaults from mnist-cli", instead
    for group in (*GROUPS, EXPERIMENT):
        for path in sorted((Path(folder) / group).glob("*.y*ml")):
            if path.suffix == ".yml":
                yield path, "names of options end in .yaml", f"call it {path.stem}.yaml"
            elif (conf_dir() / group / path.name).is_file():
                yield path, f"{group}={path.stem} is one of mnist-cli's own", "give it another name"


def command_keys(command: str) -> list[Key]:
    """The keys that stand in `conf/<command>.yaml`, those of its groups not among them."""
    file = _command_file(command)
    return list(file.keys) if file else []


def default_options(command: str) -> dict[str, str]:
    """The option of each group if none is chosen; empty for a command without groups."""
    file = _command_file(command)
    return {group: name for group, name in file.defaults if group in GROUPS} if file else {}


def defaults(command: str, chosen: Mapping[str, str]) -> dict[str, Value]:
    """The default of each group and key; the keys of an option are those of the `chosen` one.

    Args:
        chosen: the option of each group; one that isn't packaged has no defaults here.
    """
    found: dict[str, Value] = dict(default_options(command))
    keys = command_keys(command)
    for group in GROUPS:
        option = options(group).get(chosen.get(group, ""))
        keys += option.keys if option else ()
    return found | {key.path: key.value for key in keys}


def takes_list(command: str, key: str, config_dirs: Sequence[str | Path] = ()) -> bool:
    """Whether the default of `key` is a list, in the command or in any option."""
    found = [option for group in GROUPS for option in options(group, config_dirs).values()]
    keys = command_keys(command) + [own for option in found for own in option.keys]
    return any(own.path == key and isinstance(own.value, list) for own in keys)


def known_keys(command: str, config_dirs: Sequence[str | Path] = ()) -> list[str]:
    """All that can stand left of a `=`: keys, groups, and the keys of every option."""
    known = [key.path for key in command_keys(command)]
    for group in default_options(command):
        known.append(group)
        for option in options(group, config_dirs).values():
            known += [key.path for key in option.keys]
    return list(dict.fromkeys(known))


def read(path: Path) -> File:
    """Read a file of `conf/`, or a user's. Lines that aren't understood are passed over."""
    description, keys, defaults = "", list[Key](), list[tuple[str, str]]()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        lines = []
    parents: list[tuple[int, str]] = []
    for line in lines:
        if line.startswith("#"):
            description = description or line.strip("# ").removeprefix("@package _global_")
        elif match := _DEFAULT.match(line):
            defaults.append((match[1], match[2]))
        elif match := _KEY.match(line):
            indent, name, default, text = len(match[1]), match[2], match[3], match[4] or ""
            while parents and parents[-1][0] >= indent:
                parents.pop()
            if default:
                names = [*(parent for _, parent in parents), name]
                if names[0] not in ("defaults", "hydra"):
                    keys.append(Key(".".join(names), default, text))
            else:
                parents.append((indent, name))
    return File(description, tuple(defaults), tuple(keys))


def _option(group: str, path: Path) -> Option:
    file = read(path)
    if group == EXPERIMENT:
        chosen = tuple(Key(*default, "") for default in file.defaults if default[0] in GROUPS)
        return Option(path.stem, file.description, (*chosen, *file.keys))
    keys = (Key(f"{group}.{key.path}", *key[1:]) for key in file.keys if key.path != "name")
    return Option(path.stem, file.description, tuple(keys))


def _command_file(command: str) -> File | None:
    path = conf_dir() / f"{command}.yaml"
    return read(path) if command in COMMANDS and path.is_file() else None


def _rank(group: str, name: str) -> int:
    order = _ORDER.get(group, ())
    return order.index(name) if name in order else len(order)


def _value(text: str) -> Value:
    """A plain value as YAML reads it."""
    if text.startswith("[") and text.endswith("]"):
        return [_value(item) for item in _items(text[1:-1])]
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    words: dict[str, Value] = {"null": None, "~": None, "true": True, "false": False}
    if text in words:
        return words[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _items(text: str) -> Iterator[str]:
    return (item.strip() for item in text.split(",") if item.strip())
