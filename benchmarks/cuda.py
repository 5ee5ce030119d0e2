"""On a GPU: our steps out of a CUDA graph, ours one by one, and the two loops of torch in turn.

`make bench` runs it where there is CUDA. `--device cpu` of run.py runs the same rows without it,
to see that they run.
"""

from __future__ import annotations

import csv
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from measure import HERE, Spread, ratios, spread_of, timed, told


class Work(NamedTuple):
    """What is trained by all of them."""

    name: str
    model: str
    optim: str
    batch_size: int
    epochs: int


WORKS = (
    Work("linear, Adam, batch 128", "linear", "adam", 128, 10),
    Work("mlp, Adam, batch 128", "mlp", "adam", 128, 10),
    Work("cnn, Adam, batch 64", "cnn", "adam", 64, 4),
    Work("cnn_dropout, Adadelta, batch 64", "cnn_dropout", "adadelta", 64, 4),
)
GRAPH, EAGER = ("cuda_graph=true",), ("cuda_graph=false",)
LRS = "0.0001,0.0003,0.001,0.003"
SWEEP = ("model=mlp", "model.hidden=[64]", f"optim.lr={LRS}", "seed=range(0,16)", "epochs=2")


def rows(
    device: str, pairs: int, only: str, source: str, unpacked: Path
) -> Iterator[dict[str, Any]]:
    """The rows whose names hold `only`, on the data at `source` and, for the peers, `unpacked`."""
    for work in WORKS:
        if only in f"cuda {work.name}":
            yield _training(work, device, pairs, source, unpacked)
    if only in "cuda mnist_fast":
        yield _fast(device, source)
    if only in "cuda sweep":
        yield _sweep(device, pairs, source)


def _training(work: Work, device: str, pairs: int, source: str, unpacked: Path) -> dict[str, Any]:
    words = (
        f"model={work.model}", f"optim={work.optim}", f"batch_size={work.batch_size}",
        f"epochs={work.epochs}", "dataset.val_fraction=0",
    )  # fmt: skip
    sides: dict[str, Callable[[int], dict[str, Any]]] = {
        "ours": lambda seed: _ours((*words, *GRAPH, f"seed={seed}"), device, source),
        "eager": lambda seed: _ours((*words, *EAGER, f"seed={seed}"), device, source),
        "textbook": lambda seed: _peer("textbook", work, device, unpacked, seed),
        "strong": lambda seed: _peer("strong", work, device, unpacked, seed),
    }
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for seed in range(pairs):
        for name, run in sides.items():
            found[name].append(run(seed))
        told(f"{work.name} on {device}: round {seed + 1}/{pairs}")
    spent = {name: [one["train_s"] for one in runs] for name, runs in found.items()}
    return {
        "name": work.name,
        "device": _name_of(device),
        "epoch_s": spread_of([one["epoch_s"] for one in found["ours"]]),
        "loops": {name: ratios(spent["ours"], spent[name]) for name in sides if name != "ours"},
        "accuracy": {
            name: statistics.mean(one["accuracy"] for one in runs) for name, runs in found.items()
        },
    }


def _ours(words: Sequence[str], device: str, source: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        done = timed([
            sys.executable, "-m", "mnist_cli", "train", *words, f"device={device}",
            f"dataset.root={source}", f"out={folder}/run", "report=false", "--json", "--quiet",
        ])  # fmt: skip
        with open(f"{folder}/run/metrics.csv") as lines:
            epochs_s = [float(row["seconds"]) for row in csv.DictReader(lines)]
    result = json.loads(done.said)
    return {
        "accuracy": result["test"]["accuracy"],
        "train_s": result["time"]["train_s"],
        "epoch_s": statistics.median(epochs_s),
    }


def _peer(name: str, work: Work, device: str, unpacked: Path, seed: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(timed([
        sys.executable, str(HERE / "peers.py"), name, "--work", work.model, "--optim", work.optim,
        "--batch-size", str(work.batch_size), "--epochs", str(work.epochs), "--device", device,
        "--seed", str(seed), "--data", str(unpacked),
    ]).said)  # fmt: skip
    return found


def _fast(device: str, source: str) -> dict[str, Any]:
    """The recipe for 99 %, over five seeds."""
    words = ("+experiment=mnist_fast", *GRAPH)
    runs = [_ours((*words, f"seed={seed}"), device, source) for seed in range(5)]
    told(f"mnist_fast on {device}")
    return {
        "name": "mnist_fast, the whole loop",
        "device": _name_of(device),
        "loop_s": spread_of([run["train_s"] for run in runs]),
        "accuracy": spread_of([run["accuracy"] for run in runs]),
    }


def _sweep(device: str, pairs: int, source: str) -> dict[str, Any]:
    """64 perceptrons as one stack, and one after the other, each out of a graph."""
    spent: dict[tuple[str, ...], list[float]] = {
        ("sweep.fused=true", *EAGER): [], ("sweep.fused=false", *GRAPH): [],
    }  # fmt: skip
    for number in range(pairs):
        for how, walls in spent.items():
            with tempfile.TemporaryDirectory() as folder:
                walls.append(timed([
                    sys.executable, "-m", "mnist_cli", "train", "-m", *SWEEP, *how,
                    f"device={device}", f"dataset.root={source}", f"out={folder}/sweep",
                    "report=false", "--quiet",
                ]).wall_s)  # fmt: skip
        told(f"64 mlp on {device}: pair {number + 1}/{pairs}")
    stacked, alone = spent.values()
    return {
        "name": "mlp 64, 4 lr x 16 seeds, 2 epochs: stacked beside one after the other",
        "device": _name_of(device),
        "wall": ratios(stacked, alone),
    }


def _name_of(device: str) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def report(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The rows as Markdown."""
    if not rows:
        return []
    devices = ", ".join(sorted({row["device"] for row in rows}))
    lines = ["", f"## On {devices}", "", "Ratios are of the loops, the other over our graph.", ""]
    lines += ["| work | our epoch, ms | our steps one by one | strong | textbook | accuracies |"]
    lines += ["|---|---|---|---|---|---|"]
    for row in (one for one in rows if "loops" in one):
        cells = [row["name"], _shown([1000 * value for value in row["epoch_s"]])]
        cells += [_shown(row["loops"][name]) for name in ("eager", "strong", "textbook")]
        cells += [" / ".join(f"{share:.2%}" for share in row["accuracy"].values())]
        lines.append(f"| {' | '.join(cells)} |")
    for row in rows:
        if "loop_s" in row:
            told_ = "{:.2%} ({:.2%} to {:.2%})".format(*row["accuracy"])
            lines += ["", f"{row['name']}: {_shown(row['loop_s'])} s, test accuracy {told_}."]
        if "wall" in row:
            lines += ["", f"{row['name']}, whole processes: {_shown(row['wall'])}."]
    return lines


def _shown(spread: Spread | Sequence[float]) -> str:
    return "{:.2f} ({:.2f} to {:.2f})".format(*spread)
