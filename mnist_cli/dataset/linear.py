"""The synthetic regression set: y = 2 * (x_1 + ... + x_F) + noise * N(0, 1)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mnist_cli.options import LinearDatasetConfig

SLOPE = 2.0
EDGE = 2.0  # inputs lie between -EDGE and EDGE
TRAIN_SEED = 1  # constants, never the run's seed: the data of a configuration is always the same
TEST_SEED = 2


def load(config: LinearDatasetConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training inputs (N, F) and targets (N, 1), then as many for the test, all float32.

    The training inputs of a single feature are evenly spaced; all others are uniform random.
    """
    shape = (config.num_samples, config.num_features)
    train, test = (np.random.Generator(np.random.Philox(seed)) for seed in (TRAIN_SEED, TEST_SEED))
    if config.num_features == 1:
        inputs = np.linspace(-EDGE, EDGE, config.num_samples).reshape(shape)
    else:
        inputs = train.uniform(-EDGE, EDGE, shape)
    fresh = test.uniform(-EDGE, EDGE, shape)
    return (*_points(inputs, config.noise, train), *_points(fresh, config.noise, test))


def _points(
    inputs: NDArray[np.float64], noise: float, generator: np.random.Generator
) -> tuple[Tensor, Tensor]:
    targets = SLOPE * inputs.sum(axis=1, keepdims=True)
    targets += noise * generator.standard_normal(targets.shape)
    return torch.from_numpy(inputs).float(), torch.from_numpy(targets).float()
