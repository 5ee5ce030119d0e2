"""The leaderboard of a sweep, made of what lies in its folder: leaderboard.csv, .json and .md.

Each run folder in it gives its result.json and the command in overrides.txt, so it makes no
difference who ran the jobs, when, and where. One row is one configuration: its seeds are folded
into mean, sample standard deviation and number.

Rows are ranked by the mean of the best validation value. The test metric stands beside it and ranks
nothing: who picks by the test set has none left.
"""

from __future__ import annotations

import json
import shlex
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mnist_cli import conf, durable, regular_file
from mnist_cli.config import FREE_KEYS, TrainConfig, is_maximized
from mnist_cli.errors import one_line
from mnist_cli.run import LARGEST_METRIC, MAX_BYTES, RunFolder, typed_in
from mnist_cli.sweep import display

SCHEMA = 1
OF_NO_DATASET = ("dataset.root", "dataset.mirror", "dataset.val_fraction")  # it stays the same
NAME = "leaderboard"
JSON = f"{NAME}.json"
LOCATION_KEYS = {"seed", *FREE_KEYS} - {"device"}  # no two configurations differ by these alone
NEEDED_KEYS = {
    "device",
    "dataset.root",
    "dataset.mirror",
    "plugin",
}  # to repeat a run, of FREE_KEYS


@dataclass(frozen=True)
class Entry:
    """One run folder.

    Attributes:
        config: the keys of its command, as typed; empty where the run never came that far.
        state: completed, pruned, interrupted, diverged, failed, or waiting for its start.
        value: of `monitor`, at the best epoch.
        test: (accuracy or mse, value), of a completed run.
    """

    name: str
    config: dict[str, str]
    state: str
    error: str | None
    seed: int | None
    monitor: str | None
    value: float | None
    test: tuple[str, float] | None
    train_s: float | None


def read(folder: Path) -> list[Entry]:
    """The run folders in `folder`, by name; what can't be read is passed over."""
    found = (_entry(path.parent) for path in sorted(folder.glob("*/result.json")))
    return [entry for entry in found if entry is not None]


def results_in(folder: Path) -> list[dict[str, Any]]:
    """result.json of every run folder in `folder`, by name."""
    found = (RunFolder(path.parent).read_result() for path in sorted(folder.glob("*/result.json")))
    return [result for result in found if result is not None]


def command_in(folder: Path) -> dict[str, str]:
    """{key: value as typed} of overrides.txt in a run folder; empty where there is none."""
    try:
        text = regular_file.read(folder / "overrides.txt", MAX_BYTES)
        return _typed_in(text.decode(errors="replace"))
    except (OSError, ValueError):
        return {}


def _typed_in(command: str) -> dict[str, str]:
    words = (word.partition("=") for word in shlex.split(command))
    return {key: value for key, equals, value in words if equals}


def build(
    folder: Path, failures: dict[str, str] | None = None, waiting: Sequence[TrainConfig] = ()
) -> dict[str, Any]:
    """What leaderboard.json holds.

    Args:
        failures: why jobs failed, by the name of their folder, where the folder doesn't say so:
            another process is at it.
        waiting: of jobs that were not started.
    """
    entries = [*read(folder), *map(_waiting, waiting)]
    columns = _columns(entry.config for entry in entries)
    rows: dict[tuple[tuple[str, str], ...], list[Entry]] = {}
    for entry in entries:
        key = tuple((k, v) for k, v in entry.config.items() if k not in LOCATION_KEYS)
        rows.setdefault(key or (("job", entry.name),), []).append(entry)
    listed = [_row(row, columns, failures or {}) for row in rows.values()]
    metric, ranked_by = _ranking(listed, [own[0].config for own in rows.values()])
    ranked = [row for row in listed if row["mean"] is not None and metric is not None]
    sign = -1 if metric is not None and is_maximized(metric) else 1
    ranked.sort(key=lambda row: (_has_diverged(row), sign * row["mean"]))
    for rank, row in enumerate(ranked, 1):
        row["rank"] = rank
    rest = [row for row in listed if row not in ranked]
    rest.sort(key=lambda row: row["state"] != "completed")
    return {
        "schema": SCHEMA,
        "ranked_by": ranked_by,
        "columns": columns,
        "rows": [*ranked, *rest],
        "winner": ranked[0] if ranked else None,
    }


