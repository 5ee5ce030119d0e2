"""The command `eval`: every metric of a checkpoint, or of an exported .onnx file, on a split."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from mnist_cli import durable, formats, scoring, trained
from mnist_cli.config import EvalConfig
from mnist_cli.console import Console
from mnist_cli.dataset import Split
from mnist_cli.dataset.again import load_again
from mnist_cli.errors import CheckpointError, UsageError
from mnist_cli.loss import build_loss


def run(config: EvalConfig, console: Console) -> dict[str, Any]:
    """The command `eval`.

    Returns:
        The JSON document: checkpoint, split, metrics.

    Raises:
        CheckpointError, DataError: the checkpoint or its data can't be used, or its loss on them
            is not finite.
        UsageError: the split is empty, or the device isn't there.
    """
    model = trained.load(config.checkpoint, config.device, console)
    spec = model.spec
    data = load_again(model.config, spec, config.dataset.root, console)
    split: Split = getattr(data, config.split)
    if not len(split):
        raise UsageError(
            f"split={config.split} is empty: the run had dataset.val_fraction=0", "type split=test"
        )
    outputs = model.answer(split)
    loss = build_loss(model.config.loss, spec.task)
    measured = scoring.measure(outputs, split.to(outputs.device), spec, loss)
    if not math.isfinite(measured["loss"]):
        raise CheckpointError(
            f"{model.path} gives a loss of {measured['loss']}", "train again, or take another one"
        )
    document = {"checkpoint": str(model.path), "split": config.split, "metrics": measured}
    if config.out is not None:
        folder = Path(config.out)
        durable.make_folder(folder)
        text = json.dumps(document, indent=2, allow_nan=False) + "\n"
        durable.write(folder / "eval.json", text.encode())
    name = "accuracy" if spec.task == "classification" else "mse"
    console.say(
        f"{model.path} on the {config.split} split of {spec.name}:"
        f" {name} {formats.metric(name, measured[name])}"
    )
    scoring.show(measured, console)
    return document
