"""Plain data into frozen dataclasses, or one clear error.

The same function reads a composed configuration and the configuration inside a checkpoint, so
neither can hold a key, a type or a value that the other refuses. It knows bool, int, float, str,
`X | None`, `tuple[X, ...]`, fixed tuples, `dict[str, X]`, `Literal`, nested dataclasses, unions of
dataclasses told apart by their `name`, and `Annotated[..., Range(...)]`. Standard library only.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import types
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from mnist_cli.errors import UsageError, shown

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Range:
    """Bounds of a number; `above` and `below` leave their bound out."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def holds(self, value: float) -> bool:
        return self.least <= value <= self.most and self.above < value < self.below

    def __str__(self) -> str:
        bounds = [
            ("at least", self.least),
            ("above", self.above),
            ("at most", self.most),
            ("below", self.below),
        ]
        return " and ".join(
            f"{word} {_short(bound)}" for word, bound in bounds if math.isfinite(bound)
        )


def _short(bound: float) -> str:
    return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"


def parse(cls: type[T], data: object, wider: Mapping[str, Any] | None = None) -> T:
    """Make a `cls` of `data`, a tree of dicts, lists and plain values.

    Args:
        wider: types of fields of `cls` to take instead of those that it declares.

    Raises:
        UsageError: a key is unknown or missing, a type is wrong, a number is out of range or not
            finite; the message gives the full path of the key and the value.
    """
    value = _dataclass(cls, data, "", wider or {})
    assert isinstance(value, cls)
    return value


def known(kind: Any, data: Any) -> Any:
    """`data` without the keys that `kind` has no field for: a newer version may write more."""
    if dataclasses.is_dataclass(kind) and isinstance(data, dict):
        hints = _hints(kind)  # type: ignore[arg-type]
        return {name: known(hint, data[name]) for name, hint in hints.items() if name in data}
    if get_origin(kind) is tuple and get_args(kind)[-1] is Ellipsis and isinstance(data, list):
        return [known(get_args(kind)[0], item) for item in data]
    return data


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _value(kind: Any, data: Any, path: str) -> Any:
    if get_origin(kind) is Annotated:
        inner, *notes = get_args(kind)
        value = _value(inner, data, path)
        for bounds in notes:
            numbers = value if isinstance(value, tuple) else (value,)
            if value is not None and not all(bounds.holds(number) for number in numbers):
                raise UsageError(
                    f"{path}={_typed(data)} is out of range", f"{path} must be {bounds}"
                )
        return value
    if get_origin(kind) in (Union, types.UnionType):
        return _union(get_args(kind), data, path)
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        if data not in choices or isinstance(data, bool):
            names = ", ".join(map(str, choices))
            raise UsageError(f"{path}={_typed(data)} is not a choice", f"{path} is one of: {names}")
        return data
    if get_origin(kind) is tuple:
        return _tuple(get_args(kind), data, path)
    if get_origin(kind) is dict:
        return _mapping(get_args(kind)[1], data, path)
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, data, path)
    return _plain(kind, data, path)


def _plain(kind: type, data: Any, path: str) -> Any:
    if kind is float and type(data) is int:
        data = float(data) if abs(data) < 2**1023 else math.inf
    if type(data) is not kind:
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
        quoted = f": {path}=\"'{_typed(data)}'\"" if kind is str else ""
        raise UsageError(
            f"{path}={_typed(data)} has the wrong type", f"{path} must be {words[kind]}{quoted}"
        )
    if isinstance(data, float) and not math.isfinite(data):
        raise UsageError(f"{path}={_typed(data)} is not finite", f"{path} must be a finite number")
    return data


def _tuple(kinds: tuple[Any, ...], data: Any, path: str) -> tuple[Any, ...]:
    if not isinstance(data, list | tuple):
        raise UsageError(
            f"{path}={_typed(data)} is not a list", f"{path} is a list: '{path}=[a,b]'"
        )
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(data)
    if len(kinds) != len(data):
        raise UsageError(
            f"{path} has {len(data)} values", f"{path} takes {len(kinds)} values: '{path}=[a,b]'"
        )
    return tuple(_value(kind, item, path) for kind, item in zip(kinds, data, strict=True))


