"""A run that was stopped, killed or damaged ends as if nothing had happened, or says why not."""

from __future__ import annotations

import dataclasses
import errno
import functools
import itertools
import json
import os
import random
import shutil
import time
import types
from collections.abc import Callable
from pathlib import Path

import faults
import pytest
import torch
from faults import (
    TRAIN,
    Server,
    assert_agrees,
    figure,
    here,
    many,
    metrics_rows,
    outcome_of,
    state_of,
    temporaries,
    two_lines,
)

from mnist_cli import checkpoint, conf, cpu, loop, outcome, runtime, train, train_step
from mnist_cli.console import Console
from mnist_cli.learner import Learner
from mnist_cli.run import RunFolder

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIMIZERS = {
    "momentum": ("optim=momentum",),
    "adamw": ("optim=adamw",),
    "rmsprop": ("optim=rmsprop", "optim.momentum=0.9"),
    "adadelta": ("optim=adadelta",),
}
SCHEDULES = {
    "constant": ("schedule=constant", "schedule.warmup_epochs=0.5"),
    "step": ("schedule=step", "schedule.step_epochs=1", "schedule.gamma=0.5"),
    "cosine": ("schedule=cosine",),
    "onecycle": ("schedule=onecycle", "schedule.warmup_epochs=0.3"),
}


class Stops:
    """A run, and its folder as a kill after any of its saves would have left it."""

    def __init__(self, parent: Path, *words: str) -> None:
        self.folder, self._snapshots = parent / "run", parent / "snapshots"
        self.lrs: dict[int, float] = {}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "save", self._noting_save(loop.save))
            patch.setattr(outcome, "save", loop.save)
            patch.setattr(train_step, "set_lr", noting_lr(self.lrs))
            patch.setattr(os, "fsync", lambda descriptor: None)  # no power cut here, but in a hurry
            ended = here(*TRAIN, *words, "save_every=1", f"out={self.folder}", "--quiet")
        assert (ended.code, ended.stderr) == (0, "")
        self.outcome = outcome_of(self.folder)

    def _noting_save(
        self, real: Callable[[Learner, Path], None]
    ) -> Callable[[Learner, Path], None]:
        def save(learner: Learner, path: Path) -> None:
            real(learner, path)
            if path.name == "last.safetensors":
                target = self._snapshots / str(learner.progress.step)
                shutil.copytree(self.folder, target, dirs_exist_ok=True)

        return save

    @property
    def steps(self) -> list[int]:
        return sorted(int(path.name) for path in self._snapshots.iterdir())

    def after(self, step: int, folder: Path) -> Path:
        """The run folder as it was after `step`, at `folder`."""
        return shutil.copytree(self._snapshots / str(step), folder)

    def resume(self, folder: Path) -> dict[int, float]:
        """Run what is in `folder` to its end; the learning rate of each step on the way."""
        lrs: dict[int, float] = {}
        config = checkpoint.load(folder / "last.safetensors").config
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_step, "set_lr", noting_lr(lrs))
            patch.setattr(os, "fsync", lambda descriptor: None)
            train.run(
                dataclasses.replace(config, resume=str(folder), out=None), Console(quiet=True)
            )
        return lrs


def noting_lr(lrs: dict[int, float]) -> Callable[[Learner, int], None]:
    real = train_step.set_lr

    def set_lr(learner: Learner, step: int) -> None:
        real(learner, step)
        [group] = learner.optimizer.param_groups
        lrs[step] = group["lr"]

    return set_lr


@pytest.fixture(scope="module")
def stops(tmp_path_factory: pytest.TempPathFactory) -> Stops:
    """The plain run of these tests: 60 steps, 3 epochs, dropout, Adam."""
    return Stops(tmp_path_factory.mktemp("plain"))


# --- the same bits -------------------------------------------------------------------------------


@pytest.mark.torture
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_a_run_resumed_at_a_step_ends_with_the_same_bits(
    tmp_path: Path, optim: str, schedule: str
) -> None:
    stops = Stops(tmp_path, *OPTIMIZERS[optim], *SCHEDULES[schedule])
    assert stops.steps == list(range(61)) and sorted(stops.lrs) == list(range(60))
    steps = (
        range(60) if faults.TORTURE else {0, *random.Random(optim + schedule).sample(range(60), 2)}
    )
    for step in steps:
        folder = stops.after(step, tmp_path / f"after{step}")
        lrs = stops.resume(folder)
        assert lrs == {at: lr for at, lr in stops.lrs.items() if at >= step}
        assert outcome_of(folder) == stops.outcome, f"step {step}"
        shutil.rmtree(folder)
    assert_agrees(stops.folder)
    figure("resumes at a step, 16 mixes", len(steps))


