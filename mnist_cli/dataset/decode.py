"""From verified source files to tensors: the official training and test set of an image dataset.

Owns every check on the content of a source file, the per-channel statistics and the content digest.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mnist_cli.dataset import cifar, files, idx
from mnist_cli.dataset.files import damaged
from mnist_cli.dataset.sources import MNIST_SHA256, Part, Source
from mnist_cli.errors import DataError


@dataclass(frozen=True)
class Decoded:
    """The official sets of an image dataset: images (N, C, H, W) uint8, labels (N,) uint8.

    `mean` and `std` are those of each channel of the training images, in units of pixel/255;
    `digest` is the SHA-256 of the four tensors.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    digest: str


def decode(source: Source, paths: tuple[Path, ...]) -> Decoded:
    """Read and check every part of `source`, `paths` being in the order of `source.parts`.

    Raises:
        DataError: a file is not what the source says, naming it, what was expected and found.
    """
    num_train = len(source.train)
    train = _assembled(source, source.train, paths[:num_train])
    test = _assembled(source, source.test, paths[num_train:])
    return described(*train, *test)


def described(
    train_images: Tensor, train_labels: Tensor, test_images: Tensor, test_labels: Tensor
) -> Decoded:
    """The four tensors with their statistics and digest."""
    mean, std = statistics(train_images)
    digest = content_digest((train_images, train_labels, test_images, test_labels))
    return Decoded(train_images, train_labels, test_images, test_labels, mean, std, digest)


def read_part(source: Source, part: Part, path: Path) -> tuple[Tensor | None, Tensor | None]:
    """The images (N, C, H, W) and the labels (N,) that one file holds, uint8, labels from 0.

    Raises:
        DataError: see `decode`.
    """
    content = files.read(path, source.num_bytes(part))
    images: Tensor | None = None
    labels: Tensor | None = None
    if part.holds == "records":
        images, labels = cifar.parse(content, part.count, source.image_shape, path)
    elif part.holds == "images":
        pixels = idx.parse(content, (part.count, *source.image_shape[1:]), path)
        images = pixels.view(part.count, *source.image_shape)
    else:
        labels = idx.parse(content, (part.count,), path)
    _check_digest(source, part, content, path)
    if images is not None and source.transposed:
        images = images.transpose(-1, -2).contiguous()
    return images, None if labels is None else _from_zero(source, labels, path)


def statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and population standard deviation of each channel, in units of pixel/255.

    The sums are exact integers. A deviation of 0 counts as 1, so that one can divide by it.

    Args:
        images: (N, C, H, W) uint8.
    """
    means, deviations = [], []
    for channel in images.unbind(1):
        histogram = torch.bincount(channel.reshape(-1), minlength=256).tolist()
        count = channel.numel()
        total = sum(value * times for value, times in enumerate(histogram))
        squares = sum(value * value * times for value, times in enumerate(histogram))
        variance = (count * squares - total * total) / (count * count)
        means.append(total / count / 255)
        deviations.append(math.sqrt(variance) / 255 or 1.0)
    return tuple(means), tuple(deviations)


def content_digest(tensors: Iterable[Tensor]) -> str:
    """SHA-256, hexadecimal, of the types, shapes and bytes of contiguous tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def _assembled(
    source: Source, parts: tuple[Part, ...], paths: tuple[Path, ...]
) -> tuple[Tensor, Tensor]:
    pieces = [read_part(source, part, path) for part, path in zip(parts, paths, strict=True)]
    images = torch.cat([images for images, _ in pieces if images is not None])
    labels = torch.cat([labels for _, labels in pieces if labels is not None])
    present = torch.bincount(labels, minlength=len(source.classes))
    if not present.all():
        absent = source.classes[int(present.argmin())]
        path = next(
            path for path, (_, labels) in zip(paths, pieces, strict=True) if labels is not None
        )
        raise damaged(path, f"all {len(source.classes)} classes", f"none of class '{absent}'")
    return images, labels


def _check_digest(source: Source, part: Part, content: files.Content, path: Path) -> None:
    found = hashlib.sha256(content.data).hexdigest()
    if part.sha256 is not None and found != part.sha256:
        raise damaged(path, f"{source.name} with SHA-256 {part.sha256}", found)
    if part.sha256 is None and found in MNIST_SHA256.values():
        raise DataError(
            f"{files.shown_path(path)}: expected a file of {source.name}, found one of mnist",
            f"type dataset=mnist, or name a folder that holds {source.name} with dataset.root=DIR",
        )


def _from_zero(source: Source, labels: Tensor, path: Path) -> Tensor:
    least, most = source.first_label, source.first_label + len(source.classes) - 1
    wrong = ((labels < least) | (labels > most)).nonzero()
    if len(wrong):
        index = int(wrong[0])
        raise damaged(
            path, f"labels from {least} to {most}", f"{int(labels[index])} at index {index}"
        )
    return labels - least
