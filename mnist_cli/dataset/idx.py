"""The IDX format of MNIST's files, as http://yann.lecun.com/exdb/mnist/ defined it.

Bytes 0 0, one byte for the type (8: unsigned byte), one for the number of dimensions, each
dimension as a big-endian uint32, then the values in C order.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path

import torch
from torch import Tensor

from mnist_cli.dataset.files import Content, damaged

UINT8 = 8


def num_bytes(shape: tuple[int, ...]) -> int:
    """The size of an IDX file that holds a uint8 array of `shape`."""
    return 4 + 4 * len(shape) + math.prod(shape)


def parse(content: Content, shape: tuple[int, ...], path: Path) -> Tensor:
    """The array in an IDX file.

    Args:
        content: the unpacked file; the result shares its memory.
        shape: what the file has to hold, every dimension at least 1.
        path: the file, for messages.

    Returns:
        `shape`, uint8.

    Raises:
        DataError: another type, number of dimensions, shape or size.
    """
    start = 4 + 4 * len(shape)
    magic = bytes([0, 0, UINT8, len(shape)])
    if len(content) < start:
        raise damaged(path, f"an IDX header of {start} bytes", f"{len(content)} bytes")
    if content[:4].tobytes() != magic:
        expected = f"IDX magic {magic.hex()} (uint8, {len(shape)} dimensions)"
        raise damaged(path, expected, content[:4].tobytes().hex())
    found = struct.unpack(f">{len(shape)}I", content[4:start].tobytes())
    if found != shape:
        raise damaged(path, "x".join(map(str, shape)), "x".join(map(str, found)))
    if len(content) != num_bytes(shape):
        more = "or more " if len(content) > num_bytes(shape) else ""
        raise damaged(path, f"{num_bytes(shape)} bytes", f"{len(content)} {more}bytes")
    return torch.from_numpy(content[start:]).view(shape)
