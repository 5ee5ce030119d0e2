"""Reading a data file that may be anything: missing, endless, cut, packed to burst.

Owns the bounded read, the bounded gunzip, and the wording of what is wrong with a data file.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mnist_cli import regular_file
from mnist_cli.errors import DataError, one_line

Content = NDArray[np.uint8]  # the bytes of a file, (N,)

GZIP = 31  # zlib's wbits for one gzip member with its CRC checked
GZIP_SLACK_BYTES = 1 << 20  # what packing may add to content that doesn't shrink
HINT = (
    "delete the file to have it downloaded again, name another folder with dataset.root=DIR,"
    " or type dataset=digits"
)


class FilesError(DataError):
    """Files of a dataset are missing or damaged. The hint is for one who could take another."""


def damaged(path: Path, expected: str, found: str) -> FilesError:
    """The error for a file that isn't what it should be."""
    return FilesError(f"{shown_path(path)}: expected {expected}, found {found}", HINT)


def shown_path(path: Path) -> str:
    """`path` for a message: escaped, and of a long one the end, where the file's name is."""
    text = str(path)
    return one_line(text if len(text) <= 160 else f"...{text[-157:]}", 200)


def read(path: Path, limit: int) -> Content:
    """The content of a regular file, unpacked where its name ends in `.gz`.

    Args:
        path: the file.
        limit: the bytes that the content should have at most.

    Returns:
        The content, cut after `limit + 1` bytes, so that the caller sees that there is more.

    Raises:
        DataError: the file can't be read, isn't a regular file, or is no intact gzip.
    """
    packed = path.suffix == ".gz"
    most = limit + GZIP_SLACK_BYTES if packed else limit + 1
    try:
        with regular_file.opened(path) as file:
            size = os.fstat(file.fileno()).st_size
            if packed and size > most:
                raise damaged(path, f"at most {most} bytes", f"{size} bytes")
            content = np.empty(min(size, most), np.uint8)  # a bytearray is zeroed first: 3x as slow
            content = content[: file.readinto(content.data)]
    except OSError as error:
        raise DataError(f"{shown_path(path)} can't be read: {error.strerror}", HINT) from error
    return gunzip(content, limit, path) if packed else content


def gunzip(packed: Content, limit: int, path: Path) -> Content:
    """Unpack one gzip member, at most `limit + 1` bytes of it.

    Raises:
        DataError: not gzip, cut short, a wrong CRC, or anything behind the first member.
    """
    stream = zlib.decompressobj(GZIP)
    try:
        content = np.frombuffer(stream.decompress(packed.data, limit + 1), np.uint8).copy()
    except zlib.error as error:
        raise damaged(path, "an intact gzip file", f"damage: {error}") from error
    if len(content) > limit:
        return content
    if not stream.eof:
        raise damaged(path, "an intact gzip file", f"an end after {len(packed)} bytes of it")
    if stream.unused_data:
        raise damaged(path, "one gzip member", f"{len(stream.unused_data)} more bytes behind it")
    return content
