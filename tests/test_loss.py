from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mnist_cli.loss import Loss, build_loss
from mnist_cli.options import LossConfig, MseConfig, SmoothedLossConfig

Name = Literal["cross_entropy", "kl_div", "bce"]
NAMES: tuple[Name, ...] = ("cross_entropy", "kl_div", "bce")
MSE = MseConfig(name="mse")


def smoothed(name: Name, label_smoothing: float = 0.0) -> LossConfig:
    return SmoothedLossConfig(name=name, label_smoothing=label_smoothing)


def of_classes(config: LossConfig) -> Loss:
    return build_loss(config, "classification")


def expected(name: str, logits: Any, labels: Any, e: float) -> float:
    """The formulas, in NumPy and float64, a sample and a class at a time."""
    n, k = logits.shape
    total = 0.0
    for row, label in zip(logits, labels, strict=True):
        log_sum = np.log(np.sum(np.exp(row - row.max()))) + row.max()
        for index, logit in enumerate(row):
            q = (1 - e) * (index == label) + e / k
            log_p = logit - log_sum
            if name == "cross_entropy":
                total -= q * log_p
            elif name == "kl_div":
                total += q * (np.log(q) - log_p) if q > 0 else 0.0
            elif name == "bce":
                sigmoid = 1 / (1 + np.exp(-logit))
                total -= (q * np.log(sigmoid) + (1 - q) * np.log(1 - sigmoid)) / k
            else:
                total += (logit - (index == label)) ** 2 / k
    return float(total / n)


@st.composite
def batches(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (B, K) float64 in -8..8 and labels (B,) int64."""
    n, k = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    logits = torch.randn(n, k, generator=generator, dtype=torch.float64).mul(3).clamp(-8, 8)
    return logits, torch.randint(k, (n,), generator=generator)


SHARES = st.floats(0, 0.99)


@pytest.mark.parametrize("name", NAMES)
@given(batch=batches(), e=st.one_of(st.just(0.0), SHARES))
@settings(max_examples=60, deadline=None)
def test_smoothed_losses_equal_their_formulas(
    name: Name, batch: tuple[torch.Tensor, torch.Tensor], e: float
) -> None:
    logits, labels = batch
    loss = of_classes(smoothed(name, e))(logits, labels)
    assert loss.shape == ()
    assert loss.dtype == torch.float64
    value = expected(name, logits.numpy(), labels.numpy(), e)
    assert loss.item() == pytest.approx(value, rel=1e-10, abs=1e-12)


@given(batch=batches())
@settings(max_examples=60, deadline=None)
def test_mse_of_classes_equals_its_formula(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, labels = batch
    value = expected("mse", logits.numpy(), labels.numpy(), 0.0)
    assert of_classes(MSE)(logits, labels).item() == pytest.approx(value, rel=1e-12)


def test_mse_of_numbers_is_the_mean_of_squares() -> None:
    outputs, targets = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[1.0], [0.0], [1.0]])
    assert build_loss(MSE, "regression")(outputs, targets).item() == pytest.approx(13 / 3)


@pytest.mark.parametrize("config", [*(smoothed(name, 0.1) for name in NAMES), MSE], ids=str)
def test_gradients(config: LossConfig) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 2, 2, 1])
    loss = of_classes(config)
    assert torch.autograd.gradcheck(lambda x: loss(x, labels), (logits,))


def test_gradient_of_mse_of_numbers() -> None:
    outputs = torch.tensor([[1.0], [3.0]], dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([[0.5], [-2.0]], dtype=torch.float64)
    loss = build_loss(MSE, "regression")
    assert torch.autograd.gradcheck(lambda x: loss(x, targets), (outputs,))


@pytest.mark.parametrize("name", ["cross_entropy", "kl_div"])
@given(batch=batches(), e=SHARES, shift=st.floats(-1e3, 1e3))
@settings(max_examples=40, deadline=None)
def test_a_shift_of_all_logits_changes_nothing(
    name: Name, batch: tuple[torch.Tensor, torch.Tensor], e: float, shift: float
) -> None:
    logits, labels = batch
    loss = of_classes(smoothed(name, e))
    before, after = loss(logits, labels).item(), loss(logits + shift, labels).item()
    assert after == pytest.approx(before, rel=1e-9, abs=1e-9)


@given(batch=batches(), e=SHARES)
@settings(max_examples=40, deadline=None)
def test_kl_div_is_cross_entropy_less_the_entropy_of_the_targets(
    batch: tuple[torch.Tensor, torch.Tensor], e: float
) -> None:
    logits, labels = batch
    k = logits.shape[1]
    shares = [1 - e + e / k] + [e / k] * (k - 1)
    entropy = -sum(q * math.log(q) for q in shares if q > 0)
    kl = of_classes(smoothed("kl_div", e))(logits, labels).item()
    ce = of_classes(smoothed("cross_entropy", e))(logits, labels).item()
    assert kl == pytest.approx(ce - entropy, abs=1e-9)
    assert kl >= -1e-12


@given(batch=batches())
@settings(max_examples=40, deadline=None)
def test_kl_div_without_smoothing_is_cross_entropy(
    batch: tuple[torch.Tensor, torch.Tensor],
) -> None:
    kl = of_classes(smoothed("kl_div"))(*batch).item()
    assert kl == pytest.approx(of_classes(smoothed("cross_entropy"))(*batch).item(), abs=1e-12)


@pytest.mark.parametrize("config", [*(smoothed(name) for name in NAMES), MSE], ids=str)
def test_extreme_logits_stay_finite_in_float32(config: LossConfig) -> None:
    logits = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], requires_grad=True)
    loss = of_classes(config)(logits, torch.tensor([1, 1]))
    loss.backward()
    assert loss.dtype == torch.float32
    assert logits.grad is not None
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("config", [*(smoothed(name, 0.1) for name in NAMES), MSE], ids=str)
def test_vmap_over_batches(config: LossConfig) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 5, generator=generator)
    labels = torch.randint(5, (3, 4), generator=generator)
    loss = of_classes(config)
    alone = torch.stack([loss(x, y) for x, y in zip(logits, labels, strict=True)])
    torch.testing.assert_close(torch.vmap(loss)(logits, labels), alone)
