"""Measure mnist-cli beside what people write today: `make bench`.

Every pair runs in turn, A B A B ..., as whole processes on the same data, architecture, batch size,
optimizer, epochs and threads. Machines drift, so only ratios of neighbours are quoted: the median,
the least and the largest. `of the limit` is the time that the counted floating-point operations
would need at the rate of a large matrix product, measured before and after, over our own time in
the loop. A row whose accuracy is more than 0.1 points below the peer's is void.

    python benchmarks/run.py [--pairs 3] [--only mlp] [--data DIR] [--peers-python .venv-peers/...]
        [--examples DIR] [--template DIR] [--gpu cuda]

Rows are kept in outputs/bench/ as they come, so that a part can be measured again; RESULTS.md shows
the newest of each. Peers that aren't there are left out, as are rows in bfloat16 without AMX and
the part about a GPU without CUDA.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import platform
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cuda
import sweeps
import torch
from measure import HERE, Run, ratios, spread_of, timed, told, unpack

from mnist_cli import cpu

ROWS = HERE.parent / "outputs" / "bench"
INSTALLED = ("textbook", "strong", "scikit-learn")  # with .venv; the others have their own
PARTS = ("products", "optimizer", "activations", "batch", "dropout")  # of a step, see step.py
EXAMPLES, TEMPLATE = "pytorch/examples", "lightning-hydra-template"
BFLOAT16, FLOAT32 = ("precision=bfloat16",), "itself in float32"


class Work(NamedTuple):
    """What is trained, its cost in floating-point operations per image, and by whom else."""

    name: str
    model: str
    optim: str
    batch_size: int
    epochs: int
    flop_per_image: float | None
    peers: tuple[str, ...]
    ours: tuple[str, ...] = ()  # what else we are told, to do the same work


MLP, CNN, CNN_DROPOUT = 2.407e6, 24.995e6, 71.565e6
WORKS = (
    Work(
        "linear, batch 128", "linear", "adam", 128, 5, None,
        ("textbook", "strong", "scikit-learn", "jax"),
    ),
    Work("mlp, Adam, batch 64", "mlp", "adam", 64, 2, MLP, ("textbook", "strong", "keras", "jax")),
    Work("mlp, Adam, batch 256", "mlp", "adam", 256, 2, MLP, ("textbook", "strong")),
    Work(
        "mlp without dropout, Adam, batch 64", "mlp", "adam", 64, 2, MLP, ("scikit-learn",),
        ("model.dropout=0",),
    ),
    Work(
        "mlp 64-128-64, Adam, batch 128 (the template adds batch norms)", "mlp", "adam", 128, 2,
        None, (TEMPLATE,), ("model.hidden=[64,128,64]", "model.dropout=0"),
    ),
    Work("cnn, Adam, batch 64", "cnn", "adam", 64, 1, CNN, ("textbook", "strong", "keras")),
    Work(
        "cnn_dropout, Adadelta, batch 64", "cnn_dropout", "adadelta", 64, 3, CNN_DROPOUT,
        ("textbook", "strong", EXAMPLES),
    ),
    Work("cnn in bfloat16, Adam, batch 64", "cnn", "adam", 64, 1, None, (FLOAT32,), BFLOAT16),
    Work(
        "cnn_dropout in bfloat16, Adadelta, batch 64", "cnn_dropout", "adadelta", 64, 3, None,
        (FLOAT32,), BFLOAT16,
    ),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--only", default="", help="a part of the names of the rows to measure")
    parser.add_argument("--data", default=os.environ.get("MNIST_CLI_DATA"))
    parser.add_argument("--peers-python", help="a Python with benchmarks/requirements.txt")
    parser.add_argument("--examples", help="a checkout of pytorch/examples")
    parser.add_argument("--template", help="a checkout of ashleve/lightning-hydra-template")
    parser.add_argument(
        "--gpu",
        default="cuda" if torch.cuda.is_available() else None,
        help="the device for the part about a GPU; cpu to see that it runs",
    )
    options = parser.parse_args()
    if not options.data:
        sys.exit("error: no data\nhint: set MNIST_CLI_DATA to a folder with MNIST's four files")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    ROWS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder))
        for work in WORKS:
            for peer in work.peers:
                if options.only in f"{work.name}, {peer}" and bench.has(peer):
                    keep("training", f"{work.name}, {peer}", bench.training(work, peer))
        if options.only in "eval":
            keep("eval", "eval of 10,000 images by a cnn", bench.evaluation())
        if options.only in "start and memory":
            for name, row in bench.processes().items():
                keep("process", name, row)
        if options.only in "what a step is made of":
            for row in bench.steps():
                keep("step", row["work"], row)
        for row in sweeps.rows(options.pairs, options.only, options.data, bench.data):
            keep("sweep", row["name"], row)
        if options.gpu:
            given = (options.gpu, options.pairs, options.only, options.data, bench.data)
            for row in cuda.rows(*given):
                keep("cuda", row["name"], row)
    text = report()
    print(text)
    (HERE / "RESULTS.md").write_text(text)


class Bench:
    """The commands that are measured, on data that is unpacked once into `folder`."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.data = folder / "data"
        unpack(Path(options.data), self.data)
        (folder / "examples").mkdir()

    def has(self, peer: str) -> bool:
        if peer == EXAMPLES:
            return bool(self.options.examples)
        if peer == TEMPLATE:
            return bool(self.options.template and self.options.peers_python)
        if peer == FLOAT32:
            return cpu.has_amx()
        return peer in INSTALLED or bool(self.options.peers_python)

    def training(self, work: Work, peer: str) -> dict[str, Any]:
        """Run our program and a peer in turn."""
        ours, theirs, rates = [], [], [matrix_rate()]
        for seed in range(self.options.pairs):
            ours.append(self.train_ours(work, seed))
            theirs.append(self.train_peer(work, peer, seed))
            rates.append(matrix_rate())
            told(f"{work.name} against {peer}: pair {seed + 1}/{self.options.pairs}")
        loop = statistics.median(one["train_s"] for one in ours)
        floor = None
        if work.flop_per_image:
            floor = work.flop_per_image * 60_000 * work.epochs / statistics.median(rates)
        return {
            "work": work.name,
            "epochs": work.epochs,
            "peer": peer,
            "wall": ratios([one["wall_s"] for one in ours], [one["wall_s"] for one in theirs]),
            "loop": None
            if None in (one["train_s"] for one in theirs)
            else ratios([one["train_s"] for one in ours], [one["train_s"] for one in theirs]),
            "accuracy": statistics.mean(one["accuracy"] for one in ours),
            "peer_accuracy": statistics.mean(one["accuracy"] for one in theirs),
            "of_limit": floor / loop if floor else None,
        }

    def train_ours(self, work: Work, seed: int, out: Path | None = None) -> dict[str, Any]:
        out = out or self.folder / "ours"
        shutil.rmtree(out, ignore_errors=True)
        done = timed([
            sys.executable, "-m", "mnist_cli", "train", f"model={work.model}",
            f"optim={work.optim}", f"batch_size={work.batch_size}", f"epochs={work.epochs}",
            f"seed={seed}", "dataset.val_fraction=0", f"dataset.root={self.options.data}",
            *work.ours, f"out={out}", "report=false", "--json", "--quiet",
        ])  # fmt: skip
        result = json.loads(done.said)
        return {
            "accuracy": result["test"]["accuracy"],
            "train_s": result["time"]["train_s"],
            "wall_s": done.wall_s,
        }

    def train_peer(self, work: Work, peer: str, seed: int) -> dict[str, Any]:
        if peer == EXAMPLES:
            done = timed(
                [sys.executable, str(Path(self.options.examples).resolve() / "mnist" / "main.py"),
                 "--epochs", str(work.epochs), "--batch-size", str(work.batch_size),
                 "--seed", str(seed)],
                cwd=self.data.parent / "examples",  # it reads ../data
            )  # fmt: skip
            hits = re.findall(r"Accuracy: (\d+)/10000", done.said)[-1]
            return {"accuracy": int(hits) / 10_000, "train_s": None, "wall_s": done.wall_s}
        if peer == TEMPLATE:
            return self.train_template(work, seed)
        if peer == FLOAT32:
            return self.train_ours(work._replace(ours=()), seed)
        python = sys.executable if peer in INSTALLED else self.options.peers_python
        done = timed([python, *self.peer(peer, work), "--seed", str(seed)])
        return json.loads(done.said) | {"wall_s": done.wall_s}

    def train_template(self, work: Work, seed: int) -> dict[str, Any]:
        logs = self.folder / "template"
        shutil.rmtree(logs, ignore_errors=True)
        done = timed(
            [self.options.peers_python, "src/train.py", "trainer=cpu",
             f"trainer.max_epochs={work.epochs}", f"data.batch_size={work.batch_size}",
             f"paths.data_dir={self.data}/", f"paths.log_dir={logs}", f"seed={seed}",
             "callbacks.rich_progress_bar=null", "logger=csv"],
            cwd=Path(self.options.template),
            TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1",  # it was written for an older torch
        )  # fmt: skip
        (table,) = logs.rglob("metrics.csv")
        with table.open() as lines:
            accuracy = [row["test/acc"] for row in csv.DictReader(lines) if row["test/acc"]][-1]
        return {"accuracy": float(accuracy), "train_s": None, "wall_s": done.wall_s}

    def peer(self, peer: str, work: Work) -> list[str]:
        return [
            str(HERE / "peers.py"), peer, "--work", work.model, "--optim", work.optim,
            "--batch-size", str(work.batch_size), "--epochs", str(work.epochs),
            "--data", str(self.data),
        ]  # fmt: skip

    def evaluation(self) -> dict[str, Any]:
        """Weights of one epoch of each, evaluated as whole processes."""
        (work,) = (one for one in WORKS if one.name.startswith("cnn, "))
        run, weights = self.folder / "run", self.folder / "weights.pt"
        self.train_ours(work, 0, run)
        theirs = [sys.executable, *self.peer("textbook", work)]
        timed([*theirs, "--save", str(weights)])
        ours = [sys.executable, "-m", "mnist_cli", "eval", f"checkpoint={run}",
                f"dataset.root={self.options.data}", "--json", "--quiet"]  # fmt: skip
        pairs = [
            (timed(ours), timed([*theirs, "--weights", str(weights)]), timed(TORCH))
            for _ in range(5)
        ]
        return {
            "work": "eval of 10,000 images by a cnn",
            "wall": ratios([a.wall_s for a, _, _ in pairs], [b.wall_s for _, b, _ in pairs]),
            "over_import": ratios([c.wall_s for *_, c in pairs], [a.wall_s for a, *_ in pairs]),
            "peer_over_import": ratios(
                [c.wall_s for *_, c in pairs], [b.wall_s for _, b, _ in pairs]
            ),
        }

    def steps(self) -> Iterator[dict[str, Any]]:
        command = [sys.executable, str(HERE / "step.py")]
        done = timed(command, MNIST_CLI_DATA=str(self.options.data))
        yield from map(json.loads, done.said.splitlines())

    def processes(self) -> dict[str, dict[str, Any]]:
        """Start and memory, each beside what nothing can do without."""
        program = [sys.executable, "-m", "mnist_cli"]
        run = self.folder / "process"

        def fresh(*words: str) -> Callable[[], Run]:
            def measure() -> Run:
                shutil.rmtree(run, ignore_errors=True)
                return timed([*program, "train", *words, f"out={run}", "--quiet"])

            return measure

        digits = ("model=mlp", "dataset=digits", "epochs=1")
        mnist = ("model=mlp", f"dataset.root={self.options.data}", "epochs=1")
        bare = [sys.executable, "-c", "pass"]
        commands: dict[str, tuple[Sequence[str], Callable[[], Run]]] = {
            "`--help`": (bare, lambda: timed([*program, "--help"])),
            "`train --help`": (bare, lambda: timed([*program, "train", "--help"])),
            "`list`": (bare, lambda: timed([*program, "list"])),
            "a usage error (`model=cnnn`)": (
                bare,
                lambda: timed([*program, "train", "model=cnnn"], code=2),
            ),
            "1 epoch of `digits`": (TORCH, fresh(*digits, "report=false")),
            "the same with its report": (TORCH, fresh(*digits)),
            "1 epoch of MNIST, `mlp`": (TORCH, fresh(*mnist, "report=false")),
        }
        rows = {}
        for name, (base, command) in commands.items():
            command()  # fills the cache of decoded data and the disk cache
            pairs = [(timed(base), command()) for _ in range(7)]
            rows[name] = {
                "command": name,
                "beside": "`python -c pass`" if base == bare else "`import torch`",
                "wall": statistics.median(b.wall_s for _, b in pairs),
                "base": statistics.median(a.wall_s for a, _ in pairs),
                "more_s": spread_of([b.wall_s - a.wall_s for a, b in pairs]),
                "more_mb": spread_of([b.peak_mb - a.peak_mb for a, b in pairs]),
            }
            told(name)
        return rows


