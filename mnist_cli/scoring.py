"""The answers of a model on a split, and what they are worth.

Training, `eval` and `export` all ask through here, in batches of the same size, so that the same
weights give the same numbers to the last bit wherever they are measured on one machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mnist_cli import formats, metrics
from mnist_cli.console import Console
from mnist_cli.dataset import DatasetSpec, Normalise, Split
from mnist_cli.loss import Loss

BATCH_SIZE = 500
ANSWER_COLUMNS = ("index", "truth", "answer", "probability")


def answers(model: nn.Module, spec: DatasetSpec, split: Split) -> Tensor:
    """The outputs of `model` for the samples of `split`, in order: (N, K) float32."""
    [outputs] = answers_of_all([model], spec, split)
    return outputs


def answers_of_all(models: Sequence[nn.Module], spec: DatasetSpec, split: Split) -> list[Tensor]:
    """As `answers`, for models that share the cost of preparing the inputs."""
    device = split.inputs.device
    if not len(split):  # which not every model can be asked about
        return [torch.empty(0, spec.num_outputs, device=device) for _ in models]
    normalise = Normalise(spec).to(device)
    batches: list[list[Tensor]] = [[] for _ in models]
    with torch.inference_mode():
        for raw in split.inputs.split(BATCH_SIZE):
            inputs = normalise(raw)
            for model, outputs in zip(models, batches, strict=True):
                outputs.append(model.eval()(inputs))
    return [torch.cat(outputs) for outputs in batches]


def named_answers(
    outputs: Tensor, split: Split, spec: DatasetSpec
) -> list[tuple[int, str, str, float]]:
    """What (N, K) float32 outputs answer to each sample of `split`: a row of ANSWER_COLUMNS.

    Truth and answer are classes by name; the probability is that of the answer, in 0..1.
    """
    classes, probabilities = metrics.surest(outputs)
    columns = (split.targets.tolist(), classes.tolist(), probabilities.tolist())
    return [
        (index, spec.classes[truth], spec.classes[answer], probability)
        for index, (truth, answer, probability) in enumerate(zip(*columns, strict=True))
    ]


def summary(outputs: Tensor, split: Split, spec: DatasetSpec, loss: Loss) -> dict[str, float]:
    """What an epoch's line shows: loss, and accuracy or mse."""
    value = float(loss(outputs, split.targets))
    if spec.task == "classification":
        hits = int((outputs.argmax(dim=1) == split.targets).sum())
        return {"loss": value, "accuracy": hits / len(split)}
    return {"loss": value, "mse": metrics.mse(outputs, split.targets)}


def measure(outputs: Tensor, split: Split, spec: DatasetSpec, loss: Loss) -> dict[str, Any]:
    """All metrics of (N, K) float32 outputs, as result.json has them."""
    value = float(loss(outputs, split.targets))
    outputs, targets = outputs.cpu(), split.targets.cpu()
    if spec.task == "classification":
        return metrics.classification(outputs, targets, value, spec.classes)
    return metrics.regression(outputs, targets, value)


def show(measured: dict[str, Any], console: Console) -> None:
    """The metrics as tables: the whole, then a row for each class."""
    if "accuracy" not in measured:
        rows = [
            (name, formats.metric(name, measured[name]))
            for name in ("n", "loss", "mse", "mae", "r2")
        ]
        console.table(("metric", "value"), rows)
        return
    low, high = measured["accuracy_ci95"]
    rows = [
        ("n", formats.metric("n", measured["n"])),
        ("accuracy", formats.percent(measured["accuracy"])),
        ("95% interval", f"{formats.percent(low)} to {formats.percent(high)}"),
        *(
            (name, formats.metric(name, measured[name]))
            for name in ("loss", "precision", "recall", "f1", "auc", "ece")
        ),
    ]
    console.table(("metric", "value"), rows)
    console.table(
        ("class", "precision", "recall", "f1", "support"),
        [
            (
                str(row["label"]),
                *(f"{row[name]:.4f}" for name in ("precision", "recall", "f1")),
                f"{row['support']:,}",
            )
            for row in measured["per_class"]
        ],
    )
