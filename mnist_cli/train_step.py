"""One optimizer step."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mnist_cli import runtime, schedule
from mnist_cli.errors import DivergedError
from mnist_cli.job import Job

AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def lr_of(job: Job, step: int) -> float:
    """The learning rate of `step`, counted from 0."""
    total_steps = job.config.epochs * job.steps_per_epoch
    factor = schedule.lr_factor(job.config.schedule, step, job.steps_per_epoch, total_steps)
    return job.config.optim.lr * factor


def set_lr(job: Job, step: int) -> None:
    """Give the optimizer the learning rate of `step`."""
    lr = lr_of(job, step)
    for group in job.optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # which a CUDA graph reads where it is
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def take_steps(job: Job, batches: Sequence[Tensor], step: int) -> list[float]:
    """As `take_step`, on one batch after the other; the losses of all."""
    if job.replay is not None:
        return job.replay(batches, step)
    return [take_step(job, indices, number) for number, indices in enumerate(batches, step)]


def take_step(job: Job, indices: Tensor, step: int) -> float:
    """One optimizer step on the samples `indices`, (grad_accum * batch_size,) int64.

    Returns:
        The mean loss of the samples, before the step.

    Raises:
        DivergedError: the loss, or the gradient of the step before, is not finite.
    """
    set_lr(job, step)
    runtime.reseed(job.device, runtime.counted_seed(job.config.seed, "step", step))
    loss = sum(part.item() for part in compute_gradients(job, indices))
    if not math.isfinite(loss):
        check_weights(job, step - 1)
        raise diverged(job, "loss", loss, step)
    update_weights(job)
    return loss


def compute_gradients(job: Job, indices: Tensor) -> list[Tensor]:
    """Compute the gradient of the mean loss of the samples `indices`, by hand or by autograd.

    Returns:
        The part of each batch in that loss, () float32: they add up to it.
    """
    config = job.config
    if job.backprop is not None:
        return [job.backprop(*_gathered(job, indices))]
    for parameter in job.parameters:
        parameter.grad = None
    parts = []
    with runtime.tf32() if config.precision == "tf32" else contextlib.nullcontext():
        for batch in indices.split(config.batch_size):
            inputs, targets = _gathered(job, batch)
            with _autocast(job):
                outputs = job.forward(inputs)
            loss = job.loss(outputs.float(), targets)
            if len(batch) < len(indices):
                loss = loss * (len(batch) / len(indices))
            job.scaler.scale(loss).backward()
            parts.append(loss)
    return parts


def update_weights(job: Job) -> None:
    """Take the optimizer's step with the gradients that are there."""
    if job.config.grad_clip is not None:
        job.scaler.unscale_(job.optimizer)
        torch.nn.utils.clip_grad_norm_(job.parameters, job.config.grad_clip)
    job.scaler.step(job.optimizer)
    job.scaler.update()


def check_weights(job: Job, step: int) -> None:
    """Raise DivergedError if `step` (counted from 0) left weights that are not finite.

    A gradient that is not finite shows here. Looking at each gradient would cost 3 % of a step, so
    the weights are looked at when a loss is not finite, and before every checkpoint.
    """
    if not all(torch.isfinite(weights).all() for weights in job.parameters):
        raise diverged(job, "gradient", math.nan, step)


def diverged(job: Job, what: str, value: float, step: int) -> DivergedError:
    """The error for `what` not being finite at `step`, counted from 0."""
    clip = " or grad_clip=1" if job.config.grad_clip is None else ""
    return DivergedError(
        f"training diverged: the {what} is {value} at step {step + 1},"
        f" with learning rate {lr_of(job, step):g}",
        f"type a smaller learning rate (optim.lr={job.config.optim.lr / 10:.1g}){clip}",
    )


def _gathered(job: Job, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The samples `indices`, (B,) int64: normalised inputs, and targets."""
    train = job.data.train
    # Not inputs[indices]: that takes ten times as long on the CPU.
    inputs = job.normalise(train.inputs.index_select(0, indices))
    return inputs, train.targets.index_select(0, indices)


def _autocast(job: Job) -> contextlib.AbstractContextManager[None]:
    dtype = AUTOCAST.get(job.config.precision)
    return torch.autocast(job.device.type, dtype) if dtype else contextlib.nullcontext()