def write(folder: Path, board: dict[str, Any]) -> None:
    """The three files. Raises ResourceError where the disk takes none."""
    text = json.dumps(board, indent=2, allow_nan=False) + "\n"
    durable.write(folder / JSON, text.encode())
    durable.write(folder / f"{NAME}.csv", display.as_csv(board).encode())
    durable.write(folder / f"{NAME}.md", display.as_markdown(board).encode())


# --- reading -------------------------------------------------------------------------------------


def _entry(folder: Path) -> Entry | None:
    result = RunFolder(folder).read_result()
    if result is None:
        return None
    best, test, times = (_dict(result.get(key)) for key in ("best", "test", "time"))
    metric = "mse" if "mse" in test else "accuracy"
    score, seed = _number(test.get(metric)), result.get("seed")
    return Entry(
        name=folder.name,
        config=command_in(folder),
        state=state_of(result),
        error=one_line(str(result["error"])) if result.get("error") is not None else None,
        seed=seed if type(seed) is int else None,
        monitor=one_line(str(best["monitor"]), 40) if best.get("monitor") else None,
        value=_number(best.get("value")),
        test=None if score is None else (metric, score),
        train_s=_number(times.get("train_s")),
    )


def _waiting(config: TrainConfig) -> Entry:
    """A job that was not started."""
    unknown = dict.fromkeys(("error", "monitor", "value", "test", "train_s"))
    return Entry(name="", config=typed_in(config), state="waiting", seed=config.seed, **unknown)


def state_of(result: dict[str, Any]) -> str:
    """The status of result.json; `pruned` for a run that a search gave up."""
    status, error = result.get("status"), str(result.get("error"))
    if status == "interrupted" and error.startswith("pruned at epoch "):
        return "pruned"
    return status if status in ("completed", "interrupted", "diverged") else "failed"


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) <= LARGEST_METRIC else None  # NaN is not


# --- rows ----------------------------------------------------------------------------------------


def _columns(configs: Iterable[dict[str, str]]) -> list[str]:
    """The keys that tell the configurations apart.

    A key of an option counts only if it differs where the same option is chosen: `model.hidden`
    says nothing that `model` doesn't, as long as every mlp has the same.
    """
    seen: dict[str, dict[str | None, set[str]]] = {}
    for config in configs:
        for key, value in config.items():
            chosen = config.get(key.rpartition(".")[0])
            seen.setdefault(key, {}).setdefault(chosen, set()).add(value)
    differing = {key for key, values in seen.items() if max(map(len, values.values())) > 1}
    return [key for key in seen if key in differing - LOCATION_KEYS]


def _ranking(
    rows: Sequence[dict[str, Any]], configs: Sequence[dict[str, str]]
) -> tuple[str | None, str]:
    """The metric that ranks `rows`, None where they don't compare; and how, in words.

    Args:
        configs: of each row, the keys of a command; empty where none is known.
    """
    pairs = zip(rows, configs, strict=True)
    scored = [(row["metric"], config) for row, config in pairs if row["mean"] is not None]
    metrics = sorted({metric for metric, _ in scored})
    known = [config for _, config in scored if config]
    if not metrics and any(row["n"] for row in rows):
        return None, "by nothing: without a validation split there is nothing to select by"
    if not metrics:
        return None, "by nothing: no job was completed"
    if len(metrics) > 1:
        return None, f"by nothing: {', '.join(metrics)} don't compare"
    if len({part_of(config, "dataset") for config in known}) > 1:
        return None, "by nothing: scores on different datasets don't compare"
    if metrics == ["val_loss"] and len({part_of(config, "loss") for config in known}) > 1:
        return None, "by nothing: the val_loss of different losses don't compare"
    [metric] = metrics
    unstable = [_has_diverged(row) for row in rows if row["mean"] is not None]
    rest = ", then those with diverged seeds" if any(unstable) and not all(unstable) else ""
    return (
        metric,
        f"by mean {metric}, {'highest' if is_maximized(metric) else 'lowest'} first{rest}",
    )


