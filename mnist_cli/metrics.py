"""How good outputs are: every number of the `val` and `test` blocks of result.json.

All is computed on the CPU in float64 and returned as plain Python values, unrounded. The same
outputs in the same order give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

NUM_BINS = 15  # of the calibration error, as in Guo et al., 2017
Z_95 = 1.959963984540054  # the 97.5 % quantile of the standard normal distribution


def classification(
    logits: Tensor, labels: Tensor, loss: float, classes: Sequence[str]
) -> dict[str, Any]:
    """The metrics of a classifier.

    `precision`, `recall` and `f1` are means over all K classes; where a class was never predicted
    or never occurs, the undefined ratio counts as 0. `auc` is the mean over the classes that have
    both positives and negatives among the labels, and None when there is none.

    Args:
        logits: (N, K) floats, finite, N at least 1.
        labels: (N,) int64 in 0..K-1.
        loss: the mean loss, passed through.
        classes: the K names, in the order of the logits.
    """
    logits, labels = logits.detach().cpu().double(), labels.cpu()
    n, num_classes = logits.shape
    predicted = logits.argmax(dim=1)  # (N,) int64
    probabilities = probabilities_of(logits)
    cells = torch.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    confusion = cells.reshape(num_classes, num_classes)  # rows: truth
    hits, support = confusion.diagonal(), confusion.sum(dim=1)
    num_predicted = confusion.sum(dim=0)
    precision = _ratio(hits, num_predicted)
    recall = _ratio(hits, support)
    f1 = _ratio(2 * hits, num_predicted + support)
    num_correct = int(hits.sum())
    columns = (support.tolist(), precision.tolist(), recall.tolist(), f1.tolist())
    return {
        "n": n,
        "loss": loss,
        "accuracy": num_correct / n,
        "accuracy_ci95": wilson(num_correct, n),
        "precision": precision.mean().item(),
        "recall": recall.mean().item(),
        "f1": f1.mean().item(),
        "auc": macro_auc(probabilities, labels),
        "ece": calibration_error(probabilities.amax(dim=1), predicted == labels),
        "per_class": [
            {"label": label, "index": index, "precision": p, "recall": r, "f1": f, "support": s}
            for index, (label, s, p, r, f) in enumerate(zip(classes, *columns, strict=True))
        ],
        "confusion": confusion.tolist(),
    }


def probabilities_of(logits: Tensor) -> Tensor:
    """The softmax of (N, K) logits, whatever loss they were trained with: (N, K) float64."""
    return logits.double().softmax(dim=1)


def mse(outputs: Tensor, targets: Tensor) -> float:
    """The mean squared error of (N, 1) floats, in float64."""
    return (outputs.detach().cpu().double() - targets.cpu().double()).square().mean().item()


def regression(outputs: Tensor, targets: Tensor, loss: float) -> dict[str, Any]:
    """The metrics of a regression; `r2` is None where the targets are all the same.

    Args:
        outputs: (N, 1) floats, N at least 1.
        targets: (N, 1) floats.
        loss: the mean loss, passed through.
    """
    outputs, targets = outputs.detach().cpu().double(), targets.cpu().double()
    residuals = outputs - targets
    constant = bool((targets == targets[0]).all())
    spread = (targets - targets.mean()).square().sum()
    return {
        "n": len(targets),
        "loss": loss,
        "mse": mse(outputs, targets),
        "mae": residuals.abs().mean().item(),
        "r2": None if constant else (1 - residuals.square().sum() / spread).item(),
    }


def mistakes(logits: Tensor, labels: Tensor) -> Tensor:
    """The rows of (N, K) logits whose answer isn't their label, the surest first: (M,) int64."""
    answers, confidences = surest(logits)
    wrong = (answers != labels.cpu()).nonzero().flatten()
    return wrong[confidences[wrong].argsort(descending=True, stable=True)]


