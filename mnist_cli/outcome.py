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
from mnist_cli.job import Job
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

    job: Job
    folder: RunFolder
    console: Console
    started_s: float
    earlier: dict[str, float] = field(default_factory=dict)


def begin(run: Run) -> None:
    """Write what a run that is cut off goes on from, and say what is about to happen."""
    save(run.job, run.folder.last)
    run.folder.write_result(_result(run, "interrupted"))
    run.folder.write_config(run.job.config)
    _banner(run)


def conclude(run: Run, signals: SignalWatch) -> Finished:
    """Test what was selected, and leave result.json.

    Raises:
        Interrupted: by a signal; all is saved.
        DivergedError: the selected weights give no finite loss.
    """
    job, folder = run.job, run.folder
    selected = checkpoints.load(folder.best)
    model = selected.build_model(job.device)
    # By its own loss, as `eval` does: a run that is resumed may go on with another.
    loss = build_loss(selected.config.loss, job.data.spec.task)
    measured: dict[str, dict[str, Any] | None] = {"val": None}
    with timed(job.times, "eval_s"):
        if len(job.data.val):
            measured["val"], _ = _measure(job, model, loss, job.data.val)
    stop_if_asked(signals, job, folder)
    with timed(job.times, "eval_s"):
        measured["test"], outputs = _measure(job, model, loss, job.data.test)
    stop_if_asked(signals, job, folder)
    _write_answers(job, folder, outputs)
    result = _result(run, "completed") | measured
    result["model"] |= _learned_line(job, model)
    folder.write_result(result)
    return Finished(result, model, job.data, outputs)


@contextlib.contextmanager
def recorded(run: Run) -> Iterator[None]:
    """Record in the run's folder what goes wrong in the block, and raise it in the user's words."""
    try:
        yield
    except BaseException as error:
        failure = _explained(error, run.job.config)
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
    job: Job, model: nn.Module, loss: Loss, split: dataset.Split
) -> tuple[dict[str, Any], torch.Tensor]:
    """All metrics of `split`, and the (N, K) float32 outputs that they are of."""
    outputs = scoring.answers(model, job.data.spec, split)
    measured = scoring.measure(outputs, split, job.data.spec, loss)
    if not math.isfinite(measured["loss"]):
        step = job.progress.step - 1
        raise diverged(job, "loss of the selected weights", measured["loss"], step)
    return measured, outputs


def _write_answers(job: Job, folder: RunFolder, outputs: torch.Tensor) -> None:
    """errors.csv of a classification, and with predictions=true predictions.csv, of the test."""
    test, spec = job.data.test, job.data.spec
    if spec.task == "regression":
        if job.config.predictions:
            pairs = zip(test.targets.flatten().tolist(), outputs.flatten().tolist(), strict=True)
            numbers = ((index, *pair) for index, pair in enumerate(pairs))
            runs.write_table(folder.predictions, scoring.ANSWER_COLUMNS[:3], numbers)
        return
    rows = scoring.named_answers(outputs, test, spec)
    wrong = (row for row in rows if row[1] != row[2])
    runs.write_table(folder.errors, scoring.ANSWER_COLUMNS, wrong)
    if job.config.predictions:
        judged = ((*row, str(row[1] == row[2]).lower()) for row in rows)
        runs.write_table(folder.predictions, (*scoring.ANSWER_COLUMNS, "correct"), judged)


def _result(run: Run, status: str) -> dict[str, Any]:
    """result.json, without what is only known at the end of a completed run."""
    job = run.job
    best, progress, spec = job.progress.best, job.progress, job.data.spec
    samples = progress.step / job.steps_per_epoch * len(job.data.train)
    now = job.times | {"total_s": time.monotonic() - run.started_s}
    times = {name: seconds + run.earlier.get(name, 0.0) for name, seconds in now.items()}
    times["train_s"] = progress.train_s + progress.epoch_s
    return {
        "schema": runs.SCHEMA,
        "command": "train",
        "status": status,
        "error": None,
        "config_hash": config_hash(job.config),
        "seed": job.config.seed,
        "device": str(job.device),
        "run_dir": str(run.folder.path),
        "versions": {
            "mnist_cli": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "dataset": {
            "name": spec.name,
            "task": spec.task,
            "n_train": len(job.data.train),
            "n_val": len(job.data.val),
            "n_test": len(job.data.test),
            "digest": spec.digest,
        },
        "model": {"name": job.config.model.name, "num_params": num_params(job.model)},
        "best": None if best is None else dataclasses.asdict(best),
        "val": None,
        "test": None,
        "time": times,
        "samples_per_s": samples / times["train_s"] if times["train_s"] else None,
    }


def _learned_line(job: Job, model: nn.Module) -> dict[str, Any]:
    if not isinstance(job.config.model, LinearModelConfig) or job.config.task != "regression":
        return {}
    weight, bias = model.state_dict().values()
    return {"weight": weight.tolist(), "bias": bias.tolist()}


def _banner(run: Run) -> None:
    job, console = run.job, run.console
    config, data = job.config, job.data
    count = torch.get_num_threads()
    threads = f", {count} thread{'s' if count > 1 else ''}" if job.device.type == "cpu" else ""
    console.detail(f"model    {config.model.name}, {num_params(job.model):,} parameters")
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
    console.detail(f"device   {job.device}{threads}, {config.precision}")
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
    words = [f"checkpoint={run.folder.path}", *plugin_words(run.job.config.plugin)]
    checkpoint = shlex.join(words)
    console.detail(f"next     mnist-cli eval {checkpoint}")
    console.detail(f"         mnist-cli export {checkpoint} format=onnx")
