"""A leaderboard, as `leaderboard.build` gives it, on the screen, as CSV and as Markdown.

The cells of other tables and of pages are written here as well.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from typing import Any

from mnist_cli.console import Console

MAX_SHOWN = 10  # failed jobs below the table


def show(board: dict[str, Any], console: Console) -> None:
    """The table, what failed, and the winner with the command that repeats it."""
    told = short_cell if "objectives" in board else cell
    started = [row for row in board["rows"] if row["state"] != "waiting"]
    headers, rows = _cells(board | {"rows": started}, told)
    if rows:
        console.table(headers, rows, num_texts=1 + len(board["columns"]))
    failed = [job for row in board["rows"] for job in row["failed"]]
    for job in failed[:MAX_SHOWN]:
        console.say(f"{job['state']:<8} {job['job']}: {job['error'] or 'cut off'}")
    if len(failed) > MAX_SHOWN:
        console.say(f"and {len(failed) - MAX_SHOWN} more, in leaderboard.md")
    if num_waiting := sum(row["waiting"] for row in board["rows"]):
        num_jobs = num_waiting + sum(len(row["jobs"]) for row in board["rows"])
        console.say(f"waiting  {num_waiting} of {num_jobs} jobs were not started")
    console.say(f"ranked   {board['ranked_by']}")
    if board["winner"] is not None:
        console.say(f"winner   {_sentence(board['winner'], told)}")
        console.say(f"repeat   {board['winner']['command']}")


def as_csv(board: dict[str, Any]) -> str:
    text = io.StringIO()
    keys = [
        "rank", "state", "n", "metric", "mean", "std", "test_metric", "test_mean", "test_std",
        "train_s",
    ]  # fmt: skip
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*board["columns"], *keys, "failed", "error", "jobs"])
    for row in board["rows"]:
        errors = [job["error"] for job in row["failed"] if job["error"]]
        writer.writerow(
            [
                *(cell(value) for value in row["config"].values()),
                *("" if row[key] is None else row[key] for key in keys),
                len(row["failed"]),
                errors[0] if errors else "",
                " ".join(row["jobs"]),
            ]
        )
    return text.getvalue()


def as_markdown(board: dict[str, Any]) -> str:
    headers, rows = _cells(board, cell)
    headers[0] = "rank"
    lines = ["# Leaderboard", "", f"Ranked {board['ranked_by']}.", ""]
    texts = 1 + len(board["columns"])
    lines.append(_markdown_row(headers))
    lines.append(_markdown_row(["---" if i < texts else "---:" for i in range(len(headers))]))
    lines += [_markdown_row(row) for row in rows]
    failed = [job for row in board["rows"] for job in row["failed"]]
    if failed:
        lines += ["", "## Not completed", "", "| job | how it ended | error |", "|---|---|---|"]
        lines += [_markdown_row([j["job"], j["state"], j["error"] or "cut off"]) for j in failed]
    if board["winner"] is not None:
        lines += ["", "## Winner", "", f"{_sentence(board['winner'], cell)}. To repeat it:", ""]
        lines += [f"    {board['winner']['command']}"]
    return "\n".join(lines) + "\n"


def _cells(board: dict[str, Any], told: Callable[[Any], str]) -> tuple[list[str], list[list[str]]]:
    metric = next((row["metric"] for row in board["rows"] if row["metric"]), "value")
    tests = (row["test_metric"] for row in board["rows"] if row["test_metric"])
    test = next((f"test {name}" for name in tests), "test")
    headers = ["", *board["columns"], "n", metric, test, "train s"]
    rows = [
        [
            str(row["rank"] or "-"),
            *(told(value) for value in row["config"].values()),
            str(row["n"]) if row["n"] else row["state"],
            spread(row["metric"] or metric, row["mean"], row["std"], row["best_so_far"]),
            spread(test, row["test_mean"], row["test_std"]),
            "-" if row["train_s"] is None else f"{row['train_s']:.1f}",
        ]
        for row in board["rows"]
    ]
    return headers, rows


def _sentence(row: dict[str, Any], told: Callable[[Any], str]) -> str:
    what = " ".join(f"{key}={told(value)}" for key, value in row["config"].items())
    value = spread(row["metric"], row["mean"], row["std"])
    text = f"{what or 'as it stands'}: {row['metric']} {value}"
    if row["test_mean"] is not None:
        test = spread(row["test_metric"], row["test_mean"], row["test_std"])
        text += f", test {row['test_metric']} {test}"
    return text + (f" ({row['n']} seeds)" if row["n"] > 1 else "")


def cell(value: Any) -> str:
    """A value of a configuration as one types it."""
    return value if isinstance(value, str) else "-" if value is None else json.dumps(value)


def short_cell(value: Any) -> str:
    """As `cell`, with four digits: a search finds six, which files and commands keep."""
    return f"{value:.4g}" if isinstance(value, float) else cell(value)


def spread(metric: str, mean: float | None, std: float | None, so_far: float | None = None) -> str:
    """Mean and deviation as people read them; the best so far where there is no mean."""
    if mean is None:
        return "-" if so_far is None else f"({number(metric, so_far)})"
    return number(metric, mean) + ("" if std is None else f" ± {number(metric, std)}")


def number(metric: str | None, value: float) -> str:
    """A value of `metric` as people read it; with an exponent where four digits would hide it."""
    if metric == "num_params":
        return f"{value:,.0f}"
    if metric is not None and "accuracy" in metric:
        return f"{value:.2%}"
    return f"{value:.4f}" if value == 0 or 0.001 <= abs(value) < 1e6 else f"{value:.2e}"


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
