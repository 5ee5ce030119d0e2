"""The binary format of CIFAR-10's files, as https://www.cs.toronto.edu/~kriz/cifar.html defines it.

One record after the other: a label byte, then the red, the green and the blue plane, each in C
order. The other format that CIFAR-10 comes in is pickle, which runs code, and is never read.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from mnist_cli.dataset.files import Content, damaged


def num_bytes(count: int, image_shape: tuple[int, int, int]) -> int:
    """The size of a file of `count` records."""
    return count * (1 + math.prod(image_shape))


def parse(
    content: Content, count: int, image_shape: tuple[int, int, int], path: Path
) -> tuple[Tensor, Tensor]:
    """The images (count, C, H, W) and labels (count,) of one file, both uint8.

    Raises:
        DataError: another size.
    """
    expected = num_bytes(count, image_shape)
    if len(content) != expected:
        more = "or more " if len(content) > expected else ""
        raise damaged(path, f"{count} records, {expected} bytes", f"{len(content)} {more}bytes")
    records = torch.from_numpy(content).view(count, -1)
    return records[:, 1:].reshape(count, *image_shape), records[:, 0].clone()