@pytest.mark.torture
def test_sigkill_at_any_instant_loses_nothing(server: Server, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    words = [*TRAIN, "save_every=5", "--quiet"]
    reference = server.run(faults.program, [*words, f"out={plain}"])
    assert reference.code == 0
    expected = outcome_of(plain)
    chance, kills, runs, goal = random.Random(0), 0, 0, many(15, 1000)
    while kills < goal:
        folder = tmp_path / f"run{runs}"
        while True:
            child = server.start(faults.program, [*words, "resume=auto", f"out={folder}"])
            time.sleep(chance.uniform(0.02, 1) * reference.seconds)
            child.kill()
            ended = child.wait()
            if ended.code == 0:
                break
            assert ended.code == -9, ended.stderr
            kills += 1
            for path in folder.glob("*.safetensors"):
                state_of(path)
        assert outcome_of(folder) == expected
        assert_agrees(folder)
        assert not temporaries(folder)
        shutil.rmtree(folder)
        runs += 1
    figure("SIGKILL at a random instant of training, then resume", kills, runs=runs)


@pytest.mark.torture
def test_kills_before_the_first_save_leave_nothing_in_the_way(
    server: Server, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    words = [*TRAIN, "resume=auto", f"out={folder}", "--quiet"]
    for _ in range(many(5, 50)):
        (folder / ".lock").unlink(missing_ok=True)
        child = server.start(faults.program, words)
        child.wait_for((folder / ".lock").exists)
        child.kill()
        child.wait()
        if (folder / "last.safetensors").exists():
            state_of(folder / "last.safetensors")
    assert server.run(faults.program, words).code == 0
    assert_agrees(folder)
    assert not temporaries(folder)


@pytest.mark.torture
def test_one_job_alone_in_a_sweep_and_resumed_is_one_result(tmp_path: Path, stops: Stops) -> None:
    sweep = tmp_path / "sweep"
    ended = here("-m", *TRAIN, "seed=1,0", "save_every=1", f"out={sweep}", "--quiet")
    assert (ended.code, ended.stderr) == (0, "")
    outcomes = [outcome_of(path) for path in sweep.iterdir() if (path / "result.json").exists()]
    assert len(outcomes) == 2
    resumed = stops.after(33, tmp_path / "resumed")
    stops.resume(resumed)
    assert stops.outcome in outcomes
    assert outcome_of(resumed) == stops.outcome
    assert outcomes[0]["last"]["tensors"] != outcomes[1]["last"]["tensors"]
    figure("one job alone, in a sweep and resumed: hashes", 1)


@pytest.mark.torture
def test_the_state_of_early_stopping_survives(tmp_path: Path) -> None:
    """At this rate nothing gets better: patience is used up at the same epoch."""
    stops = Stops(tmp_path, "epochs=8", "optim.lr=1e-12", "early_stop.patience=3", "batch_size=400")
    assert stops.outcome["last"]["stale_epochs"] == 3
    assert len(stops.outcome["metrics"]) == 4
    for step in range(4, 16, 1 if faults.TORTURE else 3):
        folder = stops.after(step, tmp_path / f"after{step}")
        stops.resume(folder)
        assert outcome_of(folder) == stops.outcome


def test_a_run_without_a_validation_split_resumes(tmp_path: Path) -> None:
    stops = Stops(tmp_path, "dataset.val_fraction=0", "batch_size=400")
    for step in (0, 3, 4, 5):
        folder = stops.after(step, tmp_path / f"after{step}")
        assert not (folder / "best.safetensors").exists()
        stops.resume(folder)
        assert outcome_of(folder) == stops.outcome
    assert stops.outcome["result"]["best"]["monitor"] is None


def test_gradient_accumulation_and_clipping_resume(tmp_path: Path) -> None:
    stops = Stops(tmp_path, "grad_accum=3", "grad_clip=0.1", "model.dropout=0.5")
    assert stops.steps[-1] == 21
    for step in (1, 7, 10):
        folder = stops.after(step, tmp_path / f"after{step}")
        stops.resume(folder)
        assert outcome_of(folder) == stops.outcome


def test_saves_are_so_many_seconds_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that counts the steps: 20 an epoch."""
    taken: list[int] = []
    saved: list[int] = []
    take_step, save = train_step.take_step, loop.save

    def counting_step(learner: Learner, indices: torch.Tensor, step: int) -> float:
        taken.append(step)
        return take_step(learner, indices, step)

    def noting_save(learner: Learner, path: Path) -> None:
        save(learner, path)
        if path.name == "last.safetensors":
            saved.append(learner.progress.step)

    clock = types.SimpleNamespace(
        perf_counter=time.perf_counter, monotonic=lambda: float(len(taken))
    )
    monkeypatch.setattr(loop, "time", clock)
    monkeypatch.setattr(loop, "save", noting_save)
    monkeypatch.setattr(train_step, "take_step", counting_step)
    ended = here(*TRAIN, "epochs=2", "save_every=8s", f"out={tmp_path / 'run'}", "--quiet")
    assert ended.code == 0
    assert saved == [8, 16, 20, 28, 36, 40]


# --- damage --------------------------------------------------------------------------------------

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "truncated at 0 %": lambda data: b"",
    "truncated at 1 %": lambda data: data[: len(data) // 100],
    "truncated at 50 %": lambda data: data[: len(data) // 2],
    "truncated at 99 %": lambda data: data[: len(data) * 99 // 100],
    "zeros": lambda data: bytes(len(data)),
    "a tail of zeros": lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2),
    "a flipped bit": lambda data: data[:-1000] + bytes([data[-1000] ^ 1]) + data[-999:],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_last_checkpoint_falls_back_to_the_best(
    stops: Stops, tmp_path: Path, damage: str
) -> None:
    folder = stops.after(33, tmp_path / "run")
    last = folder / "last.safetensors"
    last.write_bytes(DAMAGES[damage](last.read_bytes()))
    ended = here("train", f"resume={folder}")
    assert ended.code == 0
    why, how = ended.stderr.splitlines()
    assert why.startswith("warning: ") and str(last) in why
    assert how == f"warning: going on from {folder}/best.safetensors, at step 20"
    assert outcome_of(folder) == stops.outcome


def test_two_damaged_checkpoints_are_both_named_and_nothing_is_started_anew(
    stops: Stops, tmp_path: Path
) -> None:
    folder = stops.after(33, tmp_path / "run")
    (folder / "last.safetensors").write_bytes(b"")
    best = (folder / "best.safetensors").read_bytes()
    (folder / "best.safetensors").write_bytes(best[:-1] + bytes([best[-1] ^ 128]))
    for words in ([f"resume={folder}"], ["resume=auto", f"out={folder}"]):
        ended = here("train", *words, "--quiet")
        assert ended.code == 4
        error, hint = two_lines(ended.stderr)
        assert "last.safetensors: is not a safetensors file" in error
        assert "best.safetensors: is damaged: its digest" in error
        assert "start it anew" in hint
    assert (folder / "last.safetensors").read_bytes() == b""


@pytest.mark.parametrize(
    "tail",
    [
        b"3,4",
        b"2",
        b"\n",
        b"\x00" * 100,
        b"\x00\x00\n",
        b"\xff\xfe,1\n",
        b"x,y,z\n",
        b"9" * 30 + b",1\n",
    ],
)
def test_a_torn_metrics_file_is_mended(stops: Stops, tmp_path: Path, tail: bytes) -> None:
    folder = stops.after(33, tmp_path / "run")
    with open(folder / "metrics.csv", "ab") as file:
        file.write(tail)
    stops.resume(folder)
    assert outcome_of(folder) == stops.outcome


def test_rows_of_epochs_that_were_not_saved_are_written_again(stops: Stops, tmp_path: Path) -> None:
    folder = stops.after(33, tmp_path / "run")
    shutil.copy(stops.folder / "metrics.csv", folder)
    stops.resume(folder)
    assert outcome_of(folder) == stops.outcome


def test_a_metrics_file_that_is_gone_is_missed(stops: Stops, tmp_path: Path) -> None:
    folder = stops.after(43, tmp_path / "run")
    (folder / "metrics.csv").unlink()
    ended = here("train", f"resume={folder}")
    assert ended.code == 0
    assert ended.stderr == f"warning: {folder}/metrics.csv has 0 of the 2 epochs so far\n"


def test_a_sweep_is_no_run_to_go_on_with(tmp_path: Path) -> None:
    ended = here("train", "-m", *TRAIN[1:], "epochs=1", "seed=0,1", f"out={tmp_path}", "--quiet")
    assert ended.code == 0
    error, hint = two_lines(here("train", f"resume={tmp_path}").stderr)
    assert error.endswith("holds no checkpoint") and f"sweep.resume={tmp_path}" in hint
    _, hint = two_lines(here("report", f"run={tmp_path},{tmp_path}").stderr)
    assert hint == "the page of a sweep stands alone: name one sweep, or two runs"


@pytest.mark.parametrize("content", [b"", b"epoch,st", b"\x00" * 50, b"\x00\n\x00\n"])
def test_a_metrics_file_without_its_head_is_begun_anew(
    stops: Stops, tmp_path: Path, content: bytes
) -> None:
    folder = stops.after(33, tmp_path / "run")
    (folder / "metrics.csv").write_bytes(content)
    stops.resume(folder)
    assert metrics_rows(folder) == stops.outcome["metrics"][1:]
    assert state_of(folder / "last.safetensors") == stops.outcome["last"]


def test_a_torn_result_is_written_anew(stops: Stops, tmp_path: Path) -> None:
    folder = stops.after(33, tmp_path / "run")
    for text in ("", "{", "[]", '"x"', "{}", '{"status": "completed"}'):
        (folder / "result.json").write_text(text)
        ended = here("train", f"resume={folder}", "--quiet")
        assert (ended.code, ended.stderr) == (0, "")
        assert outcome_of(folder) == stops.outcome


def test_times_are_those_of_all_sessions(stops: Stops, tmp_path: Path) -> None:
    folder = stops.after(33, tmp_path / "run")
    path, before = folder / "result.json", checkpoint.load(folder / "last.safetensors").progress
    started = {"total_s": 900.0, "startup_s": 400.0, "data_s": 300.0, "train_s": 0, "eval_s": 100.0}
    trained_s = before.train_s + before.epoch_s
    assert trained_s > 0
    path.write_text(json.dumps(json.loads(path.read_text()) | {"time": started}))
    stops.resume(folder)
    times = json.loads(path.read_text())["time"]
    assert all(times[name] > seconds for name, seconds in started.items())
    assert times["total_s"] >= started["total_s"] + times["train_s"]  # no step was lost by the kill
    assert times["train_s"] > trained_s


def test_an_epoch_counts_the_seconds_before_it_was_stopped(stops: Stops, tmp_path: Path) -> None:
    saved = [
        checkpoint.load(stops.after(step, tmp_path / f"{step}") / "last.safetensors")
        for step in (21, 33, 39)
    ]
    seconds = [each.progress.epoch_s for each in saved]
    assert 0 < seconds[0] < seconds[1] < seconds[2]
    folder = tmp_path / "33"
    progress = dataclasses.replace(saved[1].progress, epoch_s=1e4)
    checkpoint.save(folder / "last.safetensors", dataclasses.replace(saved[1], progress=progress))
    stops.resume(folder)
    rows = RunFolder(folder).read_metrics()
    assert [row["seconds"] > 1e4 for row in rows] == [False, True, False]
    times = json.loads((folder / "result.json").read_text())["time"]
    assert times["train_s"] == pytest.approx(sum(row["seconds"] for row in rows))


@pytest.mark.parametrize("times", [None, [], {"eval_s": -9.0, "data_s": "x", "total_s": True}])
def test_times_that_are_none_count_nothing(stops: Stops, tmp_path: Path, times: object) -> None:
    folder = stops.after(33, tmp_path / "run")
    path = folder / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"time": times}))
    stops.resume(folder)
    found = json.loads(path.read_text())["time"]
    assert min(found.values()) >= 0
    assert found["total_s"] >= found["data_s"] + found["train_s"] + found["eval_s"]


# --- what may change, and what may not -----------------------------------------------------------


def test_a_finished_run_is_left_alone(stops: Stops, tmp_path: Path) -> None:
    folder = shutil.copytree(stops.folder, tmp_path / "run")

    def stamps() -> dict[str, int]:
        paths = [path for path in folder.iterdir() if path.name != ".lock"]
        return {path.name: path.stat().st_mtime_ns for path in paths}

    before = stamps()
    for words in ([f"resume={folder}"], ["resume=auto", f"out={folder}"]):
        ended = here("train", *words)
        assert (ended.code, ended.stderr) == (0, "")
        assert ended.stdout == f"{folder} is already complete at step 60\n"
        assert stamps() == before
    result = json.loads((folder / "result.json").read_text())
    document = json.loads(here("train", f"resume={folder}", "--json").stdout)
    assert document == result | {"run_dir": str(folder)}  # it was copied
    ended = here("train", f"resume={folder}", f"out={folder}/../{folder.name}", "report=true")
    assert (ended.code, ended.stderr) == (
        0, "warning: report changed nothing: there was nothing to train\n",
    )  # fmt: skip


def test_a_new_run_never_overwrites_an_old_one(stops: Stops, tmp_path: Path) -> None:
    folder = stops.after(33, tmp_path / "run")
    ended = here(*TRAIN, f"out={folder}")
    assert ended.code == 2
    error, hint = two_lines(ended.stderr)
    assert error == f"out={folder} holds a run already" and "resume=auto" in hint
    assert state_of(folder / "last.safetensors")["step"] == 33


@pytest.mark.parametrize("schedule", ["constant", "step"])
def test_epochs_may_grow_where_the_schedule_allows(tmp_path: Path, schedule: str) -> None:
    words = (*SCHEDULES[schedule], "batch_size=200")
    long = here(*TRAIN, *words, "epochs=5", f"out={tmp_path}/long", "--quiet")
    short = here(*TRAIN, *words, f"out={tmp_path}/short", "--quiet")
    grown = here("train", f"resume={tmp_path}/short", "epochs=5", "--quiet")
    assert (long.code, short.code, grown.code) == (0, 0, 0)
    assert outcome_of(tmp_path / "short") == outcome_of(tmp_path / "long")


@pytest.mark.parametrize("schedule", ["cosine", "onecycle"])
def test_epochs_may_not_grow_where_the_rate_would_change(tmp_path: Path, schedule: str) -> None:
    folder = tmp_path / "run"
    assert here(*TRAIN, *SCHEDULES[schedule], f"out={folder}", "--quiet").code == 0
    ended = here("train", f"resume={folder}", "epochs=5")
    assert ended.code == 2
    error, hint = two_lines(ended.stderr)
    assert error == "epochs=5 differs from the run's epochs=3"
    assert hint.endswith("or allow it: resume_allow=[epochs]")
    _, hint = two_lines(here("train", f"resume={folder}", "epochs=2").stderr)
    assert hint.endswith("or, if no more than 2 are done, allow it: resume_allow=[epochs]")


@pytest.mark.parametrize(
    ("word", "message", "may_be_allowed"),
    [
        ("seed=1", "seed=1 differs from the run's seed=0", False),
        ("batch_size=32", "batch_size=32 differs from the run's batch_size=69", False),
        ("grad_accum=2", "grad_accum=2 differs from the run's grad_accum=1", False),
        ("model=linear", "model=linear differs from the run's model=mlp", False),
        (
            "model=mlp model.hidden=[32]",
            "model.hidden=[32] differs from the run's model.hidden=[16]",
            False,
        ),
        (
            "model=mlp model.dropout=0",
            "model.dropout=0.0 differs from the run's model.dropout=0.2",
            False,
        ),
        ("dataset=mnist", "dataset=mnist differs from the run's dataset=digits", False),
        ("dataset.val_fraction=0.2", "dataset.val_fraction=0.2 differs", False),
        ("optim=sgd", "optim=sgd differs from the run's optim=adam", False),
        ("loss=mse", "loss=mse differs from the run's loss=cross_entropy", False),
        ("optim.lr=0.5", "optim.lr=0.5 differs from the run's optim.lr=0.001", True),
        ("schedule=cosine", "schedule=cosine differs from the run's schedule=constant", True),
        ("epochs=2", "epochs=2 differs from the run's epochs=3", True),
        ("grad_clip=1", "grad_clip=1.0 differs from the run's grad_clip=null", True),
        ("early_stop.patience=2", "early_stop.patience=2 differs", True),
        ("monitor=val_loss", "monitor=val_loss differs from the run's monitor=auto", False),
    ],
)
def test_a_key_that_would_change_the_run_is_refused_by_its_name(
    stops: Stops, tmp_path: Path, word: str, message: str, may_be_allowed: bool
) -> None:
    folder = stops.after(33, tmp_path / "run")
    before = {path: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}
    ended = here("train", f"resume={folder}", *word.split())
    assert ended.code == 2
    error, hint = two_lines(ended.stderr)
    assert error.startswith(message)
    assert ("resume_allow=" in hint) is may_be_allowed
    if not may_be_allowed:
        key = message.partition("=")[0]
        assert here("train", f"resume={folder}", *word.split(), f"resume_allow=[{key}]").code == 2
    assert before == {path: path.read_bytes() for path in before}


def test_a_key_that_is_allowed_changes_the_rest_of_the_run(stops: Stops, tmp_path: Path) -> None:
    folder = stops.after(20, tmp_path / "run")
    ended = here("train", f"resume={folder}", "optim.lr=0.01", "resume_allow=[optim.lr]", "--quiet")
    assert (ended.code, ended.stderr) == (0, "")
    assert [float(row["lr"]) for row in metrics_rows(folder)] == [0.001, 0.01, 0.01]
    assert metrics_rows(folder)[0] == stops.outcome["metrics"][0]


@pytest.mark.parametrize(
    ("optim", "before", "after"),
    [("sgd", 0.9, 0), ("sgd", 0, 0.9), ("rmsprop", 0.9, 0), ("rmsprop", 0, 0.9)],
)
def test_momentum_may_come_and_go(tmp_path: Path, optim: str, before: float, after: float) -> None:
    folder, momentum = tmp_path / "run", f"optim.momentum={before}"
    assert here(*TRAIN, f"optim={optim}", momentum, f"out={folder}", "--quiet").code == 0
    words = (f"resume={folder}", "epochs=5", f"optim.momentum={after}", "resume_allow=[optim]")
    ended = here("train", *words, "--quiet")
    assert (ended.code, ended.stderr) == (0, "")
    state_of(folder / "last.safetensors")  # refuses state that the optimizer doesn't keep
    assert here("train", f"resume={folder}", "epochs=6", "--quiet").code == 0


def test_momentum_that_has_just_come_survives_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a step is taken: the checkpoint then names a momentum that nothing was kept of."""

    def killed(learner: Learner, indices: torch.Tensor, step: int) -> float:
        raise KeyboardInterrupt

    for name in ("whole", "cut"):
        words = (*TRAIN, "optim=sgd", "dataset.val_fraction=0", f"out={tmp_path / name}")
        assert here(*words, "--quiet").code == 0
        words = ("epochs=5", "optim.momentum=0.9", "resume_allow=[optim.momentum]", "--quiet")
        if name == "cut":
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(train_step, "take_step", killed)
                here("train", f"resume={tmp_path / name}", *words)
        ended = here("train", f"resume={tmp_path / name}", *words[:-1])
        assert (ended.code, ended.stderr) == (0, "")
    assert outcome_of(tmp_path / "cut") == outcome_of(tmp_path / "whole")


def test_a_run_that_is_done_keeps_its_records(stops: Stops, tmp_path: Path) -> None:
    """Nothing is trained, so they would tell of settings that never were."""
    folder = stops.after(stops.steps[-1], tmp_path / "run")
    assert here("train", f"resume={folder}", "--quiet").code == 0
    before = {path: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}
    for word, key in (("optim.lr=0.5", "optim.lr"), ("grad_clip=1", "grad_clip")):
        ended = here("train", f"resume={folder}", word, f"resume_allow=[{key}]", "--quiet")
        assert ended.code == 2
        error, hint = two_lines(ended.stderr)
        assert error.startswith("the run is done after 3 epochs") and "epochs=4" in hint
    assert before == {path: path.read_bytes() for path in before}
    words = ("optim.lr=0.5", "resume_allow=[optim.lr]", "epochs=4", "--quiet")
    assert here("train", f"resume={folder}", *words).code == 0


@pytest.mark.parametrize("status", ["completed", "interrupted"])
def test_a_run_that_was_stopped_early_keeps_its_records(tmp_path: Path, status: str) -> None:
    """Also one that was interrupted when it was to be measured; and its hint leads on."""
    folder = tmp_path / "run"
    words = (*TRAIN, "optim=sgd", "optim.lr=1e-9", "epochs=9", "early_stop.patience=1", "--quiet")
    assert here(*words, f"out={folder}").code == 0
    path = folder / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"status": status}))
    config = (folder / "config.yaml").read_bytes()
    other = ("train", f"resume={folder}", "optim.lr=0.5", "--quiet")
    ended = here(*other, "resume_allow=[optim.lr]")
    assert ended.code == 2 and (folder / "config.yaml").read_bytes() == config
    error, hint = two_lines(ended.stderr)
    assert error.startswith("the run is done after 2 epochs")
    assert "early_stop.patience=null resume_allow=[early_stop]" in hint
    ended = here(*other, "early_stop.patience=null", "resume_allow=[early_stop,optim.lr]")
    assert (ended.code, ended.stderr) == (0, "")
    assert len(metrics_rows(folder)) == 9


