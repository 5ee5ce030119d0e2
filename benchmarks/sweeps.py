"""Measure sweeps of 16 jobs on MNIST, trained as one stack, one after the other, and by the
textbook loop under Hydra's basic launcher.

Both of a pair run in turn, as whole processes, sweep folder and leaderboard included. Ratios are
those of neighbours: the median, the least and the largest. `training` is the time in the loops
alone. The textbook loop is measured with one job and with two; 16 take T1 + 15 (T2 - T1).

    python benchmarks/sweeps.py [--pairs 3] [--only linear] [--data DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from run import HERE, spread, unpack

LRS = ",".join(f"{1e-4 * 1.4**power:.3g}" for power in range(16))
MLP = ("model=mlp", "model.hidden=[64]", "optim.lr=0.0003,0.001,0.003,0.01", "seed=0,1,2,3")


class Sweep(NamedTuple):
    """One row: what is trained, and beside what."""

    name: str
    words: tuple[str, ...]
    peer: str


SWEEPS = (
    Sweep("linear, 16 lr, 5 epochs", ("model=linear", f"optim.lr={LRS}", "epochs=5"), "sequential"),
    Sweep("mlp 64, 4 lr x 4 seeds, 2 epochs", (*MLP, "epochs=2"), "sequential"),
    Sweep(
        "mlp 64, 4 lr x 4 seeds, 1 epoch, all to train",
        (*MLP, "epochs=1", "dataset.val_fraction=0"),
        "textbook",
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--only", default="", help="a part of the names of the rows to run")
    parser.add_argument("--data", default=os.environ.get("MNIST_CLI_DATA"))
    options = parser.parse_args()
    if not options.data:
        sys.exit("error: no data\nhint: set MNIST_CLI_DATA to a folder with MNIST's four files")
    print("| sweep | peer | whole process | training |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        unpack(Path(options.data), Path(folder))
        for sweep in SWEEPS:
            if options.only in f"{sweep.name} {sweep.peer}":
                row = measure(sweep, options.pairs, options.data, folder)
                print(f"| {' | '.join(row)} |", flush=True)


def measure(sweep: Sweep, pairs: int, data: str, unpacked: str) -> list[str]:
    whole, training = [], []
    for number in range(pairs):
        ours_s, ours_train_s = run_ours(sweep, data, "true")
        if sweep.peer == "textbook":
            one_s, two_s = (run_textbook(unpacked, jobs) for jobs in (1, 2))
            theirs_s = one_s + 15 * (two_s - one_s)
        else:
            theirs_s, theirs_train_s = run_ours(sweep, data, "false")
            training.append(theirs_train_s / ours_train_s)
        whole.append(theirs_s / ours_s)
        print(
            f"{sweep.name}: pair {number + 1}/{pairs}, {ours_s:.1f} s and {theirs_s:.1f} s",
            file=sys.stderr,
        )
    return [sweep.name, sweep.peer, spread(whole), spread(training) if training else ""]


def run_ours(sweep: Sweep, data: str, fused: str) -> tuple[float, float]:
    """(seconds of the whole process, seconds in the loops)."""
    with tempfile.TemporaryDirectory() as folder:
        seconds = timed(
            "-m", "mnist_cli", "train", "-m", *sweep.words, f"sweep.fused={fused}",
            f"dataset.root={data}", f"out={folder}", "--quiet",
        )  # fmt: skip
        results = [json.loads(path.read_text()) for path in Path(folder).glob("*/result.json")]
    assert len(results) == 16
    return seconds, sum(result["time"]["train_s"] for result in results)


def run_textbook(data: str, num_jobs: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        seeds = ",".join(map(str, range(num_jobs)))
        return timed(
            str(HERE / "textbook_sweep.py"), "-m", f"seed={seeds}", f"data={data}",
            f"hydra.sweep.dir={folder}",
        )  # fmt: skip


def timed(*words: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, capture_output=True)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