TORCH = [sys.executable, "-c", "import torch"]


def matrix_rate(size: int = 1024) -> float:
    """Floating-point operations per second of a large float32 matrix product, the best of ten."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    best = float("inf")
    for _ in range(10):
        started = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


# --- the report ----------------------------------------------------------------------------------


def keep(section: str, name: str, row: dict[str, Any]) -> None:
    row |= {
        "date": str(datetime.date.today()),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    (ROWS / f"{section}-{slug}.json").write_text(json.dumps(row))


def kept(section: str) -> list[dict[str, Any]]:
    found = sorted(ROWS.glob(f"{section}-*.json"), key=lambda path: path.stat().st_mtime)
    return [json.loads(path.read_text()) for path in found]


def report() -> str:
    """All rows as Markdown."""
    sections = ("training", "step", "eval", "process", "sweep", "cuda")
    training, steps, evaluation, processes, swept, on_gpu = (kept(name) for name in sections)
    order = [(work.name, peer) for work in WORKS for peer in work.peers]
    training.sort(key=lambda row: order.index((row["work"], row["peer"])))
    rows = [*training, *steps, *evaluation, *processes, *swept, *on_gpu]
    dates = sorted({row["date"] for row in rows})
    versions = "; ".join(sorted({row["versions"] for row in rows}))
    threads = "/".join(sorted({str(row["threads"]) for row in rows}))
    cpus = "/".join(sorted({row["cpu"] for row in rows}))
    lines = [
        "# Benchmark results",
        "",
        f"`make bench` of {' to '.join(dict.fromkeys((dates[0], dates[-1])))}: {versions},"
        f' {threads} threads, {cpus}; see the README\'s "Speed" for what is measured and how.',
        "",
        "## Training",
        "",
        "Ratios are peer over ours, so above 1 we are faster: median (least to largest) of"
        " interleaved pairs.",
        "",
        "| work | epochs | peer | loop | whole process | accuracy ours / peer | of the limit"
        " | CPU |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in training:
        void = row["accuracy"] < row["peer_accuracy"] - 0.001
        limit = f"{row['of_limit']:.0%}" if row["of_limit"] else ""
        loop = shown(row["loop"]) if row["loop"] else ""
        cells = [
            row["work"],
            str(row["epochs"]),
            row["peer"],
            "void" if void else loop,
            "void" if void else shown(row["wall"]),
            f"{row['accuracy']:.2%} / {row['peer_accuracy']:.2%}",
            limit,
            row["cpu"],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## What a step is made of", ""]
    lines += [
        "Each part alone, as a share of the step: what is left goes to torch's dispatcher, Python"
        " and, for the CNNs, autograd, and to what the parts lose beside each other.",
        "",
        "| work | a step | products, convolutions | optimizer | ReLU, pooling | gather, normalise"
        " | dropout | the rest |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in steps:
        shares = [row[name] / row["whole"] for name in PARTS]
        cells = [f"{share:.0%}" for share in (*shares, 1 - sum(shares))]
        lines.append(f"| {row['work']} | {row['whole']:,.0f} us | {' | '.join(cells)} |")
    lines += ["", "## Evaluation", ""]
    lines += ["| work | textbook over ours | ours over `import torch` | textbook over it |"]
    lines += ["|---|---|---|---|"]
    for row in evaluation:
        cells = [
            row["work"],
            *map(shown, (row["wall"], row["over_import"], row["peer_over_import"])),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## Start and memory", ""]
    lines += ["| command | seconds | beside | its seconds | more seconds | more MB at the peak |"]
    lines += ["|---|---|---|---|---|---|"]
    for row in processes:
        cells = [
            row["command"],
            f"{row['wall']:.3f}",
            row["beside"],
            f"{row['base']:.3f}",
            shown(row["more_s"]),
            "{:.0f} ({:.0f} to {:.0f})".format(*row["more_mb"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## Sweeps", "", "The second over the first, or seconds."]
    lines += ["", "| sweep | whole process | in the loops | CPU |", "|---|---|---|---|"]
    for row in swept:
        if "seconds" in row:
            cells = [row["name"], f"{shown(row['seconds'])} s", ""]
        else:
            cells = [row["name"], shown(row["wall"]), shown(row["loop"]) if row["loop"] else ""]
        lines.append(f"| {' | '.join([*cells, row['cpu']])} |")
    lines += cuda.report(on_gpu)
    return "\n".join(lines) + "\n"


def shown(spread: Sequence[float]) -> str:
    return "{:.2f} ({:.2f} to {:.2f})".format(*spread)


if __name__ == "__main__":
    main()
