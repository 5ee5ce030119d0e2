"""The bundled dataset: 1,797 handwritten digits of scikit-learn, 8x8, offline.

Source: https://archive.ics.uci.edu/dataset/80 (its test set). scikit-learn is imported only where
the cache doesn't have them yet, for that takes seconds.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from mnist_cli.dataset.cache import cached
from mnist_cli.dataset.decode import Decoded, described
from mnist_cli.dataset.split import stratified
from mnist_cli.errors import DataError
from mnist_cli.imports import importing

CLASSES = tuple("0123456789")
COUNT = 1_797
BRIGHTEST = 16
TEST_FRACTION = 0.2
TEST_SEED = 0  # never the run's: every run is tested on the same images


def load() -> Decoded:
    """The images (N, 1, 8, 8), their 0..16 scaled to 0..255, split 80/20 by class.

    Raises:
        DataError: scikit-learn isn't installed, or its digits aren't what they were.
    """
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise DataError("dataset=digits needs scikit-learn", "type pip install scikit-learn")
    return cached("digits", (Path(spec.origin),), _decode)


def _decode() -> Decoded:
    with importing():
        from sklearn.datasets import load_digits

    bunch = load_digits()
    values = torch.from_numpy(bunch.images)  # (1797, 8, 8) float64
    labels = torch.from_numpy(bunch.target).to(torch.uint8)
    if values.shape != (COUNT, 8, 8) or values.min() != 0 or values.max() != BRIGHTEST:
        raise DataError(
            f"scikit-learn's digits: expected {COUNT}x8x8 values from 0 to {BRIGHTEST},"
            f" found {tuple(values.shape)} from {values.min():g} to {values.max():g}",
            "type dataset=mnist",
        )
    images = (values * 255 / BRIGHTEST).round().to(torch.uint8).unsqueeze(1)
    train, test = stratified(labels.numpy(), TEST_FRACTION, TEST_SEED)
    return described(images[train], labels[train], images[test], labels[test])
