"""A leaderboard, as `leaderboard.build` gives it, on the screen, as CSV and as Markdown.

The cells of other tables are written here as well.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Collection, Sequence
from typing import Any

from mnist_cli import conf, formats
from mnist_cli.console import Console

MAX_SHOWN = 10  # failed jobs below the table


def show(board: dict[str, Any], console: Console) -> None:
    """The table, what failed, and the winner with the command that repeats it."""
    told = short_cell if "objectives" in board else cell
    started = [row for row in board["rows"] if row["state"] != "waiting"]
    headers, rows = _cells(board | {"rows": started}, told)
    num_texts = 1 + len(board["columns"])
    if board["columns"] and not console.has_room(headers, rows):
        # So that a line breaks between settings, not in them.
        headers[1:num_texts] = ["configuration"]
        for cells, row in zip(rows, started, strict=True):
            cells[1:num_texts] = [_what(row, told)]
        num_texts = 2
    if rows:
        console.table(headers, rows, num_texts)
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
    metrics = {row["metric"] for row in board["rows"] if row["metric"]}
    tests = {row["test_metric"] for row in board["rows"] if row["test_metric"]}
    headers = ["", *board["columns"], "n", *heads(metrics, tests), "train s"]
    rows = [
        [
            str(row["rank"] or "-"),
            *(told(value) for value in row["config"].values()),
            str(row["n"]) if row["n"] else row["state"],
            score(metrics, row["metric"], row["mean"], row["std"], row["best_so_far"]),
            score(tests, row["test_metric"], row["test_mean"], row["test_std"]),
            "-" if row["train_s"] is None else f"{row['train_s']:.1f}",
        ]
        for row in board["rows"]
    ]
    return headers, rows


def _sentence(row: dict[str, Any], told: Callable[[Any], str]) -> str:
    what = _what(row, told)
    value = spread(row["metric"], row["mean"], row["std"])
    text = f"{what or 'as it stands'}: {row['metric']} {value}"
    if row["test_mean"] is not None:
        test = spread(row["test_metric"], row["test_mean"], row["test_std"])
        text += f", test {row['test_metric']} {test}"
    if row["failed"]:
        return f"{text} ({row['n']} of {row['n'] + len(row['failed'])} seeds)"
    return text + (f" ({row['n']} seeds)" if row["n"] > 1 else "")


def _what(row: dict[str, Any], told: Callable[[Any], str]) -> str:
    """What tells the row apart; keys of options that it hasn't chosen are left out."""
    config = row["config"].items()
    own = {k: v for k, v in config if v is not None or k.partition(".")[0] not in conf.GROUPS}
    return " ".join(f"{key}={told(value)}" for key, value in own.items())


def cell(value: Any) -> str:
    """A value of a configuration as one types it."""
    return value if isinstance(value, str) else "-" if value is None else json.dumps(value)


def short_cell(value: Any) -> str:
    """As `cell`, with four digits: a search finds six, which files and commands keep."""
    return f"{value:.4g}" if isinstance(value, float) else cell(value)


def heads(metrics: Collection[str], tests: Collection[str]) -> tuple[str, str]:
    """The heads of the columns of validation and test scores, which are of these metrics."""
    (value,) = metrics if len(metrics) == 1 else ("value",)
    return value, " ".join(["test", *(tests if len(tests) == 1 else ())])


def score(
    metrics: Collection[str],
    metric: str | None,
    mean: float | None,
    std: float | None,
    so_far: float | None = None,
) -> str:
    """As `spread`, in a column of `metrics`: where they are several, with the name of its own."""
    text = spread(metric, mean, std, so_far)
    return text if metric is None or text == "-" or len(metrics) == 1 else f"{metric} {text}"


def spread(
    metric: str | None, mean: float | None, std: float | None, so_far: float | None = None
) -> str:
    """Mean and deviation as people read them; the best so far where there is no mean."""
    if mean is None:
        return "-" if so_far is None else f"({formats.metric(metric, so_far)})"
    deviation = "" if std is None else f" ± {formats.metric(metric, std)}"
    return formats.metric(metric, mean) + deviation


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