def test_a_recipe_does_not_mix_with_what_a_run_holds(stops: Stops, tmp_path: Path) -> None:
    folder = stops.after(33, tmp_path / "run")
    ended = here("train", f"resume={folder}", "+experiment=cnn_adam", "--quiet")
    error, hint = two_lines(ended.stderr)
    assert ended.code == 2 and "+experiment" not in hint
    assert "experiment= name two configurations" in error
    recipe = ("train", "+experiment=linear_regression", "epochs=2", "report=false", "--quiet")
    auto = (*recipe, f"out={tmp_path / 'recipe'}", "resume=auto")
    assert here(*auto).code == 0
    assert here(*auto, "epochs=3").code == 0
    result = json.loads((tmp_path / "recipe/result.json").read_text())
    assert (result["model"]["name"], result["best"]["epoch"]) == ("linear", 3)


def test_all_of_an_option_of_ones_own_is_compared_with_the_run(
    stops: Stops, tmp_path: Path
) -> None:
    """It has the name of the run's optimizer, and another learning rate."""
    folder = stops.after(33, tmp_path / "run")
    (tmp_path / "mine/optim").mkdir(parents=True)
    text = (conf.conf_dir() / "optim/adam.yaml").read_text()
    (tmp_path / "mine/optim/slow.yaml").write_text(text.replace("lr: 0.001", "lr: 0.0001"))
    (tmp_path / "mine/optim/same.yaml").write_text(text)
    words = ("train", f"resume={folder}", "--config-dir", str(tmp_path / "mine"), "--quiet")
    ended = here(*words, "optim=slow")
    assert ended.code == 2
    assert two_lines(ended.stderr)[0].startswith("optim.lr=0.0001 differs from the run's")
    ended = here(*words, "optim=slow", "hydra.job.name=x")
    assert ended.code == 2 and "optim.lr=0.0001 differs" in ended.stderr
    assert here(*words, "optim=same").code == 0
    assert outcome_of(folder) == stops.outcome


