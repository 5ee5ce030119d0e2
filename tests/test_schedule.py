from __future__ import annotations

import warnings
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR, StepLR

from mnist_cli.options import (
    ConstantConfig,
    CosineConfig,
    OnecycleConfig,
    ScheduleConfig,
    StepConfig,
)
from mnist_cli.schedule import lr_factor, may_extend


def constant(warmup_epochs: float = 0.0) -> ConstantConfig:
    return ConstantConfig(name="constant", warmup_epochs=warmup_epochs)


def step(step_epochs: int = 3, gamma: float = 0.1, warmup_epochs: float = 0.0) -> StepConfig:
    return StepConfig(
        name="step", step_epochs=step_epochs, gamma=gamma, warmup_epochs=warmup_epochs
    )


def cosine(final: float = 0.0, warmup_epochs: float = 0.0) -> CosineConfig:
    return CosineConfig(name="cosine", final_lr_fraction=final, warmup_epochs=warmup_epochs)


def onecycle(
    peak: float = 0.3, initial: float = 0.04, final: float = 4e-6, warmup_epochs: float = 0.0
) -> OnecycleConfig:
    return OnecycleConfig(
        name="onecycle",
        peak_fraction=peak,
        initial_lr_fraction=initial,
        final_lr_fraction=final,
        warmup_epochs=warmup_epochs,
    )


def factors(config: ScheduleConfig, steps_per_epoch: int, total: int) -> list[float]:
    return [lr_factor(config, index, steps_per_epoch, total) for index in range(total)]


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)


def torch_factors(scheduler: LRScheduler, total: int, every: int = 1) -> list[float]:
    """The learning rates that torch's scheduler gives to `total` steps, stepped every `every`."""
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it wants optimizer.step() before; nothing is optimized
        for index in range(total):
            rates.append(float(scheduler.get_last_lr()[0]))
            if (index + 1) % every == 0 and index + 1 < total:
                scheduler.step()
    return rates


@pytest.mark.parametrize(("step_epochs", "gamma"), [(1, 0.5), (3, 0.1), (4, 1.0), (20, 0.3)])
def test_step_equals_torch(step_epochs: int, gamma: float) -> None:
    expected = torch_factors(StepLR(optimizer(), step_epochs, gamma), 7 * 13, every=7)
    assert factors(step(step_epochs, gamma), 7, 7 * 13) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("total", [1, 2, 10, 97])
@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_cosine_equals_torch(total: int, final: float) -> None:
    expected = torch_factors(CosineAnnealingLR(optimizer(), total, eta_min=final), total)
    assert factors(cosine(final), 5, total) == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("total", [1, 2, 3, 9, 100, 101])
@pytest.mark.parametrize("peak", [0.015, 0.25, 0.3, 0.45, 0.9])
def test_onecycle_equals_torch(total: int, peak: float) -> None:
    scheduler = OneCycleLR(
        optimizer(), max_lr=1.0, total_steps=total, pct_start=peak, cycle_momentum=False
    )
    expected = torch_factors(scheduler, total)
    assert factors(onecycle(peak), 10, total) == pytest.approx(expected, rel=1e-12)


def test_onecycle_with_its_own_ends_equals_torch() -> None:
    scheduler = OneCycleLR(
        optimizer(), 1.0, 60, pct_start=0.4, div_factor=5, final_div_factor=20, cycle_momentum=False
    )
    expected = torch_factors(scheduler, 60)
    assert factors(onecycle(0.4, 0.2, 0.01), 10, 60) == pytest.approx(expected, rel=1e-12)


def test_onecycle_whose_peak_is_the_first_step_only_falls() -> None:
    assert factors(onecycle(peak=0.25), 4, 4) == pytest.approx([1, 0.750001, 0.250003, 4e-6])


def test_warmup_is_linear_and_then_the_schedule_starts() -> None:
    assert factors(constant(1.0), 4, 8) == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    assert factors(constant(0.5), 4, 4) == [0.5, 1, 1, 1]
    assert factors(constant(0.01), 4, 4) == [1, 1, 1, 1]
    assert factors(cosine(warmup_epochs=1.0), 4, 12)[4:] == factors(cosine(), 4, 8)
    cycle = onecycle(warmup_epochs=1.0)
    assert factors(cycle, 4, 12)[:4] == pytest.approx([0.01, 0.02, 0.03, 0.04])
    assert factors(cycle, 4, 12)[4:] == factors(onecycle(), 4, 8)
    assert factors(step(2, 0.5, 1.0), 2, 8) == [0.5, 1, 1, 1, 0.5, 0.5, 0.5, 0.5]


WARMUPS = st.one_of(st.just(0.0), st.floats(0, 3))
UNIT = st.floats(0, 1)
POSITIVE_UNIT = st.floats(1e-6, 1)
CONFIGS: st.SearchStrategy[ScheduleConfig] = st.one_of(
    st.builds(constant, WARMUPS),
    st.builds(step, st.integers(1, 5), POSITIVE_UNIT, WARMUPS),
    st.builds(cosine, UNIT, WARMUPS),
    st.builds(onecycle, st.floats(0.01, 0.99), POSITIVE_UNIT, UNIT, WARMUPS),
)


@given(CONFIGS, st.integers(1, 20), st.integers(1, 8))
@settings(max_examples=200, deadline=None)
def test_factors_lie_in_0_to_1(config: ScheduleConfig, steps_per_epoch: int, epochs: int) -> None:
    assume(config.warmup_epochs < epochs)
    for factor in factors(config, steps_per_epoch, steps_per_epoch * epochs):
        assert type(factor) is float
        assert 0 <= factor <= 1 + 1e-12


@given(CONFIGS, st.integers(20, 60), st.integers(4, 8))
@settings(max_examples=100, deadline=None)
def test_factors_have_no_jumps_but_the_drops_of_step(
    config: ScheduleConfig, steps_per_epoch: int, epochs: int
) -> None:
    assume(not isinstance(config, StepConfig))
    assume(not isinstance(config, OnecycleConfig) or 0.2 <= config.peak_fraction <= 0.8)
    total = steps_per_epoch * epochs
    warmup = round(config.warmup_epochs * steps_per_epoch)
    shortest = min(0.2 * (total - warmup) - 1, warmup or total)
    values = factors(config, steps_per_epoch, total)
    for before, after in pairwise(values):
        assert abs(after - before) <= 2 / shortest  # a cosine is at most pi/2 times as steep


@given(CONFIGS, st.integers(1, 20), st.integers(1, 5), st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_what_may_extend_keeps_its_factors(
    config: ScheduleConfig, steps_per_epoch: int, epochs: int, more: int
) -> None:
    assume(may_extend(config))
    total = steps_per_epoch * epochs
    longer = factors(config, steps_per_epoch, total + more * steps_per_epoch)
    assert longer[:total] == factors(config, steps_per_epoch, total)


def test_only_constant_and_step_may_extend() -> None:
    schedules: list[ScheduleConfig] = [constant(), step(), cosine(), onecycle()]
    assert [may_extend(config) for config in schedules] == [True, True, False, False]
