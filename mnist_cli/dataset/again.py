"""The data that a run was made with, loaded once more to ask its model something."""

from __future__ import annotations

import contextlib
import dataclasses
import os

from mnist_cli import dataset
from mnist_cli.config import TrainConfig
from mnist_cli.console import Console
from mnist_cli.dataset import Dataset, DatasetSpec
from mnist_cli.dataset.files import FilesError
from mnist_cli.errors import CheckpointError, DataError
from mnist_cli.options import EmnistConfig, ImageFilesConfig


def load_again(
    run: TrainConfig,
    spec: DatasetSpec,
    root: str | None,
    console: Console,
    *,
    may_download: bool = True,
) -> Dataset:
    """The data of the configuration `run`: at `root`, else where the run had it.

    A mirror that a checkpoint names is forgotten: no address comes out of a file. Data of another
    digest than that in `spec` is said so; the numbers are then not those of the run.

    Raises:
        DataError: it is missing or damaged.
        CheckpointError: a model for `spec` can't be fed with it.
    """
    source = run.dataset
    if isinstance(source, ImageFilesConfig | EmnistConfig):
        if root is None:
            with contextlib.suppress(ValueError):  # no name that a folder can have
                root = source.root if os.path.isdir(os.path.expanduser(source.root or "")) else None
        source = dataclasses.replace(source, root=root, mirror=None)
    try:
        data = dataset.load(source, run.seed, may_download=may_download)
    except FilesError as error:
        hint = "name the folder that holds the data of the run: dataset.root=DIR"
        raise DataError(error.message, hint) from error
    if (data.spec.input_shape, len(data.spec.classes)) != (spec.input_shape, len(spec.classes)):
        raise CheckpointError(
            f"the checkpoint is for samples of shape {spec.input_shape} and {len(spec.classes)}"
            f" classes, but {spec.name} has {data.spec.input_shape} and {len(data.spec.classes)}",
            "take a checkpoint that was trained on this dataset",
        )
    if spec.digest != data.spec.digest:
        console.warn(
            f"the {spec.name} data here is not what the run used"
            f" (digest {data.spec.digest[:12]} instead of {spec.digest[:12]})"
        )
    return data