def test_the_selected_weights_are_measured_by_their_own_loss(tmp_path: Path) -> None:
    """A run goes on with another loss and finds nothing better: `eval` repeats its numbers."""
    folder = tmp_path / "run"
    assert here(*TRAIN, "epochs=2", f"out={folder}", "--quiet").code == 0
    words = ("optim.lr=3", "loss.label_smoothing=0.2", "resume_allow=[optim.lr,loss]")
    ended = here("train", f"resume={folder}", "epochs=3", *words, "--quiet")
    assert (ended.code, ended.stderr) == (0, "")
    result = json.loads((folder / "result.json").read_text())
    assert result["best"]["epoch"] == 2
    ended = here("eval", f"checkpoint={folder}", "--json")
    assert json.loads(ended.stdout)["metrics"] == result["test"]


def test_what_does_not_change_the_run_may_differ(stops: Stops, tmp_path: Path) -> None:
    folder = stops.after(33, tmp_path / "run")
    ended = here("train", f"resume={folder}", "save_every=7", "device=cpu", "--quiet")
    assert (ended.code, ended.stderr) == (0, "")
    assert outcome_of(folder) == stops.outcome


def test_auto_starts_and_continues(stops: Stops, tmp_path: Path) -> None:
    folder = tmp_path / "new"
    ended = here(*TRAIN, "resume=auto", f"out={folder}", "save_every=1", "--quiet")
    assert (ended.code, ended.stderr) == (0, "")
    assert outcome_of(folder) == stops.outcome
    half = stops.after(33, tmp_path / "half")
    ended = here(*TRAIN, "resume=auto", f"out={half}")
    assert (ended.code, ended.stderr) == (0, "")
    assert "resuming at step 33" in ended.stdout
    assert outcome_of(half) == stops.outcome


