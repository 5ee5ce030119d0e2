"""The command `train`: one run, from a configuration to a selected and tested model.

Read `run` for the order of things, `loop.py` for the loop, `train_step.py` for a step in it, and
`outcome.py` for what is left in the end.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any, cast

import torch
from torch import nn

from mnist_cli import cuda_graph, dataset, find, logger, optim, outcome, resume, runtime, schedule
from mnist_cli import run as runs
from mnist_cli.checkpoint import Checkpoint, Progress
from mnist_cli.config import TrainConfig, config_hash, to_plain
from mnist_cli.console import Console
from mnist_cli.dataset import Dataset, Normalise
from mnist_cli.errors import DataError, UsageError
from mnist_cli.learner import Learner
from mnist_cli.logger import Loggers
from mnist_cli.loop import ShouldStop, fit, is_out_of_patience, is_over, never, timed
from mnist_cli.loss import Loss, build_loss, build_loss_gradient
from mnist_cli.model import build_model
from mnist_cli.model.backprop import Backprop
from mnist_cli.model.linear import Linear
from mnist_cli.model.mlp import Mlp
from mnist_cli.options import (
    DatasetConfig,
    LinearModelConfig,
    MlpConfig,
    PluginLossConfig,
    PluginModelConfig,
    PluginScheduleConfig,
)
from mnist_cli.outcome import Run
from mnist_cli.plugin_code import code_of_plugin
from mnist_cli.signals import SignalWatch
from mnist_cli.train_step import lr_of

RUNS = "outputs/train"
OF_TRAINING = ("logger", "predictions", "profile", "report")  # only done while or after it trains


def run(
    config: TrainConfig,
    console: Console,
    typed: Collection[str] = (),
    started_s: float | None = None,
    *,
    signals: SignalWatch | None = None,
    should_stop: ShouldStop = never,
) -> dict[str, Any]:
    """Train, select on the validation split, test once; leave everything in the run folder.

    Args:
        typed: the keys that the user named; of a run that is resumed, the others come out of its
            checkpoint.
        started_s: `time.monotonic()` of the start, for the times in the result.
        signals: the watch of a process that runs job after job; None for one of the run's own.
        should_stop: see `loop.fit`.

    Returns:
        What result.json holds.

    Raises:
        UsageError, DataError: before anything is written.
        CheckpointError: the run to resume has no checkpoint that can be used.
        LockedError: another process is at the run folder.
        DivergedError: a loss or gradient was not finite; the checkpoints before it stand.
        ResourceError: no disk, memory or GPU memory is left; the last checkpoint stands.
        PrunedError: `should_stop` said so, after a checkpoint was written.
        Interrupted: by a signal, after a checkpoint was written.
    """
    started_s = time.monotonic() if started_s is None else started_s
    with contextlib.ExitStack() as held:
        with signals.at_once() if signals else contextlib.nullcontext():
            found = held.enter_context(opened(config, console, typed, started_s))
        if not isinstance(found, Run):
            return found
        watch = signals or held.enter_context(SignalWatch())
        loggers = held.enter_context(Loggers(console))
        with outcome.recorded(found):
            outcome.begin(found)
            loggers.start(found.learner.config, found.folder)
            with cuda_graph.replaying(found.learner, console):
                reason = fit(found.learner, found.folder, console, watch, loggers.log, should_stop)
            finished = outcome.conclude(found, watch)
        outcome.show(found, finished.result, reason)
        loggers.finish(finished)
    return finished.result


LoadData = Callable[[DatasetConfig, int, torch.device], Dataset]


def load_data(config: DatasetConfig, seed: int, device: torch.device) -> Dataset:
    """As `dataset.load`, on `device`."""
    return dataset.load(config, seed).to(device)


@contextlib.contextmanager
def opened(
    config: TrainConfig,
    console: Console,
    typed: Collection[str],
    started_s: float,
    load: LoadData = load_data,
) -> Iterator[Run | dict[str, Any]]:
    """Hold the run of `config`, a new one or as its checkpoint left it.

    Yields:
        The run; or the result of one that is complete already.

    Raises:
        MnistCliError: as `run` does before it trains.
    """
    runtime.set_up_cpu()
    old_folder = find.run_to_resume(config)
    if old_folder is None:
        logger.require(config.logger)
        learner = prepare(config, None, started_s, load)
        with runs.create(config.out, RUNS, config.resume == "auto") as folder, folder.log(console):
            yield Run(learner, folder, console, started_s)
        return
    with runs.reopen(old_folder) as folder:
        config, before = resume.load(folder, config, typed, console)
        result = folder.read_result()
        if result and runs.is_complete(result, config):
            console.say(f"{old_folder} is already complete at step {before.progress.step}")
            new, old = to_plain(config), to_plain(before.config)
            if late := [key for key in OF_TRAINING if new[key] and new[key] != old[key]]:
                console.warn(f"{', '.join(late)} changed nothing: there was nothing to train")
            yield result
            return
        logger.require(config.logger)
        learner = prepare(config, before, started_s, load)
        if learner.data.spec != before.spec:
            raise DataError(
                f"the {before.spec.name} data here is not what the run was trained on"
                f" (digest {learner.data.spec.digest[:12]} instead of {before.spec.digest[:12]})",
                "name the folder with the run's data: dataset.root=DIR",
            )
        _refuse_to_rewrite(before, learner)
        with folder.log(console):
            for difference in runtime.Host.of(learner.device).differences(before.host):
                console.warn(difference)
            console.say(f"resuming at step {before.progress.step}")
            num_epochs = before.progress.step // learner.steps_per_epoch
            if (num_rows := folder.keep_metrics_until(num_epochs)) < num_epochs:
                console.warn(f"{folder.metrics} has {num_rows} of the {num_epochs} epochs so far")
            earlier = _times_before(learner, runs.times_of(result))
            yield Run(learner, folder, console, started_s, earlier)


def _refuse_to_rewrite(before: Checkpoint, learner: Learner) -> None:
    """Raises UsageError where `learner` would tell of training that never was."""
    config, per_epoch, step = learner.config, learner.steps_per_epoch, before.progress.step
    done = step // per_epoch
    if step > config.epochs * per_epoch:
        raise UsageError(
            f"epochs={config.epochs} is less than the {done} that are done",
            f"type epochs={done} or more",
        )
    patience = before.config.early_stop.patience
    was_stopped = patience is not None and before.progress.stale_epochs >= patience
    was_over = was_stopped or step == before.config.epochs * per_epoch
    if was_over and is_over(learner) and config_hash(config) != config_hash(before.config):
        hint = "start a new run"
        if is_out_of_patience(learner):
            hint += ", or type early_stop.patience=null resume_allow=[early_stop]"
        elif schedule.may_extend(config.schedule):
            hint += f", or type epochs={done + 1} or more"
        raise UsageError(
            f"the run is done after {done} epochs: other settings would change its records alone",
            hint,
        )


def prepare(
    config: TrainConfig,
    before: Checkpoint | None,
    started_s: float,
    load: LoadData = load_data,
) -> Learner:
    """Device, data, model, loss and optimizer; as they stood at the checkpoint `before`, if any."""
    times = {"startup_s": time.monotonic() - started_s}
    device = runtime.resolve_device(config.device, config.precision)
    with timed(times, "data_s"):
        data = load(config.dataset, config.seed, device)
    runtime.reseed(torch.device("cpu"), runtime.counted_seed(config.seed, "init"))
    model = build_model(config.model, data.spec.input_shape, data.spec.num_outputs).to(device)
    loss = build_loss(config.loss, data.spec.task)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "float16")
    if before is not None:
        model.load_state_dict(before.model)
    optimizer = optim.build_optimizer(config.optim, model)
    if before is not None:
        optim.restore_state(optimizer, config.optim, model, before.optim)
        scale, steps = before.progress.loss_scale, before.progress.loss_scale_steps
        if scale is not None:
            state = {"scale": scale, "_growth_tracker": steps}
            scaler.load_state_dict(scaler.state_dict() | state)
    learner = Learner(
        config=config,
        device=device,
        data=data,
        normalise=Normalise(data.spec).to(device),
        model=model,
        forward=torch.compile(model) if config.compile else model,  # type: ignore[arg-type]
        loss=loss,
        backprop=_backprop(config, device, model, loss),
        optimizer=optimizer,
        scaler=scaler,
        progress=Progress() if before is None else before.progress,
        times=times | {"eval_s": 0.0},
    )
    _try_plugins(learner)
    return learner


def _backprop(
    config: TrainConfig, device: torch.device, model: nn.Module, loss: Loss
) -> Backprop | None:
    """Backpropagation without autograd, where it is written out and all that a step needs."""
    is_ours = isinstance(config.model, LinearModelConfig | MlpConfig)
    if not is_ours or isinstance(config.loss, PluginLossConfig):  # which may do anything
        return None
    is_plain = config.precision == "float32" and not config.compile and config.grad_accum == 1
    if device.type != "cpu" or not is_plain:
        return None
    return Backprop(cast("Linear | Mlp", model), build_loss_gradient(config.loss, loss))


def _times_before(learner: Learner, told: dict[str, float]) -> dict[str, float]:
    """What the sessions before took, by the times `told` that the last of them left.

    Of one that was killed, only the training is known, by its last checkpoint.
    """
    trained_s = learner.progress.train_s + learner.progress.epoch_s
    untold_s = max(0.0, trained_s - told.get("train_s", 0.0))
    return told | {"total_s": told.get("total_s", 0.0) + untold_s}


def _try_plugins(learner: Learner) -> None:
    """Let what plugins brought see a batch, so that it fails before anything is written.

    Raises:
        UsageError: it fails, or the model gives outputs of another shape.
    """
    config, train = learner.config, learner.data.train
    targets = train.targets[: config.batch_size]
    outputs = torch.zeros(len(targets), learner.data.spec.num_outputs, device=learner.device)
    if isinstance(config.model, PluginModelConfig):
        with code_of_plugin(config.model, "answer with"), torch.no_grad():
            inputs = learner.normalise(train.inputs[: config.batch_size])
            shape = tuple(learner.model.eval()(inputs).shape)
        if shape != tuple(outputs.shape):
            raise UsageError(
                f"model={config.model.name} gives outputs of shape {shape} for {len(targets)}"
                f" samples, not {tuple(outputs.shape)}",
                "mend or update its package, or take another model",
            )
    if isinstance(config.loss, PluginLossConfig):
        with code_of_plugin(config.loss, "compute"):
            learner.loss(outputs, targets).item()
    if isinstance(config.schedule, PluginScheduleConfig) and not is_over(learner):
        with code_of_plugin(config.schedule, "compute"):
            lr_of(learner, learner.progress.step)
