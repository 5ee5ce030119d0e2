"""Jobs of a sweep that are trained as one stack leave what each leaves alone, but for rounding."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import faults
import pytest
from faults import Server, figure, many, outcome_of, temporaries, two_lines
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_sweep import board_of, busy, children_of, folders, kills_until_done, states

from mnist_cli import checkpoint, dataset, outcome, stacked
from mnist_cli.config import SweepConfig, TrainConfig, train_config
from mnist_cli.dataset import Dataset
from mnist_cli.options import DatasetConfig, LinearModelConfig, MlpConfig
from mnist_cli.run import RunFolder
from mnist_cli.sweep import fused
from mnist_cli.sweep.group import MAX_MEMBERS, WIDEST, groups, planned

if TYPE_CHECKING:
    from conftest import Program

pytestmark = pytest.mark.usefixtures("empty_cwd")

TINY = (
    "dataset=digits",
    "model=mlp",
    "model.hidden=[16]",
    "batch_size=64",
    "epochs=3",
    "report=false",
)
LINE = (
    "dataset=linear", "dataset.num_samples=300", "dataset.noise=0.1", "dataset.val_fraction=0.2",
    "model=linear", "loss=mse", "optim=sgd", "batch_size=32", "epochs=5", "report=false",
)  # fmt: skip
EIGHT = ("train", "-m", *TINY, "optim.lr=0.003,0.01", "seed=0,1,2,3", "--quiet")


def assert_same(path: Path, other: Path) -> None:
    """The run in `path` is that in `other`, but for rounding."""
    for name in ("best", "last"):
        one, two = (checkpoint.load(at / f"{name}.safetensors") for at in (path, other))
        for part in ("model", "optim"):
            for key, tensor in getattr(two, part).items():
                assert getattr(one, part)[key].shape == tensor.shape
                near = getattr(one, part)[key].isclose(tensor, rtol=1e-3, atol=1e-4)
                assert near.all(), f"{path.name}: {key}"
        assert one.progress.step == two.progress.step
        assert one.progress.stale_epochs == two.progress.stale_epochs
    rows, others = (RunFolder(at).read_metrics() for at in (path, other))
    assert [row["epoch"] for row in rows] == [row["epoch"] for row in others]
    for row, expected in zip(rows, others, strict=True):
        for key in set(expected) - {"seconds", "samples_per_s"}:
            assert row[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-6), key
    one_result, two_result = (RunFolder(at).read_result() for at in (path, other))
    assert one_result is not None and two_result is not None
    assert one_result.keys() == two_result.keys()
    for key in ("status", "error", "config_hash", "seed", "dataset", "device"):
        assert one_result[key] == two_result[key]
    assert one_result["best"]["epoch"] == two_result["best"]["epoch"]
    assert one_result["test"]["loss"] == pytest.approx(two_result["test"]["loss"], rel=1e-3)
    names = [sorted(file.name for file in at.iterdir()) for at in (path, other)]
    assert names[0] == names[1]


def is_fused(run: Path) -> bool:
    return "trained as one stack" in (run / "train.log").read_text()


# --- as alone ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        (*TINY, "optim=sgd,momentum,adam,adamw,rmsprop,adagrad,adadelta", "seed=3,4"),
        (*TINY, "loss.label_smoothing=0,0.2", "schedule=step,cosine", "model.dropout=0,0.4"),
        (*TINY, "optim.lr=0.01,0.5", "early_stop.patience=1", "monitor=val_loss", "epochs=6"),
        (*TINY, "optim.weight_decay=0,0.1", "dataset.val_fraction=0", "predictions=true"),
        (*LINE, "optim.lr=0.01,0.1", "seed=0,1", "predictions=true"),
    ],
    ids=["optimizers", "schedules", "early_stop", "no_validation", "regression"],
)
def test_every_job_ends_as_alone(mnist_cli: Program, words: tuple[str, ...]) -> None:
    for name, is_wanted in (("a", "auto"), ("b", "false")):
        line = ("train", "-m", *words, f"sweep.fused={is_wanted}", f"out={name}", "--quiet")
        assert mnist_cli(*line) == (0, "", "")
    together, alone = folders(Path("a")), folders(Path("b"))
    assert together.keys() == alone.keys()
    for name, path in together.items():
        assert is_fused(path) and not is_fused(alone[name])
        assert_same(path, alone[name])
    ranked = [[row["config"] for row in board_of(Path(name))["rows"]] for name in ("a", "b")]
    assert sorted(map(str, ranked[0])) == sorted(map(str, ranked[1]))


def test_what_a_stack_leaves_is_a_run_like_any_other(mnist_cli: Program) -> None:
    words = ("train", "-m", *TINY, "optim.lr=0.01,0.02", "seed=0,1", "report=true", "out=a")
    assert mnist_cli(*words, "--quiet") == (0, "", "")
    for path in folders(Path("a")).values():
        outcome = mnist_cli("eval", f"checkpoint={path}", "--json")
        assert json.loads(outcome.stdout)["metrics"] == outcome_of(path)["result"]["test"]
        faults.assert_agrees(path)
        assert (path / "report.html").exists()
        shares = RunFolder(path).read_result() or {}
        assert 4 * shares["time"]["train_s"] <= shares["time"]["total_s"]
    before = states(Path("a"))
    assert mnist_cli(*(w.replace("out=", "sweep.resume=") for w in words), "--quiet").code == 0
    assert states(Path("a")) == before
    assert mnist_cli("export", f"checkpoint={path}", "format=onnx", "--quiet").code == 0
    assert mnist_cli("train", f"resume={path}", "epochs=4", "--quiet") == (0, "", "")
    assert mnist_cli("train", *TINY, "optim.lr=0.02", "seed=1", "epochs=4", "out=b").code == 0
    for name in ("model", "optim"):
        one, two = (
            getattr(checkpoint.load(at / "last.safetensors"), name) for at in (path, Path("b"))
        )
        assert all(one[key].isclose(two[key], rtol=1e-3, atol=1e-4).all() for key in two)


def test_data_that_takes_too_much_memory_is_not_all_there_at_once(
    mnist_cli: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("train", "-m", *TINY, "optim.lr=0.01,0.02", "seed=0,1,2", "--quiet")
    assert mnist_cli(*words, "out=a") == (0, "", "")
    monkeypatch.setattr(fused, "MAX_DATA_BYTES", 1)
    assert mnist_cli(*words, "out=b") == (0, "", "")
    for name, path in folders(Path("b")).items():
        assert "one of 2 jobs" in (path / "train.log").read_text()
        assert_same(path, Path("a") / name)


def test_a_signal_does_not_wait_for_the_data(
    mnist_cli: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[DatasetConfig] = []

    def official(config: DatasetConfig) -> Dataset:
        asked.append(config)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the signal was kept for later")

    monkeypatch.setattr(dataset, "official", official)
    outcome = mnist_cli("train", "-m", *TINY, "optim.lr=0.01,0.02", "seed=0", "out=a", "--json")
    assert outcome.code == 130
    assert [job["exit_code"] for job in json.loads(outcome.stdout)["jobs"]] == [130, 130]
    assert outcome.error == "interrupted with 2 of 2 jobs left; what is done is in a"
    assert len(asked) == 1 and not folders(Path("a"))


# --- which jobs ----------------------------------------------------------------------------------


def test_what_can_be_stacked_is_and_the_rest_runs_alone(mnist_cli: Program) -> None:
    words = ("dataset=digits", "epochs=2", "model=cnn,linear", "optim.lr=0.01,0.02")
    outcome = mnist_cli("train", "-m", *words, "sweep.fused=true", "out=a")
    assert outcome.code == 0
    lines = outcome.stdout.splitlines()
    assert lines[0] == "alone    2 of 4 jobs: model=cnn can't be stacked"
    assert "start    2 of 4 jobs, trained as one stack" in lines
    assert sum(line.startswith("done ") for line in lines) == 4
    assert [is_fused(path) for path in folders(Path("a")).values()] == [False, False, True, True]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("model=cnn", "seed=0,1"), "be trained as one: model=cnn can't be stacked"),
        (
            ("model=mlp", "seed=0,1", "logger=[tensorboard,wandb]"),
            "be trained as one: logger=[tensorboard,wandb] can't be stacked",
        ),
        (("model=mlp", "batch_size=32,64"), "be trained as one: they differ in too much"),
        (("model=mlp", "seed=0"), "be trained as one: they differ in too much"),
        (
            ("model=mlp", "optim=adam,sgd", "sweep.search=optuna"),
            "sweep.fused=true doesn't go with sweep.search=optuna",
        ),
        (("model=mlp", "seed=0,1", "sweep.fused=maybe"), "sweep.fused='maybe' is not a choice"),
    ],
)
def test_true_needs_something_to_stack(
    mnist_cli: Program, words: tuple[str, ...], error: str
) -> None:
    outcome = mnist_cli("train", "-m", "dataset=digits", "sweep.fused=true", *words)
    assert outcome.code == 2
    assert error in outcome.error
    assert os.listdir() == []


def config_with(**values: Any) -> TrainConfig:
    plain: dict[str, Any] = {
        "model": {"name": "linear"}, "loss": {"name": "mse"},
        "optim": {"name": "adam", "lr": 0.1, "betas": [0.9, 0.9], "eps": 1e-8, "weight_decay": 0.0},
        "dataset": {"name": "digits", "val_fraction": 0.1},
        "schedule": {"name": "constant", "warmup_epochs": 0.0},
        "seed": 0, "epochs": 1, "batch_size": 64, "device": "auto", "precision": "float32",
        "compile": False, "cuda_graph": False, "grad_clip": None, "grad_accum": 1,
        "monitor": "auto", "early_stop": {"patience": None}, "save_every": None, "resume": None,
        "resume_allow": [],
        "profile": False, "plugin": [], "report": True, "logger": [], "predictions": False,
        "out": None,
    }  # fmt: skip
    return train_config(plain | values)


def sweep_with(**values: Any) -> SweepConfig:
    defaults = SweepConfig(
        jobs=1, fused="auto", resume=None, fail_fast=False, search="grid", trials=1,
        sampler="tpe", pruner="none", objectives=(),
    )  # fmt: skip
    return dataclasses.replace(defaults, **values)


@given(
    chosen=st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from([32, 64, 128])), min_size=1, max_size=150
    ),
    jobs=st.integers(1, 5),
    fused=st.sampled_from(["auto", "true", "false"]),
)
@example(chosen=[(place % 4, 64) for place in range(150)], jobs=1, fused="auto")
@settings(max_examples=60, deadline=None)
def test_every_job_is_planned_once(chosen: Any, jobs: int, fused: str) -> None:
    configs = [config_with(seed=seed, batch_size=size) for seed, size in chosen]
    plan = planned(configs, sweep_with(jobs=jobs, fused=fused))
    assert sorted(place for group in plan for place in group.members) == list(range(len(configs)))
    for group in plan:
        assert list(group.members) == sorted(group.members)
        assert len({configs[place].batch_size for place in group.members}) == 1
        assert len(group.members) < MAX_MEMBERS + 4
        assert fused != "false" or len(group.members) == 1
    if fused != "false":
        assert len(plan) >= len(groups(configs))
    firsts = [group.members[0] for group in plan]
    assert firsts == sorted(firsts)


def test_what_goes_wrong_behind_the_result_of_a_job_disturbs_no_other(
    mnist_cli: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, failed = outcome.show, []

    def show(run: outcome.Run, *arguments: Any) -> None:
        if not failed:
            failed.append(run)
            raise RuntimeError("odd")
        real(run, *arguments)

    monkeypatch.setattr(outcome, "show", show)
    words = ("train", "-m", *TINY, "seed=0,1,2", "sweep.fused=true", "out=a", "--json")
    jobs = json.loads(mnist_cli(*words).stdout)["jobs"]
    assert sorted(job.get("error") or "" for job in jobs) == ["", "", "RuntimeError: odd"]
    [row] = board_of(Path("a"))["rows"]
    assert (row["n"], [job["state"] for job in row["failed"]]) == (2, ["failed"])


def test_a_group_is_divided_among_processes_by_jobs_not_by_seeds() -> None:
    configs = [config_with(seed=seed) for seed in (0, 0, 0, 0, 1, 1, 1, 1)]
    plan = planned(configs, sweep_with(jobs=2))
    assert [group.members for group in plan] == [(0, 1, 4, 5), (2, 3, 6, 7)]


def test_auto_stacks_what_is_faster_so() -> None:
    def model(hidden: list[int] | None) -> Any:
        return {"name": "linear"} if hidden is None else {
            "name": "mlp", "hidden": hidden, "dropout": 0.0,
        }  # fmt: skip

    for hidden, is_faster in ((None, True), ([], True), ([WIDEST], True), ([8, WIDEST + 1], False)):
        configs = [config_with(model=model(hidden), seed=seed) for seed in range(3)]
        assert isinstance(configs[0].model, LinearModelConfig | MlpConfig)
        assert len(planned(configs, sweep_with())) == (1 if is_faster else 3)
        assert len(planned(configs, sweep_with(fused="true"))) == 1


# --- what goes wrong -----------------------------------------------------------------------------


def test_a_job_that_diverges_disturbs_no_other(mnist_cli: Program) -> None:
    words = ("train", "-m", *TINY, "seed=0,1")
    assert mnist_cli(*words, "optim.lr=0.01,0.02", "out=a", "--quiet").code == 0
    outcome = mnist_cli(*words, "optim.lr=0.01,1e30,0.02", "out=b", "--json")
    assert outcome.code == 1
    jobs = json.loads(outcome.stdout)["jobs"]
    lost = [job for job in jobs if "exit_code" in job]
    assert len(jobs) == 6 and [job["exit_code"] for job in lost] == [5, 5]
    for job in lost:
        assert "training diverged: the loss is " in job["error"]
        result = RunFolder(Path(job["run_dir"])).read_result() or {}
        assert (result["status"], result["error"]) == ("diverged", job["error"])
        assert f"error: {job['error']}" in (Path(job["run_dir"]) / "train.log").read_text()
    alone = mnist_cli("train", *TINY, "optim.lr=1e30", "out=c")
    assert alone.code == 5 and alone.error == lost[0]["error"]
    for name, path in folders(Path("a")).items():
        assert_same(Path("b") / name, path)


def test_what_no_job_can_begin_with_is_the_error_of_each(
    mnist_cli: Program, real_mnist: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "train-images-idx3-ubyte").write_bytes(b"no images")
    words = ("train", "-m", "model=linear", "epochs=1", "batch_size=1000", "optim.lr=0.1,0.01")
    assert mnist_cli(*words, f"dataset.root={data}", "out=a").code == 1
    failed = [job for row in board_of(Path("a"))["rows"] for job in row["failed"]]
    assert len(failed) == 2
    assert all("train-images-idx3-ubyte" in job["error"] for job in failed)
    again = mnist_cli(*words, f"dataset.root={real_mnist}", "sweep.resume=a", "--quiet")
    assert again == (0, "", "")
    assert len(states(Path("a"))) == 2


@pytest.mark.parametrize(
    ("error", "code", "hint"),
    [
        (RuntimeError("can't allocate memory"), 6, "type sweep.fused=false"),
        (ValueError("odd"), 1, "this is a fault of mnist-cli"),
    ],
)
def test_a_stack_that_fails_is_the_failure_of_its_jobs(
    mnist_cli: Program, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, hint: str
) -> None:
    def rounds(*arguments: Any) -> Any:
        raise error

    monkeypatch.setattr(stacked, "rounds", rounds)
    outcome = mnist_cli("train", "-m", *TINY, "seed=0,1", "out=a", "--json")
    assert outcome.code == 1
    jobs = json.loads(outcome.stdout)["jobs"]
    assert [(job["exit_code"], job["hint"]) for job in jobs] == [(code, hint)] * 2
    for path in folders(Path("a")).values():
        result = RunFolder(path).read_result() or {}
        assert result["status"] == "failed"
        assert code != 1 or "ValueError: odd" in (path / "train.log").read_text().splitlines()


# --- going on ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def eight(server: Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """`EIGHT`, never interrupted, and the seconds that it took."""
    folder = tmp_path_factory.mktemp("eight") / "sweep"
    ended = server.run(faults.program, [*EIGHT, f"out={folder}"])
    assert ended.code == 0
    return folder, ended.seconds


def assert_whole(sweep: Path, eight: Path) -> None:
    assert folders(sweep).keys() == folders(eight).keys()
    for name, path in folders(sweep).items():
        assert_same(path, eight / name)
        assert not temporaries(path)
    (row, other), (first, second) = (board_of(at)["rows"] for at in (sweep, eight))
    assert (row["config"], other["config"]) == (first["config"], second["config"])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_every_job(server: Server, tmp_path: Path, number: int, code: int) -> None:
    sweep, whole = tmp_path / "sweep", tmp_path / "whole"
    words = [*EIGHT, "epochs=20"]
    child = server.start(faults.program_in_group, [*words, f"out={sweep}"])
    child.wait_for(lambda: sum(1 for _ in sweep.glob("*/metrics.csv")) == 8)
    child.kill(number)
    ended = child.wait()
    assert ended.code == code
    assert "8 of 8 jobs left" in two_lines(ended.stderr)[0]
    results = [RunFolder(path).read_result() or {} for path in folders(sweep).values()]
    assert all(result["status"] == "interrupted" for result in results)
    assert all("everything is saved" in result["error"] for result in results)
    saved = [checkpoint.load(path / "last.safetensors") for path in folders(sweep).values()]
    assert len({found.progress.step for found in saved}) == 1
    assert server.run(faults.program, [*words, f"sweep.resume={sweep}"]).code == 0
    assert server.run(faults.program, [*words, f"out={whole}"]).code == 0
    assert_whole(sweep, whole)


def test_a_stack_that_is_cut_off_goes_on_as_one(mnist_cli: Program) -> None:
    words = ("train", "-m", *TINY, "optim.lr=0.01,0.02", "seed=0,1", "--quiet")
    assert mnist_cli(*words, "out=a").code == 0
    assert mnist_cli(*words, "out=b").code == 0
    for number, path in enumerate(folders(Path("b")).values()):
        (path / "result.json").unlink()
        if number < 3:  # of the last one only the result is missing
            shutil.copy(path / "best.safetensors", path / "last.safetensors")
    steps = {
        checkpoint.load(path / "last.safetensors").progress.step
        for path in folders(Path("b")).values()
    }
    assert mnist_cli(*words, "sweep.resume=b").code == 0
    for name, path in folders(Path("b")).items():
        assert_same(path, Path("a") / name)
        assert f"resuming at step {min(steps)}" in "".join(
            (other / "train.log").read_text() for other in folders(Path("b")).values()
        )


@pytest.mark.torture
def test_a_stack_killed_at_any_instant_loses_no_finished_job(
    server: Server, eight: tuple[Path, float], tmp_path: Path
) -> None:
    chance, kills, goal, runs = random.Random(2), 0, many(4, 50), 0
    while kills < goal:
        runs += 1
        sweep = tmp_path / f"sweep{runs}"
        kills += kills_until_done(server, EIGHT, sweep, (0.2, 0.95), eight[1], chance)
        assert_whole(sweep, eight[0])
        shutil.rmtree(sweep)
    figure("SIGKILL of a sweep of 8 jobs in one stack, then `sweep.resume`", kills, runs=runs)


def test_two_stacks_at_once_one_of_them_killed(
    server: Server, eight: tuple[Path, float], tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep"
    words = [*EIGHT, "epochs=60", "sweep.jobs=2"]
    child = server.start(faults.program, [*words, f"out={sweep}"])
    found: list[int] = []

    def is_busy() -> bool:
        found[:] = [pid for pid in children_of(child.pid) if busy(sweep, pid) is not None]
        return bool(found)

    child.wait_for(is_busy)
    os.kill(found[0], signal.SIGKILL)
    ended = child.wait()
    assert ended.code == 1
    assert "4 of 8 jobs failed" in two_lines(ended.stderr)[0]
    before = states(sweep)
    assert len(before) == 4 and all(is_fused(Path(path).parent) for path in before)
    errors = {job["error"] for row in board_of(sweep)["rows"] for job in row["failed"]}
    assert errors == {"the process of the job was ended by signal 9 (SIGKILL)"}
    assert server.run(faults.program, [*words, f"sweep.resume={sweep}"]).code == 0
    assert before.items() < states(sweep).items() and len(states(sweep)) == 8