@pytest.mark.parametrize(
    "name", ["missing", "a file", "empty", "x" * 300, "~nobody-of-this-name/run", "loop"]
)
def test_a_folder_that_holds_no_run_can_not_be_resumed(tmp_path: Path, name: str) -> None:
    (tmp_path / "a file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    ended = here("train", f"resume={name if name[0] == '~' else tmp_path / name}")
    assert ended.code == 4
    assert name[:10] in two_lines(ended.stderr)[0]


def test_another_number_of_threads_is_said(stops: Stops, server: Server, tmp_path: Path) -> None:
    folder = stops.after(33, tmp_path / "run")
    ended = server.run(faults.program_with_threads, ["train", f"resume={folder}"], 2)
    assert ended.code == 0
    assert "warning: the run had threads=1, here it is 2" in ended.stderr


def test_optimizer_state_that_does_not_fit_is_refused(stops: Stops, tmp_path: Path) -> None:
    """Fused optimizers walk through memory: state of another shape must never reach them."""
    folder = stops.after(33, tmp_path / "run")
    found = checkpoint.load(folder / "last.safetensors")
    name, step = "output.weight.exp_avg", "output.weight.step"
    weight, state = found.model["output.weight"], found.optim
    sound = {path: path.read_bytes() for path in folder.glob("*.safetensors")}
    damages: dict[str, dict[str, torch.Tensor]] = {
        "holds no state of the optimizer": {},
        f"lacks the tensors 'optim.{name}'": {k: v for k, v in state.items() if k != name},
        f"has a tensor 'optim.{name}' of shape []": state | {name: torch.tensor(0.0)},
        f"has unknown tensors 'optim.{name}2'": state | {f"{name}2": weight},
        f"has a tensor 'optim.{step}' of shape [10, 16]": state | {step: weight},
    }
    for reason, optim in damages.items():
        for path in sound:
            checkpoint.save(path, dataclasses.replace(found, optim=optim))
        ended = here("train", f"resume={folder}", "--quiet")
        assert ended.code == 4
        assert two_lines(ended.stderr)[0].count(reason) == 2  # the last and the best
    for path, content in sound.items():
        path.write_bytes(content)
    assert here("train", f"resume={folder}", "--quiet").code == 0


# --- numbers that are not finite, and memory -----------------------------------------------------


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["optim=sgd", "optim.lr=1e30"], "the loss is"),
        (["optim=sgd", "optim.lr=1e300", "save_every=1"], "the "),
        (["optim=adam", "optim.lr=1e38"], "the "),
    ],
)
def test_numbers_that_are_not_finite_end_the_run(
    tmp_path: Path, words: list[str], what: str
) -> None:
    folder = tmp_path / "run"
    ended = here(*TRAIN, *words, f"out={folder}", "--quiet")
    assert ended.code == 5
    error, hint = two_lines(ended.stderr)
    assert error.startswith(f"training diverged: {what}") and " at step " in error
    assert "with learning rate 1e+" in error and "optim.lr=" in hint
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "diverged" and result["error"] == error
    for path in folder.glob("*.safetensors"):
        state_of(path)  # refuses what is not finite
    lower = ["optim.lr=0.01", "resume_allow=[optim.lr]"]
    ended = here("train", f"resume={folder}", *lower, "--quiet")
    assert (ended.code, ended.stderr) == (0, "")


