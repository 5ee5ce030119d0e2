"""Decoded datasets in the user's cache folder, one safetensors file for each place of the sources.

The cache can only save time: what is missing, damaged, of other source files or foreign is built
again, and a folder that can't be written to is no error. So anybody may remove a file at any time:
who reads it goes on reading. What nobody used for a month is removed, whether its sources are still
there or not: another machine that shares the folder may see them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from mnist_cli.dataset import files
from mnist_cli.dataset.decode import Decoded, content_digest
from mnist_cli.dataset.sources import user_cache
from mnist_cli.errors import DataError

FORMAT = 1
TENSORS = ("train_images", "train_labels", "test_images", "test_labels")
MOST_BYTES = 4 << 30
STALE_S = 3600.0  # of a file that is being written
UNUSED_S = 30 * 86_400.0


def cached(name: str, paths: tuple[Path, ...], build: Callable[[], Decoded]) -> Decoded:
    """What `build` makes of the source files `paths`, from the cache where it is there.

    Args:
        name: of the dataset, a part of the file's name.
        paths: the source files; another size or time of change of one leads to a new build.
        build: decodes the files; its errors pass through.
    """
    folder = user_cache()
    if folder is None:
        return build()
    place = _sha256(json.dumps([str(path) for path in paths]))
    path = folder / "decoded" / f"{name}-{place[:16]}.safetensors"
    with contextlib.suppress(OSError):
        _remove_unused(path)
    key = _key(paths)
    decoded = load(path, key)
    if decoded is None:
        decoded = build()
        if key == _key(paths):
            save(path, key, decoded)
    with contextlib.suppress(OSError):
        _note_use(path)
    return decoded


def load(path: Path, key: str) -> Decoded | None:
    """The content of a cache file, or None where it isn't intact or of other source files."""
    try:
        metadata, tensors = _parse(files.read(path, MOST_BYTES))
        head = json.loads(metadata["head"])
        train_images, train_labels, test_images, test_labels = (tensors[name] for name in TENSORS)
        official = (train_images, train_labels, test_images, test_labels)
        if metadata["check"] != _sha256(metadata["head"]) or head["key"] != key:
            return None
        if head["digest"] != content_digest(official):
            return None
        mean, std = tuple(head["mean"]), tuple(head["std"])
        return Decoded(*official, mean=mean, std=std, digest=head["digest"])
    except (DataError, LookupError, TypeError, ValueError, RuntimeError, MemoryError):
        return None


def save(path: Path, key: str, decoded: Decoded) -> None:
    """Write a cache file whole or not at all; a failure leaves no trace."""
    facts = {"key": key, "digest": decoded.digest, "mean": decoded.mean, "std": decoded.std}
    head = json.dumps(facts)
    tensors = {name: getattr(decoded, name) for name in TENSORS}
    content = safetensors.torch.save(tensors, {"head": head, "check": _sha256(head)})
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, content)


def _parse(content: files.Content) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and uint8 tensors of a safetensors file, the tensors in the memory of `content`.

    The library would copy every tensor, which takes as long as reading them.
    """
    start = 8 + int.from_bytes(content[:8].tobytes(), "little")
    header = json.loads(content[8:start].tobytes())
    metadata = header.pop("__metadata__")
    return metadata, {name: _tensor(content, start, entry) for name, entry in header.items()}


def _tensor(content: files.Content, start: int, entry: dict[str, Any]) -> Tensor:
    first, last = entry["data_offsets"]
    return torch.from_numpy(content[start + first : start + last]).view(entry["shape"])


def _write(path: Path, content: bytes) -> None:
    descriptor, temporary = tempfile.mkstemp(
        prefix=f".{path.name}.", suffix=".tmp", dir=path.parent
    )
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _note_use(path: Path) -> None:
    """Set the time of the last access, which many file systems don't keep."""
    os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))


def _remove_unused(path: Path) -> None:
    """Remove what is no longer used of the dataset of `path`, and what a killed process left."""
    name, now = path.name.rpartition("-")[0], time.time()
    for pattern, limit_s in ((f"{name}-*.safetensors", UNUSED_S), (f".{name}-*.tmp", STALE_S)):
        for other in set(path.parent.glob(pattern)) - {path}:
            with contextlib.suppress(OSError):
                state = other.stat()
                if now - max(state.st_atime, state.st_mtime) > limit_s:
                    other.unlink()


def _key(paths: tuple[Path, ...]) -> str:
    states: list[object] = [FORMAT]
    for path in paths:
        try:
            state = path.stat()
        except OSError:
            states.append([str(path), None])
        else:
            states.append([str(path), state.st_size, state.st_mtime_ns])
    return json.dumps(states)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
