"""The page of a sweep: who won, what made the difference, how they learned, what a search did."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Sequence
from typing import Any

from markupsafe import Markup

from mnist_cli import formats
from mnist_cli.report import canvas, page, sweep_axes, sweep_plots
from mnist_cli.report.sweep_axes import Dot
from mnist_cli.report.sweep_plots import Ending
from mnist_cli.report.sweep_record import Metric, Point, Row, SweepRecord
from mnist_cli.sweep import display

MAX_ROWS = 100  # of a table
MAX_LINES = 400  # of parallel coordinates, and dots of an effect
MAX_CURVES = 40
MAX_KEYS = 8  # that are drawn
MAX_TOLD = 12  # values in the text that stands for a drawing


@canvas.own_style()
def render(record: SweepRecord) -> str:
    """The page as HTML."""
    metric = _metric(record)
    metrics = {row.metric for row in record.rows if row.metric}
    tests = {row.test_metric for row in record.rows if row.test_metric}
    drawn = [key for key in _keys(record) if _can_be_drawn(record, key)][:MAX_KEYS]
    return page.render(
        "sweep.html.j2",
        record=record,
        winner=record.winner,
        title=_title(record),
        headers=[*record.columns, "n", *display.heads(metrics, tests), "train s"],
        rows=[_cells(row, record.columns, metrics, tests) for row in record.rows[:MAX_ROWS]],
        unfinished=[job for row in record.rows for job in row.failed],
        max_rows=MAX_ROWS,
        facts=_facts(record),
        parallel=_parallel(record, drawn, metric),
        effects={key: _effect(record, key, metric) for key in drawn} if metric else {},
        hidden_keys=[key for key in record.columns if key not in drawn],
        curves=_curves(record, metric),
        max_curves=MAX_CURVES,
        num_dots=MAX_LINES,
        search=record.search,
        history=_history(record),
        fronts=_fronts(record),
        pareto=_pareto(record),
    )


def _title(record: SweepRecord) -> str:
    keys = record.columns
    over = f"{', '.join(keys[:-1])} and {keys[-1]}" if 1 < len(keys) < 4 else ", ".join(keys)
    what = "Sweep" if not keys else f"Sweep over {over if len(keys) < 4 else f'{len(keys)} keys'}"
    dataset = record.dataset()
    return what if dataset is None or "dataset" in keys else f"{what} on {dataset}"


def _metric(record: SweepRecord) -> Metric | None:
    """What the configurations are compared by; None where nothing ranks them."""
    return record.winner.metric if record.winner else None


def _keys(record: SweepRecord) -> list[str]:
    """The keys that differ; those of a search by importance."""
    importance = record.search.importance if record.search else {}
    return sorted(record.columns, key=lambda key: -importance.get(key, 0.0))


def _can_be_drawn(record: SweepRecord, key: str) -> bool:
    values = [row.config.get(key) for row in record.rows]
    num = len(sweep_axes.choices(values))
    return num > 1 and (num <= sweep_plots.MAX_CHOICES or sweep_axes.are_numbers(values))


# --- tables --------------------------------------------------------------------------------------


def _cells(
    row: Row, columns: Sequence[str], metrics: Collection[str], tests: Collection[str]
) -> dict[str, Any]:
    return {
        "rank": row.rank,
        "config": [display.cell(row.config.get(key)) for key in columns],
        "n": row.n or row.state,
        "value": display.score(metrics, row.metric, row.mean, row.std, row.best_so_far),
        "test": display.score(tests, row.test_metric, row.test_mean, row.test_std),
        "train_s": "-" if row.train_s is None else f"{row.train_s:.1f}",
    }


def _facts(record: SweepRecord) -> dict[str, str]:
    """Names and values of what stands below the winner's score."""
    num_jobs = sum(len(row.jobs) for row in record.rows)
    num_pruned = sum(row.state == "pruned" for row in record.rows)
    spent_s = sum(row.n * row.train_s for row in record.rows if row.train_s is not None)
    facts = {"Configurations": f"{len(record.rows):,}", "Runs": f"{num_jobs:,}"}
    num_unfinished = sum(len(row.failed) for row in record.rows)
    facts["Completed"] = f"{sum(row.n for row in record.rows):,}"
    if num_pruned:
        facts["Given up"] = f"{num_pruned:,}"
    if num_unfinished:
        facts["Not completed"] = f"{num_unfinished:,}"
    if record.search:
        pruner = "" if record.search.pruner == "none" else f", {record.search.pruner} pruner"
        facts["Search"] = f"{record.search.sampler}{pruner}"
    return facts | {"Training": page.seconds(spent_s)}


# --- drawings ------------------------------------------------------------------------------------


def _score(row: Row) -> float | None:
    return row.mean if row.mean is not None else row.best_so_far


def _effect(record: SweepRecord, key: str, metric: Metric) -> Markup:
    """What the values of a key led to, whatever the other keys were."""
    dots = [
        Dot(row.config.get(key), score, row.mean is not None, row is record.winner)
        for row in record.rows[:MAX_LINES]
        if (score := _score(row)) is not None
    ]
    scores: dict[str, list[float]] = {}
    for dot in dots:
        if dot.is_done:
            scores.setdefault(display.cell(dot.value), []).append(dot.score)
    listed = sweep_axes.choices([dot.value for dot in dots if dot.is_done])
    told = "; ".join(
        f"{name}: {formats.metric(metric, statistics.median(scores[name]))}"
        for name in listed[:MAX_TOLD]
    )
    more = f"; and {len(listed) - MAX_TOLD} more values" if len(listed) > MAX_TOLD else ""
    label = f"Median {metric} by {key}. {told}{more}."
    if sweep_axes.are_numbers([dot.value for dot in dots]):
        return sweep_plots.effect_of_number(metric, dots, label)
    return sweep_plots.effect_of_choices(metric, dots, label)