def surest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The class that each row of (N, K) answers, (N,) int64, and its probability, (N,) float64."""
    logits = logits.detach().cpu().double()
    return logits.argmax(dim=1), logits.softmax(dim=1).amax(dim=1)


def wilson(num_correct: int, n: int) -> list[float]:
    """The 95 % score interval [low, high] of a share, within 0..1.

    Source: Wilson, "Probable Inference", 1927. Unlike p +- 1.96 s it holds near 0 and 1.
    """
    share, z2 = num_correct / n, Z_95**2
    center = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # The share itself bounds both: rounding puts an end past it where it is 0 or 1.
    return [min(share, max(0.0, center - half)), max(share, min(1.0, center + half))]


def macro_auc(probabilities: Tensor, labels: Tensor) -> float | None:
    """The mean area under the ROC curve, one class against the rest.

    The area is the chance that a positive stands above a negative, a tie counting one half; the
    ranks of the positives give it (Mann and Whitney, 1947): (R - P (P + 1) / 2) / (P (N - P)) with
    P positives, whose ranks, the mean rank within a tie, sum to R.

    Args:
        probabilities: (N, K) float64.
        labels: (N,) int64. Classes without positives or without negatives are left out.
    """
    n = len(labels)
    truth = labels.numpy()
    areas = []
    for index, scores in enumerate(probabilities.T.contiguous().numpy()):
        positives = np.sort(scores[truth == index])
        p = len(positives)
        if p in (0, n):
            continue
        ranked = np.sort(scores)  # not torch's sort, which takes ten times as long
        below = int(np.searchsorted(ranked, positives, side="left").sum())
        up_to = int(np.searchsorted(ranked, positives, side="right").sum())
        rank_sum = (below + up_to + p) / 2
        areas.append((rank_sum - p * (p + 1) / 2) / (p * (n - p)))
    return math.fsum(areas) / len(areas) if areas else None


def calibration_error(confidences: Tensor, correct: Tensor) -> float:
    """sum_m |B_m| / N * |accuracy(B_m) - confidence(B_m)| over 15 equal bins of the confidence.

    Bin m holds the confidences in ((m - 1) / 15, m / 15].
    Source: Guo et al., "On Calibration of Modern Neural Networks", 2017, equation 3.

    Args:
        confidences: (N,) float64, the probability of the predicted class.
        correct: (N,) bool.
    """
    gaps = torch.bincount(
        _bins(confidences), weights=correct.double() - confidences, minlength=NUM_BINS
    )
    return gaps.abs().sum().item() / len(confidences)


def calibration_bins(confidences: Tensor, correct: Tensor) -> list[dict[str, Any]]:
    """What `calibration_error` sums up, of each of its 15 bins that isn't empty.

    Returns:
        `n`, `num_correct` and the mean `confidence` of each, the least sure first.

    Args:
        confidences: (N,) float64, the probability of the predicted class.
        correct: (N,) bool.
    """
    bins = _bins(confidences)
    counts = torch.bincount(bins, minlength=NUM_BINS).tolist()
    hits = torch.bincount(bins, weights=correct.double(), minlength=NUM_BINS).tolist()
    sums = torch.bincount(bins, weights=confidences, minlength=NUM_BINS).tolist()
    return [
        {"n": n, "num_correct": round(num_correct), "confidence": total / n}
        for n, num_correct, total in zip(counts, hits, sums, strict=True)
        if n
    ]


def mcnemar(only_a: int, only_b: int) -> float:
    """The exact two-sided p of two classifiers that answered the same samples.

    Where only one of them is right, each is so with chance 1/2 if both are equally good. So the
    smaller count k of n is binomial, and p = 2 * sum_{i <= k} C(n, i) / 2^n, at most 1.
    Source: McNemar, "Note on the Sampling Error of the Difference Between Correlated Proportions",
    1947, with the binomial distribution itself instead of its normal approximation.

    Args:
        only_a: samples that the first got right and the second wrong.
        only_b: the other way round.
    """
    n, ways, total = only_a + only_b, 1, 0  # whole numbers: no rounding until the last line
    for i in range(min(only_a, only_b) + 1):
        total += ways
        ways = ways * (n - i) // (i + 1)
    return min(1.0, 2 * total / (1 << n))


def _bins(confidences: Tensor) -> Tensor:
    edges = torch.arange(1, NUM_BINS, dtype=torch.float64) / NUM_BINS
    return torch.bucketize(confidences, edges)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole in float64, 0 where the whole is 0."""
    return part.double() / whole.clamp(min=1)
