"""Completion of the command line in bash, zsh and fish.

`-sc install=SHELL` prints a script for the shell. At each TAB the script calls `-sc query=SHELL`
with the line up to the cursor in COMP_LINE, and gets the candidates for its last word, one a line.
They come from file names and a few lines of YAML; neither Hydra nor torch is imported.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from mnist_cli import conf
from mnist_cli.errors import UsageError
from mnist_cli.line import CFG_TOPICS, INFO_TOPICS, typed_plugins

# The values that a key may have, where they can be counted; a test compares with `config`.
CHOICES = {
    "device": ("auto", "cpu", "cuda"),
    "precision": ("float32", "tf32", "bfloat16", "float16"),
    "sweep.fused": ("auto", "true", "false"),
    "sweep.search": ("grid", "optuna"),
    "sweep.sampler": ("tpe", "gp", "random", "grid"),
    "sweep.pruner": ("none", "median", "halving"),
    "logger": ("tensorboard", "mlflow", "wandb"),
    "monitor": ("auto", "val_loss", "val_accuracy", "val_mse"),
    "dataset.split": ("byclass", "bymerge", "balanced", "letters", "digits", "mnist"),
    "split": ("test", "val", "train"),
    "format": ("onnx", "torch_export", "safetensors"),
    "quantize": ("none", "int8"),
    "preprocess": ("auto", "none"),
}

# The keys that name a file or folder, with the ends of the files to show beside folders.
PATHS: dict[str, tuple[str, ...]] = {
    "checkpoint": (".safetensors", ".onnx"),
    "dataset.root": (),
    "images": (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".gif", ".webp"),
    "out": (),
    "resume": (),
    "run": (),
    "sweep.resume": (),
}

# The flags that take a word of their own.
FLAG_VALUES = {
    "--cfg": CFG_TOPICS,
    "--info": INFO_TOPICS,
    "--config-dir": (),
    "-cd": (),
}

BASH = r"""_mnist_cli() {
    mapfile -t COMPREPLY < <(COMP_LINE=$COMP_LINE COMP_POINT=$COMP_POINT COMP_WORD=$2 \
        "${1/#\~/$HOME}" -sc query=bash 2>/dev/null)
    if [[ ${COMPREPLY[0]} == files ]]; then
        compopt -o filenames
    fi
    COMPREPLY=("${COMPREPLY[@]:1}")
    if [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *= ]]; then
        compopt -o nospace
    fi
}
complete -F _mnist_cli mnist-cli
"""

ZSH = r"""_mnist_cli() {
    local -a found open closed
    found=(${(f)"$(COMP_LINE="${(j: :)words[1,CURRENT-1]} $QIPREFIX$PREFIX" \
        ${(Q)~words[1]} -sc query=zsh 2>/dev/null)"})
    open=(${(M)found:#*[=/]})
    closed=(${found:#*[=/]})
    (( $#open )) && compadd -S '' -- $open
    (( $#closed )) && compadd -- $closed
}
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
compdef _mnist_cli mnist-cli
"""

FISH = r"""function __mnist_cli
    set -l line (commandline -cp)
    set -l program (string replace -r '^~' $HOME -- (commandline -opc)[1])
    COMP_LINE="$line" $program -sc query=fish 2>/dev/null
end
complete -c mnist-cli -f -a '(__mnist_cli)'
"""

INSTALL = {"bash": BASH, "zsh": ZSH, "fish": FISH}

UNINSTALL = {
    "bash": "complete -r mnist-cli\nunset -f _mnist_cli\n",
    "zsh": "compdef -d mnist-cli\nunfunction _mnist_cli\n",
    "fish": "complete -c mnist-cli -e\nfunctions -e __mnist_cli\n",
}


def main(args: Sequence[str]) -> int:
    """Carry out `-sc install=SHELL`, `-sc uninstall=SHELL` or `-sc query=SHELL`."""
    verb, _, shell = (args[-1] if args else "").partition("=")
    if shell not in INSTALL or verb not in ("install", "uninstall", "query"):
        sys.stderr.write(
            "error: completion knows install=SHELL, uninstall=SHELL and query=SHELL\n"
            "hint: SHELL is bash, zsh or fish: mnist-cli -sc install=bash\n"
        )
        return 2
    if verb == "query":
        sys.stdout.write("".join(f"{line}\n" for line in _query(shell, os.environ)))
    else:
        sys.stdout.write((INSTALL if verb == "install" else UNINSTALL)[shell])
    return 0


def _query(shell: str, environ: Mapping[str, str]) -> list[str]:
    """The answer to a shell's script: candidates for the last word of COMP_LINE.

    bash splits words at `=` and `:` and replaces only the last part, COMP_WORD. For it they come
    without what stands before that part, and after a line that says whether they are `files`.
    """
    line = environ.get("COMP_LINE", "")
    point = environ.get("COMP_POINT", "")
    words = split(line[: int(point)] if point.isdigit() else line)
    found = complete(words[1:-1], words[-1])
    if shell != "bash":
        return found
    raw = environ.get("COMP_WORD", "")  # between quotes as it is, else with backslashes
    part = raw if words[-1].endswith(raw) else split(raw)[-1]
    start = len(words[-1]) - len(part) if words[-1].endswith(part) else 0
    found = [candidate[start:] for candidate in found]
    if is_path(words[1:-1], words[-1]):
        return ["files", *(name.rstrip("/") for name in found)]  # bash adds the slash of a folder
    return ["words", *found]


def split(line: str) -> list[str]:
    """The words of `line` as a shell sees them; the last is what stands at its end, maybe ''."""
    for end in ("", '"', "'"):  # the last word may lack its closing quote
        try:
            *words, last = shlex.split(f"{line}\N{NULL}{end}")
        except ValueError:
            continue
        return [*words, last.removesuffix("\N{NULL}")]
    return [""]


def complete(words: Sequence[str], current: str) -> list[str]:
    """What `current` may become, sorted as in help, given the `words` between program and it."""
    config_dirs, command, rest = _parse(words)
    key, equals, value = current.partition("=")
    before = words[-1] if words else ""
    if is_path(words, current):
        prefix, typed = ("", current) if before in FLAG_VALUES else (f"{key}=", value)
        if key == "images":  # several, separated by commas
            done, comma, typed = value.rpartition(",")
            prefix += done + comma
        extra = ("auto",) if key == "resume" else ()
        found: Iterable[str] = (*_files(typed, PATHS.get(key, ())), *extra)
        return _matching((f"{prefix}{name}" for name in found), current)
    if before in FLAG_VALUES:
        return _matching(FLAG_VALUES[before], current)
    if current.startswith("-"):
        return _matching((flag for flag in conf.FLAGS if flag not in words), current)
    if command is None:
        return _matching(conf.COMMANDS, current)
    if command == "list":
        names = conf.options(key, config_dirs) if equals else (*conf.GROUPS, conf.EXPERIMENT)
        prefix = f"{key}=" if equals else ""
        return [] if rest else _matching((f"{prefix}{name}" for name in names), current)
    if equals:
        done, comma, _ = value.rpartition(",")
        taken = done.split(",")
        values = _values(command, key, config_dirs, rest)
        return _matching((f"{key}={done}{comma}{v}" for v in values if v not in taken), current)
    given = {word.partition("=")[0] for word in rest}
    keys = (name for name in _keys(command, config_dirs, rest) if name not in given)
    return _matching((f"{name}=" for name in keys), current)


def is_path(words: Sequence[str], current: str) -> bool:
    """Whether `current`, behind `words`, names a file or folder."""
    if words and words[-1] in ("--config-dir", "-cd"):
        return True
    key, equals, _ = current.partition("=")
    return bool(equals) and key in (*PATHS, "--config-dir")


def _parse(words: Sequence[str]) -> tuple[list[str], str | None, list[str]]:
    """The folders of --config-dir, the command, and the rest without flags."""
    config_dirs: list[str] = []
    rest: list[str] = []
    before = ""
    for word in words:
        if before in ("--config-dir", "-cd") or word.startswith("--config-dir="):
            config_dirs.append(os.path.expanduser(word.removeprefix("--config-dir=")))
        elif not word.startswith("-") and word not in FLAG_VALUES.get(before, ()):
            rest.append(word)
        before = word
    if names := typed_plugins(rest):
        from mnist_cli import plugin

        with contextlib.suppress(UsageError):  # no such plugin
            config_dirs += plugin.folders(names)
    return config_dirs, rest[0] if rest else None, rest[1:]


def _chosen(command: str, config_dirs: Sequence[str], rest: Sequence[str]) -> dict[str, list[str]]:
    """The options of each group: those on the line, else those of its recipe, else the defaults."""
    chosen = {group: [name] for group, name in conf.default_options(command).items()}
    pairs = [word.partition("=")[::2] for word in rest]
    recipes = conf.options(conf.EXPERIMENT, config_dirs) if chosen else {}
    for key, value in pairs:
        if key == f"+{conf.EXPERIMENT}" and value in recipes:
            keys = recipes[value].keys
            chosen |= {each.path: [each.default] for each in keys if each.path in chosen}
    return chosen | {key: value.split(",") for key, value in pairs if key in chosen}


def _keys(command: str, config_dirs: Sequence[str], rest: Sequence[str]) -> list[str]:
    """All that can stand left of a `=`, given the options on the line."""
    chosen = _chosen(command, config_dirs, rest)
    found = [*chosen, *(key.path for key in _option_keys(command, config_dirs, chosen))]
    if chosen and conf.options(conf.EXPERIMENT, config_dirs):
        found.append(f"+{conf.EXPERIMENT}")
    return list(dict.fromkeys(found))


def _option_keys(
    command: str, config_dirs: Sequence[str], chosen: dict[str, list[str]]
) -> list[conf.Key]:
    keys = conf.command_keys(command)
    for group, names in chosen.items():
        options = conf.options(group, config_dirs)
        for name in names:
            keys += options[name].keys if name in options else ()
    return keys


def _values(
    command: str, key: str, config_dirs: Sequence[str], rest: Sequence[str]
) -> tuple[str, ...]:
    """What can stand right of `key=`, as far as it can be counted."""
    chosen = _chosen(command, config_dirs, rest)
    group = key.removeprefix("+")
    if key in chosen or (chosen and key == f"+{conf.EXPERIMENT}"):
        return tuple(conf.options(group, config_dirs))
    defaults = {each.path: each.default for each in _option_keys(command, config_dirs, chosen)}
    if key == "plugin" and key in defaults:
        from mnist_cli import plugin

        return tuple(plugin.installed())
    if defaults.get(key) in ("true", "false"):
        return ("true", "false")
    return CHOICES.get(key, ()) if key in defaults else ()


def _files(typed: str, ends: tuple[str, ...]) -> list[str]:
    """Folders (with a slash) and files with one of `ends` that begin as `typed` does."""
    head, name = os.path.split(typed)
    head += "/" if head and not head.endswith("/") else ""
    try:
        found = sorted(Path(os.path.expanduser(head) or ".").iterdir())
    except OSError:
        return []
    return [
        f"{head}{path.name}{'/' if path.is_dir() else ''}"
        for path in found
        if path.name.startswith(name)
        and (name or not path.name.startswith("."))
        and (path.is_dir() or path.name.lower().endswith(ends))
    ]


def _matching(candidates: Iterable[str], current: str) -> list[str]:
    return [candidate for candidate in candidates if candidate.startswith(current)]
