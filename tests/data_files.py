"""Small synthetic data files in the real formats, for tests.

The counts of the real datasets are fixed, so the builders return a `Source` that fits their files.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import struct
import tarfile
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mnist_cli.dataset import sources
from mnist_cli.dataset.sources import Part, Source

Array = NDArray[np.uint8]


def encode_idx(array: Array) -> bytes:
    """A uint8 array as an IDX file."""
    return (
        bytes([0, 0, 8, array.ndim])
        + struct.pack(f">{array.ndim}I", *array.shape)
        + array.tobytes()
    )


def write(path: Path, content: bytes) -> Path:
    """`content` at `path`, gzipped where the name ends in `.gz`, with the folders that it needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content, 1, mtime=0) if path.suffix == ".gz" else content)
    return path


def write_idx_images(path: Path, images: Array) -> Path:
    """(N, H, W) uint8."""
    return write(path, encode_idx(images))


def write_idx_labels(path: Path, labels: Array) -> Path:
    """(N,) uint8."""
    return write(path, encode_idx(labels))


def synthetic(
    count: int, num_classes: int, shape: tuple[int, ...], seed: int
) -> tuple[Array, Array]:
    """Images (count, *shape), brighter with their class, and labels that go round the classes."""
    generator = np.random.default_rng(seed)
    labels = (np.arange(count) % num_classes).astype(np.uint8)
    noise = generator.integers(0, 64, (count, *shape))
    level = (labels.astype(np.int64) * 190 // max(1, num_classes - 1)).reshape(
        -1, *[1] * len(shape)
    )
    return (noise + level).astype(np.uint8), labels


def small_source(name: str, num_train: int, num_test: int) -> Source:
    """The real source `name`, with fewer images and no pinned digests."""
    real = sources.emnist(name[7:]) if name.startswith("emnist-") else sources.SOURCES[name]

    def shrunk(parts: tuple[Part, ...], count: int) -> tuple[Part, ...]:
        num_files = len(parts) if parts[0].holds == "records" else 1
        return tuple(replace(part, count=count // num_files, sha256=None) for part in parts)

    return replace(real, train=shrunk(real.train, num_train), test=shrunk(real.test, num_test))


def part_contents(source: Source) -> dict[str, bytes]:
    """The unpacked content of each file of `source`, synthetic."""
    contents = {}
    for seed, parts in enumerate((source.train, source.test)):
        for number, part in enumerate(parts):
            shape = source.image_shape if part.holds == "records" else source.image_shape[1:]
            draw = seed + 10 * (number if part.holds == "records" else 0)
            images, labels = synthetic(part.count, len(source.classes), shape, draw)
            labels = labels + np.uint8(source.first_label)
            if part.holds == "records":
                rows = np.hstack([labels[:, None], images.reshape(len(images), -1)])
                contents[part.file] = rows.tobytes()
            else:
                contents[part.file] = encode_idx(images if part.holds == "images" else labels)
    return contents


def write_mnist_like(
    root: Path,
    name: str,
    num_train: int,
    num_test: int,
    folder: str | None = None,
    suffix: str = ".gz",
) -> Source:
    """Synthetic files like those of dataset `name` in `root`/`folder`, by default torchvision's.

    Returns:
        The source that reads them, for `image_files.load(source, str(root))`.
    """
    source = small_source(name, num_train, num_test)
    for file, content in part_contents(source).items():
        write(root / (source.folder if folder is None else folder) / f"{file}{suffix}", content)
    return source


@functools.lru_cache
def gzip_bomb(head: bytes = b"", zeros: int = 1 << 27) -> bytes:
    """A gzip file of `head` and very many zeros."""
    packer = zlib.compressobj(1, zlib.DEFLATED, 31)
    packed = [packer.compress(head)]
    packed += [packer.compress(bytes(1 << 20)) for _ in range(zeros >> 20)]
    return b"".join(packed) + packer.flush()


def downloads(source: Source) -> tuple[Source, dict[str, bytes]]:
    """What a server of `source` serves, by name, and the source with the md5 of it."""
    contents = part_contents(source)
    if source.archive is None:
        served = {
            f"{file}.gz": gzip.compress(content, 1, mtime=0) for file, content in contents.items()
        }
    else:
        served = {source.archive.file: pack(source, contents)}
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in served.items()}
    return replace(source, md5=md5), served


def pack(source: Source, contents: dict[str, bytes]) -> bytes:
    """The archive of `source`, a zip or a tar.gz file."""
    archive = source.archive
    if archive is None:
        raise ValueError(source.name)
    members = {
        f"{archive.prefix}{file}{archive.suffix}": gzip.compress(c, 1) if archive.suffix else c
        for file, c in contents.items()
    }
    packed = io.BytesIO()
    if archive.file.endswith(".zip"):
        with zipfile.ZipFile(packed, "w") as zipped:
            for name, content in members.items():
                zipped.writestr(name, content)
        return packed.getvalue()
    with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=1) as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return packed.getvalue()
