"""Where code of plugins is called: what fails there names the plugin and the line."""

from __future__ import annotations

import contextlib
import inspect
import traceback
from collections.abc import Iterator

from mnist_cli.errors import MnistCliError, PluginError, is_out_of_memory
from mnist_cli.options import PLUGINS, PluginConfig


@contextlib.contextmanager
def code_of_plugin(option: PluginConfig, doing: str) -> Iterator[None]:
    """Call what a plugin supplies: whatever it raises in the block names it.

    Args:
        option: whose code is called.
        doing: what it is asked to do, such as "build".

    Raises:
        PluginError: the code raised anything but an error of this program, or a lack of memory.
    """
    try:
        yield
    except MnistCliError:
        raise
    except (Exception, SystemExit) as error:
        if is_out_of_memory(error):
            raise
        name, group = next(
            (name, group)
            for name, pairs in PLUGINS.items()
            for group, known in pairs
            if isinstance(option, known)
        )
        place = _place_in(_package_of(type(option)), error) or inspect.getfile(type(option))
        what = f"'{name}' failed to {doing} {group}={option.name}"
        raise _plugin_error(what, error, place) from error


def plugin_at_fault(error: BaseException) -> PluginError | None:
    """The error for one that was raised while the code of a plugin ran, if it was."""
    for name, pairs in PLUGINS.items():
        for package in {_package_of(option) for _, option in pairs}:
            if place := _place_in(package, error):
                return _plugin_error(f"'{name}' failed", error, place)
    return None


def _package_of(option: type[PluginConfig]) -> str:
    return option.__module__.partition(".")[0]


def _place_in(package: str, error: BaseException) -> str | None:
    """The innermost line of `package` that was at work when `error` was raised."""
    places = [
        f"line {line} of {frame.f_code.co_filename}"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if frame.f_globals.get("__name__", "").partition(".")[0] == package
    ]
    return places[-1] if places else None


def _plugin_error(what: str, error: BaseException, place: str) -> PluginError:
    return PluginError(
        f"the plugin {what}: {type(error).__name__}: {error}",
        f"mend {place}, update its package, or leave it out",
    )
