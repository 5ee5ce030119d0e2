"""The page of one run."""

from __future__ import annotations

import math
import shlex
from typing import Any

import torch
from markupsafe import Markup
from torch import Tensor

from mnist_cli import formats, metrics
from mnist_cli.report import canvas, page, pictures, plots
from mnist_cli.report.canvas import FIRST, MUTED, Curve
from mnist_cli.report.record import ClassScores, Record
from mnist_cli.run import typed_in

MAX_FILTERS = 32


@canvas.own_style()
def render(record: Record) -> str:
    """The page as HTML."""
    best = record.checkpoint.progress.best
    return page.render(
        "run.html.j2",
        record=record,
        best=best,
        is_classifier=record.spec.task == "classification",
        curves=_curves(record, None if best is None else best.epoch),
        confusion=_confusion(record.test),
        calibration=_calibration(record),
        mistakes=_mistakes(record),
        fit=_fit(record),
        filters=_filters(record),
        line=_line(record),
        settings=_settings(record),
        command=_command(record),
    )


def _curves(record: Record, selected: int | None) -> dict[str, Markup]:
    """Loss, metric and learning rate over the epochs, whatever of it is there."""
    metric = "val_accuracy" if record.spec.task == "classification" else "val_mse"
    mark = selected if best_is_chosen(record) else None
    loss = [_line_of(record, *which) for which in _LOSSES]
    drawn = {}
    if any(line.x for line in loss):
        label = f"Loss over {len(record.epochs)} epochs. {_told(loss)}"
        drawn["Loss"] = plots.curves(loss, label, mark=mark)
    scores = _line_of(record, metric, "validation", FIRST)
    if scores.x:
        name = "Accuracy" if metric == "val_accuracy" else "Mean squared error"
        label = f"{name} on the validation split. {_told([scores])}"
        drawn[name] = plots.curves([scores], label, mark=mark, percent=name == "Accuracy")
    rates = _line_of(record, "lr", "learning rate", MUTED)
    if rates.x:
        drawn["Learning rate"] = plots.rates(rates.x, rates.y, f"{_told([rates])}")
    return drawn


_LOSSES = (
    ("train_loss", "training", MUTED),
    ("val_loss", "validation", FIRST),
)


def best_is_chosen(record: Record) -> bool:
    """Whether a metric has chosen the epoch, and not just the end."""
    best = record.checkpoint.progress.best
    return best is not None and best.monitor is not None


def _line_of(record: Record, column: str, name: str, ink: str) -> Curve:
    return Curve(name, ink, *record.column(column))


def _told(lines: list[Curve]) -> str:
    """What a drawing shows, for those who can't see it."""
    return " ".join(
        f"{line.name.capitalize()}: from {line.y[0]:.4g} to {line.y[-1]:.4g}."
        for line in lines
        if line.x
    )


def _confusion(scores: object) -> list[list[dict[str, Any]]] | None:
    """Cells of count, share of the truth's samples, and depth of colour in 0..1."""
    if not isinstance(scores, ClassScores):
        return None
    rows = []
    for truth, counts in enumerate(scores.confusion):
        whole = sum(counts)
        shares = [count / whole if whole else 0.0 for count in counts]
        rows.append(
            [
                {
                    "count": count,
                    "share": share,
                    "is_right": truth == answer,
                    "depth": f"{0.55 * share if truth == answer else _depth(share):.3f}",
                }
                for answer, (count, share) in enumerate(zip(counts, shares, strict=True))
            ]
        )
    return rows


def _depth(share: float) -> float:
    """The colour of a mistake, deep enough to be seen where it happened once."""
    return 0.1 + 0.9 * math.sqrt(share)


def _calibration(record: Record) -> dict[str, Any] | None:
    if record.split is None or record.outputs is None or record.spec.task == "regression":
        return None
    answers, confidences = metrics.surest(record.outputs)
    correct = answers == record.split.targets
    bins = metrics.calibration_bins(confidences, correct)
    label = "Share of right answers by probability. " + " ".join(
        f"At {part['confidence']:.0%}: {part['num_correct']} of {part['n']}." for part in bins
    )
    confidence, accuracy = confidences.mean().item(), correct.double().mean().item()
    return {
        "drawing": plots.reliability(bins, label),
        "ece": metrics.calibration_error(confidences, correct),
        "confidence": confidence,
        "accuracy": accuracy,
    }


