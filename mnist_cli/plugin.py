"""Plugins: installed packages that add options of their own.

A package declares an entry point in the group `mnist_cli` that names one of its modules. OPTIONS of
that module lists the classes of its options, each of which inherits from one of the
`Plugin...Config` of `options`; their YAML files lie in `conf/<group>/` beside it.

Only a name that was typed (`plugin=NAME`) leads to an import, in `use` and nowhere else: a
checkpoint or a configuration file can name a plugin, but not load it. Finding the installed names
and their folders reads files and runs nothing of a package.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, get_args

from mnist_cli.errors import UsageError, shown
from mnist_cli.options import PLUGINS, UNIONS, PluginConfig
from mnist_cli.typed import option_names

GROUP = "mnist_cli"


def installed() -> list[str]:
    """The names that can be typed."""
    return sorted({point.name for point in entry_points(group=GROUP)})


def folders(names: Sequence[str]) -> tuple[str, ...]:
    """The folder with the YAML files of each plugin; nothing is imported.

    Raises:
        UsageError: a plugin isn't installed, or its module or folder isn't there.
    """
    return tuple(str(_folder(_entry_point(name))) for name in names)


def use(names: Sequence[str]) -> None:
    """Import the plugins `names`; the options of these and of no others are known from now on.

    Raises:
        UsageError: a plugin isn't installed, can't be imported, or its OPTIONS aren't options.
    """
    PLUGINS.clear()
    for name in names:
        PLUGINS[name] = []
        _register(_entry_point(name), PLUGINS[name])


def _entry_point(name: str) -> EntryPoint:
    points = list(dict.fromkeys(entry_points(group=GROUP, name=name)))
    if len(points) > 1:
        modules = ", ".join(point.value for point in points)
        raise UsageError(f"several packages have a plugin {shown(name)}: {modules}", "keep one")
    if points:
        return points[0]
    alike = {known: difflib.SequenceMatcher(None, name, known).ratio() for known in installed()}
    names = ", ".join(sorted(alike, key=lambda known: alike[known], reverse=True))
    raise UsageError(
        f"there is no plugin {shown(name)}",
        f"installed: {names or 'none'}; to add one, pip install the package that brings it",
    )


def _folder(point: EntryPoint) -> Path:
    spec = _spec(point.module)
    if spec is None or spec.origin is None:
        raise _broken(point, f"there is no module {point.module}")
    folder = Path(spec.origin).parent / "conf"
    if not folder.is_dir():
        raise _broken(point, f"there is no folder {folder}")
    return folder


def _spec(module: str) -> ModuleSpec | None:
    """Where `module` lies. `importlib.util.find_spec` would import the packages around it."""
    spec: ModuleSpec | None = None
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        path = None if spec is None else spec.submodule_search_locations
        name = ".".join(parts[:end])
        found = (finder.find_spec(name, path) for finder in sys.meta_path)
        spec = next((each for each in found if each is not None), None)
        if spec is None:
            return None
    return spec


def _register(point: EntryPoint, options: list[tuple[str, type[PluginConfig]]]) -> None:
    """Import a plugin and append its OPTIONS to `options`, once they are known to be some."""
    folder = _folder(point)
    try:
        found = [(_group(option), option) for option in point.load().OPTIONS]
        named = [(group, option, option_names(option)) for group, option in found if group]
    except (Exception, SystemExit) as error:  # a plugin may raise anything
        raise _broken(point, f"{type(error).__name__}: {error}") from error
    if len(named) < len(found) or not all(names for _, _, names in named):
        raise _broken(
            point,
            "OPTIONS must hold dataclasses that inherit from a Plugin...Config of mnist_cli.options"
            " and have a name: Literal[...]",
        )
    for group, option, names in named:
        if missing := ", ".join(f"{name}()" for name in sorted(option.__abstractmethods__)):
            raise _broken(point, f"{option.__name__} has no {missing}")
        for name in names:
            if name in _taken(group):
                raise _broken(point, f"{group}={name} is an option already")
            if not (folder / group / f"{name}.yaml").is_file():
                raise _broken(point, f"there is no file {folder / group / f'{name}.yaml'}")
        options.append((group, option))


def _group(option: Any) -> str | None:
    """The group of a dataclass that inherits from one of the `Plugin...Config`, else None."""
    if not isinstance(option, type) or "__dataclass_params__" not in vars(option):
        return None
    groups = (group for group in UNIONS if issubclass(option, get_args(UNIONS[group])[-1]))
    return next(groups, None)


def _taken(group: str) -> set[str]:
    """The names of the options of `group` so far."""
    own = get_args(UNIONS[group])
    added = (option for pairs in PLUGINS.values() for of, option in pairs if of == group)
    return {name for option in (*own, *added) for name in option_names(option)}


def _broken(point: EntryPoint, reason: str) -> UsageError:
    return UsageError(
        f"the plugin '{point.name}' ({point.value}) can't be used: {reason}",
        "mend or update its package, or leave it out",
    )