def _mapping(kind: Any, data: Any, path: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise UsageError(f"{path}={_typed(data)} has the wrong type", f"{path} has keys and values")
    return {key: _value(kind, item, f"{path}.{key}") for key, item in data.items()}


def _union(kinds: tuple[Any, ...], data: Any, path: str) -> Any:
    if type(None) in kinds:
        if data is None:
            return None
        rest = tuple(kind for kind in kinds if kind is not type(None))
        return _value(rest[0], data, path) if len(rest) == 1 else _union(rest, data, path)
    if all(dataclasses.is_dataclass(kind) for kind in kinds):
        by_name = {name: kind for kind in kinds for name in option_names(kind)}
        name = data.get("name") if isinstance(data, dict) else None
        if not isinstance(name, str) or name not in by_name:
            raise UsageError(
                f"{path}.name={_typed(name)} is not a choice",
                f"{path} is one of: {', '.join(by_name)}",
            )
        return _dataclass(by_name[name], data, path)
    for kind in kinds:  # int | str: the kind that fits as it is
        if type(data) is kind or (
            get_origin(kind) is Annotated and type(data) is get_args(kind)[0]
        ):
            return _value(kind, data, path)
    return _value(kinds[-1], data, path)


def option_names(kind: Any) -> tuple[str, ...]:
    """The values that the `name` of a group option's dataclass may have.

    None for the classes that plugins inherit from, whose `name` is any text.
    """
    return get_args(_hints(kind)["name"])


def _dataclass(kind: Any, data: Any, path: str, wider: Mapping[str, Any] | None = None) -> Any:
    hints = _hints(kind) | dict(wider or {})
    dot = f"{path}." if path else ""
    if not isinstance(data, dict):
        raise UsageError(
            f"{path}={_typed(data)} has the wrong type", f"{path} has the keys {', '.join(hints)}"
        )
    for key in data:
        if key not in hints:
            raise unknown_key(f"{dot}{key}", [f"{dot}{name}" for name in hints])
    for key in hints:
        if key not in data:
            raise UsageError(
                f"'{dot}{key}' is missing", f"don't remove '{dot}{key}', or give it a value"
            )
    values = {key: _value(hints[key], item, f"{dot}{key}") for key, item in data.items()}
    return kind(**values)


class UnknownKeyError(UsageError):
    """A key that no dataclass has."""

    def __init__(self, key: str, hint: str) -> None:
        super().__init__(f"unknown key {shown(key)}", hint)
        self.key = key


def unknown_key(key: str, known: list[str]) -> UnknownKeyError:
    """The error for a key that doesn't exist, with the full path of the nearest that does."""
    best = nearest(key, known)
    if best is not None:
        return UnknownKeyError(key, f"did you mean {best}=...?")
    folder = key[: key.rfind(".") + 1]
    beside = [other for other in known if folder and other.startswith(folder)] or known
    more = ", ..." if len(beside) > 12 else ""
    return UnknownKeyError(key, f"keys are: {', '.join(beside[:12])}{more}")


def nearest(word: str, words: list[str]) -> str | None:
    """The one of `words` that `word` was likely meant to be, or None.

    A key without its path (`lr`, `patiense`) is compared with the last part of each key too; of two
    with the same path only the last parts are.
    """
    last = word.rpartition(".")[2]
    for candidate in words:
        if candidate.rpartition(".")[2] == last:
            return candidate
    path = word.removesuffix(last)
    others = [each for each in words if not (path and f"{each}.".startswith(path))]
    if close := difflib.get_close_matches(word, others, n=1, cutoff=0.6):
        return close[0]
    lasts = {candidate.rpartition(".")[2]: candidate for candidate in reversed(words)}
    close = difflib.get_close_matches(last, lasts, n=1, cutoff=0.6)
    return lasts[close[0]] if close else None


def _typed(value: Any) -> str:
    """`value` as one would type it on the command line."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return shown(value)