def _mistakes(record: Record) -> dict[str, Any] | None:
    """The wrong answers, the surest first."""
    if record.split is None or record.outputs is None or record.spec.task == "regression":
        return None
    answers, confidences = metrics.surest(record.outputs)
    order = metrics.mistakes(record.outputs, record.split.targets)
    shown = order[: pictures.MAX_TILES]
    classes = record.spec.classes
    return pictures.tiles(
        record.split,
        shown,
        [classes[truth] for truth in record.split.targets[shown].tolist()],
        [classes[answer] for answer in answers[shown].tolist()],
        [formats.percent(share) for share in confidences[shown].tolist()],
        hidden=len(order) - len(shown),
    )


def _fit(record: Record) -> dict[str, Markup]:
    """Data, answers and residuals of a regression."""
    if record.split is None or record.outputs is None or record.spec.task == "classification":
        return {}
    inputs = record.split.inputs
    truth = record.split.targets.flatten().tolist()
    answers = record.outputs.flatten().tolist()
    errors = [answer - true for answer, true in zip(answers, truth, strict=True)]
    most = max(map(abs, errors))
    told = f"{len(truth)} test samples; the largest difference is {most:.3g}."
    drawn = (
        {"Test data and fit": plots.fit(inputs.flatten().tolist(), truth, answers, told)}
        if inputs.shape[1] == 1
        else {"Answer over truth": plots.agreement(truth, answers, told)}
    )
    drawn["Residuals over the answer"] = plots.residuals(answers, errors, told)
    drawn["Residuals by size"] = plots.spread(errors, told)
    return drawn


def _filters(record: Record) -> dict[str, Any] | None:
    """The weights of the first layer, where they look at an image: (N, C, height, width)."""
    if record.spec.task == "regression":
        return None
    name, weights = next(iter(record.weights().items()))
    is_output = name.startswith("output.")
    if weights.dim() == 2 and weights.shape[1] == math.prod(record.spec.input_shape):
        weights = weights.reshape(len(weights), *record.spec.input_shape)
    if weights.dim() != 4:  # of a plugin's model, which may begin with anything
        return None
    strongest = weights.flatten(1).norm(dim=1).argsort(descending=True, stable=True)
    shown = torch.arange(len(weights)) if is_output else strongest[:MAX_FILTERS]
    planes = weights.mean(dim=1)  # of an image with colours: what it looks for in brightness
    largest = max(planes[shown].abs().max().item(), 1e-12)
    return {
        "name": name.removesuffix(".weight"),
        "total": len(weights),
        "shape": " x ".join(map(str, weights.shape[2:])),
        "is_output": is_output,
        "has_colours": weights.shape[1] > 1,
        "largest": largest,
        "tiles": [_tile(record, planes, int(row), largest, is_output) for row in shown],
    }


def _tile(
    record: Record, planes: Tensor, row: int, largest: float, is_output: bool
) -> tuple[str, str]:
    caption = record.spec.classes[row] if is_output else str(row + 1)
    return pictures.of_weights(planes[row], largest), caption


def _line(record: Record) -> dict[str, list[float]] | None:
    """The weight and bias that a linear regression has learned."""
    if record.spec.task == "classification" or record.config.model.name != "linear":
        return None
    weight, bias = record.weights().values()
    return {"weight": weight.flatten().tolist(), "bias": bias.flatten().tolist()}


def _settings(record: Record) -> list[dict[str, Any]]:
    """Every key with its value, and its default where that is another one."""
    standard = page.defaults(record.config)
    return [
        {
            "key": key,
            "value": value,
            "default": standard.get(key),
            "differs": key in standard and standard[key] != value,
        }
        for key, value in page.settings(record.config).items()
    ]


def _command(record: Record) -> str:
    """The line that repeats the run, without the keys that have their defaults."""
    typed = {row["key"] for row in _settings(record) if row["differs"]}
    words = [f"{key}={value}" for key, value in typed_in(record.config).items() if key in typed]
    return shlex.join(["mnist-cli", "train", *words])
