"""The command `eval`: every metric of a checkpoint, or of an exported .onnx file, on a split."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mnist_cli import checkpoint as checkpoints
from mnist_cli import durable, onnx_file, runtime, scoring
from mnist_cli.config import EvalConfig, TrainConfig
from mnist_cli.console import Console
from mnist_cli.dataset import DatasetSpec, Split
from mnist_cli.errors import CheckpointError, UsageError
from mnist_cli.loss import build_loss


def run(config: EvalConfig, console: Console) -> dict[str, Any]:
    """The command `eval`.

    Returns:
        The JSON document of the contract: checkpoint, split, metrics.

    Raises:
        CheckpointError, DataError: the checkpoint or its data can't be used.
        UsageError: the split is empty, or the device isn't there.
    """
    path = checkpoints.find(config.checkpoint)
    device = runtime.resolve_device(config.device)
    runtime.keep_freed_memory()
    if path.suffix == ".onnx":
        exported = onnx_file.load(path)
        return _evaluate(config, console, path, exported.config, exported.spec, exported.answer)
    found = checkpoints.load(path)
    for difference in runtime.Host.of(device).differences(found.host):
        console.warn(difference)
    model = found.build_model(device)

    def answer(split: Split) -> Tensor:
        return scoring.answers(model, found.spec, split.to(device))

    return _evaluate(config, console, path, found.config, found.spec, answer)


def _evaluate(
    config: EvalConfig,
    console: Console,
    path: Path,
    trained: TrainConfig,
    spec: DatasetSpec,
    answer: Callable[[Split], Tensor],
) -> dict[str, Any]:
    data = checkpoints.load_data(trained, spec, config.dataset.root, console)
    split: Split = getattr(data, config.split)
    if not len(split):
        raise UsageError(
            f"split={config.split} is empty: the run had dataset.val_fraction=0", "type split=test"
        )
    outputs = answer(split)
    if outputs.shape != (len(split), spec.num_outputs) or outputs.dtype != torch.float32:
        raise CheckpointError(
            f"{path} gives answers of shape {tuple(outputs.shape)} and type {outputs.dtype}",
            "name a file that mnist-cli export wrote",
        )
    if not outputs.isfinite().all():
        raise CheckpointError(
            f"{path} gives answers that are not finite numbers", "train again, or take another one"
        )
    loss = build_loss(trained.loss, spec.task)
    measured = scoring.measure(outputs, split.to(outputs.device), spec, loss)
    document = {"checkpoint": str(path), "split": config.split, "metrics": measured}
    if config.out is not None:
        folder = Path(config.out)
        with durable.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        durable.write(folder / "eval.json", (json.dumps(document, indent=2) + "\n").encode())
    console.say(f"{path} on the {config.split} split of {spec.name}")
    scoring.show(measured, console)
    return document
