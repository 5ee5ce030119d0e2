"""The training loop: `fit` reads from top to bottom, and all that it does is a visible call."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from mnist_cli import checkpoint as checkpoints
from mnist_cli import formats, runtime, scoring
from mnist_cli.checkpoint import Best, Progress
from mnist_cli.config import is_maximized, save_every_s
from mnist_cli.console import Console
from mnist_cli.errors import Interrupted, PrunedError
from mnist_cli.learner import REPLAYED_STEPS, Learner
from mnist_cli.options import plugin_words
from mnist_cli.profiler import Profiler
from mnist_cli.run import RunFolder
from mnist_cli.signals import SignalWatch
from mnist_cli.train_step import check_weights, diverged, lr_of, take_steps

ShouldStop = Callable[[int, float | None], bool]
Log = Callable[[dict[str, Any]], None]


def never(epoch: int, value: float | None) -> bool:
    """The `should_stop` of a run that nobody watches."""
    return False


def fit(
    learner: Learner,
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
    config, train = learner.config, learner.data.train
    clock = SaveClock(config.save_every)
    before = learner.progress
    step, loss_sum, epoch_s = before.step, before.loss_sum, before.epoch_s
    trace = folder.trace if config.profile else None
    with console.bar() as bar, Profiler(trace, console) as profiler:
        while not is_over(learner):
            epoch, position = divmod(step, learner.steps_per_epoch)
            order = runtime.permutation(config.seed, epoch, len(train)).to(learner.device)
            batches = order.split(config.batch_size * config.grad_accum)
            learner.model.train()
            resumed_at_s, spent_s = time.perf_counter(), epoch_s
            while position < len(batches):
                taken = batches[position : position + steps_at_once(learner, step)]
                losses = take_steps(learner, taken, step)
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
                    learner.progress = _advance(learner, step, loss_sum, epoch_s)
                    save(learner, folder.last)
                    stop_if_asked(signals, learner, folder)
            epoch_s = spent_s + time.perf_counter() - resumed_at_s
            train_s = learner.progress.train_s + epoch_s
            learner.progress = _advance(learner, step, 0.0, 0.0, train_s=train_s)

            with timed(learner.times, "eval_s"):
                outputs = scoring.answers(learner.model, learner.data.spec, learner.data.val)
                scores = score(learner, outputs)
            row = row_of(learner, loss_sum, epoch_s, scores)
            keep(learner, folder, row, console)
            clock.saved()
            log(row)
            loss_sum = epoch_s = 0.0
            stop_if_asked(signals, learner, folder)
            if should_stop(epoch + 1, scores[config.monitored]):
                raise PrunedError(epoch + 1, _how_to_go_on(learner, folder))
    return end(learner, folder)


def score(learner: Learner, outputs: Tensor) -> dict[str, float | None]:
    """Loss and accuracy (or mse) on the validation split; None where there is no such split.

    Args:
        outputs: what the model answers there, (N, C) float32.
    """
    val, spec = learner.data.val, learner.data.spec
    if not len(val):
        metric = "accuracy" if spec.task == "classification" else "mse"
        return {"val_loss": None, f"val_{metric}": None}
    scores = scoring.summary(outputs, val, spec, learner.loss)
    if not math.isfinite(scores["loss"]):
        raise diverged(learner, "validation loss", scores["loss"], learner.progress.step - 1)
    return {f"val_{name}": value for name, value in scores.items()}


def row_of(
    learner: Learner, loss_sum: float, epoch_s: float, scores: dict[str, float | None]
) -> dict[str, Any]:
    """The row of metrics.csv for the epoch that `learner` has just done."""
    step, num_rows = learner.progress.step, len(learner.data.train)
    return {
        "epoch": step // learner.steps_per_epoch,
        "step": step,
        "lr": lr_of(learner, step - 1),
        "train_loss": loss_sum / num_rows,
        **scores,
        "seconds": epoch_s,
        "samples_per_s": num_rows / epoch_s,
    }


def keep(learner: Learner, folder: RunFolder, row: dict[str, Any], console: Console) -> None:
    """Select, record and save an epoch, whose row of metrics.csv is `row`."""
    is_best = select(learner, row["epoch"], row)
    _record(folder, row, console)
    line, short = epoch_lines(row, learner.config.epochs, is_best)
    console.say(line, short)
    if is_best:
        save(learner, folder.best)
    save(learner, folder.last)


def end(learner: Learner, folder: RunFolder) -> str:
    """Save what a run without a validation split is judged by, and say why the run is over."""
    if not len(learner.data.val):
        save(learner, folder.best)
    if is_out_of_patience(learner):
        config = learner.config
        return f"no better {config.monitored} for {config.early_stop.patience} epochs"
    return "the last epoch is done"


def is_over(learner: Learner) -> bool:
    """Whether there is no epoch left to train."""
    is_complete = learner.progress.step >= learner.config.epochs * learner.steps_per_epoch
    return is_complete or is_out_of_patience(learner)


def is_out_of_patience(learner: Learner) -> bool:
    patience = learner.config.early_stop.patience
    return patience is not None and learner.progress.stale_epochs >= patience


def steps_at_once(learner: Learner, step: int) -> int:
    """How many steps from `step` on may be taken until losses, signals and clock are checked."""
    if learner.replay is None:
        return 1
    every = learner.config.save_every
    return min(REPLAYED_STEPS, every - step % every) if isinstance(every, int) else REPLAYED_STEPS


def select(learner: Learner, epoch: int, scores: dict[str, float | None]) -> bool:
    """Whether this epoch is the best so far; remembers it if so.

    A tie goes to the later epoch, which has learned from more steps, but doesn't count as progress
    for early stopping. Without a validation split the newest weights are the result.
    """
    monitor = learner.config.monitored if len(learner.data.val) else None
    value = scores[monitor] if monitor else None
    before = learner.progress.best
    gain = math.inf
    if monitor and value is not None and before is not None and before.value is not None:
        gain = value - before.value if is_maximized(monitor) else before.value - value
    stale = 0 if gain > 0 else learner.progress.stale_epochs + 1
    new = Best(epoch=epoch, step=learner.progress.step, monitor=monitor, value=value)
    best = new if gain >= 0 else before
    learner.progress = dataclasses.replace(learner.progress, best=best, stale_epochs=stale)
    return gain >= 0 and monitor is not None


def save(learner: Learner, path: Path) -> None:
    """Write a checkpoint, unless its weights are not finite."""
    check_weights(learner, learner.progress.step - 1)
    checkpoints.save(path, learner.checkpoint())


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


def epoch_lines(row: dict[str, Any], epochs: int, is_best: bool) -> tuple[str, str]:
    """What is said of an epoch: all of it, and what a terminal of 80 columns has room for."""
    width = len(str(epochs))
    number, lr = f"epoch {row['epoch']:>{width}}/{epochs}", f"lr {row['lr']:.2e}"
    parts = [f"train loss {formats.metric('loss', row['train_loss'])}"]
    if row["val_loss"] is not None:
        parts.append(f"val loss {formats.metric('loss', row['val_loss'])}")
    if row.get("val_accuracy") is not None:
        parts.append(f"val accuracy {row['val_accuracy']:.2%}")
    seconds, speed = f"{row['seconds']:.1f} s", f"{row['samples_per_s']:,.0f}/s"
    mark = ["*"] if is_best else []
    whole = [number, lr, *parts, seconds, speed, *mark]
    return "  ".join(whole), "  ".join([number, *parts, seconds, *mark])


def _advance(
    learner: Learner, step: int, loss_sum: float, epoch_s: float, train_s: float | None = None
) -> Progress:
    scaling = learner.scaler.state_dict()  # empty but for float16
    return dataclasses.replace(
        learner.progress,
        step=step,
        loss_sum=loss_sum,
        epoch_s=epoch_s,
        train_s=learner.progress.train_s if train_s is None else train_s,
        loss_scale=scaling.get("scale"),
        loss_scale_steps=scaling.get("_growth_tracker", 0),
    )


def _record(folder: RunFolder, row: dict[str, Any], console: Console) -> None:
    """Metrics that can't be written are said loudly but don't end a run."""
    try:
        folder.add_metrics(row)
    except OSError as error:
        console.warn(f"{folder.metrics} can't be written: {error.strerror}")


def stop_if_asked(signals: SignalWatch, learner: Learner, folder: RunFolder) -> None:
    """Raise Interrupted if a signal came. Call it when everything is saved."""
    if signals.received is not None:
        raise Interrupted(
            signals.received,
            f"interrupted at step {learner.progress.step}; everything is saved in {folder.path}",
            _how_to_go_on(learner, folder),
        )


def _how_to_go_on(learner: Learner, folder: RunFolder) -> str:
    words = [f"resume={folder.path}", *plugin_words(learner.config.plugin)]
    return f"type mnist-cli train {shlex.join(words)}"


@contextlib.contextmanager
def timed(times: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        times[name] = times.get(name, 0.0) + time.perf_counter() - started
