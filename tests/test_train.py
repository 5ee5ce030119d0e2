"""Training: what a run leaves behind, and that every key does what it says."""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT, Program
from data_files import write_mnist_like
from faults import TORTURE
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mnist_cli import checkpoint, conf, dataset, loop, runtime, schedule, train, train_step
from mnist_cli import run as runs
from mnist_cli.checkpoint import Best, Progress
from mnist_cli.cli import main
from mnist_cli.config import TrainConfig, config_hash, to_plain, train_config
from mnist_cli.learner import Learner
from mnist_cli.model.dropout import Dropout

pytestmark = pytest.mark.usefixtures("empty_cwd")

DIGITS = ("dataset=digits", "model=linear", "epochs=1")
LINE = ("dataset=linear", "model=linear", "loss=mse", "optim=sgd", "epochs=1")
FILES = {"config.yaml", "overrides.txt", "metrics.csv", "result.json", "train.log"}
FILES |= {"best.safetensors", "last.safetensors"}

Trained = Callable[..., Path]


def result_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "result.json").read_text())
    return found


def rows_of(run: Path) -> list[dict[str, str]]:
    with open(run / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def config_of(run: Path) -> TrainConfig:
    return train_config(yaml.safe_load((run / "config.yaml").read_text()))


def weights(run: Path, name: str = "last") -> dict[str, Tensor]:
    return checkpoint.load(run / f"{name}.safetensors").model


def vector(run: Path) -> Tensor:
    """All weights at the end of a run, (P,) float64."""
    return torch.cat([tensor.flatten().double() for _, tensor in sorted(weights(run).items())])


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- the records of a run ------------------------------------------------------------------------

NUMBER, TEXT, COUNT = (int, float), (str,), (int,)
CLASSIFICATION = {
    "n": COUNT,
    **dict.fromkeys(("loss", "accuracy", "precision", "recall", "f1", "auc", "ece"), (float,)),
    **dict.fromkeys(("accuracy_ci95", "per_class", "confusion"), (list,)),
}
REGRESSION = {"n": COUNT, **dict.fromkeys(("loss", "mse", "mae", "r2"), (float,))}


def assert_types(found: dict[str, Any], expected: dict[str, Any], path: str = "") -> None:
    """The keys are exactly those of `expected`, the values of its types."""
    assert found.keys() == expected.keys(), path
    for key, kind in expected.items():
        if isinstance(kind, dict):
            assert_types(found[key], kind, f"{path}{key}.")
        else:
            assert type(found[key]) in kind, (f"{path}{key}", found[key])


def assert_is_complete_run(run: Path, *, has_val: bool = True, has_report: bool = False) -> None:
    """Everything that the contract says of a run folder."""
    config, result = config_of(run), result_of(run)
    is_regression = config.task == "regression"
    more = {"report.html": has_report, "errors.csv": not is_regression}
    files = FILES | {name for name, is_there in more.items() if is_there}
    assert {path.name for path in run.iterdir()} - {".lock"} == files
    block = REGRESSION if is_regression else CLASSIFICATION
    line = {"weight": (list,), "bias": (list,)}
    is_line = is_regression and config.model.name == "linear"
    assert_types(
        result,
        {
            "schema": COUNT,
            "command": TEXT,
            "status": TEXT,
            "error": (type(None),),
            "config_hash": TEXT,
            "seed": COUNT,
            "device": TEXT,
            "run_dir": TEXT,
            "versions": dict.fromkeys(("mnist_cli", "torch", "python"), TEXT),
            "dataset": {
                **dict.fromkeys(("name", "task", "digest"), TEXT),
                **dict.fromkeys(("n_train", "n_val", "n_test"), COUNT),
            },
            "model": {"name": TEXT, "num_params": COUNT, **(line if is_line else {})},
            "best": {
                "epoch": COUNT,
                "step": COUNT,
                "monitor": TEXT if has_val else (type(None),),
                "value": NUMBER if has_val else (type(None),),
            },
            "val": block if has_val else (type(None),),
            "test": block,
            "time": dict.fromkeys(("total_s", "startup_s", "data_s", "train_s", "eval_s"), NUMBER),
            "samples_per_s": NUMBER,
        },
    )
    assert (result["schema"], result["command"], result["status"]) == (1, "train", "completed")
    assert result["config_hash"] == config_hash(config)
    assert result["dataset"]["name"] == config.dataset.name
    assert result["model"]["name"] == config.model.name
    assert result["test"]["n"] == result["dataset"]["n_test"]
    times = result["time"]
    assert min(times.values()) >= 0
    assert times["total_s"] >= times["data_s"] + times["train_s"] + times["eval_s"]
    rows = rows_of(run)
    metric = "val_mse" if is_regression else "val_accuracy"
    columns = ["epoch", "step", "lr", "train_loss", "val_loss", metric, "seconds", "samples_per_s"]
    assert [list(row) for row in rows] == [columns] * len(rows)
    assert [int(row["epoch"]) for row in rows] == list(range(1, len(rows) + 1))
    steps = math.ceil(result["dataset"]["n_train"] / (config.batch_size * config.grad_accum))
    assert [int(row["step"]) for row in rows] == [steps * n for n in range(1, len(rows) + 1)]
    for row in rows:
        numbers = [float(value) for value in row.values() if value]
        assert all(map(math.isfinite, numbers)), row
        assert bool(row[metric]) == bool(row["val_loss"]) == has_val
    if has_val:
        chosen = rows[result["best"]["epoch"] - 1]
        assert float(chosen[result["best"]["monitor"]]) == result["best"]["value"]
        for name in ("loss", metric.removeprefix("val_")):
            assert result["val"][name] == float(chosen[f"val_{name}"])
    if not is_regression:
        for split in filter(None, (result["val"], result["test"])):
            low, high = split["accuracy_ci95"]
            assert 0 <= low <= split["accuracy"] <= high <= 1
            cells = split["confusion"]
            assert sum(map(sum, cells)) == split["n"]
            hits = sum(cells[i][i] for i in range(len(cells)))
            assert split["accuracy"] == hits / split["n"]
            assert [row["support"] for row in split["per_class"]] == [sum(row) for row in cells]
    assert "\x1b" not in (run / "train.log").read_text()
    best = checkpoint.load(run / "best.safetensors")
    assert dataclasses.asdict(best.progress.best or Best(1, 1, None, None)) == result["best"]
    assert checkpoint.load(run / "last.safetensors").progress.step == int(rows[-1]["step"])


OPTIONS = [
    f"{group}={name}"
    for group in ("model", "optim", "loss", "schedule")
    for name in conf.options(group)
]


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_trains_an_epoch(trained: Trained, option: str) -> None:
    model = () if option.startswith("model=") else ("model=mlp", "model.hidden=[16]")
    assert_is_complete_run(trained("dataset=digits", "epochs=1", *model, option))


@pytest.mark.parametrize("model", ["linear", "mlp"])
def test_every_model_of_numbers_trains_an_epoch(trained: Trained, model: str) -> None:
    run = trained(*LINE, f"model={model}", "dataset.num_samples=40", "dataset.val_fraction=0.25")
    assert_is_complete_run(run)


@pytest.mark.parametrize("recipe", conf.options("experiment"))
def test_every_recipe_trains_an_epoch(mnist_cli: Program, recipe: str) -> None:
    chosen = {key.path: key.value for key in conf.options("experiment")[recipe].keys}
    is_line = chosen.get("dataset") == "linear"
    data = () if is_line else ("dataset=digits",)
    outcome = mnist_cli("train", f"+experiment={recipe}", *data, "epochs=1", "out=run", "--quiet")
    assert outcome == (0, "", "")
    has_val = not is_line and chosen.get("dataset.val_fraction") != 0
    assert_is_complete_run(Path("run"), has_val=has_val, has_report=True)


@pytest.mark.parametrize("name", conf.options("dataset"))
def test_every_dataset_trains_an_epoch(
    mnist_cli: Program, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    words: list[str] = []
    if name not in ("digits", "linear"):
        file = "emnist-balanced" if name == "emnist" else name
        suffix = "" if name == "cifar10" else ".gz"
        source = write_mnist_like(Path("data"), file, 470, 94, suffix=suffix)
        monkeypatch.setattr(dataset, "source_of", lambda config: source)
        words = ["dataset.root=data", "model=cnn"]
    base = LINE if name == "linear" else DIGITS
    outcome = mnist_cli("train", *base, f"dataset={name}", *words, "out=run", "--quiet")
    assert outcome == (0, "", "")
    assert_is_complete_run(Path("run"), has_val=name != "linear", has_report=True)
    assert result_of(Path("run"))["dataset"]["name"] == name


ODD = (
    *("dataset=digits", "dataset.val_fraction=0.2", "epochs=2", "batch_size=100", "seed=17"),
    *("model=mlp", "model.hidden=[9,5]", "model.dropout=0.25", "grad_clip=1", "grad_accum=2"),
    *("optim=adamw", "optim.betas=[0.8,0.99]", "optim.eps=1e-07", "optim.weight_decay=0.3"),
    *("loss=bce", "loss.label_smoothing=0.05", "monitor=val_loss", "early_stop.patience=1"),
    *("schedule=onecycle", "schedule.warmup_epochs=0.5", "save_every=7"),
)


def test_the_command_in_the_folder_repeats_the_run(mnist_cli: Program, trained: Trained) -> None:
    run = trained(*ODD)
    words = shlex.split((run / "overrides.txt").read_text())
    assert words[:2] == ["mnist-cli", "train"]
    assert mnist_cli(*words[1:], "out=again", "--quiet").code == 0
    again = Path("again")
    for name in ("best", "last"):
        assert equal(weights(run, name), weights(again, name))
    assert config_of(again) == dataclasses.replace(config_of(run), out="again")
    for key in ("config_hash", "best", "val", "test"):
        assert result_of(run)[key] == result_of(again)[key]


def test_the_resolved_configuration_is_what_was_typed(trained: Trained) -> None:
    run = trained(*ODD)
    config = to_plain(config_of(run))
    assert checkpoint.load(run / "last.safetensors").config == config_of(run)
    for word in ODD:
        key, _, text = word.partition("=")
        found = functools.reduce(lambda tree, name: tree[name], key.split("."), config)
        expected = yaml.safe_load(text.replace("1e-07", "1.0e-07"))
        assert (found["name"] if key in conf.GROUPS else found) == expected


# --- randomness ----------------------------------------------------------------------------------


def test_the_seed_decides(mnist_cli: Program) -> None:
    words = ("dataset=digits", "epochs=2", "model=mlp", "model.hidden=[16]", "--quiet")
    for out, seed in (("a", 5), ("b", 5), ("c", 6)):
        torch.manual_seed(len(out))
        torch.rand(seed)  # what was drawn before doesn't matter
        assert mnist_cli("train", *words, f"seed={seed}", f"out={out}").code == 0
    assert equal(weights(Path("a")), weights(Path("b")))
    assert not equal(weights(Path("a")), weights(Path("c")))
    a, b, c = (result_of(Path(out)) for out in "abc")
    assert (a["val"], a["test"], a["config_hash"]) == (b["val"], b["test"], b["config_hash"])
    assert a["config_hash"] != c["config_hash"]


def test_every_epoch_sees_all_rows_in_an_order_of_its_own(
    mnist_cli: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    real = train_step.take_step

    def take_step(learner: Learner, indices: Tensor, step: int) -> float:
        seen.extend(indices.tolist())
        return real(learner, indices, step)

    monkeypatch.setattr(train_step, "take_step", take_step)
    assert mnist_cli("train", *DIGITS, "epochs=3", "report=false", "out=run").code == 0
    num_rows = result_of(Path("run"))["dataset"]["n_train"]
    orders = [tuple(seen[i : i + num_rows]) for i in range(0, len(seen), num_rows)]
    assert [sorted(order) for order in orders] == [list(range(num_rows))] * 3
    assert len(set(orders)) == 3


def test_every_step_drops_other_values(trained: Trained) -> None:
    """Of the same rows, at weights that don't move."""
    words = ("model=mlp", "model.hidden=[16]", "model.dropout=0.5", "optim.lr=1e-30")
    learner = train.prepare(config_of(trained(*DIGITS, *words)), None, time.monotonic())
    losses = [train_step.take_step(learner, torch.arange(64), step) for step in (0, 1, 0)]
    assert losses[0] == losses[2] != losses[1]


# --- what the keys do ----------------------------------------------------------------------------

FULL_BATCH = ("dataset=digits", "model=linear", "optim=sgd", "optim.lr=0.5", "batch_size=2000")


def initial(trained: Trained, *words: str) -> Tensor:
    """The weights before the first step: so small a step changes none."""
    return vector(trained(*words, "epochs=1", "optim.lr=1e-30"))


@pytest.mark.parametrize("num_samples", [128, 150], ids=["even", "ragged"])
@pytest.mark.parametrize("optim", ["sgd", "adam"])
def test_accumulated_gradients_are_those_of_the_large_batch(
    trained: Trained, num_samples: int, optim: str
) -> None:
    words = (*LINE, "model=mlp", "model.hidden=[8]", "model.dropout=0", f"optim={optim}")
    words += ("optim.lr=0.01", f"dataset.num_samples={num_samples}", "dataset.noise=0.3")
    large = trained(*words, "epochs=3", "batch_size=64")
    small = trained(*words, "epochs=3", "batch_size=16", "grad_accum=4")
    plain = trained(*words, "epochs=3", "batch_size=16")
    assert torch.allclose(vector(large), vector(small), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(vector(large), vector(plain), rtol=1e-2, atol=1e-3)
    assert [row["step"] for row in rows_of(large)] == [row["step"] for row in rows_of(small)]
    losses = [[float(row["train_loss"]) for row in rows_of(run)] for run in (large, small)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_without_validation_the_last_weights_are_the_result(trained: Trained) -> None:
    run = trained("dataset=digits", "model=linear", "epochs=2", "dataset.val_fraction=0")
    assert_is_complete_run(run, has_val=False)
    result = result_of(run)
    assert (result["dataset"]["n_train"], result["dataset"]["n_val"]) == (1438, 0)
    assert result["best"] == {"epoch": 2, "step": 46, "monitor": None, "value": None}
    assert equal(weights(run, "best"), weights(run, "last"))


@pytest.mark.parametrize("width", [80, 120])
def test_an_epoch_is_a_line_on_the_terminal_and_a_whole_one_in_the_log(
    monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    assert main(["train", *DIGITS, "out=run", "report=false"]) == 0
    log = Path("run/train.log").read_text()
    assert "\x1b" not in log and "accuracy" in log
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue()).replace("\r", "\n")
    (line,) = (line for line in shown.splitlines() if "train loss" in line)
    (logged,) = (line for line in log.splitlines() if "train loss" in line)
    parts = ("epoch 1/1  ", "  val loss ", "  val accuracy ", " s  ", "*")
    assert all(part in line for part in parts) and len(line) < width
    assert (line == logged) == (width == 120)
    assert re.search(r"  lr 1\.00e-03  .*,\d{3}/s  \*$", logged)


def test_early_stopping_stops_and_says_why(mnist_cli: Program) -> None:
    # Weights that don't move: the first epoch is the best, none that follows is better.
    words = ("dataset=digits", "model=linear", "optim=sgd", "optim.lr=1e-30", "epochs=9", "out=run")
    code, stdout, _ = mnist_cli("train", *words, "early_stop.patience=2")
    run = Path("run")
    assert code == 0
    assert [row["epoch"] for row in rows_of(run)] == ["1", "2", "3"]
    assert re.search(r"stopped .*val_accuracy.* 2 epochs", stdout)
    assert result_of(run)["status"] == "completed"
    assert result_of(run)["best"]["epoch"] == 3  # a tie goes to the later one


@given(
    values=st.lists(st.integers(0, 4), min_size=1, max_size=12),
    monitor=st.sampled_from(["val_accuracy", "val_loss", "val_mse"]),
    patience=st.integers(1, 4),
)
def test_selection_and_patience(values: list[int], monitor: str, patience: int) -> None:
    config = types.SimpleNamespace(
        monitored=monitor, early_stop=types.SimpleNamespace(patience=patience)
    )
    job: Any = types.SimpleNamespace(
        config=config, data=types.SimpleNamespace(val=[0]), progress=Progress()
    )
    seen: list[float] = []
    for epoch, value in enumerate(values, 1):
        job.progress = dataclasses.replace(job.progress, step=10 * epoch)
        seen.append(value if monitor == "val_accuracy" else -value)
        is_best = loop.select(job, epoch, {monitor: float(value)})
        best = max(range(epoch), key=lambda i: (seen[i], i))
        assert job.progress.best == Best(best + 1, 10 * (best + 1), monitor, float(values[best]))
        assert is_best == (best + 1 == epoch)
        first_of_best = seen.index(max(seen)) + 1
        assert loop.is_out_of_patience(job) == (epoch - first_of_best >= patience)


def test_the_gradient_is_clipped_by_its_norm(trained: Trained) -> None:
    before = initial(trained, *FULL_BATCH)
    free = vector(trained(*FULL_BATCH, "epochs=1")) - before
    clipped = vector(trained(*FULL_BATCH, "epochs=1", "grad_clip=0.001")) - before
    assert free.norm() > 0.01
    assert clipped.norm() == pytest.approx(0.5 * 0.001, rel=1e-3)
    assert torch.cosine_similarity(free, clipped, dim=0) > 1 - 1e-5
    loose = vector(trained(*FULL_BATCH, "epochs=1", "grad_clip=1e6")) - before
    assert torch.allclose(loose, free, rtol=1e-5, atol=1e-8)


def test_weight_decay_pulls_towards_zero(trained: Trained) -> None:
    before = initial(trained, *FULL_BATCH)
    plain = vector(trained(*FULL_BATCH, "epochs=1"))
    decayed = vector(trained(*FULL_BATCH, "epochs=1", "optim.weight_decay=0.1"))
    assert torch.allclose(decayed - plain, -0.5 * 0.1 * before, rtol=1e-3, atol=1e-7)


def test_momentum_keeps_a_share_of_the_last_step(trained: Trained) -> None:
    before = initial(trained, *FULL_BATCH)
    first = vector(trained(*FULL_BATCH, "epochs=1"))
    second = vector(trained(*FULL_BATCH, "epochs=2"))
    moved = vector(trained(*FULL_BATCH, "epochs=2", "optim.momentum=0.9"))
    assert torch.allclose(moved - second, 0.9 * (first - before), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", conf.options("schedule"))
@pytest.mark.parametrize("warmup", [0.0, 1.5])
def test_the_learning_rate_follows_the_schedule(trained: Trained, name: str, warmup: float) -> None:
    words = ("dataset=digits", "model=linear", "epochs=4", f"schedule={name}")
    run = trained(*words, f"schedule.warmup_epochs={warmup}", "optim.lr=0.02", "batch_size=200")
    config, rows = config_of(run), rows_of(run)
    per_epoch = int(rows[0]["step"])
    for row in rows:
        step = int(row["step"]) - 1
        factor = schedule.lr_factor(config.schedule, step, per_epoch, 4 * per_epoch)
        assert float(row["lr"]) == 0.02 * factor
    assert len({row["lr"] for row in rows}) > 1 or (name, warmup) == ("constant", 0.0)


def test_the_recipe_learns_the_line(mnist_cli: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # a thousand epochs of it
    assert mnist_cli("train", "+experiment=linear_regression", "out=run", "--quiet").code == 0
    result = result_of(Path("run"))
    assert result["model"]["weight"] == [[pytest.approx(2.0, abs=0.05)]]
    assert result["model"]["bias"] == [pytest.approx(0.0, abs=0.05)]
    assert (len(rows_of(Path("run"))), result["best"]["epoch"]) == (1000, 1000)


def test_digits_are_learned(mnist_cli: Program) -> None:
    scores = []
    for seed in range(3):
        words = ("+experiment=cnn_adam", "dataset=digits", f"seed={seed}", f"out={seed}")
        assert mnist_cli("train", *words, "--quiet").code == 0
        scores.append(result_of(Path(str(seed)))["test"]["accuracy"])
    assert sum(scores) / 3 >= 0.97


# --- when it goes wrong --------------------------------------------------------------------------

DIVERGING = ("dataset=digits", "model=mlp", "optim=sgd", "optim.lr=1e30", "epochs=2")


def test_a_run_that_diverges(mnist_cli: Program) -> None:
    outcome = mnist_cli("train", *DIVERGING, "out=run")
    assert outcome.code == 5
    assert len(outcome.stderr.splitlines()) == 2
    assert re.search(r"at step [1-9]\d*, with learning rate 1e\+30", outcome.error)
    assert "optim.lr=1e+29" in outcome.hint
    run = Path("run")
    result = result_of(run)
    assert (result["status"], result["error"]) == ("diverged", outcome.error)
    assert (result["val"], result["test"]) == (None, None)
    for path in run.glob("*.safetensors"):
        assert all(bool(t.isfinite().all()) for t in checkpoint.load(path).model.values())
    assert (run / "last.safetensors").exists()
    log = (run / "train.log").read_text()
    assert log.endswith(f"error: {outcome.error}\nhint: {outcome.hint}\n")


def test_a_run_whose_validation_loss_alone_is_not_finite_diverges(mnist_cli: Program) -> None:
    words = (*FULL_BATCH, "optim.lr=1e25", "loss=mse", "epochs=1", "out=run")
    outcome = mnist_cli("train", *words)
    assert outcome.code == 5
    assert "the validation loss is inf at step 1," in outcome.error
    assert result_of(Path("run"))["status"] == "diverged"
    assert not Path("run/metrics.csv").exists()


def test_a_run_imports_nothing_that_it_does_not_need(trained: Trained, tmp_path: Path) -> None:
    trained("dataset=digits", "model=mlp", "epochs=1")  # leaves the decoded digits in the cache
    heavy = {"torch._dynamo", "torchvision", "sklearn", "PIL", "onnx", "onnxruntime", "matplotlib"}
    heavy |= {"tensorboard", "mlflow", "wandb", "pandas", "sqlalchemy"}
    program = (
        "import sys; from mnist_cli.cli import main; code = main(sys.argv[1:]);"
        f"print(code, sorted({heavy} & set(sys.modules)))"
    )
    words = ["train", "dataset=digits", "model=mlp", "epochs=1", f"out={tmp_path / 'run'}"]
    command = [sys.executable, "-c", program, *words, "report=false", "--quiet"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "0 []\n"


def test_a_folder_with_a_run_is_left_alone(mnist_cli: Program, trained: Trained) -> None:
    shutil.copytree(trained(*DIGITS), "run")
    before = {path: path.read_bytes() for path in Path("run").iterdir()}
    outcome = mnist_cli("train", *DIGITS, "seed=1", "out=run")
    assert (outcome.code, outcome.stdout, len(outcome.stderr.splitlines())) == (2, "", 2)
    assert "out=run holds a run already" in outcome.error
    assert {path: path.read_bytes() for path in Path("run").iterdir()} == before


def test_two_starts_in_one_second(mnist_cli: Program) -> None:
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: runs.unique_folder(Path("many")), range(64)))
    assert len(set(folders)) == 64
    for _ in range(2):
        assert mnist_cli("train", *LINE, "--quiet").code == 0
    found = sorted(path.name for path in Path("outputs/train").iterdir())
    assert len(found) == 2
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_[0-9a-f]+", name) for name in found)


def test_a_name_that_is_taken_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = itertools.chain(["same"] * 3, itertools.count())
    monkeypatch.setattr(runs.secrets, "token_hex", lambda size: str(next(ids)))
    made = [runs.unique_folder(Path("few")) for _ in range(3)]
    assert len(set(made)) == 3 and all(folder.is_dir() for folder in made)


# --- the other ways to run -----------------------------------------------------------------------


def test_a_profile_of_the_shortest_run(mnist_cli: Program) -> None:
    assert mnist_cli("train", *LINE, "profile=true", "out=run", "--quiet").code == 0
    assert "traceEvents" in json.loads(Path("run/trace.json").read_text())


def test_a_profile_is_a_trace(mnist_cli: Program, capfd: pytest.CaptureFixture[str]) -> None:
    assert mnist_cli("train", *DIGITS, "profile=true", "out=run", "--quiet").code == 0
    assert capfd.readouterr() == ("", "")
    assert json.loads(Path("run/trace.json").read_text())["traceEvents"]
    plain = mnist_cli("train", *DIGITS, "out=plain", "--quiet")
    assert plain.code == 0
    assert equal(weights(Path("run")), weights(Path("plain")))


def test_a_profile_that_can_not_be_written_is_said_so(mnist_cli: Program) -> None:
    Path("run/trace.json").mkdir(parents=True)
    outcome = mnist_cli("train", *LINE, "profile=true", "out=run")
    assert outcome.code == 0
    assert outcome.stderr.startswith("warning: no trace was written: can't write run/trace.json")


compiles = pytest.mark.skipif(
    not (shutil.which("c++") or shutil.which("g++")), reason="no C++ compiler"
)


@compiles
def test_a_compiled_dropout_draws_at_each_step_and_repeats() -> None:
    layer: Callable[[Tensor], Tensor] = torch.compile(Dropout(0.25))

    def drawn(step: int) -> Tensor:
        runtime.reseed(torch.device("cpu"), runtime.counted_seed(0, "step", step))
        return layer(torch.ones(90, 301))

    masks = [drawn(step) for step in (1, 2, 1)]
    assert torch.equal(masks[0], masks[2]) and not torch.equal(masks[0], masks[1])
    for mask in masks:
        assert torch.equal(mask.unique(), torch.tensor([0, 1 / 0.75]))
        assert mask.mean().item() == pytest.approx(1, abs=0.02)


@pytest.mark.torture
@pytest.mark.skipif(not TORTURE, reason="takes a minute: set MNIST_CLI_TORTURE=1")
@compiles
def test_a_compiled_model_with_dropout_learns(mnist_cli: Program) -> None:
    words = ("model=mlp", "model.dropout=0.2", "dataset=digits", "epochs=3", "--quiet")
    assert mnist_cli("train", *words, "compile=true", "out=run").code == 0
    assert result_of(Path("run"))["test"]["accuracy"] > 0.85


@pytest.mark.torture
@pytest.mark.skipif(not TORTURE, reason="takes 15 s: set MNIST_CLI_TORTURE=1")
@compiles
def test_a_compiled_model_learns_the_same(mnist_cli: Program) -> None:
    words = (*LINE, "model=mlp", "model.dropout=0", "dataset.num_samples=80", "epochs=2", "--quiet")
    for out, compiled in (("a", "false"), ("b", "true")):
        assert mnist_cli("train", *words, f"compile={compiled}", f"out={out}").code == 0
    assert torch.allclose(vector(Path("a")), vector(Path("b")), rtol=1e-4, atol=1e-6)


# --- sweeps --------------------------------------------------------------------------------------


def test_a_job_of_a_sweep_is_the_run_alone(mnist_cli: Program, trained: Trained) -> None:
    words = ("dataset=digits", "epochs=1", "model=mlp", "model.hidden=[16]")
    swept = ("optim=adam,sgd", "seed=0,1", "sweep.fused=false")
    assert mnist_cli("train", "-m", *words, *swept, "--quiet").code == 0
    (sweep,) = Path("outputs/sweep").iterdir()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_[0-9a-f]+", sweep.name)
    jobs = {path.name: path for path in sweep.iterdir() if path.is_dir()}
    assert len(jobs) == 4
    for optim, seed in itertools.product(("adam", "sgd"), (0, 1)):
        alone = trained(*words, f"optim={optim}", f"seed={seed}")
        name = f"optim={optim}_seed={seed}-{config_hash(config_of(alone))[:8]}"
        assert_is_complete_run(jobs[name])
        assert equal(weights(alone), weights(jobs[name]))
        for key in ("config_hash", "best", "val", "test"):
            assert result_of(alone)[key] == result_of(jobs[name])[key]


@pytest.mark.parametrize("launcher", [(), ("hydra/launcher=basic",)], ids=["own", "launcher"])
def test_a_failing_job_stops_no_other(mnist_cli: Program, launcher: tuple[str, ...]) -> None:
    words = ("dataset=digits", "model=mlp", "epochs=1", "optim=sgd", "-m", "optim.lr=1e30,0.1")
    outcome = mnist_cli("train", *words, "out=sweep", "--json", *launcher)
    assert outcome.code == 1
    document = json.loads(outcome.stdout)
    assert document["exit_code"] == 1
    status = {result_of(path)["status"]: path for path in Path("sweep").iterdir() if path.is_dir()}
    assert set(status) == {"diverged", "completed"}
    assert "optim.lr=0.1" in status["completed"].name
    assert "1 of 2 jobs failed" in document["error"]
    assert "training diverged" in outcome.stderr
    assert "Error executing job" not in outcome.stderr


def test_a_quiet_sweep_says_what_failed(mnist_cli: Program) -> None:
    words = ("dataset=digits", "model=mlp", "epochs=1", "optim=sgd", "-m", "optim.lr=1e30,0.1")
    outcome = mnist_cli("train", *words, "out=sweep", "--quiet")
    assert (outcome.code, outcome.stdout) == (1, "")
    assert outcome.error == "1 of 2 jobs failed in sweep"
    logs = "".join(path.read_text() for path in Path("sweep").glob("*/train.log"))
    assert "training diverged" in logs


def test_a_sweep_is_checked_before_its_first_job(mnist_cli: Program) -> None:
    outcome = mnist_cli("train", *DIGITS, "-m", "optim.lr=0.1,-1")
    assert (outcome.code, outcome.stdout) == (2, "")
    assert os.listdir() == []


def test_a_sweep_through_a_launcher_of_hydra(mnist_cli: Program, trained: Trained) -> None:
    for _ in range(2):  # a second sweep has a folder of its own
        words = ("-m", *DIGITS, "hydra/launcher=basic", "seed=0,1")
        assert mnist_cli("train", *words, "--quiet") == (0, "", "")
    sweeps = [path for path in Path("outputs/sweep").iterdir() if path.is_dir()]
    assert len(sweeps) == 2
    for sweep in sweeps:
        jobs = sorted(path for path in sweep.iterdir() if path.is_dir())
        assert [path.name.rpartition("-")[0][-6:] for path in jobs] == ["seed=0", "seed=1"]
        for seed, job in enumerate(jobs):
            assert_is_complete_run(job)
            assert equal(weights(job), weights(trained(*DIGITS, f"seed={seed}")))


# --- real data -----------------------------------------------------------------------------------


def test_real_mnist(mnist_cli: Program, real_mnist: Path) -> None:
    words = ("+experiment=mlp_adam", "epochs=1", f"dataset.root={real_mnist}", "out=run", "--quiet")
    assert mnist_cli("train", *words).code == 0
    result = result_of(Path("run"))
    assert result["dataset"] | {"digest": ""} == {
        "name": "mnist", "task": "classification", "digest": "",
        "n_train": 54_000, "n_val": 6_000, "n_test": 10_000,
    }  # fmt: skip
    assert result["test"]["accuracy"] >= 0.94
    outcome = mnist_cli("eval", "checkpoint=run", "--json")
    assert json.loads(outcome.stdout)["metrics"] == result["test"]
