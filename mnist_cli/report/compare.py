"""Two runs on the same test samples, and the page that shows them beside each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from markupsafe import Markup
from torch import Tensor

from mnist_cli import formats, metrics
from mnist_cli.config import FREE_KEYS
from mnist_cli.errors import UsageError
from mnist_cli.report import canvas, page, pictures, plots
from mnist_cli.report.canvas import FIRST, SECOND, Curve
from mnist_cli.report.record import ClassScores, NumberScores, Record
from mnist_cli.run import as_typed

ALPHA = 0.05


@dataclass(frozen=True)
class Comparison:
    """Two runs.

    Attributes:
        mcnemar: of two classifiers whose test samples are at hand, the counts `both`, `only_a`,
            `only_b`, `neither` and `p_value`; else None.
        verdict: what that means, as a sentence; empty where it is None.
    """

    a: Record
    b: Record
    mcnemar: dict[str, Any] | None
    verdict: str


def compare(a: Record, b: Record) -> Comparison:
    """Put two runs beside each other. Raises UsageError where their data differ."""
    if a.spec.digest != b.spec.digest or a.spec.classes != b.spec.classes:
        raise UsageError(
            f"{a.path} and {b.path} were made with different data:"
            f" {a.spec.name} {a.spec.digest[:12]} and {b.spec.name} {b.spec.digest[:12]}",
            "name two runs on the same dataset",
        )
    right_a, right_b = _right(a), _right(b)
    if right_a is None or right_b is None:
        return Comparison(a, b, None, "")
    counts = {
        "both": int((right_a & right_b).sum()),
        "only_a": int((right_a & ~right_b).sum()),
        "only_b": int((right_b & ~right_a).sum()),
        "neither": int((~right_a & ~right_b).sum()),
    }
    p_value = metrics.mcnemar(counts["only_a"], counts["only_b"])
    return Comparison(a, b, counts | {"p_value": p_value}, _verdict(counts, p_value))


@canvas.own_style()
def render(comparison: Comparison) -> str:
    """The page as HTML."""
    a, b = comparison.a, comparison.b
    return page.render(
        "compare.html.j2",
        runs=(("A", a), ("B", b)),
        is_classifier=a.spec.task == "classification",
        comparison=comparison,
        intervals=_intervals(a, b),
        scores=_scores(a, b),
        per_class=_per_class(a, b),
        curves=_curves(a, b),
        settings=_settings(a, b),
        disagreements=_disagreements(a, b),
    )


def _right(record: Record) -> Tensor | None:
    """Which test samples a classifier got right: (N,) bool."""
    if record.split is None or record.outputs is None or record.spec.task == "regression":
        return None
    return metrics.surest(record.outputs)[0] == record.split.targets


def _verdict(counts: dict[str, int], p_value: float) -> str:
    only_a, only_b = counts["only_a"], counts["only_b"]
    told = f"A alone is right on {only_a:,} test samples, B alone on {only_b:,}; "
    p_text = f"p = {p_value:.2g}" if p_value >= 1e-4 else "p < 0.0001"
    if p_value >= ALPHA:
        return f"{told}that is no evidence that one is better ({p_text})"
    return f"{told}{'A' if only_a > only_b else 'B'} is better ({p_text})"


def _intervals(a: Record, b: Record) -> Markup | None:
    rows = [
        (name, ink, scores.accuracy_ci95[0], scores.accuracy, scores.accuracy_ci95[1])
        for name, ink, scores in (("A", FIRST, a.test), ("B", SECOND, b.test))
        if isinstance(scores, ClassScores)
    ]
    told = "; ".join(f"{row[0]} {row[3]:.2%}, from {row[2]:.2%} to {row[4]:.2%}" for row in rows)
    return plots.intervals(rows, f"Test accuracy with its 95% interval. {told}.") if rows else None


def _scores(a: Record, b: Record) -> list[tuple[str, float | None, float | None, float | None]]:
    """Name, A, B and their difference of each metric of the test split."""
    if a.test is None or b.test is None:
        return []
    is_regression = isinstance(a.test, NumberScores)
    names = ("accuracy", "precision", "recall", "f1", "auc", "loss", "ece")
    rows = []
    for name in ("loss", "mse", "mae", "r2") if is_regression else names:
        one, other = getattr(a.test, name), getattr(b.test, name)
        gap = None if one is None or other is None else other - one
        rows.append((name, one, other, gap))
    return rows


def _per_class(a: Record, b: Record) -> list[tuple[str, int, float, float]]:
    """Class, number of samples, and the share that A and B find."""
    if not isinstance(a.test, ClassScores) or not isinstance(b.test, ClassScores):
        return []
    pairs = zip(a.spec.classes, a.test.per_class, b.test.per_class, strict=True)
    return [(name, one.support, one.recall, other.recall) for name, one, other in pairs]


def _curves(a: Record, b: Record) -> dict[str, Markup]:
    is_regression = a.spec.task == "regression"
    metric = ("val_mse", "Validation error (mse)") if is_regression else (
        "val_accuracy", "Validation accuracy",
    )  # fmt: skip
    columns = (metric, ("val_loss", "Validation loss"), ("train_loss", "Training loss"))
    drawn = {}
    for column, name in columns:
        lines = [
            Curve(who, ink, *record.column(column))
            for who, ink, record in (("A", FIRST, a), ("B", SECOND, b))
        ]
        told = " ".join(f"{line.name}: {line.y[-1]:.4g} at the end." for line in lines if line.x)
        if told:
            percent = column == "val_accuracy"
            drawn[name] = plots.curves(lines, f"{name} over epochs. {told}", percent=percent)
    return drawn


def _settings(a: Record, b: Record) -> list[tuple[str, str | None, str | None]]:
    """The keys that change numbers and differ, with both values; None where a run lacks it."""
    one, other = page.settings(a.config), page.settings(b.config)
    keys = [*one, *(key for key in other if key not in one)]
    return [
        (
            key,
            as_typed(one[key]) if key in one else None,
            as_typed(other[key]) if key in other else None,
        )
        for key in keys
        if key not in FREE_KEYS and (key not in one or key not in other or one[key] != other[key])
    ]


def _disagreements(a: Record, b: Record) -> list[tuple[str, int, dict[str, Any]]]:
    """Title, number, and images of each way to disagree; the surest wrong answer first."""
    if a.split is None or a.outputs is None or b.outputs is None or a.spec.task == "regression":
        return []
    truth = a.split.targets
    (said_a, sure_a), (said_b, sure_b) = metrics.surest(a.outputs), metrics.surest(b.outputs)
    right_a, right_b = said_a == truth, said_b == truth
    groups = (
        ("Only A is right", right_a & ~right_b, sure_b),
        ("Only B is right", right_b & ~right_a, sure_a),
        ("Both are wrong, in different ways", ~right_a & ~right_b & (said_a != said_b),
         torch.maximum(sure_a, sure_b)),
    )  # fmt: skip
    return [(title, int(which.sum()), _group(a, b, which, by)) for title, which, by in groups]


def _group(a: Record, b: Record, which: Tensor, by: Tensor) -> dict[str, Any]:
    assert a.split is not None and a.outputs is not None and b.outputs is not None
    rows = which.nonzero().flatten()
    shown = rows[by[rows].argsort(descending=True, stable=True)][: pictures.MAX_TILES // 2]
    columns = [[a.spec.classes[truth] for truth in a.split.targets[shown].tolist()]]
    for outputs in (a.outputs, b.outputs):
        said, sure = metrics.surest(outputs[shown]) if len(shown) else (shown, shown)
        columns.append([a.spec.classes[answer] for answer in said.tolist()])
        columns.append([formats.percent(share) for share in sure.tolist()])
    return pictures.tiles(a.split, shown, *columns, hidden=len(rows) - len(shown))