def gradient_of(parameter: torch.nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


@pytest.mark.parametrize("number", [torch.inf, -torch.inf, torch.nan])
def test_a_gradient_that_is_not_finite_ends_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: float
) -> None:
    """The loss is finite, and one parameter's gradient is not, at step 35 only."""
    folder, steps = tmp_path / "run", itertools.count(1)
    real = train_step.update_weights

    def update_weights(learner: Learner) -> None:
        if next(steps) == 35:
            gradient_of(learner.parameters[0]).mul_(number)
        real(learner)

    monkeypatch.setattr(train_step, "update_weights", update_weights)
    ended = here(*TRAIN, f"out={folder}", "--quiet")
    assert ended.code == 5
    assert "the gradient is nan at step 35, with learning rate 0.001" in two_lines(ended.stderr)[0]
    assert state_of(folder / "last.safetensors")["step"] == 20


@pytest.mark.parametrize(
    ("optim", "found"),
    [
        ("adam", "optim.hidden.0.weight.exp_avg_sq is not finite after step 40"),
        ("adagrad", "optim.hidden.0.weight.sum is not finite after step 40"),
        ("rmsprop", "optim.hidden.0.weight.square_avg is not finite after step 40"),
        ("momentum", "the loss is nan at step 36"),
    ],
)
def test_gradients_too_large_to_square_never_spoil_a_checkpoint(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, optim: str, found: str
) -> None:
    """Their squares overflow in the optimizer's state while the weights stay finite."""
    folder, steps = tmp_path / "run", itertools.count(1)
    real = train_step.update_weights

    def update_weights(learner: Learner) -> None:
        if next(steps) >= 35:
            for parameter in learner.parameters:
                gradient_of(parameter).mul_(1e25)
        real(learner)

    monkeypatch.setattr(train_step, "update_weights", update_weights)
    ended = here(*TRAIN, f"optim={optim}", f"out={folder}", "--quiet")
    assert ended.code == 5 and found in two_lines(ended.stderr)[0]
    assert state_of(folder / "last.safetensors")["step"] == 20
    state_of(folder / "best.safetensors")


