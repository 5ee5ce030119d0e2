from __future__ import annotations

import json
import math
import time
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
import sklearn.metrics
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mnist_cli import scoring
from mnist_cli.dataset import DatasetSpec, Split
from mnist_cli.metrics import (
    calibration_bins,
    calibration_error,
    classification,
    macro_auc,
    mcnemar,
    regression,
    surest,
    wilson,
)

KEYS = [
    "n",
    "loss",
    "accuracy",
    "accuracy_ci95",
    "precision",
    "recall",
    "f1",
    "auc",
    "ece",
    "per_class",
    "confusion",
]


def names(k: int) -> list[str]:
    return [f"class {index}" for index in range(k)]


@st.composite
def outputs(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Logits (N, K) float32, half of the time with many ties, and labels (N,), some missing."""
    n, k = draw(st.integers(1, 40)), draw(st.integers(2, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    logits = torch.randn(n, k, generator=generator) * draw(st.sampled_from([0.3, 2.0, 30.0]))
    if draw(st.booleans()):
        logits = logits.round()
    present = draw(st.lists(st.integers(0, k - 1), min_size=1, max_size=k, unique=True))
    picks = torch.randint(len(present), (n,), generator=generator)
    return logits, torch.tensor(present)[picks]


def close(value: Any) -> Any:
    return pytest.approx(value, rel=1e-9, abs=1e-9)


@given(outputs())
@settings(max_examples=150, deadline=None)
def test_classification_equals_scikit_learn(batch: tuple[Tensor, Tensor]) -> None:
    logits, labels = batch
    k = logits.shape[1]
    found = classification(logits, labels, 0.25, names(k))
    truth, predicted = labels.numpy(), logits.numpy().argmax(axis=1)
    assert list(found) == KEYS
    assert found["n"] == len(labels)
    assert found["loss"] == 0.25
    assert found["accuracy"] == sklearn.metrics.accuracy_score(truth, predicted)
    every = list(range(k))
    table = sklearn.metrics.precision_recall_fscore_support(
        truth, predicted, labels=every, zero_division=0
    )
    for index, row in enumerate(found["per_class"]):
        assert list(row) == ["label", "index", "precision", "recall", "f1", "support"]
        assert (row["label"], row["index"]) == (f"class {index}", index)
        for column, key in enumerate(["precision", "recall", "f1", "support"]):
            assert row[key] == close(table[column][index])
    macro = sklearn.metrics.precision_recall_fscore_support(
        truth, predicted, labels=every, zero_division=0, average="macro"
    )
    assert [found["precision"], found["recall"], found["f1"]] == close(list(macro[:3]))
    confusion = sklearn.metrics.confusion_matrix(truth, predicted, labels=every)
    assert found["confusion"] == confusion.tolist()


@given(outputs())
@settings(max_examples=150, deadline=None)
def test_auc_equals_scikit_learn(batch: tuple[Tensor, Tensor]) -> None:
    logits, labels = batch
    probabilities = logits.double().softmax(dim=1)
    areas = [
        sklearn.metrics.roc_auc_score(labels == index, probabilities[:, index])
        for index in range(logits.shape[1])
        if 0 < (labels == index).sum() < len(labels)
    ]
    found = classification(logits, labels, 0.0, names(logits.shape[1]))["auc"]
    assert found is None if not areas else found == close(np.mean(areas))


def test_auc_equals_scikit_learns_own_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 10, generator=generator)
    labels = torch.randint(10, (500,), generator=generator)
    found = classification(logits, labels, 0.0, names(10))["auc"]
    probabilities = scipy.special.softmax(logits.double().numpy(), axis=1)
    assert found == close(sklearn.metrics.roc_auc_score(labels, probabilities, multi_class="ovr"))


def test_auc_counts_ties_one_half_and_knows_when_it_is_undefined() -> None:
    scores = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]], dtype=torch.float64)
    assert macro_auc(scores, torch.tensor([0, 1, 1])) == 0.5
    assert macro_auc(scores, torch.tensor([1, 1, 1])) is None
    assert macro_auc(scores[:1], torch.tensor([0])) is None


def looped_ece(logits: Any, labels: Any) -> float:
    probabilities = scipy.special.softmax(logits.astype(np.float64), axis=1)
    confidence, predicted = probabilities.max(axis=1), logits.argmax(axis=1)
    total = 0.0
    for m in range(15):
        inside = [i for i, c in enumerate(confidence) if m / 15 < c <= (m + 1) / 15]
        if inside:
            accuracy = np.mean([predicted[i] == labels[i] for i in inside])
            total += len(inside) / len(labels) * abs(accuracy - confidence[inside].mean())
    return total


@given(outputs())
@settings(max_examples=150, deadline=None)
def test_ece_equals_a_plain_loop(batch: tuple[Tensor, Tensor]) -> None:
    logits, labels = batch
    found = classification(logits, labels, 0.0, names(logits.shape[1]))["ece"]
    assert found == close(looped_ece(logits.numpy(), labels.numpy()))
    assert 0 <= found <= 1


def test_ece_of_a_confidence_on_an_edge_is_in_the_lower_bin() -> None:
    confidences = torch.tensor([0.2, 0.2 + 1e-9, 1.0], dtype=torch.float64)
    found = calibration_error(confidences, torch.tensor([True, False, True]))
    assert found == close((0.8 + 0.2) / 3)


@given(st.integers(1, 100_000), st.data())
@settings(max_examples=100, deadline=None)
def test_interval_equals_the_roots_of_wilsons_equation(n: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, n))
    low, high = wilson(correct, n)
    reference = scipy.stats.binomtest(correct, n).proportion_ci(0.95, method="wilson")
    assert [low, high] == close([reference.low, reference.high])
    assert 0 <= low <= correct / n <= high <= 1
    z, share = scipy.stats.norm.ppf(0.975), correct / n
    for root in (low, high):  # |share - root| is z standard errors of the root
        assert abs(share - root) == close(z * math.sqrt(max(root * (1 - root), 0) / n))


@pytest.mark.parametrize("size", [1, 4, 22, 23, 500])
def test_the_size_of_evaluation_batches_changes_no_answer(
    monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    spec = DatasetSpec("linear", "regression", (3,), classes=(), mean=(), std=(), digest="")
    models = [nn.Linear(3, 1), nn.Linear(3, 1)]
    inputs = torch.randn(23, 3)
    expected = [model(inputs) for model in models]
    monkeypatch.setattr(scoring, "BATCH_SIZE", size)
    found = scoring.answers_of_all(models, spec, Split(inputs, torch.zeros(23, 1)))
    torch.testing.assert_close(found, expected)


@given(outputs(), st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_the_order_of_samples_changes_nothing(batch: tuple[Tensor, Tensor], seed: int) -> None:
    logits, labels = batch
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    k = names(logits.shape[1])
    first = classification(logits, labels, 0.0, k)
    second = classification(logits[order], labels[order], 0.0, k)
    assert second.pop("ece") == close(first.pop("ece"))
    assert second == first


def test_results_are_plain_json() -> None:
    logits, labels = torch.eye(3).repeat(4, 1), torch.arange(3).repeat(4)
    found = classification(logits, labels, 0.5, names(3))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert (found["accuracy"], found["f1"], found["auc"]) == (1.0, 1.0, 1.0)


def test_10_000_samples_take_milliseconds() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(10_000, 10, generator=generator)
    labels = torch.randint(10, (10_000,), generator=generator)
    classification(logits, labels, 0.0, names(10))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        classification(logits, labels, 0.0, names(10))
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.2


@given(st.integers(1, 50), st.integers(0, 2**32), st.floats(0, 10))
@settings(max_examples=60, deadline=None)
def test_regression_equals_scikit_learn(n: int, seed: int, noise: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randn(n, 1, generator=generator)
    found_outputs = targets + noise * torch.randn(n, 1, generator=generator)
    found = regression(found_outputs, targets, 0.5)
    assert list(found) == ["n", "loss", "mse", "mae", "r2"]
    truth, predicted = targets.double().numpy(), found_outputs.double().numpy()
    assert (found["n"], found["loss"]) == (n, 0.5)
    assert found["mse"] == close(sklearn.metrics.mean_squared_error(truth, predicted))
    assert found["mae"] == close(sklearn.metrics.mean_absolute_error(truth, predicted))
    if n == 1:
        assert found["r2"] is None
    else:
        assert found["r2"] == close(sklearn.metrics.r2_score(truth, predicted))


def test_r2_of_equal_targets_is_undefined() -> None:
    targets = torch.full((7, 1), 0.1)
    assert regression(torch.zeros(7, 1), targets, 0.0)["r2"] is None


@given(outputs())
@settings(max_examples=100, deadline=None)
def test_the_bins_sum_up_to_the_calibration_error(batch: tuple[Tensor, Tensor]) -> None:
    answers, confidences = surest(batch[0])
    correct = answers == batch[1]
    bins = calibration_bins(confidences, correct)
    assert sum(part["n"] for part in bins) == len(correct)
    assert sum(part["num_correct"] for part in bins) == int(correct.sum())
    assert sorted(bins, key=lambda part: part["confidence"]) == bins
    gaps = [abs(part["num_correct"] - part["n"] * part["confidence"]) for part in bins]
    assert sum(gaps) / len(correct) == close(calibration_error(confidences, correct))


@given(st.integers(0, 400), st.integers(0, 400))
def test_mcnemar_equals_scipy(only_a: int, only_b: int) -> None:
    n = only_a + only_b
    expected = scipy.stats.binomtest(only_a, n).pvalue if n else 1.0
    assert mcnemar(only_a, only_b) == close(expected) == close(mcnemar(only_b, only_a))
