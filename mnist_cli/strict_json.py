"""JSON from anybody: no duplicate keys, no NaN, no numbers out of reach, no endless depth."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from mnist_cli import regular_file


def read(path: Path, most_bytes: int) -> dict[str, Any]:
    """The JSON object in a file of at most `most_bytes`.

    Raises:
        OSError: it can't be read.
        ValueError: it is something else.
    """
    data = regular_file.read(path, most_bytes + 1)
    if len(data) > most_bytes:
        raise ValueError(f"it is larger than {most_bytes} bytes")
    return parse(data)


def parse(data: bytes) -> dict[str, Any]:
    """A JSON object out of UTF-8 bytes. Raises ValueError for anything else."""
    try:
        found = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_int=_int,
            parse_float=_float,
        )
    except RecursionError:
        raise ValueError("it is too deep") from None
    if not isinstance(found, dict):
        raise ValueError("it is not an object")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands there twice")
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def _float(digits: str) -> float:
    if math.isinf(number := float(digits)):
        raise ValueError(f"{digits[:20]} is out of reach")
    return number


def _int(digits: str) -> int:
    if len(digits) > 20:
        raise ValueError("a number is too long")
    return int(digits)
