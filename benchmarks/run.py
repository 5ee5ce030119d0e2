"""Measure mnist-cli beside what people write today: `make bench`.

Every pair runs in turn, A B A B ..., as whole processes on the same data, architecture, batch size,
optimizer, epochs and threads. Machines drift, so only ratios of neighbours are quoted: the median,
the least and the largest. `of the limit` is the time that the counted floating-point operations
would need at the rate of a large matrix product, measured before and after, over our own time in
the loop. A row whose accuracy is more than 0.1 points below the peer's is void.

    python benchmarks/run.py [--pairs 3] [--only mlp] [--data DIR]
"""

from __future__ import annotations

import argparse
import datetime
import gzip
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

HERE = Path(__file__).resolve().parent
FILES = ("train-images", "train-labels", "t10k-images", "t10k-labels")


class Work(NamedTuple):
    """One row: what is trained, and its cost in floating-point operations per image."""

    name: str
    model: str
    optim: str
    batch_size: int
    epochs: int
    flop_per_image: float | None


WORKS = (
    Work("linear, batch 128, 5 epochs", "linear", "adam", 128, 5, None),
    Work("mlp, Adam, batch 64", "mlp", "adam", 64, 2, 2.407e6),
    Work("mlp, Adam, batch 256", "mlp", "adam", 256, 2, 2.407e6),
    Work("cnn, Adam, batch 64", "cnn", "adam", 64, 1, 24.995e6),
    Work("cnn_dropout, Adadelta, batch 64", "cnn_dropout", "adadelta", 64, 1, 71.565e6),
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--only", help="a part of the names of the rows to run")
    parser.add_argument("--data", default=os.environ.get("MNIST_CLI_DATA"))
    options = parser.parse_args()
    if not options.data:
        sys.exit("error: no data\nhint: set MNIST_CLI_DATA to a folder with MNIST's four files")
    with tempfile.TemporaryDirectory() as folder:
        unpack(Path(options.data), Path(folder))
        rows = [
            measure(work, peer, options.pairs, options.data, folder)
            for work in WORKS
            if options.only is None or options.only in work.name
            for peer in ("textbook", "strong")
        ]
    text = report(rows, options.pairs)
    print(text)
    if options.only is None:
        (HERE / "RESULTS.md").write_text(text)


def unpack(source: Path, target: Path) -> None:
    """MNIST as torchvision lays it out, for the peers."""
    raw = target / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in FILES:
        path = source / f"{name}-idx{3 if 'images' in name else 1}-ubyte.gz"
        (raw / path.stem).write_bytes(gzip.decompress(path.read_bytes()))


def measure(work: Work, peer: str, pairs: int, data: str, unpacked: str) -> dict[str, Any]:
    """Run our program and a peer in turn, `pairs` times each."""
    ours, theirs, rates = [], [], [matrix_rate()]
    for seed in range(pairs):
        ours.append(run_ours(work, seed, data))
        theirs.append(run_peer(work, peer, seed, unpacked))
        rates.append(matrix_rate())
        print(f"{work.name} against {peer}: pair {seed + 1}/{pairs}", file=sys.stderr, flush=True)
    loop = statistics.median(one["train_s"] for one in ours)
    floor = None
    if work.flop_per_image:
        floor = work.flop_per_image * 60_000 * work.epochs / statistics.median(rates)
    return {
        "work": work.name,
        "peer": peer,
        "wall": [b["wall_s"] / a["wall_s"] for a, b in zip(ours, theirs, strict=True)],
        "loop": [b["train_s"] / a["train_s"] for a, b in zip(ours, theirs, strict=True)],
        "accuracy": statistics.mean(one["accuracy"] for one in ours),
        "peer_accuracy": statistics.mean(one["accuracy"] for one in theirs),
        "of_limit": floor / loop if floor else None,
    }


def run_ours(work: Work, seed: int, data: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "mnist_cli", "train", f"model={work.model}",
            f"optim={work.optim}", f"batch_size={work.batch_size}", f"epochs={work.epochs}",
            f"seed={seed}", "dataset.val_fraction=0", f"dataset.root={data}",
            f"out={folder}/run", "--json", "--quiet",
        ]  # fmt: skip
        found, wall_s = timed(command)
    return {
        "accuracy": found["test"]["accuracy"],
        "train_s": found["time"]["train_s"],
        "wall_s": wall_s,
    }


def run_peer(work: Work, peer: str, seed: int, unpacked: str) -> dict[str, float]:
    command = [
        sys.executable, str(HERE / "peers.py"), peer, "--work", work.model, "--optim", work.optim,
        "--batch-size", str(work.batch_size), "--epochs", str(work.epochs), "--seed", str(seed),
        "--data", unpacked,
    ]  # fmt: skip
    found, wall_s = timed(command)
    return found | {"wall_s": wall_s}


def timed(command: list[str]) -> tuple[dict[str, Any], float]:
    started = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout), time.perf_counter() - started


def matrix_rate(size: int = 1024) -> float:
    """Floating-point operations per second of a large float32 matrix product, the best of ten."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    best = float("inf")
    for _ in range(10):
        started = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def report(rows: list[dict[str, Any]], pairs: int) -> str:
    """The table as Markdown."""
    lines = [
        "# Benchmark results",
        "",
        f"`make bench` on {datetime.date.today()}: Python {platform.python_version()},"
        f" torch {torch.__version__}, {torch.get_num_threads()} threads,"
        f" {torch.backends.cpu.get_cpu_capability()}; {pairs} interleaved pairs each.",
        "Ratios are peer over ours: median (least to largest).",
        "",
        "| work | peer | loop | whole process | accuracy ours / peer | of the limit |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        void = row["accuracy"] < row["peer_accuracy"] - 0.001
        limit = f"{row['of_limit']:.0%}" if row["of_limit"] else ""
        cells = [
            row["work"],
            row["peer"],
            "void" if void else spread(row["loop"]),
            "void" if void else spread(row["wall"]),
            f"{row['accuracy']:.2%} / {row['peer_accuracy']:.2%}",
            limit,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


if __name__ == "__main__":
    main()
