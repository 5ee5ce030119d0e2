"""Sweeps: the same bits as alone, nothing lost, a leaderboard of what lies in the folder."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import faults
import hydra
import pytest
from faults import Child, Server, figure, many, outcome_of, temporaries, two_lines
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console as RichConsole

from mnist_cli import compose, conf, durable, multirun
from mnist_cli.compose import PARSERS
from mnist_cli.console import Console
from mnist_cli.line import parse_line
from mnist_cli.run import RunFolder
from mnist_cli.sweep import display, leaderboard, pool
from mnist_cli.sweep.job import record

if TYPE_CHECKING:
    from conftest import Program

pytestmark = pytest.mark.usefixtures("empty_cwd")

# 22 steps an epoch; a job takes a tenth of a second.
TINY = (
    "dataset=digits", "model=mlp", "model.hidden=[16]", "batch_size=64", "epochs=2", "report=false",
)  # fmt: skip
ALONE = "sweep.fused=false"  # to the last bit, and one after the other
TWELVE = (
    "train", "-m", *TINY, "optim=adam,sgd", "optim.lr=0.1,0.01", "seed=0,1,2", ALONE, "--quiet",
)  # fmt: skip


SWEPT = {  # of one key: values of several types, a group, one that takes others along
    "optim.lr": ("0.1", "0.5", "1e-3"),
    "optim": ("adam", "sgd", "momentum"),
    "model": ("linear", "mlp"),
    "+experiment": ("mlp_adam", "cnn_adam"),
    "seed": ("0", "7", "${epochs}"),
    "epochs": ("5", "6"),
    "grad_clip": ("null", "1.5"),
    "resume_allow": ("[]", "[epochs]", "[seed,epochs]"),
    "predictions": ("true", "false"),
    "early_stop": ("{patience:2}", "{}"),
    "out": ("null", "'a b/c=d'"),
}  # fmt: skip


@given(
    st.lists(st.sampled_from(sorted(SWEPT)), min_size=1, max_size=4, unique=True).flatmap(
        lambda keys: st.fixed_dictionaries(
            {key: st.lists(st.sampled_from(SWEPT[key]), min_size=1, unique=True) for key in keys}
        )
    ),
    st.sampled_from([[], ["sweep.jobs=2"], ["sweep.jobs=2", "optim.lr=0.3"]]),
)
@settings(max_examples=12, deadline=None)
def test_law_every_job_is_composed_as_it_is_alone(
    chosen: dict[str, list[str]], before: list[str]
) -> None:
    words = [*before, *(f"{key}={','.join(values)}" for key, values in chosen.items())]
    line = parse_line(["train", "-m", *words])
    with compose.initialized(line):
        parsed = OverridesParser.create().parse_overrides(words)
        composer = multirun.Composer(line, parsed)
        found = multirun.sweep_settings(composer, parsed)
        assert found is not None and found.jobs == (2 if before else 1)
        for job in multirun.sweep_jobs(composer, parsed):
            assert not any(word.startswith("sweep.") for word in job.words)
            alone = hydra.compose("train", list(job.words))
            assert job.config == compose.checked(line, alone)


def folders(sweep: Path) -> dict[str, Path]:
    return {path.name: path for path in sorted(sweep.iterdir()) if path.is_dir()}


def board_of(sweep: Path) -> dict[str, Any]:
    board: dict[str, Any] = json.loads((sweep / "leaderboard.json").read_text())
    return board


def states(sweep: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every result.json that says that its run is done."""
    return {
        str(path): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in sweep.glob("*/result.json")
        if json.loads(path.read_text())["status"] == "completed"
    }


@pytest.fixture(scope="module")
def twelve(server: Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """`TWELVE`, never interrupted, and the seconds that it took."""
    folder = tmp_path_factory.mktemp("twelve") / "sweep"
    ended = server.run(faults.program, [*TWELVE, f"out={folder}"])
    assert ended.code == 0
    return folder, ended.seconds


# --- the leaderboard -----------------------------------------------------------------------------


def leave(
    sweep: Path,
    name: str,
    words: str,
    value: float | None,
    test: float = 0.5,
    monitor: str | None = "val_accuracy",
    status: str = "completed",
    error: str | None = None,
) -> None:
    """A run folder as some launcher may have left it."""
    folder = sweep / name
    folder.mkdir(parents=True)
    (folder / "overrides.txt").write_text(f"mnist-cli train {words}\n")
    seed = dict(word.partition("=")[::2] for word in shlex.split(words)).get("seed", "0")
    result = {
        "status": status, "error": error, "config_hash": name, "seed": int(seed),
        "best": {"epoch": 1, "step": 1, "monitor": monitor, "value": value},
        "test": {"accuracy": test} if status == "completed" else None, "time": {"train_s": 1.0},
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result))


def test_rows_are_ranked_by_validation_and_never_by_test(tmp_path: Path) -> None:
    for position, value in enumerate((0.5, 0.9, 0.7)):
        leave(tmp_path, f"a{position}", f"optim.lr=0.{position + 1} seed=0", value, 1 - value)
    board = leaderboard.build(tmp_path)
    assert [row["config"]["optim.lr"] for row in board["rows"]] == [0.2, 0.3, 0.1]
    assert [row["rank"] for row in board["rows"]] == [1, 2, 3]
    assert board["winner"] == board["rows"][0]
    assert board["ranked_by"] == "by mean val_accuracy, highest first"


def test_the_lowest_loss_wins(tmp_path: Path) -> None:
    for position, value in enumerate((0.5, 0.1, 0.3)):
        leave(tmp_path, f"a{position}", f"epochs={position} seed=0", value, monitor="val_mse")
    assert [row["mean"] for row in leaderboard.build(tmp_path)["rows"]] == [0.1, 0.3, 0.5]


def test_seeds_are_folded_into_mean_deviation_and_number(tmp_path: Path) -> None:
    for seed, value in enumerate((0.7, 0.8, 0.9)):
        leave(tmp_path, f"a{seed}", f"model=mlp optim.lr=0.1 seed={seed} save_every={seed}", value)
    leave(tmp_path, "again", "model=mlp optim.lr=0.1 seed=2 profile=true", 0.9)
    (row,) = leaderboard.build(tmp_path)["rows"]
    assert (row["n"], row["seeds"], row["config"]) == (3, [0, 1, 2], {})
    assert row["mean"] == pytest.approx(0.8) and row["std"] == pytest.approx(0.1)
    assert row["command"] == "mnist-cli train -m model=mlp optim.lr=0.1 seed=0,1,2"


def test_only_what_differs_is_a_column(tmp_path: Path) -> None:
    leave(tmp_path, "a", "model=mlp model.hidden=[8] optim=adam optim.lr=0.1 epochs=2", 0.1)
    leave(tmp_path, "b", "model=mlp model.hidden=[8] optim=sgd optim.lr=0.2 epochs=2", 0.2)
    leave(tmp_path, "c", "model=cnn optim=sgd optim.lr=0.2 epochs=2", 0.3)
    assert leaderboard.build(tmp_path)["columns"] == ["model", "optim"]
    leave(tmp_path, "d", "model=cnn optim=sgd optim.lr=0.3 epochs=2", 0.4)
    assert leaderboard.build(tmp_path)["columns"] == ["model", "optim", "optim.lr"]


