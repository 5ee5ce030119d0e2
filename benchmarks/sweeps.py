"""Sweeps: jobs trained as one stack, in several processes, and one after the other.

Both of a pair run in turn, as whole processes, sweep folder and leaderboard included. The textbook
loop under Hydra's basic launcher is measured with one job and with two: 16 take T1 + 15 (T2 - T1).
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from measure import HERE, ratios, spread_of, timed, told

LRS = ",".join(f"{1e-4 * 1.4**power:.3g}" for power in range(16))
MLP = ("model=mlp", "model.hidden=[64]", "optim.lr=0.0003,0.001,0.003,0.01", "seed=0,1,2,3")
SMALL_CNN = ("model=cnn", "model.channels=[8,16]", "model.dense=32", "epochs=1")
SEQUENTIAL, TEXTBOOK = ("sweep.fused=false",), "textbook"


class Sweep(NamedTuple):
    """One row: what is trained and how, and beside what."""

    name: str
    words: tuple[str, ...]
    ours: tuple[str, ...]
    theirs: tuple[str, ...] | str
    num_jobs: int = 16


SWEEPS = (
    Sweep(
        "linear, 16 lr, 5 epochs: stacked beside one after the other",
        ("model=linear", f"optim.lr={LRS}", "epochs=5"), ("sweep.fused=true",), SEQUENTIAL,
    ),
    Sweep(
        "mlp 64, 4 lr x 4 seeds, 2 epochs: stacked beside one after the other",
        (*MLP, "epochs=2"), ("sweep.fused=true",), SEQUENTIAL,
    ),
    Sweep(
        "mlp 64, 4 lr x 4 seeds, 1 epoch, all to train: stacked beside the textbook",
        (*MLP, "epochs=1", "dataset.val_fraction=0"), ("sweep.fused=true",), TEXTBOOK,
    ),
    Sweep(
        "a small cnn, 24 seeds, 1 epoch: sweep.jobs=2 beside 1",
        (*SMALL_CNN, "seed=range(0,24)"), ("sweep.jobs=2",), ("sweep.jobs=1",), 24,
    ),
)  # fmt: skip
DIGITS = ("model=linear", "dataset=digits", "epochs=1", "sweep.fused=false")


def rows(pairs: int, only: str, data: str, unpacked: Path) -> Iterator[dict[str, Any]]:
    """The rows whose names hold `only`."""
    for sweep in SWEEPS:
        if only in sweep.name:
            yield _row(sweep, pairs, data, unpacked)
    if only in "a job of a sweep beyond its training":
        yield _overhead(pairs)


def _row(sweep: Sweep, pairs: int, data: str, unpacked: Path) -> dict[str, Any]:
    ours, theirs = [], []
    for number in range(pairs):
        ours.append(_train(sweep, sweep.ours, data))
        if isinstance(sweep.theirs, str):
            one_s, two_s = (_textbook(unpacked, jobs) for jobs in (1, 2))
            theirs.append((one_s + (sweep.num_jobs - 1) * (two_s - one_s), None))
        else:
            theirs.append(_train(sweep, sweep.theirs, data))
        told(f"{sweep.name}: pair {number + 1}/{pairs}")
    loop = None
    if sweep.theirs == SEQUENTIAL:
        loop = ratios([train_s for _, train_s in ours], [train_s or 0 for _, train_s in theirs])
    whole = ratios([whole_s for whole_s, _ in ours], [whole_s for whole_s, _ in theirs])
    return {"name": sweep.name, "wall": whole, "loop": loop}


def _train(sweep: Sweep, words: tuple[str, ...], data: str) -> tuple[float, float]:
    """(seconds of the whole process, seconds in the loops)."""
    with tempfile.TemporaryDirectory() as folder:
        done = timed([
            sys.executable, "-m", "mnist_cli", "train", "-m", *sweep.words, *words,
            f"dataset.root={data}", f"out={folder}", "report=false", "--quiet",
        ])  # fmt: skip
        results = [json.loads(path.read_text()) for path in Path(folder).glob("*/result.json")]
    assert len(results) == sweep.num_jobs
    return done.wall_s, sum(result["time"]["train_s"] for result in results)


def _textbook(unpacked: Path, num_jobs: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        seeds = ",".join(map(str, range(num_jobs)))
        return timed([
            sys.executable, str(HERE / "textbook_sweep.py"), "-m", f"seed={seeds}",
            f"data={unpacked}", f"hydra.sweep.dir={folder}",
        ]).wall_s  # fmt: skip


def _overhead(pairs: int) -> dict[str, Any]:
    """Seconds of a job beyond what it trains and evaluates: 42 short ones less 2, over 40."""
    seconds = []
    for _ in range(pairs):
        (few_s, few), (many_s, many) = (_short_jobs(number) for number in (2, 42))
        seconds.append((many_s - few_s - (many - few)) / 40)
    return {"name": "a job of a sweep beyond its training", "seconds": spread_of(seconds)}


def _short_jobs(number: int) -> tuple[float, float]:
    """(seconds of the whole process, seconds of training and evaluation)."""
    with tempfile.TemporaryDirectory() as folder:
        done = timed([
            sys.executable, "-m", "mnist_cli", "train", "-m", *DIGITS, f"seed=range(0,{number})",
            f"out={folder}", "report=false", "--quiet",
        ])  # fmt: skip
        times = [
            json.loads(path.read_text())["time"] for path in Path(folder).glob("*/result.json")
        ]
    assert len(times) == number
    return done.wall_s, sum(time["train_s"] + time["eval_s"] for time in times)