@pytest.mark.parametrize(
    ("words", "mebibytes"),
    [
        (["model.hidden=[20000,20000]"], 400),  # the weights don't fit
        (["model.hidden=[60000]", "batch_size=1365"], 250),  # the activations don't fit
    ],
)
def test_too_little_memory_is_one_line(
    server: Server, tmp_path: Path, words: list[str], mebibytes: int
) -> None:
    folder = tmp_path / "run"
    ended = server.run(
        faults.program_with_memory,
        [*TRAIN, *words, f"out={folder}", "--quiet"],
        mebibytes * 2**20,
    )
    assert ended.code == 6, ended.stderr
    error, hint = two_lines(ended.stderr)
    assert error == "out of memory" and "batch_size=" in hint
    if (folder / "last.safetensors").exists():
        state_of(folder / "last.safetensors")


def test_a_crash_between_best_and_last_goes_on_from_best(
    monkeypatch: pytest.MonkeyPatch, stops: Stops, tmp_path: Path
) -> None:
    """Which is newer; from `last` the epoch would be trained again, and might not be the best."""
    folder, real = tmp_path / "run", loop.save

    def save(learner: Learner, path: Path) -> None:
        if path.name == "last.safetensors" and learner.progress.step == 40:
            raise KeyboardInterrupt
        real(learner, path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "save", save)
        here(*TRAIN, f"out={folder}", "--quiet")
    saved = {name: state_of(folder / f"{name}.safetensors")["step"] for name in ("best", "last")}
    assert saved == {"best": 40, "last": 20}
    lrs: dict[int, float] = {}
    with monkeypatch.context() as patch:
        patch.setattr(train_step, "set_lr", noting_lr(lrs))
        assert here("train", f"resume={folder}", "--quiet").code == 0
    assert sorted(lrs) == list(range(40, 60))
    assert outcome_of(folder) == stops.outcome


def test_weights_of_another_epoch_than_the_selected_one_are_refused(
    stops: Stops, tmp_path: Path
) -> None:
    folder = stops.after(stops.steps[-1], tmp_path / "run")
    older = stops.after(25, tmp_path / "older") / "best.safetensors"
    of_another_run = tmp_path / "newer/best.safetensors"
    words = (*TRAIN, "seed=1", "epochs=5", "dataset.val_fraction=0", f"out={of_another_run.parent}")
    assert here(*words, "--quiet").code == 0
    for foreign in (older, of_another_run):
        shutil.copy(foreign, folder)
        ended = here("train", f"resume={folder}", "epochs=9", "--quiet")
        error, hint = two_lines(ended.stderr)
        assert ended.code == 4 and hint.startswith("put it back")
        assert "best.safetensors doesn't hold the weights of epoch" in error
    (folder / "best.safetensors").unlink()
    ended = here("train", f"resume={folder}", "epochs=9", "--quiet")
    assert ended.code == 4 and "can't be used" in two_lines(ended.stderr)[0]


def test_a_folder_that_was_copied_is_a_run_of_its_own(stops: Stops, tmp_path: Path) -> None:
    copied = shutil.copytree(stops.folder, tmp_path / "copied")
    before = {path: path.read_bytes() for path in stops.folder.iterdir()}
    document = json.loads(here("train", f"resume={copied}", "--json").stdout)
    assert document["run_dir"] == str(copied)
    (copied / "result.json").write_text(json.dumps({"status": "failed", "config_hash": "?"}))
    assert here("train", f"resume={copied}", "report=true").code == 0
    assert (copied / "report.html").exists()
    assert before == {path: path.read_bytes() for path in stops.folder.iterdir()}


def test_a_run_at_home_is_found_with_the_keys_of_its_model(
    monkeypatch: pytest.MonkeyPatch, stops: Stops, tmp_path: Path
) -> None:
    stops.after(20, tmp_path / "run")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert here("train", "resume=~/run", "model.hidden=[16]", "--quiet").code == 0


