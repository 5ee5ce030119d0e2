"""The training loop: `fit` reads from top to bottom, and all that it does is a visible call."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mnist_cli import checkpoint as checkpoints
from mnist_cli import dataset, optim, runtime, schedule, scoring
from mnist_cli.checkpoint import Best, Checkpoint, Progress
from mnist_cli.config import TrainConfig, save_every_s
from mnist_cli.console import Console
from mnist_cli.dataset import Dataset, Normalise
from mnist_cli.errors import DivergedError, Interrupted, PrunedError
from mnist_cli.loss import Loss
from mnist_cli.options import plugin_words
from mnist_cli.run import RunFolder
from mnist_cli.signals import SignalWatch

AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}
PROFILED_STEPS = 20
REPLAYED_STEPS = 50  # how many are replayed between two looks at losses, signals and the clock

Replay = Callable[[Sequence[Tensor], int], list[float]]
ShouldStop = Callable[[int, float | None], bool]
Log = Callable[[dict[str, Any]], None]


@dataclass
class Job:
    """All that a run works with.

    Attributes:
        forward: the model, compiled where that was asked for.
        replay: takes steps as `take_steps` does, out of a CUDA graph; None where there is none.
    """

    config: TrainConfig
    device: torch.device
    data: Dataset
    normalise: Normalise
    model: nn.Module
    forward: nn.Module
    loss: Loss
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    progress: Progress
    times: dict[str, float]
    replay: Replay | None = None

    @functools.cached_property
    def parameters(self) -> list[nn.Parameter]:
        """Those of the model: to find them takes longer than to do something to each."""
        return list(self.model.parameters())

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.data.train) / (self.config.batch_size * self.config.grad_accum))

    def checkpoint(self) -> Checkpoint:
        return Checkpoint(
            config=self.config,
            spec=self.data.spec,
            progress=self.progress,
            host=runtime.Host.of(self.device),
            model=self.model.state_dict(),
            optim=optim.state_tensors(self.optimizer, self.model),
        )


def never(epoch: int, value: float | None) -> bool:
    """The `should_stop` of a run that nobody watches."""
    return False


def fit(
    job: Job,
    folder: RunFolder,
    console: Console,
    signals: SignalWatch,
    log: Log,
    should_stop: ShouldStop = never,
) -> str:
    """The loop. Leaves `best` and `last` in `folder` and returns why it ended.

    Args:
        log: told the row of each epoch, when all is saved.
        should_stop: told the number and the monitored value of each epoch, when all is saved; a
            search answers True where the run isn't worth its time.

    Raises:
        PrunedError: `should_stop` said so.
    """
    config, train, val = job.config, job.data.train, job.data.val
    clock = SaveClock(config.save_every)
    step, loss_sum, epoch_s = job.progress.step, job.progress.loss_sum, job.progress.epoch_s
    with console.bar() as bar, _Profiler(job, folder) as profiler:
        while not is_over(job):
            epoch, position = divmod(step, job.steps_per_epoch)
            order = runtime.permutation(config.seed, epoch, len(train)).to(job.device)
            batches = order.split(config.batch_size * config.grad_accum)
            job.model.train()
            resumed_at_s, spent_s = time.perf_counter(), epoch_s
            while position < len(batches):
                taken = batches[position : position + steps_at_once(job, step)]
                losses = take_steps(job, taken, step)
                step += len(taken)
                position += len(taken)
                for loss, indices in zip(losses, taken, strict=True):
                    loss_sum += loss * len(indices)
                profiler.advance(len(taken))
                bar.show(
                    position, len(batches), f"epoch {epoch + 1}/{config.epochs}", f"loss {loss:.4f}"
                )
                if position < len(batches) and (signals.received or clock.is_due(step)):
                    epoch_s = spent_s + time.perf_counter() - resumed_at_s
                    job.progress = _advance(job, step, loss_sum, epoch_s)
                    save(job, folder.last)
                    stop_if_asked(signals, job, folder)
            epoch_s = spent_s + time.perf_counter() - resumed_at_s
            job.progress = _advance(job, step, 0.0, 0.0, train_s=job.progress.train_s + epoch_s)

            with timed(job.times, "eval_s"):
                scores = score(job, val, step)
            row = {
                "epoch": epoch + 1,
                "step": step,
                "lr": lr_of(job, step - 1),
                "train_loss": loss_sum / len(train),
                **scores,
                "seconds": epoch_s,
                "samples_per_s": len(train) / epoch_s,
            }
            keep(job, folder, row, console)
            clock.saved()
            log(row)
            loss_sum = epoch_s = 0.0
            stop_if_asked(signals, job, folder)
            if should_stop(epoch + 1, scores[config.monitored]):
                raise PrunedError(epoch + 1, folder.path)
    return end(job, folder)


def keep(job: Job, folder: RunFolder, row: dict[str, Any], console: Console) -> None:
    """Select, record and save an epoch, whose row of metrics.csv is `row`."""
    is_best = select(job, row["epoch"], row)
    _record(folder, row, console)
    console.say(epoch_line(row, job.config.epochs, is_best))
    if is_best:
        save(job, folder.best)
    save(job, folder.last)


def end(job: Job, folder: RunFolder) -> str:
    """Save what a run without a validation split is judged by, and say why the run is over."""
    if not len(job.data.val):
        save(job, folder.best)
    if is_out_of_patience(job):
        return f"no better {job.config.monitored} for {job.config.early_stop.patience} epochs"
    return "the last epoch is done"


def is_over(job: Job) -> bool:
    """Whether there is no epoch left to train."""
    is_complete = job.progress.step >= job.config.epochs * job.steps_per_epoch
    return is_complete or is_out_of_patience(job)


def is_out_of_patience(job: Job) -> bool:
    patience = job.config.early_stop.patience
    return patience is not None and job.progress.stale_epochs >= patience


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


def steps_at_once(job: Job, step: int) -> int:
    """How many steps from `step` on may be taken before losses, signals and the clock are seen."""
    if job.replay is None:
        return 1
    every = job.config.save_every
    return min(REPLAYED_STEPS, every - step % every) if isinstance(every, int) else REPLAYED_STEPS


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
    """Compute the gradient of the mean loss of the samples `indices`.

    Returns:
        The part of each batch in that loss, () float32: they add up to it.
    """
    config, train = job.config, job.data.train
    for parameter in job.parameters:
        parameter.grad = None
    parts = []
    with runtime.tf32() if config.precision == "tf32" else contextlib.nullcontext():
        for batch in indices.split(config.batch_size):
            # Not inputs[batch]: that takes ten times as long on the CPU.
            inputs = job.normalise(train.inputs.index_select(0, batch))
            with _autocast(job):
                outputs = job.forward(inputs)
            loss = job.loss(outputs.float(), train.targets.index_select(0, batch))
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


def score(job: Job, val: dataset.Split, step: int) -> dict[str, float | None]:
    """Loss and accuracy (or mse) on the validation split; None where there is no such split."""
    metric = "accuracy" if job.data.spec.task == "classification" else "mse"
    if not len(val):
        return {"val_loss": None, f"val_{metric}": None}
    outputs = scoring.answers(job.model, job.data.spec, val)
    scores = scoring.summary(outputs, val, job.data.spec, job.loss)
    if not math.isfinite(scores["loss"]):
        raise diverged(job, "validation loss", scores["loss"], step - 1)
    return {f"val_{name}": value for name, value in scores.items()}


def select(job: Job, epoch: int, scores: dict[str, float | None]) -> bool:
    """Whether this epoch is the best so far; remembers it if so.

    A tie goes to the later epoch, which has learned from more steps, but doesn't count as progress
    for early stopping. Without a validation split the newest weights are the result.
    """
    monitor = job.config.monitored if len(job.data.val) else None
    value = scores[monitor] if monitor else None
    before = job.progress.best
    gain = math.inf
    if value is not None and before is not None and before.value is not None:
        gain = value - before.value if monitor == "val_accuracy" else before.value - value
    stale = 0 if gain > 0 else job.progress.stale_epochs + 1
    new = Best(epoch=epoch, step=job.progress.step, monitor=monitor, value=value)
    best = new if gain >= 0 else before
    job.progress = dataclasses.replace(job.progress, best=best, stale_epochs=stale)
    return gain >= 0 and monitor is not None


def save(job: Job, path: Path) -> None:
    """Write a checkpoint, unless its weights are not finite."""
    check_weights(job, job.progress.step - 1)
    checkpoints.save(path, job.checkpoint())


class SaveClock:
    """Says when `save_every` asks for a checkpoint inside an epoch."""

    def __init__(self, every: int | str | None) -> None:
        self._steps = every if isinstance(every, int) else None
        self._seconds = save_every_s(every) if isinstance(every, str) else None
        self.saved()

    def saved(self) -> None:
        self._saved_s = time.monotonic()

    def is_due(self, step: int) -> bool:
        if self._steps is not None:
            return step % self._steps == 0
        if self._seconds is not None and time.monotonic() - self._saved_s >= self._seconds:
            self.saved()
            return True
        return False


def epoch_line(row: dict[str, Any], epochs: int, is_best: bool) -> str:
    width = len(str(epochs))
    parts = [f"epoch {row['epoch']:>{width}}/{epochs}", f"lr {row['lr']:.2e}"]
    parts.append(f"train loss {row['train_loss']:.4f}")
    if row["val_loss"] is not None:
        parts.append(f"val loss {row['val_loss']:.4f}")
    if row.get("val_accuracy") is not None:
        parts.append(f"val accuracy {row['val_accuracy']:.2%}")
    parts += [f"{row['seconds']:.1f} s", f"{row['samples_per_s']:,.0f}/s"]
    return "  ".join(parts) + ("  *" if is_best else "")


def _advance(
    job: Job, step: int, loss_sum: float, epoch_s: float, train_s: float | None = None
) -> Progress:
    return dataclasses.replace(
        job.progress,
        step=step,
        loss_sum=loss_sum,
        epoch_s=epoch_s,
        train_s=job.progress.train_s if train_s is None else train_s,
        loss_scale=job.scaler.get_scale() if job.scaler.is_enabled() else None,
    )


def _record(folder: RunFolder, row: dict[str, Any], console: Console) -> None:
    """Metrics that can't be written are said loudly but don't end a run."""
    try:
        folder.add_metrics(row)
    except OSError as error:
        console.warn(f"{folder.metrics} can't be written: {error.strerror}")


def stop_if_asked(signals: SignalWatch, job: Job, folder: RunFolder) -> None:
    """Raise Interrupted if a signal came. Call it when everything is saved."""
    if signals.received is not None:
        words = [f"resume={folder.path}", *plugin_words(job.config.plugin)]
        raise Interrupted(
            signals.received,
            f"interrupted at step {job.progress.step}; everything is saved in {folder.path}",
            f"type mnist-cli train {shlex.join(words)}",
        )


def _autocast(job: Job) -> contextlib.AbstractContextManager[None]:
    dtype = AUTOCAST.get(job.config.precision)
    return torch.autocast(job.device.type, dtype) if dtype else contextlib.nullcontext()


@contextlib.contextmanager
def timed(times: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        times[name] = times.get(name, 0.0) + time.perf_counter() - started


class _Profiler:
    """With profile=true: a trace of the first steps, for chrome://tracing or ui.perfetto.dev."""

    def __init__(self, job: Job, folder: RunFolder) -> None:
        self._path = folder.path / "trace.json"
        self._left = PROFILED_STEPS if job.config.profile else 0

    def __enter__(self) -> _Profiler:
        if self._left:
            from torch.profiler import profile

            self._profile = profile()
            with runtime.silent_stderr():  # here it says that there is no GPU, as an error
                self._profile.start()
        return self

    def advance(self, num_steps: int) -> None:
        if self._left:
            self._left = max(0, self._left - num_steps)
            if not self._left:
                self._write()

    def __exit__(self, *error: object) -> None:
        if self._left:
            self._write()

    def _write(self) -> None:
        with runtime.silent_stderr():
            self._profile.stop()
            self._profile.export_chrome_trace(str(self._path))