def test_what_is_not_completed_has_no_rank_but_its_error(tmp_path: Path) -> None:
    leave(tmp_path, "a", "epochs=1 seed=0", 0.5)
    leave(tmp_path, "b", "epochs=1 seed=1", 0.9, status="diverged", error="training diverged")
    leave(tmp_path, "c", "epochs=2 seed=0", 0.9, status="failed", error="a | b\nc")
    leave(tmp_path, "d", "epochs=3", 0.9, status="interrupted", error="pruned at epoch 3")
    leave(tmp_path, "e", "epochs=4", None, status="interrupted")
    board = leaderboard.build(tmp_path)
    assert [(row["rank"], row["state"], row["n"]) for row in board["rows"]] == [
        (1, "completed", 1), (None, "failed", 0), (None, "pruned", 0), (None, "interrupted", 0),
    ]  # fmt: skip
    failed = [job for row in board["rows"] for job in row["failed"]]
    assert [job["job"] for job in failed] == ["b", "c", "e"]
    assert failed[1]["error"] == "a | b\\nc"
    leaderboard.write(tmp_path, board)
    assert "| c | failed | a \\| b\\nc |" in (tmp_path / "leaderboard.md").read_text()
    with open(tmp_path / "leaderboard.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["failed"] for row in rows] == ["1", "1", "0", "1"]
    assert rows[0]["mean"] == "0.5" and rows[1]["mean"] == ""


def test_a_loss_is_not_ranked_beside_another_loss(tmp_path: Path) -> None:
    for number, loss in enumerate(("mse", "bce loss.label_smoothing=0.1", "bce")):
        words = f"loss={loss} monitor=val_loss"
        leave(tmp_path / "a", str(number), words, 0.1 * number, monitor="val_loss")
        leave(tmp_path / "b", str(number), f"loss={loss}", 0.1 * number)
    board = leaderboard.build(tmp_path / "a")
    assert board["winner"] is None
    assert board["ranked_by"] == "by nothing: the val_loss of different losses don't compare"
    assert leaderboard.build(tmp_path / "b")["winner"]["config"]["loss"] == "bce"
    leave(tmp_path / "c", "0", "loss=mse monitor=val_loss", 0.4, monitor="val_loss")
    leave(tmp_path / "c", "1", "loss=bce monitor=val_loss", None, status="failed", error="none")
    assert leaderboard.build(tmp_path / "c")["winner"]["jobs"] == ["0"]  # the other has no score


def test_a_setting_of_null_is_told(tmp_path: Path) -> None:
    """And the key of an option that a row hasn't chosen is not."""
    leave(tmp_path, "0", "model=cnn early_stop.patience=null", 0.9)
    leave(tmp_path, "1", "model=mlp model.hidden=[8] early_stop.patience=3", 0.8)
    leave(tmp_path, "2", "model=mlp model.hidden=[9] early_stop.patience=3", 0.7)
    winner = leaderboard.build(tmp_path)["winner"]
    assert display._what(winner, display.cell) == "model=cnn early_stop.patience=-"


def test_scores_of_different_metrics_say_which_they_are(mnist_cli: Program) -> None:
    words = (
        "dataset=digits,linear",
        "model=mlp",
        "loss=mse",
        "dataset.val_fraction=0.2",
        "epochs=1",
    )
    assert mnist_cli("train", "-m", *words, "epochs=1", "out=sweep", "--quiet").code == 0
    table = Path("sweep/leaderboard.md").read_text()
    page = " ".join(re.sub("<[^>]*>", " ", Path("sweep/report.html").read_text()).split())
    for run in Path("sweep").glob("*/result.json"):
        result = json.loads(run.read_text())
        name = "mse" if result["dataset"]["name"] == "linear" else "accuracy"
        told = f"{result['test'][name]:.4f}" if name == "mse" else f"{result['test'][name]:.2%}"
        for text in (table, page):
            assert f"{name} {told}" in text
            assert f"val_{name} " in text and "test accuracy" not in text


@pytest.mark.parametrize("width", [70, 200])
def test_a_leaderboard_breaks_no_setting(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, width: int
) -> None:
    """Where its columns don't fit the terminal, lines end between settings."""
    for lr in ("0.01", "0.001"):
        for size in ("128", "256"):
            words = f"optim.lr={lr} batch_size={size} loss=cross_entropy dataset.val_fraction={lr}"
            leave(tmp_path, f"{lr}-{size}", f"{words} optim.weight_decay={lr} epochs={size}", 0.5)

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream in (terminal := Terminal(), pipe := io.StringIO()):
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setattr(sys, "stdout", stream)
        display.show(leaderboard.build(tmp_path), Console())
    in_one = "optim.lr  batch_size  dataset.val_fraction  optim.weight_decay  epochs"
    shown = re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue())
    assert in_one in pipe.getvalue()
    assert (in_one in shown) == (width == 200)
    if width == 70:
        for setting in ("optim.lr=0.001", "dataset.val_fraction=0.001", "batch_size=256"):
            assert shown.count(f"{setting} ") >= 2


