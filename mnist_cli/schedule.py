"""The learning rate over a run, as a pure function of the step.

A schedule keeps no state: the factor of step 1000 is the same whether the run came there in one go
or was resumed at step 999.
"""

from __future__ import annotations

import math

from mnist_cli.options import (
    ConstantConfig,
    CosineConfig,
    OnecycleConfig,
    PluginScheduleConfig,
    ScheduleConfig,
    StepConfig,
)


def lr_factor(config: ScheduleConfig, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """The factor on the base learning rate, in 0..1, for the optimizer step about to be taken.

    A warm-up of W = round(warmup_epochs * steps_per_epoch) steps multiplies the schedule by
    min((step + 1) / W, 1): the first step is 1/W, never 0, and step W - 1 is the first at full
    height. `cosine` and `onecycle` stand at their first value until step W and share the
    remaining steps; the drops of `step` are counted from epoch 0, with or without warm-up.

    Args:
        config: which schedule.
        step: number of optimizer steps already taken, 0 <= step < total_steps.
        steps_per_epoch: optimizer steps of one epoch, at least 1.
        total_steps: optimizer steps of the whole run.
    """
    warmup_steps = round(config.warmup_epochs * steps_per_epoch)
    warmup = min((step + 1) / warmup_steps, 1.0) if warmup_steps else 1.0
    steps_after = max(step - warmup_steps, 0)
    num_steps = max(total_steps - warmup_steps, 1)
    match config:
        case ConstantConfig():
            return warmup
        case StepConfig():
            epoch = step // steps_per_epoch
            return float(warmup * config.gamma ** (epoch // config.step_epochs))
        case CosineConfig():
            return warmup * _cosine(1.0, config.final_lr_fraction, steps_after / num_steps)
        case OnecycleConfig():
            return warmup * _onecycle(config, steps_after, num_steps)
        case PluginScheduleConfig():
            return warmup * config.factor(step, steps_per_epoch, total_steps)


def may_extend(config: ScheduleConfig) -> bool:
    """Whether a run may get more epochs without changing the factors of the steps before."""
    return isinstance(config, ConstantConfig | StepConfig)


def _cosine(start: float, end: float, progress: float) -> float:
    """Half a cosine from `start` at progress 0 to `end` at progress 1.

    Loshchilov and Hutter, "SGDR", 2017, equation 5; torch's CosineAnnealingLR with T_max = the
    number of steps. `end` is thus reached after the last step, not at it.
    """
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def _onecycle(config: OnecycleConfig, step: int, num_steps: int) -> float:
    """Smith and Topin, "Super-convergence", 2019, as torch's OneCycleLR with two cosine phases.

    The peak lies at step peak_fraction * num_steps - 1, seldom a whole number; the last step,
    num_steps - 1, is at `final_lr_fraction`.
    """
    peak = config.peak_fraction * num_steps - 1
    # A peak at step 0 has no way up; torch divides by zero there.
    if step <= peak and peak > 0:
        return _cosine(config.initial_lr_fraction, 1.0, step / peak)
    return _cosine(1.0, config.final_lr_fraction, (step - peak) / (num_steps - 1 - peak))