def test_a_metrics_file_that_could_not_be_begun_gets_its_head_later(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(os, "fsync", full)
        folder.add_metrics({"epoch": 1, "step": 20})
    folder.add_metrics({"epoch": 2, "step": 40})
    assert folder.read_metrics() == [{"epoch": 2, "step": 40}]
    folder.keep_metrics_until(2)
    assert folder.read_metrics() == [{"epoch": 2, "step": 40}]


def test_a_folder_may_be_called_anything(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"x\xff y")
    words = tuple(word for word in TRAIN if word != "report=false")
    ended = here(*words, f"out={folder}", "profile=true")
    assert (ended.code, ended.stderr) == (0, "")
    assert os.fsencode(f"{folder}")[-4:] not in (folder / "train.log").read_bytes()
    assert (folder / "report.html").exists()
    assert here("train", f"resume={folder}", "epochs=4", "--quiet").code == 0
    assert here("eval", f"checkpoint={folder}", "--quiet").code == 0


def test_too_little_gpu_memory_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What CUDA raises, at a step; there is no GPU here to fill."""
    real = train_step.take_step

    def take_step(learner: Learner, indices: torch.Tensor, step: int) -> float:
        if step == 34:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(learner, indices, step)

    monkeypatch.setattr(train_step, "take_step", take_step)
    folder = tmp_path / "run"
    ended = here(*TRAIN, f"out={folder}", "--quiet")
    assert ended.code == 6
    error, hint = two_lines(ended.stderr)
    assert error == "out of GPU memory" and "batch_size=34" in hint
    assert state_of(folder / "last.safetensors")["step"] == 20
    assert json.loads((folder / "result.json").read_text())["status"] == "failed"


@pytest.mark.parametrize("first_scale", [2.0**8, 2.0**40])
def test_float16_goes_on_with_the_scale_of_its_loss(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, first_scale: float
) -> None:
    """On the CPU, with a scale that grows every seven steps; from 2**40 no step is taken for some.

    float16 is refused there, because nobody wants it so slow; the arithmetic is the same.
    """
    scaler = functools.partial(
        torch.amp.GradScaler, init_scale=first_scale, growth_interval=7, growth_factor=1.5
    )
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    monkeypatch.setattr(runtime, "resolve_device", lambda name, precision: torch.device("cpu"))
    words = (*TRAIN, "precision=float16", "--quiet")
    whole, stop = tmp_path / "whole", train_step.take_step
    assert here(*words, f"out={whole}").code == 0
    for last_step in (2, 24):

        def take_step(
            learner: Learner, indices: torch.Tensor, step: int, last: int = last_step
        ) -> float:
            if step == last:
                raise KeyboardInterrupt
            return stop(learner, indices, step)

        folder = tmp_path / str(last_step)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(train_step, "take_step", take_step)
            here(*words, "save_every=1", f"out={folder}")
        before = checkpoint.load(folder / "last.safetensors").progress
        assert before.step == last_step
        assert before.loss_scale_steps > 0 or first_scale > 2.0**30
        assert here("train", f"resume={folder}", "--quiet").code == 0
        assert outcome_of(folder) == outcome_of(whole)
        scales = [checkpoint.load(each / "last.safetensors").progress for each in (folder, whole)]
        assert len({(found.loss_scale, found.loss_scale_steps) for found in scales}) == 1


def test_bfloat16_goes_on_exactly_on_a_cpu_that_is_quick_with_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Any CPU can compute it; without AMX it is refused, because it would only be slow."""
    words = ("train", "model=cnn", "dataset=digits", "epochs=2", "device=cpu", "--quiet")
    monkeypatch.setattr(cpu, "has_amx", lambda: False)
    refused = here(*words, "precision=bfloat16", f"out={tmp_path / 'refused'}")
    sweep = here(*words, "-m", "precision=bfloat16", "seed=0,1", f"out={tmp_path / 'refused'}")
    assert sweep.code == 2 and sweep.stderr == refused.stderr
    error, hint = two_lines(refused.stderr)
    assert refused.code == 2 and not (tmp_path / "refused").exists()
    assert error.startswith("precision=bfloat16 needs CUDA or a CPU with AMX")
    assert hint == "type precision=float32"

    monkeypatch.setattr(cpu, "has_amx", lambda: True)
    exact, whole, cut = (tmp_path / name for name in ("exact", "whole", "cut"))
    assert here(*words, f"out={exact}").code == 0
    words = (*words, "precision=bfloat16")
    assert here(*words, f"out={whole}").code == 0
    losses = [float(metrics_rows(folder)[0]["train_loss"]) for folder in (exact, whole)]
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.03)

    real = train_step.take_step

    def take_step(learner: Learner, indices: torch.Tensor, step: int) -> float:
        if step == 30:
            raise KeyboardInterrupt
        return real(learner, indices, step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_step, "take_step", take_step)
        here(*words, "save_every=1", f"out={cut}")
    assert checkpoint.load(cut / "last.safetensors").progress.step == 30
    assert here("train", f"resume={cut}", "--quiet").code == 0
    assert outcome_of(cut) == outcome_of(whole)


def test_a_run_never_goes_on_with_other_data(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert here(*TRAIN, f"out={folder}", "--quiet").code == 0
    found = checkpoint.load(folder / "last.safetensors")
    spec = dataclasses.replace(found.spec, digest="0" * 64)
    checkpoint.save(folder / "last.safetensors", dataclasses.replace(found, spec=spec))
    before = (folder / "last.safetensors").read_bytes()
    ended = here("train", f"resume={folder}", "epochs=9", "--quiet")
    error, _ = two_lines(ended.stderr)
    assert ended.code == 3 and "000000000000" in error
    assert (folder / "last.safetensors").read_bytes() == before


def test_what_is_typed_is_checked_with_what_the_run_holds(tmp_path: Path) -> None:
    """Not with the defaults: the run is a perceptron of other widths and more epochs."""
    folder = tmp_path / "run"
    assert here(*TRAIN, "epochs=4", f"out={folder}", "--quiet").code == 0
    words = ("train", f"resume={folder}", "--quiet")
    more = here(*words, "epochs=12", "early_stop.patience=11", "resume_allow=[early_stop.patience]")
    assert more.code == 0, more.stderr
    keys = "early_stop.patience=null", "resume_allow=[epochs,early_stop.patience]"
    fewer = here(*words, "epochs=2", *keys)
    assert fewer.code == 2 and "12 that are done" in fewer.stderr
    other = here(*words, "model.hidden=[5]")
    assert other.code == 2 and "differs from the run's model.hidden=" in other.stderr
