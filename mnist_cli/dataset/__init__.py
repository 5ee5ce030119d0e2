"""Datasets as tensors: `load` makes the training, validation and test split of a configuration.

    sources      the catalogue, and where files may lie
    download     getting what is missing
    transfer     one file over https, bounded in time and size
    files        the bounded read of a file that may be anything
    idx, cifar   the two file formats
    decode       every check on their content, statistics, digest
    cache        the decoded tensors as one file
    image_files  the rooms above in their order
    digits       scikit-learn's bundled digits
    linear       the synthetic regression set
    split        which rows are held back for validation
    again        the data of a run, for those who ask its model

The test set is the official one; validation rows are taken from the training set only.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mnist_cli.dataset import digits, image_files, linear, split
from mnist_cli.dataset.decode import Decoded, content_digest, described
from mnist_cli.dataset.sources import source_of
from mnist_cli.errors import DataError
from mnist_cli.options import (
    DatasetConfig,
    DigitsConfig,
    LinearDatasetConfig,
    PluginDatasetConfig,
)
from mnist_cli.plugin_code import code_of_plugin

__all__ = ["Dataset", "DatasetSpec", "Normalise", "Split", "load"]


@dataclass(frozen=True)
class Split:
    """Rows of a dataset.

    Attributes:
        inputs: (N, C, H, W) uint8 images, or (N, F) float32.
        targets: (N,) int64 classes, or (N, 1) float32.
    """

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device | str) -> Split:
        """The same rows on `device`."""
        return Split(self.inputs.to(device), self.targets.to(device))


@dataclass(frozen=True)
class DatasetSpec:
    """What a checkpoint has to know of its dataset.

    Attributes:
        name: the option of the group.
        task: what is predicted, a class or a number.
        input_shape: of one row, (C, H, W) or (F,).
        classes: a name for each class; empty for regression, as are mean and std.
        mean: of each channel of the official training set, in units of pixel/255, or empty.
        std: the standard deviation, likewise.
        digest: SHA-256 of the official training and test set, whatever the seed and the split.
    """

    name: str
    task: Literal["classification", "regression"]
    input_shape: tuple[int, ...]
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    digest: str

    @property
    def num_outputs(self) -> int:
        return len(self.classes) if self.task == "classification" else 1


@dataclass(frozen=True)
class Dataset:
    """A model learns from `train`, is selected on `val`, and tested on `test` once."""

    spec: DatasetSpec
    train: Split
    val: Split
    test: Split

    def to(self, device: torch.device | str) -> Dataset:
        """The same rows on `device`."""
        train, val, test = (one.to(device) for one in (self.train, self.val, self.test))
        return Dataset(self.spec, train, val, test)


def load(config: DatasetConfig, seed: int, *, may_download: bool = True) -> Dataset:
    """Load, verify and split a dataset, downloading it where it is missing.

    Args:
        config: the `dataset` group.
        seed: decides which training rows become validation rows, and nothing else.
        may_download: False raises DataError where files are missing.

    Raises:
        DataError: the files are damaged, or neither there nor to be had.
        UsageError: `dataset.val_fraction` leaves a class or a split empty.
        ResourceError: the disk is full.
    """
    return hold_back(official(config, may_download=may_download), config, seed)


def official(config: DatasetConfig, *, may_download: bool = True) -> Dataset:
    """As `load`, before any row is held back for validation."""
    if isinstance(config, LinearDatasetConfig):
        return _regression(config)
    if isinstance(config, DigitsConfig):
        return _classification(config.name, digits.load(), digits.CLASSES)
    if isinstance(config, PluginDatasetConfig):
        with code_of_plugin(config, "load"):
            sets, classes = config.load(), config.classes()
        _check_sets(config.name, sets, len(classes))
        return _classification(config.name, described(*sets), classes)
    source = source_of(config)
    decoded = image_files.load(source, config.root, config.mirror, may_download=may_download)
    return _classification(config.name, decoded, source.classes)


def hold_back(data: Dataset, config: DatasetConfig, seed: int) -> Dataset:
    """`data` with the share `config.val_fraction` of its training rows as validation rows.

    Raises:
        UsageError: a class or a split would be empty.
    """
    if data.spec.task == "regression":
        train, val = split.random(len(data.train), config.val_fraction, seed)
    elif config.val_fraction == 0:
        return data
    else:
        train, val = split.stratified(data.train.targets.numpy(), config.val_fraction, seed)
    rows = data.train
    return dataclasses.replace(data, train=_rows(rows, train), val=_rows(rows, val))


class Normalise(nn.Module):
    """What a model is fed: (pixel / 255 - mean) / std, as one multiplication and one subtraction.

    Training, evaluation and export share this arithmetic. (N, C, H, W) uint8 becomes float32;
    numbers (N, F) of a regression pass unchanged.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, spec: DatasetSpec) -> None:
        super().__init__()
        self.is_image = bool(spec.mean)
        scale = [1 / (255 * std) for std in spec.std]
        shift = [mean / std for mean, std in zip(spec.mean, spec.std, strict=True)]
        self.register_buffer("scale", torch.tensor(scale).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("shift", torch.tensor(shift).view(1, -1, 1, 1), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Raw inputs to what the model takes, on their device."""
        if not self.is_image:
            return inputs
        return inputs.to(torch.float32, copy=True).mul_(self.scale).sub_(self.shift)


def _classification(name: str, decoded: Decoded, classes: tuple[str, ...]) -> Dataset:
    spec = DatasetSpec(
        name=name,
        task="classification",
        input_shape=tuple(decoded.train_images.shape[1:]),
        classes=classes,
        mean=decoded.mean,
        std=decoded.std,
        digest=decoded.digest,
    )
    train = Split(decoded.train_images, decoded.train_labels.long())
    test = Split(decoded.test_images, decoded.test_labels.long())
    return Dataset(spec, train, _none_of(train), test)


def _check_sets(name: str, sets: tuple[Tensor, Tensor, Tensor, Tensor], num_classes: int) -> None:
    """Refuse what a plugin's dataset may not be. Raises DataError."""
    for part, images, labels in (("training", *sets[:2]), ("test", *sets[2:])):
        fits = (
            (images.dtype, labels.dtype) == (torch.uint8, torch.uint8)
            and images.ndim == 4
            and labels.shape == images.shape[:1]
            and len(torch.bincount(labels)) == num_classes
            and bool(torch.bincount(labels).all())
        )
        if not fits:
            raise DataError(
                f"dataset={name} gives a {part} set of {tuple(images.shape)} {images.dtype} images,"
                f" {tuple(labels.shape)} {labels.dtype} labels",
                "its plugin must give (N, C, H, W) uint8 images and (N,) uint8 labels of all"
                f" {num_classes} classes",
            )


def _regression(config: LinearDatasetConfig) -> Dataset:
    tensors = linear.load(config)
    spec = DatasetSpec(
        name=config.name,
        task="regression",
        input_shape=(config.num_features,),
        classes=(),
        mean=(),
        std=(),
        digest=content_digest(tensors),
    )
    train, test = Split(*tensors[:2]), Split(*tensors[2:])
    return Dataset(spec, train, _none_of(train), test)


def _none_of(rows: Split) -> Split:
    return Split(rows.inputs[:0], rows.targets[:0])


def _rows(rows: Split, index: NDArray[np.int64]) -> Split:
    """Some rows; NumPy copies them in a fifth of the time that torch takes."""
    return Split(
        torch.from_numpy(rows.inputs.numpy()[index]), torch.from_numpy(rows.targets.numpy()[index])
    )