def _has_diverged(row: dict[str, Any]) -> bool:
    """Whether some seeds diverged: the mean of the rest is one of the lucky ones."""
    return any(job["state"] == "diverged" for job in row["failed"])


def part_of(config: dict[str, str], group: str) -> frozenset[tuple[str, str]]:
    """The settings of a group; of a dataset those that make it another one."""
    return frozenset(
        (key, value)
        for key, value in config.items()
        if key.partition(".")[0] == group and key not in OF_NO_DATASET
    )


def _row(
    entries: Sequence[Entry], columns: Sequence[str], failures: dict[str, str]
) -> dict[str, Any]:
    done = {e.seed: e for e in entries if e.state == "completed" and e.name not in failures}
    first = next(iter(done.values()), entries[0])
    failed = [
        e
        for e in entries
        if e.seed not in done and (e.state not in ("pruned", "waiting") or e.name in failures)
    ]
    monitors = {e.monitor for e in done.values()}
    values = [e.value for e in done.values() if e.value is not None]
    tests = [e.test for e in done.values() if e.test is not None]
    times = [e.train_s for e in done.values() if e.train_s is not None]
    is_whole = len(monitors) == 1 and len(values) == len(done)
    mean, std = _mean_std(values if is_whole else [])
    test_mean, test_std = _mean_std([value for _, value in tests])
    return {
        "rank": None,
        "config": {key: _plain(first.config.get(key)) for key in columns},
        "state": "completed" if done else _state(first, failures),
        "n": len(done),
        "seeds": sorted(seed for seed in done if seed is not None),
        "metric": first.monitor if is_whole or not done else None,
        "mean": mean,
        "std": std,
        "best_so_far": first.value if not done else None,
        "test_metric": tests[0][0] if tests else None,
        "test_mean": test_mean,
        "test_std": test_std,
        "train_s": statistics.fmean(times) if times else None,
        "jobs": [entry.name for entry in entries if entry.state != "waiting"],
        "waiting": sum(entry.state == "waiting" for entry in entries),
        "failed": [
            {"job": e.name, "state": _state(e, failures), "error": failures.get(e.name, e.error)}
            for e in failed
        ],
        "command": _command(first, columns, sorted(seed for seed in done if seed is not None)),
    }


def _state(entry: Entry, failures: dict[str, str]) -> str:
    """That of the job: a run that was completed before may be one that can't go on as asked."""
    return "failed" if entry.state == "completed" and entry.name in failures else entry.state


def _mean_std(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation (n - 1); None where there are too few values."""
    mean = statistics.fmean(values) if values else None
    return mean, statistics.stdev(values) if len(values) > 1 else None


def _command(entry: Entry, columns: Sequence[str], seeds: Sequence[int]) -> str | None:
    """What repeats the row: its run, or a sweep over its seeds.

    It names what the sweep varied and what differs from the defaults, of the keys that matter.
    """
    if not entry.config:
        return None
    standard = conf.defaults("train", entry.config)
    words = ["mnist-cli", "train", *(["-m"] if len(seeds) > 1 else [])]
    for key, value in entry.config.items():
        if key == "seed" and len(seeds) > 1:
            words.append(f"seed={','.join(map(str, seeds))}")
        elif key in columns or (
            key not in set(FREE_KEYS) - NEEDED_KEYS
            and (key not in standard or not _is_same(_plain(value), standard[key]))
        ):
            words.append(f"{key}={value}")
    return one_line(shlex.join(words), 4000)


def _is_same(value: Any, standard: Any) -> bool:
    """Whether these are one setting: 0 and 0.0 are, 1 and true are not."""
    return bool(value == standard) and isinstance(value, bool) == isinstance(standard, bool)


def _plain(text: str | None) -> Any:
    """The value of an override: a number, a flat list, a truth value or null where it is one."""
    if text is None:
        return None
    try:
        value = json.loads(text)
        if all(map(_is_leaf, value if isinstance(value, list) else [value])):
            return value
    except (ValueError, RecursionError):
        pass
    return one_line(text[1:-1] if text[:1] == text[-1:] == "'" else text)


def _is_leaf(value: Any) -> bool:
    return value is None or isinstance(value, bool) or _number(value) is not None
