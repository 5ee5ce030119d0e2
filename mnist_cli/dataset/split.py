"""Which rows are held back: a pure function of the labels, the fraction and the seed.

The order comes from the raw output of NumPy's Philox generator, which NumPy promises not to
change (https://numpy.org/neps/nep-0019-rng-policy.html), so a split is the same with any version.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mnist_cli.errors import UsageError

Rows = NDArray[np.int64]  # row numbers, (N,)


def stratified(labels: NDArray[np.uint8], fraction: float, seed: int) -> tuple[Rows, Rows]:
    """Hold back `fraction` of the rows, and of each class as near to it as whole rows allow.

    Args:
        labels: (N,), classes from 0, each at least once.
        fraction: 0 (holds nothing back) to below 1.
        seed: at least 0.

    Returns:
        The rows that stay, (N - M,), and those held back, (M,), each ascending.

    Raises:
        UsageError: a class would have no row on one side.
    """
    counts = np.bincount(labels)
    quotas = _quotas(counts, fraction)
    empty = (quotas == 0) | (quotas == counts)
    if fraction > 0 and empty.any():
        label = int(empty.argmax())
        raise _too_coarse(fraction, f"the {counts[label]} rows of class {label}", int(counts.min()))
    order = _order(len(labels), seed)
    ordered_labels = labels[order]
    held = np.zeros(len(labels), bool)
    for label, quota in enumerate(quotas):
        held[order[ordered_labels == label][:quota]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)


def random(count: int, fraction: float, seed: int) -> tuple[Rows, Rows]:
    """As `stratified`, for `count` rows without classes."""
    quota = round(count * fraction)
    if fraction > 0 and quota in (0, count):
        raise _too_coarse(fraction, f"{count} rows", count)
    held = np.zeros(count, bool)
    held[_order(count, seed)[:quota]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)


def _quotas(counts: Rows, fraction: float) -> Rows:
    """Largest remainders: whole rows per class that sum up to the rounded fraction of all rows."""
    exact = counts.astype(np.float64) * fraction
    quotas = np.floor(exact).astype(np.int64)
    short = round(int(counts.sum()) * fraction) - int(quotas.sum())
    quotas[np.argsort(quotas - exact, kind="stable")[: max(0, short)]] += 1
    return quotas


def _order(count: int, seed: int) -> Rows:
    keys: NDArray[np.uint64] = np.random.Philox(seed).random_raw(count)
    order: Rows = np.argsort(keys, kind="stable")
    return order


def _too_coarse(fraction: float, what: str, smallest: int) -> UsageError:
    message = f"dataset.val_fraction={fraction:g} can't split {what}: one side would be empty"
    if smallest < 2:
        return UsageError(message, "type dataset.val_fraction=0")
    least, most = 1 / smallest, 1 - 1 / smallest
    return UsageError(
        message, f"type dataset.val_fraction=0, or one from {least:.2g} to {most:.2g}"
    )