def _parallel(record: SweepRecord, keys: Sequence[str], metric: Metric | None) -> Markup | None:
    """The completed configurations across their keys; None where there is nothing to compare."""
    rows = [row for row in record.rows if row.rank is not None][:MAX_LINES]
    if metric is None or len(rows) < 2 or len(keys) < 2:
        return None
    axes = [
        sweep_axes.axis_of_key(key, [row.config.get(key) for row in rows])
        for key in record.columns
        if key in keys
    ]
    means = [row.mean for row in rows if row.mean is not None]
    axes.append(sweep_axes.axis_of_scores(metric, means))
    best = " ".join(f"{key}={display.cell(rows[0].config.get(key))}" for key in keys)
    label = f"A line for each of {len(rows)} configurations across {len(keys)} keys and {metric}."
    return sweep_plots.parallel(axes, f"{label} The winner: {best}.")


def _curves(record: SweepRecord, metric: Metric | None) -> dict[str, Markup]:
    """Curves of the best configurations over epochs, each the mean of its seeds."""
    shown = record.rows[:MAX_CURVES]
    epochs = [[record.epochs(job) for job in row.jobs[:MAX_CURVES]] for row in shown]
    drawn = {}
    for column in dict.fromkeys((metric or "val_loss", "train_loss")):
        lines: list[Ending] = []
        for row, jobs in zip(shown, epochs, strict=True):
            seeds = [curve for rows in jobs if (curve := _column(rows, column))]
            is_winner = row is record.winner
            name = str(row.rank) if row.rank is not None and row.rank <= 3 else ""
            if len(record.rows) == 1:  # nothing to compare but seeds
                lines += [Ending("", *_mean([seed]), row.n > 0, False) for seed in seeds]
            elif seeds:
                lines.append(Ending(name, *_mean(seeds), row.n > 0, is_winner))
        if lines:
            best, kind = lines[0], "runs" if len(shown) == 1 else "configurations"
            told = (
                f"{_NAMES[column]} over epochs, {len(lines)} {kind}."
                f" The first one: from {best.y[0]:.4g} to {best.y[-1]:.4g}."
            )
            is_share = column == "val_accuracy"
            drawn[_NAMES[column]] = sweep_plots.curves(lines, told, percent=is_share)
    return drawn


_NAMES = {
    "val_accuracy": "Validation accuracy",
    "val_loss": "Validation loss",
    "val_mse": "Validation error (mse)",
    "train_loss": "Training loss",
}


def _column(rows: Sequence[dict[str, float]], column: str) -> dict[float, float]:
    return {row["epoch"]: row[column] for row in rows if "epoch" in row and column in row}


def _mean(seeds: Sequence[dict[float, float]]) -> tuple[list[float], list[float]]:
    """Epochs that each of `seeds` has, and their mean there."""
    epochs = sorted(set(seeds[0]).intersection(*seeds[1:]) or seeds[0])
    seeds = [seed for seed in seeds if set(epochs) <= set(seed)]
    return epochs, [statistics.fmean(seed[epoch] for seed in seeds) for epoch in epochs]


# --- searches ------------------------------------------------------------------------------------


def _history(record: SweepRecord) -> Markup | None:
    """The course of a search for one objective."""
    search = record.search
    if search is None or len(search.objectives) > 1:
        return None
    ((name, direction),) = search.objectives.items()
    so_far = {job: row.best_so_far for row in record.rows for job in row.jobs}
    jobs = record.winner.jobs if record.winner else ()
    dots = []
    for trial in search.history:
        is_done = trial.values is not None
        score = trial.values[0] if trial.values else so_far.get(trial.job or "")
        if score is not None and (is_done or name == _metric(record)):
            dots.append(Dot(trial.trial, score, is_done, is_done and trial.job in jobs))
    done = [dot.score for dot in dots if dot.is_done]
    if not done:
        return None
    best = max(done) if direction == "maximize" else min(done)
    label = f"{name} of {len(done)} completed trials; the best is {formats.metric(name, best)}."
    num_trials = len(search.history)
    return sweep_plots.history(name, dots, num_trials, direction == "maximize", label)


def _fronts(record: SweepRecord) -> dict[str, Markup]:
    """Each further objective over the first one."""
    search = record.search
    if search is None or len(search.objectives) == 1:
        return {}
    first, *others = search.objectives
    best = [tuple(point.values[name] for name in search.objectives) for point in search.pareto]
    done = [trial.values for trial in search.history if trial.values is not None]
    drawn = {}
    for place, name in enumerate(others, 1):
        points = [(values[place], values[0], values in best) for values in done]
        label = f"{first} over {name} of {len(points)} trials; {len(best)} are on the front."
        if points:
            drawn[f"{first} over {name}"] = sweep_plots.front((name, first), points, label)
    return drawn


def _pareto(record: SweepRecord) -> list[Point]:
    """The front, the best of the first objective first."""
    search = record.search
    if search is None:
        return []
    (first, direction), *_ = search.objectives.items()
    return sorted(search.pareto, key=lambda p: p.values[first], reverse=direction == "maximize")