def test_a_glob_finds_the_options_of_ones_own(mnist_cli: Program) -> None:
    text = (conf.conf_dir() / "optim/adam.yaml").read_text()
    for rate in ("0.0001", "0.0002"):
        path = Path(f"mine/optim/slow{rate[-1]}.yaml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("lr: 0.001", f"lr: {rate}"))
    words = ("--config-dir", "mine", "optim=glob(slow*)", *TINY, "epochs=1")
    assert mnist_cli("train", "-m", *words, "out=sweep", "--quiet").code == 0
    commands = [leaderboard.command_in(run) for run in Path("sweep").iterdir() if run.is_dir()]
    assert {command["optim.lr"] for command in commands} == {"0.0001", "0.0002"}


def test_without_a_validation_split_nothing_ranks(tmp_path: Path) -> None:
    leave(tmp_path, "a", "epochs=1", None, monitor=None)
    leave(tmp_path, "b", "epochs=2", None, test=0.99, monitor=None)
    board = leaderboard.build(tmp_path)
    assert board["winner"] is None and "without a validation split" in board["ranked_by"]
    assert [row["rank"] for row in board["rows"]] == [None, None]


def test_different_metrics_do_not_compare(tmp_path: Path) -> None:
    leave(tmp_path, "a", "monitor=val_loss", 0.4, monitor="val_loss")
    leave(tmp_path, "b", "monitor=val_accuracy", 0.5)
    board = leaderboard.build(tmp_path)
    assert board["winner"] is None
    assert board["ranked_by"] == "by nothing: val_accuracy, val_loss don't compare"


def test_seeds_that_are_left_do_not_win(tmp_path: Path) -> None:
    for seed, value in enumerate((0.99, None, None)):
        status = "diverged" if value is None else "completed"
        leave(tmp_path, f"a{seed}", f"optim.lr=0.1 seed={seed}", value, status=status)
        leave(tmp_path, f"b{seed}", f"optim.lr=0.2 seed={seed}", 0.9)
    board = leaderboard.build(tmp_path)
    assert [(row["config"]["optim.lr"], row["n"]) for row in board["rows"]] == [(0.2, 3), (0.1, 1)]
    assert board["ranked_by"].endswith("highest first, then those with diverged seeds")
    for seed in range(3):
        shutil.rmtree(tmp_path / f"b{seed}")
    leave(tmp_path, "b2", "optim.lr=0.2 seed=2", None, status="failed")
    leaderboard.write(tmp_path, board := leaderboard.build(tmp_path))
    assert board["ranked_by"].endswith("highest first")
    assert (
        "val_accuracy 99.00%, test accuracy 50.00% (1 of 3 seeds)"
        in (tmp_path / "leaderboard.md").read_text()
    )


def test_a_seed_that_failed_otherwise_costs_no_rank(tmp_path: Path) -> None:
    for seed, status in enumerate(("completed", "failed", "interrupted")):
        leave(tmp_path, f"a{seed}", f"optim.lr=0.1 seed={seed}", 0.99, status=status, error="x")
        leave(tmp_path, f"b{seed}", f"optim.lr=0.2 seed={seed}", 0.9)
    board = leaderboard.build(tmp_path)
    assert board["ranked_by"] == "by mean val_accuracy, highest first"
    assert [(row["config"]["optim.lr"], row["n"]) for row in board["rows"]] == [(0.1, 1), (0.2, 3)]


def test_scores_on_different_datasets_do_not_compare(tmp_path: Path) -> None:
    for number, words in enumerate(("dataset=mnist model=cnn", "dataset=kmnist model=cnn")):
        leave(tmp_path, str(number), words, 0.9 - 0.1 * number)
    board = leaderboard.build(tmp_path)
    assert board["ranked_by"] == "by nothing: scores on different datasets don't compare"
    assert (board["winner"], [row["rank"] for row in board["rows"]]) == (None, [None, None])


odd = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.integers(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)
KEYS = st.sampled_from(["status", "error", "seed", "best", "test", "time", "config_hash"])


@pytest.mark.torture
@settings(max_examples=many(100, 3000), deadline=None)
@given(result=st.dictionaries(KEYS, odd) | odd, words=st.text(max_size=30))
def test_any_file_can_lie_in_the_folder(
    tmp_path_factory: pytest.TempPathFactory, result: Any, words: str
) -> None:
    sweep = tmp_path_factory.mktemp("odd")
    (sweep / "a").mkdir()
    (sweep / "a" / "result.json").write_text(json.dumps(result))
    (sweep / "a" / "overrides.txt").write_bytes(words.encode("utf-8", "surrogatepass"))
    leave(sweep, "b", "epochs=1", 0.5)
    board = leaderboard.build(sweep)
    leaderboard.write(sweep, board)
    assert any("b" in row["jobs"] for row in board["rows"])
    shutil.rmtree(sweep)


def test_the_winners_command_repeats_it(mnist_cli: Program) -> None:
    words = ("train", "-m", *TINY, "optim.lr=0.1,0.001", "seed=0,1", ALONE)
    outcome = mnist_cli(*words, "out=a", "--json")
    assert outcome.code == 0
    document = json.loads(outcome.stdout)
    assert document["sweep_dir"] == "a" and len(document["jobs"]) == 4
    board = board_of(Path("a"))
    assert document["leaderboard"] == board["rows"] and document["winner"] == board["winner"]
    winner = board["winner"]
    assert winner["command"] == (
        "mnist-cli train -m model=mlp 'model.hidden=[16]' optim.lr=0.1 dataset=digits seed=0,1"
        " epochs=2"
    )
    values = [job["best"]["value"] for job in document["jobs"][:2]]
    assert winner["config"] == {"optim.lr": 0.1}
    assert winner["mean"] == pytest.approx(sum(values) / 2)
    assert winner["std"] == pytest.approx(abs(values[0] - values[1]) / math.sqrt(2))
    program, *again = shlex.split(winner["command"])
    assert program == "mnist-cli"
    assert mnist_cli(*again, ALONE, "out=b", "--quiet").code == 0
    (row,) = board_of(Path("b"))["rows"]
    for key in ("mean", "std", "test_mean", "test_std", "seeds"):
        assert row[key] == winner[key]


@pytest.mark.parametrize(
    "words",
    [
        ("optim.weight_decay=0,0.1", "optim=adagrad", "device=cpu", "profile=true"),
        ("optim=momentum", "optim.momentum=0.5,0.9", "optim.nesterov=true", "grad_clip=null,1"),
        ("schedule=cosine,step", "epochs=3", "early_stop.patience=1,null", "compile=false"),
        ("+experiment=mlp_adam", "seed=1,2", "epochs=2", "predictions=true", "monitor=val_loss"),
        ("model=cnn", "model.channels=[2,2],[2,4]", "model.dense=4", "save_every=30s"),
    ],
)
def test_every_command_repeats_its_row(mnist_cli: Program, words: tuple[str, ...]) -> None:
    words = ("dataset=digits", "epochs=1", *words)
    assert mnist_cli("train", "-m", *words, "out=a", "report=false", "--quiet").code == 0
    for row in board_of(Path("a"))["rows"]:
        _, *again = shlex.split(row["command"])
        for key, value in row["config"].items():
            assert any(word.startswith(f"{key}=") for word in again), (key, value)
        for key in ("report", "profile", "predictions", "save_every", "plugin", "loss", "compile"):
            assert not any(word.startswith(f"{key}=") for word in again)
        shown = mnist_cli(*again, "out=b", "report=false", "--json")
        document = json.loads(shown.stdout)
        jobs = document.get("jobs", [document])
        before = [json.loads((Path("a") / j / "result.json").read_text()) for j in row["jobs"]]
        assert {job["config_hash"] for job in jobs} == {job["config_hash"] for job in before}
        assert {job["val"]["loss"] for job in jobs} == {job["val"]["loss"] for job in before}
        shutil.rmtree("b")


def test_numbers_that_are_none_are_no_numbers(tmp_path: Path) -> None:
    """Of a folder from anybody: JSON knows NaN, nested lists, and integers without an end."""
    for name, value in {"a": "NaN", "b": "1e999", "c": "9" * 400, "d": "[[1]]", "e": "{}"}.items():
        leave(tmp_path, name, f"optim.lr={value}", 0.5)
    board = leaderboard.build(tmp_path)
    leaderboard.write(tmp_path, board)
    assert all(isinstance(row["config"]["optim.lr"], str) for row in board["rows"])


def test_a_pipe_in_a_run_folder_is_not_waited_for(tmp_path: Path) -> None:
    for name in ("a", "b"):
        leave(tmp_path, name, "optim.lr=0.1", 0.5)
    for path in (tmp_path / "a" / "overrides.txt", tmp_path / "b" / "result.json"):
        path.unlink()
        os.mkfifo(path)
    assert [row["jobs"] for row in leaderboard.build(tmp_path)["rows"]] == [["a"]]


def test_a_sweep_says_what_happens(mnist_cli: Program) -> None:
    outcome = mnist_cli("train", "-m", *TINY, "optim.lr=0.1,1e30", "seed=0", ALONE, "out=a")
    assert outcome.code == 1
    lines = outcome.stdout.splitlines()
    assert lines[0] == "start    1/2  optim.lr=0.1"
    assert lines[1].startswith("done     1/2  optim.lr=0.1  val_accuracy ")
    assert lines[3].startswith("failed   2/2  optim.lr=1e+30  training diverged: the loss is nan")
    assert any(line.startswith("winner   optim.lr=0.1: val_accuracy ") for line in lines)
    assert any(line.startswith("repeat   mnist-cli train model=mlp ") for line in lines)
    assert lines[-1] == "sweep    a"
    assert two_lines(outcome.stderr) == (
        "1 of 2 jobs failed in a",
        f"see {next(Path('a').glob('optim.lr=1e+30-*'))}/train.log for why, then type the command"
        " again with sweep.resume=a",
    )


@pytest.mark.parametrize("dataset", ["linear", "digits"])
def test_regression_and_a_sweep_without_validation(mnist_cli: Program, dataset: str) -> None:
    words = ["model=linear", "epochs=1", "optim.lr=0.1,0.01", "dataset.val_fraction=0"]
    if dataset == "linear":
        words[-1:] = ["loss=mse", "dataset.num_samples=200", "dataset.val_fraction=0.2"]
    assert mnist_cli("train", "-m", f"dataset={dataset}", *words, "out=a", "--quiet").code == 0
    board = board_of(Path("a"))
    first, last = board["rows"]
    if dataset == "linear":
        assert first["metric"] == "val_mse" and first["test_metric"] == "mse"
        assert first["mean"] < last["mean"]
    else:
        assert board["winner"] is None and first["test_mean"] is not None


def test_what_a_launcher_of_hydra_leaves_is_ranked_too(mnist_cli: Program) -> None:
    words = ("train", "-m", *TINY, "optim.lr=0.1,1e30", "out=a", "hydra/launcher=basic", "--json")
    outcome = mnist_cli(*words)
    assert outcome.code == 1
    board = board_of(Path("a"))
    assert [row["state"] for row in board["rows"]] == ["completed", "diverged"]
    assert json.loads(outcome.stdout)["winner"] == board["winner"]
    before = states(Path("a"))
    again = mnist_cli(*(w.replace("out=", "sweep.resume=").replace("1e30", "0.2") for w in words))
    assert again.code == 0
    assert before.items() < states(Path("a")).items()
    assert len(board_of(Path("a"))["rows"]) == 3


# --- failures ------------------------------------------------------------------------------------


def test_a_job_that_cannot_begin_leaves_its_error_and_is_tried_again(
    mnist_cli: Program, real_mnist: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "train-images-idx3-ubyte").write_bytes(b"no images")
    words = ("train", "-m", "model=linear", "epochs=1", "batch_size=1000", "seed=0")
    assert mnist_cli(*words, f"dataset.root={data}", "out=a").code == 1
    (row,) = board_of(Path("a"))["rows"]
    assert (row["rank"], row["state"]) == (None, "failed")
    assert "train-images-idx3-ubyte" in row["failed"][0]["error"]
    (result,) = (json.loads(path.read_text()) for path in Path("a").glob("*/result.json"))
    assert (result["status"], result["best"]) == ("failed", None)
    again = mnist_cli(*words, f"dataset.root={real_mnist}", "sweep.resume=a", "--quiet")
    assert again == (0, "", "")
    (row,) = board_of(Path("a"))["rows"]
    assert (row["rank"], row["state"], row["failed"]) == (1, "completed", [])


def test_a_traceback_goes_to_the_log(mnist_cli: Program, trained: Callable[..., Path]) -> None:
    """And into the result, but of a run that was completed."""
    shutil.copytree(trained(*TINY), "run")
    config = PARSERS["train"](json.loads(json.dumps(yaml_of(Path("run")))) | {"out": "run"})
    details = "Traceback (most recent call last):\nValueError: odd\n"
    before = result_of(Path("run"))
    record(config, "ValueError: odd", details)
    assert Path("run/train.log").read_text().endswith("ValueError: odd\n")
    assert result_of(Path("run")) == before
    RunFolder(Path("run")).write_result(before | {"status": "interrupted"})
    record(config, "ValueError: odd", details)
    assert result_of(Path("run")) == before | {"status": "failed", "error": "ValueError: odd"}


def test_a_failure_is_recorded_where_the_log_is_not(
    mnist_cli: Program, trained: Callable[..., Path]
) -> None:
    config = PARSERS["train"](json.loads(json.dumps(yaml_of(trained(*TINY)))) | {"out": "run"})
    Path("run").mkdir()
    Path("run/train.log").symlink_to("/dev/full")
    record(config, "no data", "error: no data\n")
    assert (result_of(Path("run"))["status"], Path("run/config.yaml").exists()) == ("failed", True)


def result_of(run: Path) -> dict[str, Any]:
    found = RunFolder(run).read_result()
    assert found is not None
    return found


def yaml_of(run: Path) -> Any:
    import yaml

    return yaml.safe_load((run / "config.yaml").read_text())


def test_fail_fast_starts_nothing_more(mnist_cli: Program) -> None:
    words = ("train", "-m", *TINY, "optim.lr=0.1,1e30,0.2", ALONE, "--json")
    outcome = mnist_cli(*words, "out=a", "sweep.fail_fast=true")
    assert outcome.code == 1
    assert len(json.loads(outcome.stdout)["jobs"]) == len(folders(Path("a"))) == 2
    assert [row["state"] for row in board_of(Path("a"))["rows"]] == [
        "completed", "diverged", "waiting",
    ]  # fmt: skip
    [log] = Path("a").glob("optim.lr=1e+30-*/train.log")
    assert "Traceback (most recent call last)" in log.read_text()
    assert mnist_cli("report", "run=a").code == 0
    assert "waiting" in Path("a/report.html").read_text()
    assert mnist_cli(*words, "out=b").code == 1
    assert len(folders(Path("b"))) == 3


def test_a_job_in_use_fails_alone(mnist_cli: Program) -> None:
    words = ("train", "-m", *TINY, "seed=0,1", "--json")
    assert mnist_cli(*words, "out=a").code == 0
    first, second = folders(Path("a")).values()
    for path in (first, second):
        (path / "result.json").unlink()
    with durable.locked(first):
        outcome = mnist_cli(*words, "sweep.resume=a")
    document = json.loads(outcome.stdout)
    assert outcome.code == 1
    assert document["jobs"][0]["exit_code"] == 7
    assert f"is in use by process {os.getpid()}" in document["jobs"][0]["error"]
    assert document["jobs"][1]["status"] == "completed"
    assert not (first / "result.json").exists()


@pytest.mark.parametrize(
    ("words", "error", "hint"),
    [
        (("sweep.jobs=2",), "sweep.jobs= is for a sweep", "add -m"),
        (("sweep={jobs:2}",), "is for a sweep", "add -m"),
        (("-m", "sweep.jobs=0"), "sweep.jobs=0 is out of range", "at least 1"),
        (("-m", "sweep.jobs=1,2"), "gives several values", "type one value"),
        (("-m", "sweep.job=2"), "sweep.job", "did you mean sweep.jobs"),
        (("-m", "sweep.resume=no"), "sweep.resume=no is not a folder", "name the folder"),
        (("-m", "sweep.resume="), "sweep.resume", ""),
        (("-m", "sweep.resume=.", "out=a"), "name two folders", "drop out="),
        (("-m", "resume=a"), "resume= names one run", "sweep.resume=DIR"),
        (("-m", "hydra/launcher=basic", "sweep.jobs=2"), "doesn't go with hydra.", "leave either"),
    ],
)
def test_keys_of_a_sweep_are_checked(
    mnist_cli: Program, words: tuple[str, ...], error: str, hint: str
) -> None:
    outcome = mnist_cli("train", *TINY, *words)
    assert outcome.code == 2
    assert error in outcome.error and hint in outcome.hint
    assert os.listdir() == []


def test_a_folder_with_runs_is_no_new_sweep(mnist_cli: Program) -> None:
    words = ("train", "-m", *TINY, "epochs=1", "out=a", "--quiet")
    assert mnist_cli(*words).code == 0
    outcome = mnist_cli(*words)
    assert outcome.code == 2
    assert outcome.error == "out=a holds runs already"
    assert "sweep.resume=a" in outcome.hint
    outcome = mnist_cli("train", *TINY, "out=a")
    assert (outcome.code, outcome.error) == (2, "out=a holds the folders of other runs")


@pytest.mark.parametrize("more", [(), ("hydra.verbose=false",)])
def test_a_glob_goes_over_the_options_of_a_group(mnist_cli: Program, more: tuple[str, ...]) -> None:
    words = ("train", "-m", "model=glob([l*,m*])", "dataset=digits", "epochs=1", "report=false")
    assert mnist_cli(*words, "out=a", "--quiet", *more).code == 0
    assert {row["config"]["model"] for row in board_of(Path("a"))["rows"]} == {"linear", "mlp"}


def test_to_go_on_takes_the_words_of_the_sweep(mnist_cli: Program) -> None:
    words = ("train", "-m", *TINY, "epochs=1")
    assert mnist_cli(*words, "out=a", "--quiet").code == 0
    before = sorted(os.listdir("a"))
    # Nothing differs.
    assert [name[:4] for name in before] == [".loc", "job-", "lead", "lead", "lead"]
    outcome = mnist_cli("train", "-m", "sweep.resume=a", "sweep.jobs=1")
    assert outcome.code == 2
    assert outcome.error == "sweep.resume=a alone would train the defaults there"
    assert "type the words of the sweep again" in outcome.hint
    assert sorted(os.listdir("a")) == before
    assert mnist_cli(*words, "sweep.resume=a", "--quiet").code == 0
    assert sorted(os.listdir("a")) == before


# --- going on ------------------------------------------------------------------------------------


def test_a_sweep_goes_on_and_grows(mnist_cli: Program, trained: Callable[..., Path]) -> None:
    words = ("train", "-m", *TINY, ALONE, "--quiet")
    assert mnist_cli(*words, "seed=0,1", "out=a").code == 0
    before = states(Path("a"))
    assert mnist_cli(*words, "seed=0,1,2", "optim=adam,sgd", "sweep.resume=a").code == 0
    after = states(Path("a"))
    assert before.items() < after.items() and len(after) == 6
    rows = board_of(Path("a"))["rows"]
    assert [(row["config"]["optim"], row["n"]) for row in rows] == [("adam", 3), ("sgd", 3)]
    for path in folders(Path("a")).values():
        config = yaml_of(path)
        alone = trained(*TINY, f"optim={config['optim']['name']}", f"seed={config['seed']}")
        assert outcome_of(path) == outcome_of(alone)


def assert_whole(sweep: Path, twelve: Path) -> None:
    """All twelve jobs are there, with the same bits as in a sweep that was never stopped."""
    assert folders(sweep).keys() == folders(twelve).keys()
    for name, path in folders(sweep).items():
        assert outcome_of(path) == outcome_of(twelve / name)
        assert not temporaries(path)
    timeless = [
        [{k: v for k, v in row.items() if k != "train_s"} for row in board_of(at)["rows"]]
        for at in (sweep, twelve)
    ]
    assert timeless[0] == timeless[1]


@pytest.mark.torture
def test_a_sweep_killed_at_any_instant_loses_nothing(
    server: Server, twelve: tuple[Path, float], tmp_path: Path
) -> None:
    chance, kills, goal = random.Random(0), 0, many(4, 50)
    for run in itertools.count():
        sweep = tmp_path / f"sweep{run}"
        kills += kills_until_done(server, TWELVE, sweep, (0.1, 0.9), twelve[1], chance)
        assert_whole(sweep, twelve[0])
        shutil.rmtree(sweep)
        if kills >= goal:
            break
    figure("SIGKILL of a 12-job sweep at a random instant, then resume", kills, runs=run + 1)


def kills_until_done(
    server: Server,
    words: Sequence[str],
    sweep: Path,
    shares: tuple[float, float],
    whole_s: float,
    chance: random.Random,
) -> int:
    """Run `words` in the new folder `sweep`, killed and resumed until a process comes to its end.

    Args:
        shares: of `whole_s`, the seconds of an undisturbed run, between which each is killed.

    Returns:
        The number of kills; what was finished before one is so after it.
    """
    sweep.mkdir()
    for kills in itertools.count():
        before = states(sweep)
        child = server.start(faults.program_in_group, [*words, f"sweep.resume={sweep}"])
        time.sleep(chance.uniform(*shares) * whole_s)
        kill_group(child)
        code = child.wait().code
        assert before.items() <= states(sweep).items()
        if code == 0:
            return kills
        assert code == -9
    raise AssertionError


def kill_group(child: Child, number: int = signal.SIGKILL) -> None:
    if not child.is_over():
        os.killpg(child.pid, number)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_the_job_and_leaves_a_leaderboard(
    server: Server, twelve: tuple[Path, float], tmp_path: Path, number: int, code: int
) -> None:
    sweep = tmp_path / "sweep"
    child = server.start(faults.program_in_group, [*TWELVE, f"out={sweep}"])
    child.wait_for(lambda: sum(1 for _ in sweep.glob("*/metrics.csv")) >= 3)
    child.kill(number)
    ended = child.wait()
    assert ended.code == code
    error, hint = two_lines(ended.stderr)
    assert "of 12 jobs left" in error and f"sweep.resume={sweep}" in hint
    before, board = states(sweep), board_of(sweep)
    assert 2 <= len(before) < 12
    assert sum(row["n"] for row in board["rows"]) == len(before)
    assert server.run(faults.program, [*TWELVE, f"sweep.resume={sweep}"]).code == 0
    assert before.items() < states(sweep).items()
    assert_whole(sweep, twelve[0])


# --- several at once -----------------------------------------------------------------------------


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def busy(sweep: Path, worker: int) -> Path | None:
    """The folder of the job that `worker` is at, with an epoch behind it."""
    for lock in sweep.glob("*/.lock"):
        there = (lock.parent / "metrics.csv").exists()
        if lock.read_text().strip() == str(worker) and there:
            return lock.parent
    return None


def test_two_at_once_one_of_them_killed_give_the_bits_of_one_alone(
    server: Server, tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep"
    words = ["train", "-m", *TINY, "epochs=40", "seed=0,1,2,3", ALONE, "--quiet"]
    child = server.start(faults.program, [*words, "sweep.jobs=2", f"out={sweep}"])
    found: list[tuple[int, Path]] = []

    def is_busy() -> bool:
        found[:] = [
            (pid, path) for pid in children_of(child.pid) if (path := busy(sweep, pid)) is not None
        ]
        return bool(found)

    child.wait_for(is_busy)
    victim, folder = found[0]
    os.kill(victim, signal.SIGKILL)
    ended = child.wait()
    assert ended.code == 1
    assert "1 of 4 jobs failed" in two_lines(ended.stderr)[0]
    (failed,) = board_of(sweep)["rows"][0]["failed"]
    assert failed == {
        "job": folder.name, "state": "failed",
        "error": "the process of the job was ended by signal 9 (SIGKILL)",
    }  # fmt: skip
    before = states(sweep)
    assert len(before) == 3
    assert server.run(faults.program, [*words, f"sweep.resume={sweep}"]).code == 0
    assert before.items() < states(sweep).items()
    for seed, path in enumerate(folders(sweep).values()):
        alone = tmp_path / f"alone{seed}"
        line = ["train", *TINY, "epochs=40", f"seed={seed}", f"out={alone}", "--quiet"]
        assert server.run(faults.program, line).code == 0
        assert outcome_of(path) == outcome_of(alone)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("how", ["sweep.fused=true", "sweep.fused=false", "hydra/launcher=basic"])
def test_a_signal_while_a_job_ends_ends_the_sweep(
    server: Server, tmp_path: Path, number: int, how: str
) -> None:
    """At an instant when the job, or the stack, has looked for signals for the last time."""
    sweep = tmp_path / "sweep"
    words = ["train", "-m", *TINY, "optim=adam,sgd", "seed=0,1,2", how]
    ended = server.run(faults.program_signalled_at_the_end, [*words, f"out={sweep}"], number)
    assert ended.code == 128 + number
    num_done = 3 if how == "sweep.fused=true" else 1
    assert len(states(sweep)) == num_done
    if "launcher" not in how:
        assert f"{6 - num_done} of 6 jobs left" in two_lines(ended.stderr)[0]
        assert f"waiting  {6 - num_done} of 6 jobs" in ended.stdout
        rows = board_of(sweep)["rows"]
        assert [row["config"]["optim"] for row in rows] == ["adam", "sgd"]
        assert [row["state"] for row in rows] == ["completed", "waiting"]
        assert rows[1]["jobs"] == rows[1]["failed"] == []
    assert server.run(faults.program, [*words, f"sweep.resume={sweep}"]).code == 0
    assert len(states(sweep)) == 6


def test_a_run_is_no_sweep_to_go_on_with(mnist_cli: Program, trained: Callable[..., Path]) -> None:
    run = trained(*TINY)
    before = sorted(os.listdir(run))
    outcome = mnist_cli("train", "-m", *TINY, "seed=1,2", f"sweep.resume={run}")
    assert outcome.code == 2
    assert outcome.error == f"sweep.resume={run} is the folder of one run"
    assert sorted(os.listdir(run)) == before


@given(
    st.lists(st.text("abc = ", max_size=150), min_size=1, max_size=5),
    st.integers(40, 150),
)
@settings(max_examples=30, deadline=None)
def test_law_rows_of_a_live_table_stand_on_one_line_each(words: list[str], width: int) -> None:
    rows = [[str(100 + number), word, "epoch 7/40", "98.61%"] for number, word in enumerate(words)]
    table = Console()._table(("job", "what differs", "state", "best"), rows, 3, "", width)
    out = io.StringIO()
    RichConsole(file=out, width=width).print(table)
    lines = [line for line in out.getvalue().splitlines() if "epoch" in line]
    assert len(lines) == len(rows)
    for number, line in enumerate(lines):
        assert line.split()[0] == str(100 + number) and "epoch 7/40  98.61%" in line


def test_a_sweep_is_run_by_one_process_at_a_time(server: Server, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    words = ["train", "-m", *TINY, "epochs=60", "seed=0,1", ALONE, "--quiet"]
    child = server.start(faults.program, [*words, f"out={sweep}"])
    child.wait_for(lambda: any(sweep.glob("*/metrics.csv")))
    second = server.run(faults.program, [*words, f"sweep.resume={sweep}"])
    assert second.code == 7
    assert f"{sweep} is in use by process {child.pid}" in two_lines(second.stderr)[0]
    assert (child.wait().code, len(states(sweep))) == (0, 2)


def test_a_run_that_went_further_than_the_sweep_keeps_its_result(mnist_cli: Program) -> None:
    words = ("train", "-m", *TINY, "seed=0,1", ALONE, "--quiet")
    assert mnist_cli(*words, "out=a").code == 0
    [run] = Path("a").glob("seed=1-*")
    assert mnist_cli("train", f"resume={run}", "epochs=3", "--quiet").code == 0
    before = result_of(run)
    outcome = mnist_cli(*words, "sweep.resume=a", "--json")
    assert outcome.code == 1
    [failed] = [job for job in json.loads(outcome.stdout)["jobs"] if "exit_code" in job]
    assert "epochs=2 differs from the run's epochs=3" in failed["error"]
    assert failed["status"] == "completed"
    assert result_of(run) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_its_sweep(server: Server, tmp_path: Path, number: int) -> None:
    """SIGINT reaches the whole group, as from a terminal; SIGKILL the sweep alone."""
    sweep = tmp_path / "sweep"
    words = ["train", "-m", *TINY, "epochs=10000", "seed=0,1,2", "sweep.jobs=2", ALONE, "--quiet"]
    child = server.start(faults.program_in_group, [*words, f"out={sweep}"])
    child.wait_for(lambda: sum(1 for _ in sweep.glob("*/metrics.csv")) == 2)
    workers = children_of(child.pid)
    assert len(workers) == 2
    if number == signal.SIGINT:
        kill_group(child, number)
    else:
        child.kill(number)
    ended = child.wait()
    end = time.monotonic() + 30
    while any(map(is_alive, workers)):
        assert time.monotonic() < end
        time.sleep(0.01)
    results = [json.loads(path.read_text()) for path in sweep.glob("*/result.json")]
    assert [result["status"] for result in results] == ["interrupted"] * 2
    assert all("everything is saved" in result["error"] for result in results)
    if number == signal.SIGINT:
        assert ended.code == 130
        assert "3 of 3 jobs left" in two_lines(ended.stderr)[0]
        (row,) = board_of(sweep)["rows"]
        assert (row["state"], len(row["failed"])) == ("interrupted", 2)


def test_cores_are_divided_and_gpus_taken_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    cores = len(os.sched_getaffinity(0))
    threads = [pool.share_of(0, n, [])["OMP_NUM_THREADS"] for n in (1, 2, cores, 10 * cores)]
    assert threads == [str(cores), str(max(1, cores // 2)), "1", "1"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert pool.share_of(0, 1, [])["OMP_NUM_THREADS"] == "1"
    assert "CUDA_VISIBLE_DEVICES" not in pool.share_of(0, 2, ["0"])
    shares = [pool.share_of(slot, 4, ["2", "5"])["CUDA_VISIBLE_DEVICES"] for slot in range(4)]
    assert shares == ["2", "5", "2", "5"]


# --- searches ------------------------------------------------------------------------------------

SEARCH = (
    "train", "-m", *TINY, "optim.lr=tag(log,interval(1e-4,1))", "optim=adam,sgd",
    "sweep.search=optuna", "--quiet",
)  # fmt: skip


def history(sweep: Path) -> list[tuple[Any, ...]]:
    return [
        (trial["state"], trial["values"], trial["epochs"], trial["config"], trial["job"])
        for trial in board_of(sweep)["history"]
    ]


@pytest.mark.parametrize("sampler", ["tpe", "random", "gp"])
def test_a_search_repeats_exactly(mnist_cli: Program, sampler: str) -> None:
    words = (*SEARCH, f"sweep.sampler={sampler}", "sweep.trials=12", "sweep.pruner=median")
    assert mnist_cli(*words, "out=a").code in (0, 1)
    assert mnist_cli(*words[:-2], "sweep.trials=5", "sweep.pruner=median", "out=b").code in (0, 1)
    assert mnist_cli(*words, "sweep.resume=b").code in (0, 1)
    assert history(Path("a")) == history(Path("b"))
    assert len(history(Path("a"))) == 12
    assert mnist_cli(*words, "out=c", "seed=1", "sweep.trials=2").code in (0, 1)
    points = [[trial[3] for trial in history(Path(sweep))[:2]] for sweep in ("a", "c")]
    assert points[0] != points[1]
    before = states(Path("a"))
    assert mnist_cli(*words, "sweep.resume=a").code in (0, 1)
    assert states(Path("a")) == before


def test_a_search_says_what_it_found(mnist_cli: Program) -> None:
    words = (*SEARCH[:-1], "sweep.trials=10", "sweep.pruner=median", "out=a", "--json")
    outcome = mnist_cli(*words)
    document = json.loads(outcome.stdout)
    board = board_of(Path("a"))
    best = max(trial["values"][0] for trial in board["history"] if trial["state"] == "complete")
    assert board["winner"]["mean"] == best
    assert document["winner"] == board["winner"]
    assert board["objectives"] == {"val_accuracy": "maximize"}
    assert set(board["importance"]) <= {"optim.lr", "optim"} and board["importance"]
    assert sum(board["importance"].values()) == pytest.approx(1)
    assert {Path(job["run_dir"]).name for job in document["jobs"]} == set(folders(Path("a")))
    for trial in board["history"]:
        assert 1e-4 <= trial["config"]["optim.lr"] <= 1
        config = yaml_of(Path("a") / trial["job"])
        assert config["optim"]["lr"] == pytest.approx(trial["config"]["optim.lr"], rel=1e-5)
        assert config["optim"]["name"] == trial["config"]["optim"]


def test_a_search_is_told_the_scores_on_the_validation_split(mnist_cli: Program) -> None:
    words = (*SEARCH, "sweep.trials=3", "sweep.objectives=[val_accuracy,val_loss]", "out=a")
    assert mnist_cli(*words).code == 0
    trials = board_of(Path("a"))["history"]
    assert len(trials) == 3
    for trial in trials:
        scores = result_of(Path("a") / trial["job"])["val"]
        assert trial["values"] == [scores["accuracy"], scores["loss"]]


def test_a_trial_that_diverges_has_failed_and_was_not_given_up(mnist_cli: Program) -> None:
    words = ("train", "-m", *TINY, "optim=sgd", "optim.lr=0.1,1e30", "sweep.search=optuna")
    outcome = mnist_cli(*words, "sweep.sampler=grid", "sweep.pruner=median", "out=a", "--quiet")
    assert outcome.code == 1
    found = {(trial[3]["optim.lr"], trial[0]) for trial in history(Path("a"))}
    assert found == {("0.1", "complete"), ("1e+30", "fail")}


@pytest.mark.parametrize("pruner", ["median", "halving"])
def test_what_lies_behind_is_given_up_and_is_no_failure(mnist_cli: Program, pruner: str) -> None:
    words = ("train", "-m", *TINY, "epochs=4", "optim.lr=0.1,0.05,0.02,1e-7,1e-8,1e-9,1e-10,1e-11")
    words += ("sweep.search=optuna", "sweep.sampler=grid", f"sweep.pruner={pruner}", "out=a")
    assert mnist_cli(*words, "--quiet") == (0, "", "")
    results = [json.loads(path.read_text()) for path in Path("a").glob("*/result.json")]
    pruned = [result for result in results if result["status"] == "interrupted"]
    assert len(results) == 8 and pruned
    for result in pruned:
        epochs = len(faults.metrics_rows(Path(result["run_dir"])))
        assert result["error"] == f"pruned at epoch {epochs}" and epochs < 4
    board = board_of(Path("a"))
    assert board["winner"]["config"]["optim.lr"] in (0.1, 0.05, 0.02)
    assert sum(row["state"] == "pruned" for row in board["rows"]) == len(pruned)
    assert sum(trial["state"] == "pruned" for trial in board["history"]) == len(pruned)
    assert all(not row["failed"] for row in board["rows"])
    again = mnist_cli("train", f"resume={pruned[0]['run_dir']}", "--quiet")
    assert again == (0, "", "")


def test_sampler_grid_tries_each_once_and_ends(mnist_cli: Program) -> None:
    words = ("train", "-m", *TINY, "optim=adam,sgd", "seed=3", "batch_size=range(64,129,32)")
    words += ("sweep.search=optuna", "sweep.sampler=grid", "out=a", "--quiet")
    assert mnist_cli(*words) == (0, "", "")
    configs = [trial["config"] for trial in board_of(Path("a"))["history"]]
    tried = sorted((each["optim"], each["batch_size"]) for each in configs)
    assert tried == list(itertools.product(["adam", "sgd"], [64, 96, 128]))


def test_several_objectives_give_a_front(mnist_cli: Program) -> None:
    words = ("train", "-m", *TINY, "model.hidden=[4],[8],[16],[32]", "optim.lr=0.05")
    words += ("sweep.search=optuna", "sweep.sampler=grid", "out=a", "--quiet")
    assert mnist_cli(*words, "sweep.objectives=[val_accuracy,num_params]") == (0, "", "")
    board = board_of(Path("a"))
    values = {trial["job"]: tuple(trial["values"]) for trial in board["history"]}
    front = {trial["job"] for trial in board["pareto"]}
    for job, (accuracy, size) in values.items():
        is_beaten = any(
            a >= accuracy and s <= size and (a, s) != (accuracy, size) for a, s in values.values()
        )
        assert (job in front) == (not is_beaten)


def test_people_see_four_digits_and_files_hold_what_was_run(mnist_cli: Program) -> None:
    words = ("train", "-m", *TINY, "optim.lr=tag(log,interval(1e-4,1e-1))", "sweep.search=optuna")
    words += ("sweep.trials=2", "sweep.objectives=[val_accuracy,num_params]", "out=a")
    said = mnist_cli(*words).stdout.splitlines()
    board = board_of(Path("a"))
    full = [str(row["config"]["optim.lr"]) for row in board["rows"]]
    assert all(len(value.lstrip("0.")) > 4 for value in full)
    short = {f"{float(value):.4g}" for value in full}
    shown = [line for line in said if not line.startswith("repeat")]
    assert not any(value in line for value in full for line in shown)
    for kind, count in (("start ", 2), ("done ", 2), ("winner ", 1), ("front ", 1)):
        lines = [line for line in shown if line.startswith(kind)]
        assert len(lines) == count
        assert all(any(f"optim.lr={value}" in line for value in short) for line in lines)
    assert f"optim.lr={full[0]} " in next(line for line in said if line.startswith("repeat"))
    for name in ("leaderboard.csv", "leaderboard.md"):
        assert all(value in (Path("a") / name).read_text() for value in full)
    for name in ("history", "pareto"):
        assert {str(trial["config"]["optim.lr"]) for trial in board[name]} <= set(full)


def test_a_regression_is_searched_downward(mnist_cli: Program) -> None:
    words = ("train", "-m", "dataset=linear", "loss=mse", "model=linear", "epochs=3")
    words += ("dataset.num_samples=200", "dataset.val_fraction=0.2")
    words += ("optim.lr=interval(0.001,0.1)", "sweep.search=optuna")
    assert mnist_cli(*words, "sweep.trials=4", "out=a", "--quiet").code == 0
    board = board_of(Path("a"))
    assert board["objectives"] == {"val_mse": "minimize"}
    assert board["winner"]["mean"] == min(trial["values"][0] for trial in board["history"])


@pytest.mark.torture
def test_a_search_killed_at_any_instant_goes_on(server: Server, tmp_path: Path) -> None:
    words = [*SEARCH, "optim.lr=interval(0.01,0.1)", "sweep.trials=8"]
    whole = tmp_path / "whole"
    ended = server.run(faults.program, [*words, f"out={whole}"])
    assert ended.code == 0
    chance, kills, goal, runs = random.Random(1), 0, many(4, 50), 0
    while kills < goal:
        runs += 1
        sweep = tmp_path / f"sweep{runs}"
        kills += kills_until_done(server, words, sweep, (0.2, 0.9), ended.seconds, chance)
        done = [trial for trial in history(sweep) if trial[0] == "complete"]
        assert done == history(whole)
        for name, path in folders(sweep).items():
            assert outcome_of(path) == outcome_of(whole / name)
    figure("SIGKILL of a search at a random instant, then resume", kills, runs=runs)


def test_half_a_line_in_the_journal_is_dropped(mnist_cli: Program) -> None:
    assert mnist_cli(*SEARCH, "sweep.trials=2", "out=a").code == 0
    with open("a/search.journal", "ab") as file:
        file.write(b'{"op_code":4,"worker_id')
    Path("a/search.journal.lock").symlink_to("a/search.journal")
    assert mnist_cli(*SEARCH, "sweep.trials=3", "sweep.resume=a").code == 0
    assert len(history(Path("a"))) == 3


def test_a_search_with_two_at_once(server: Server, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    words = [*SEARCH, "sweep.trials=12", "sweep.pruner=median", "sweep.jobs=2", f"out={sweep}"]
    assert server.run(faults.program, words).code in (0, 1)
    trials = history(sweep)
    assert len(trials) == 12 and {trial[0] for trial in trials} <= {"complete", "pruned", "fail"}
    assert {trial[4] for trial in trials} == set(folders(sweep))


@pytest.mark.parametrize(
    ("words", "error", "hint"),
    [
        (("sweep.trials=3",), "'sweep.trials=3' is for a search", "add sweep.search=optuna"),
        (("optim.lr=interval(0.1,1)",), "can't be counted", "add sweep.search=optuna"),
        (("sweep.search=optuna",), "has nothing to choose", "interval(1e-4, 1e-1)"),
        (("sweep.search=optuna", "seed=0,1"), "doesn't choose the seed", "one seed"),
        (("sweep.search=optuna", "epochs=interval(1,3)"), "takes whole numbers", "=range(1,4)"),
        (
            ("sweep.search=optuna", "batch_size=tag(log,interval(16,1048576))"),
            *("batch_size takes whole numbers", "=tag(log,range(16,1048577))"),
        ),
        (
            ("sweep.search=optuna", "monitor=val_loss", "loss.label_smoothing=interval(0,0.2)"),
            *("can't choose the loss", "val_accuracy"),
        ),
        (
            ("sweep.search=optuna", "optim=adam,sgd", "sweep.objectives=[val_loss]",
             "sweep.pruner=halving"),
            "stops by monitor=val_accuracy, and the search is for val_loss", "monitor=val_loss",
        ),
        (
            ("sweep.search=optuna", "dataset.val_fraction=0.1,0"),
            *("dataset.val_fraction=0 leaves none", "val_fraction=0.1"),
        ),
        (
            ("sweep.search=optuna", "dataset=digits,mnist"),
            *("can't choose the dataset: scores on different datasets don't compare", "for each"),
        ),
        (("sweep.search=optuna", "epochs=range(1,3.5,0.5)"), "epochs=1.5 has the wrong", "whole"),
        (("sweep.search=optuna", "optim.lr=interval(-1,1)"), "optim.lr=-1 is out of", "above 0"),
        (("sweep.search=optuna", "optim.lr=interval(1,0.1)"), "no range to search", "smaller end"),
        (("sweep.search=optuna", "optim.lr=tag(log,interval(0,1))"), "no range", "above 0"),
        (("sweep.search=optuna", "optim=adam,adm"), "no optim 'adm'", "adam"),
        (("sweep.search=optuna", "sweep.objectives=[speed]"), "'speed'", "num_params"),
        (
            ("sweep.search=optuna", "optim=adam,sgd", "sweep.objectives=[val_mse]"),
            "val_mse, which dataset=digits has not", "val_accuracy",
        ),
        (
            ("sweep.search=optuna", "sweep.objectives=[val_loss,train_s]", "sweep.pruner=median"),
            "compares one value", "sweep.pruner=none",
        ),
        (
            ("sweep.search=optuna", "optim=adam,sgd", "dataset.val_fraction=0"),
            "leaves none", "val_fraction=0.1",
        ),
        (
            ("sweep.search=optuna", "optim.lr=interval(0.1,1)", "sweep.sampler=grid"),
            "can't count the values of optim.lr", "another sampler",
        ),
        (("sweep.search=random",), "sweep.search='random' is not a choice", "grid, optuna"),
    ],
)  # fmt: skip
def test_a_search_is_checked(
    mnist_cli: Program, words: tuple[str, ...], error: str, hint: str
) -> None:
    outcome = mnist_cli("train", "-m", *TINY, *words)
    assert outcome.code == 2
    assert error in outcome.error and hint in outcome.hint
    assert os.listdir() == []


def test_a_search_through_recipes_keeps_to_one_dataset(mnist_cli: Program) -> None:
    words = ("train", "-m", "+experiment=mlp_adam,cifar10_cnn", "sweep.search=optuna")
    outcome = mnist_cli(*words)
    assert outcome.code == 2 and outcome.error.startswith("a search can't choose the dataset")


def test_another_search_does_not_go_on_in_the_folder(mnist_cli: Program) -> None:
    assert mnist_cli(*SEARCH, "sweep.trials=1", "out=a").code == 0
    for words, difference in {
        ("optim=adam,adamw",): "with optim=adam,sgd, and this one is with optim=adam,adamw",
        ("optim.lr=interval(0.1,1)",): (
            "with optim.lr=0.0001 to 1.0 on a log scale, and this one is with optim.lr=0.1 to 1.0"
        ),
        ("optim.lr=0.1",): (
            "with optim.lr=0.0001 to 1.0 on a log scale, and this one is with optim.lr=0.1"
        ),
        ("epochs=3",): "with epochs=2, and this one is with epochs=3",
        ("seed=1",): "with seed=0, and this one is with seed=1",
        ("sweep.objectives=[val_loss]",): (
            "with sweep.objectives=val_accuracy, and this one is with sweep.objectives=val_loss"
        ),
    }.items():
        outcome = mnist_cli(*SEARCH, *words, "sweep.trials=2", "sweep.resume=a")
        assert outcome.code == 2 and outcome.error == f"a holds a search {difference}"
    assert mnist_cli(*SEARCH, "sweep.trials=2", "save_every=5", "sweep.resume=a").code == 0
    assert len(board_of(Path("a"))["history"]) == 2
    outcome = mnist_cli("train", "-m", *TINY, "seed=0,1", "sweep.resume=a")
    assert outcome.code == 2 and outcome.error == "sweep.resume=a is the folder of a search"


def test_without_optuna_the_hint_says_what_to_install(
    mnist_cli: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    outcome = mnist_cli(*SEARCH)
    assert (outcome.code, outcome.hint) == (2, "type pip install 'mnist-cli[optuna]'")
    assert os.listdir() == []


def test_a_process_that_was_let_go_is_told_nothing_more() -> None:
    """An epoch that it had told of may still be in the pipe, and is answered."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    worker = pool.Worker(subprocess.Popen(["cat"], **pipes), 0)
    worker.send({"stop": False})
    worker.let_go()
    worker.send({"stop": False})
    assert list(worker.messages()) == [{"stop": False}]
    assert worker.bury() == 0
