"""What a run leaves: its first records, what it is worth in the end, or why it failed."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import platform
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mnist_cli import __version__, dataset, formats, scoring
from mnist_cli import checkpoint as checkpoints
from mnist_cli import run as runs
from mnist_cli.config import TrainConfig, config_hash
from mnist_cli.console import Console
from mnist_cli.errors import (
    DivergedError,
    Interrupted,
    MnistCliError,
    PrunedError,
    ResourceError,
    UsageError,
    is_out_of_memory,
    one_line,
)
from mnist_cli.learner import Learner
from mnist_cli.logger import Finished
from mnist_cli.loop import save, stop_if_asked, timed
from mnist_cli.loss import Loss, build_loss
from mnist_cli.model import num_params
from mnist_cli.options import LinearModelConfig, plugin_words
from mnist_cli.plugin_code import plugin_at_fault
from mnist_cli.run import RunFolder
from mnist_cli.signals import SignalWatch
from mnist_cli.train_step import diverged


@dataclass(frozen=True, eq=False)
class Run:
    """A run at work: what it trains, the folder that it holds, the `time.monotonic()` of its start,
    and what earlier sessions took, in seconds, by the names of result.json.
    """

    learner: Learner
    folder: RunFolder
    console: Console
    started_s: float
    earlier: dict[str, float] = field(default_factory=dict)


def begin(run: Run) -> None:
    """Write what a run that is cut off goes on from, and say what is about to happen."""
    save(run.learner, run.folder.last)
    run.folder.write_result(_result(run, "interrupted"))
    run.folder.write_config(run.learner.config)
    _banner(run)


def conclude(run: Run, signals: SignalWatch) -> Finished:
    """Test what was selected, and leave result.json.

    Raises:
        Interrupted: by a signal; all is saved.
        DivergedError: the selected weights give no finite loss.
    """
    learner, folder = run.learner, run.folder
    selected = checkpoints.load(folder.best)
    model = selected.build_model(learner.device)
    # By its own loss, as `eval` does: a run that is resumed may go on with another.
    loss = build_loss(selected.config.loss, learner.data.spec.task)
    measured: dict[str, dict[str, Any] | None] = {"val": None}
    with timed(learner.times, "eval_s"):
        if len(learner.data.val):
            measured["val"], _ = _measure(learner, model, loss, learner.data.val)
    stop_if_asked(signals, learner, folder)
    with timed(learner.times, "eval_s"):
        measured["test"], outputs = _measure(learner, model, loss, learner.data.test)
    stop_if_asked(signals, learner, folder)
    _write_answers(learner, folder, outputs)
    result = _result(run, "completed") | measured
    result["model"] |= _learned_line(learner, model)
    folder.write_result(result)
    return Finished(result, model, learner.data, outputs)


@contextlib.contextmanager
def recorded(run: Run) -> Iterator[None]:
    """Record in the run's folder what goes wrong in the block, and raise it in the user's words."""
    try:
        yield
    except BaseException as error:
        failure = _explained(error, run.learner.config)
        _record_failure(failure, run)
        if failure is error:
            raise
        raise failure from error


def _explained(error: BaseException, config: TrainConfig) -> BaseException:
    """`error`, or what it means to the user."""
    if is_out_of_memory(error):
        hint = f"type a smaller batch: batch_size={max(1, config.batch_size // 2)}"
        kind = "GPU memory" if isinstance(error, torch.OutOfMemoryError) else "memory"
        return ResourceError(f"out of {kind}", hint)
    if config.compile and type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        reason = str(error).strip().splitlines()[0]
        return UsageError(f"compile=true fails here: {reason}", "type compile=false")
    if not isinstance(error, MnistCliError | Interrupted):
        return plugin_at_fault(error) or error
    return error


def _record_failure(error: BaseException, run: Run) -> None:
    """Leave the failure in result.json and in the log, if the disk still takes them."""
    status = "failed"
    if isinstance(error, DivergedError):
        status = "diverged"
    elif isinstance(error, Interrupted | PrunedError):
        status = "interrupted"
    message = getattr(error, "message", None) or f"{type(error).__name__}: {one_line(str(error))}"
    run.console.record(f"error: {message}")
    if hint := getattr(error, "hint", None):
        run.console.record(f"hint: {hint}")
    with contextlib.suppress(ResourceError):
        run.folder.write_result(_result(run, status) | {"error": message})


def _measure(
    learner: Learner, model: nn.Module, loss: Loss, split: dataset.Split
) -> tuple[dict[str, Any], torch.Tensor]:
    """All metrics of `split`, and the (N, K) float32 outputs that they are of."""
    outputs = scoring.answers(model, learner.data.spec, split)
    measured = scoring.measure(outputs, split, learner.data.spec, loss)
    if not math.isfinite(measured["loss"]):
        step = learner.progress.step - 1
        raise diverged(learner, "loss of the selected weights", measured["loss"], step)
    return measured, outputs


def _write_answers(learner: Learner, folder: RunFolder, outputs: torch.Tensor) -> None:
    """errors.csv of a classification, and with predictions=true predictions.csv, of the test."""
    test, spec = learner.data.test, learner.data.spec
    if spec.task == "regression":
        if learner.config.predictions:
            pairs = zip(test.targets.flatten().tolist(), outputs.flatten().tolist(), strict=True)
            numbers = ((index, *pair) for index, pair in enumerate(pairs))
            runs.write_table(folder.predictions, scoring.ANSWER_COLUMNS[:3], numbers)
        return
    rows = scoring.named_answers(outputs, test, spec)
    wrong = (row for row in rows if row[1] != row[2])
    runs.write_table(folder.errors, scoring.ANSWER_COLUMNS, wrong)
    if learner.config.predictions:
        judged = ((*row, str(row[1] == row[2]).lower()) for row in rows)
        runs.write_table(folder.predictions, (*scoring.ANSWER_COLUMNS, "correct"), judged)


def _result(run: Run, status: str) -> dict[str, Any]:
    """result.json, without what is only known at the end of a completed run."""
    learner = run.learner
    best, progress, spec = learner.progress.best, learner.progress, learner.data.spec
    samples = progress.step / learner.steps_per_epoch * len(learner.data.train)
    now = learner.times | {"total_s": time.monotonic() - run.started_s}
    times = {name: seconds + run.earlier.get(name, 0.0) for name, seconds in now.items()}
    times["train_s"] = progress.train_s + progress.epoch_s
    return {
        "schema": runs.SCHEMA,
        "command": "train",
        "status": status,
        "error": None,
        "config_hash": config_hash(learner.config),
        "seed": learner.config.seed,
        "device": str(learner.device),
        "run_dir": str(run.folder.path),
        "versions": {
            "mnist_cli": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "dataset": {
            "name": spec.name,
            "task": spec.task,
            "n_train": len(learner.data.train),
            "n_val": len(learner.data.val),
            "n_test": len(learner.data.test),
            "digest": spec.digest,
        },
        "model": {"name": learner.config.model.name, "num_params": num_params(learner.model)},
        "best": None if best is None else dataclasses.asdict(best),
        "val": None,
        "test": None,
        "time": times,
        "samples_per_s": samples / times["train_s"] if times["train_s"] else None,
    }


def _learned_line(learner: Learner, model: nn.Module) -> dict[str, Any]:
    config = learner.config
    if not isinstance(config.model, LinearModelConfig) or config.task != "regression":
        return {}
    weight, bias = model.state_dict().values()
    return {"weight": weight.tolist(), "bias": bias.tolist()}


def _banner(run: Run) -> None:
    learner, console = run.learner, run.console
    config, data = learner.config, learner.data
    count = torch.get_num_threads()
    threads = f", {count} thread{'s' if count > 1 else ''}" if learner.device.type == "cpu" else ""
    console.detail(f"model    {config.model.name}, {num_params(learner.model):,} parameters")
    console.detail(
        f"data     {data.spec.name}: {len(data.train):,} to train, {len(data.val):,} to validate,"
        f" {len(data.test):,} to test"
    )
    console.detail(
        f"optim    {config.optim.name}, lr {config.optim.lr:g}, schedule {config.schedule.name},"
        f" loss {config.loss.name}"
    )
    selects = f"by {config.monitored}" if len(data.val) else "nothing, the last epoch is the result"
    console.detail(f"select   {selects}")
    console.detail(f"device   {learner.device}{threads}, {config.precision}")
    console.detail(f"run      {run.folder.path}")


def show(run: Run, result: dict[str, Any], reason: str) -> None:
    """Say how the run ended, and what came of it."""
    console = run.console
    best, splits = result["best"], [name for name in ("val", "test") if result[name]]
    console.detail(f"stopped  {reason}")
    chosen = f"the best {best['monitor']}" if best["monitor"] else "the last one"
    console.detail(f"selected epoch {best['epoch']} ({chosen})")
    names = (
        ("loss", "mse", "mae", "r2")
        if "mse" in result["test"]
        else ("loss", "accuracy", "f1", "ece")
    )
    rows = [
        (name, *(formats.metric(name, result[split][name]) for split in splits)) for name in names
    ]
    console.table(("metric", *splits), rows)
    if "accuracy" in result["test"]:
        low, high = result["test"]["accuracy_ci95"]
        console.detail(f"test accuracy lies between {low:.2%} and {high:.2%} (95%)")
    words = [f"checkpoint={run.folder.path}", *plugin_words(run.learner.config.plugin)]
    checkpoint = shlex.join(words)
    console.detail(f"next     mnist-cli eval {checkpoint}")
    console.detail(f"         mnist-cli export {checkpoint} format=onnx")
