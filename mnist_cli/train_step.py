"""One optimizer step."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mnist_cli import runtime, schedule
from mnist_cli.errors import DivergedError
from mnist_cli.learner import Learner

AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def lr_of(learner: Learner, step: int) -> float:
    """The learning rate of `step`, counted from 0."""
    total_steps = learner.config.epochs * learner.steps_per_epoch
    factor = schedule.lr_factor(learner.config.schedule, step, learner.steps_per_epoch, total_steps)
    return learner.config.optim.lr * factor


def set_lr(learner: Learner, step: int) -> None:
    """Give the optimizer the learning rate of `step`."""
    lr = lr_of(learner, step)
    for group in learner.optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # which a CUDA graph reads where it is
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def take_steps(learner: Learner, batches: Sequence[Tensor], step: int) -> list[float]:
    """As `take_step`, on one batch after the other; the losses of all."""
    if learner.replay is not None:
        return learner.replay(batches, step)
    return [take_step(learner, indices, number) for number, indices in enumerate(batches, step)]


def take_step(learner: Learner, indices: Tensor, step: int) -> float:
    """One optimizer step on the samples `indices`, (grad_accum * batch_size,) int64.

    Returns:
        The mean loss of the samples, before the step.

    Raises:
        DivergedError: the loss, or the gradient of the step before, is not finite.
    """
    set_lr(learner, step)
    runtime.reseed(learner.device, runtime.counted_seed(learner.config.seed, "step", step))
    loss = sum(part.item() for part in compute_gradients(learner, indices))
    if not math.isfinite(loss):
        check_weights(learner, step - 1)
        raise diverged(learner, "loss", loss, step)
    update_weights(learner)
    return loss


def compute_gradients(learner: Learner, indices: Tensor) -> list[Tensor]:
    """Compute the gradient of the mean loss of the samples `indices`, by hand or by autograd.

    Returns:
        The part of each batch in that loss, () float32: they add up to it.
    """
    config = learner.config
    if learner.backprop is not None:
        return [learner.backprop(*_gathered(learner, indices))]
    for parameter in learner.parameters:
        parameter.grad = None
    parts = []
    with runtime.tf32() if config.precision == "tf32" else contextlib.nullcontext():
        for batch in indices.split(config.batch_size):
            inputs, targets = _gathered(learner, batch)
            with _autocast(learner):
                outputs = learner.forward(inputs)
            loss = learner.loss(outputs.float(), targets)
            if len(batch) < len(indices):
                loss = loss * (len(batch) / len(indices))
            learner.scaler.scale(loss).backward()
            parts.append(loss)
    return parts


def update_weights(learner: Learner) -> None:
    """Take the optimizer's step with the gradients that are there."""
    if learner.config.grad_clip is not None:
        learner.scaler.unscale_(learner.optimizer)
        torch.nn.utils.clip_grad_norm_(learner.parameters, learner.config.grad_clip)
    learner.scaler.step(learner.optimizer)
    learner.scaler.update()


def check_weights(learner: Learner, step: int) -> None:
    """Raise DivergedError if `step` (counted from 0) left weights that are not finite.

    A gradient that is not finite shows here. Looking at each gradient would cost 3 % of a step, so
    the weights are looked at when a loss is not finite, and before every checkpoint.
    """
    if not all(torch.isfinite(weights).all() for weights in learner.parameters):
        raise diverged(learner, "gradient", math.nan, step)


def diverged(learner: Learner, what: str, value: float, step: int) -> DivergedError:
    """The error for `what` not being finite at `step`, counted from 0."""
    clip = " or grad_clip=1" if learner.config.grad_clip is None else ""
    return DivergedError(
        f"training diverged: the {what} is {value} at step {step + 1},"
        f" with learning rate {lr_of(learner, step):g}",
        f"type a smaller learning rate (optim.lr={learner.config.optim.lr / 10:.1g}){clip}",
    )


def _gathered(learner: Learner, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The samples `indices`, (B,) int64: normalised inputs, and targets."""
    train = learner.data.train
    # Not inputs[indices]: that takes ten times as long on the CPU.
    inputs = learner.normalise(train.inputs.index_select(0, indices))
    return inputs, train.targets.index_select(0, indices)


def _autocast(learner: Learner) -> contextlib.AbstractContextManager[None]:
    dtype = AUTOCAST.get(learner.config.precision)
    return torch.autocast(learner.device.type, dtype) if dtype else contextlib.nullcontext()
