"""More than one machine: what launchers of Hydra leave, and several processes at one search."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import faults
import optuna
import pytest
from faults import Child, Ended, Server, outcome_of, two_lines
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins

from mnist_cli import durable
from mnist_cli.config import SweepConfig
from mnist_cli.sweep.space import Numbers
from mnist_cli.sweep.study import Study

if TYPE_CHECKING:
    from conftest import Program

pytestmark = pytest.mark.usefixtures("empty_cwd")

TINY = (
    "dataset=digits",
    "model=mlp",
    "model.hidden=[16]",
    "batch_size=64",
    "epochs=2",
    "report=false",
)
GOOD_AND_BAD = ("train", "-m", *TINY, "optim.lr=0.1,1e30")
LOCAL = "hydra/launcher=submitit_local"
LONG = 100_000  # epochs; nobody waits for their end
has_ray = importlib.util.find_spec("ray") is not None


def folders(sweep: Path) -> dict[str, Path]:
    return {path.parent.name: path.parent for path in sorted(sweep.glob("*/result.json"))}


def board_of(sweep: Path) -> dict[str, Any]:
    board: dict[str, Any] = json.loads((sweep / "leaderboard.json").read_text())
    return board


def result_of(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def assert_as_plain(sweep: Path, mnist_cli: Program) -> None:
    """`sweep` holds what the plain sweep of `GOOD_AND_BAD` leaves: bits, folders, leaderboard."""
    assert mnist_cli(*GOOD_AND_BAD, "sweep.fused=false", "out=plain", "--quiet").code == 1
    plain = folders(Path("plain"))
    found = folders(sweep)
    assert found.keys() == plain.keys()
    good, bad = found
    assert outcome_of(found[good]) == outcome_of(plain[good])
    assert result_of(found[bad])["error"] == result_of(plain[bad])["error"]
    boards = [board_of(Path("plain")), board_of(sweep)]
    for board in boards:
        for row in [*board["rows"], board["winner"]]:
            row["train_s"] = None
    assert boards[0] == boards[1]
    for ending in ("csv", "md"):
        assert (sweep / f"leaderboard.{ending}").exists()


# --- launchers of Hydra --------------------------------------------------------------------------


def test_submitit_leaves_what_a_plain_sweep_leaves(mnist_cli: Program) -> None:
    outcome = mnist_cli(*GOOD_AND_BAD, LOCAL, "out=a", "--json")
    assert outcome.code == 1
    document = json.loads(outcome.stdout)
    assert len(document["jobs"]) == 2 and document["winner"] == board_of(Path("a"))["winner"]
    assert outcome.stderr.startswith(f"launch   2 jobs by {LOCAL}, in a\n")
    assert_as_plain(Path("a"), mnist_cli)


def test_a_launched_job_that_is_killed_stands_in_the_leaderboard(
    server: Server, tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep"
    words = ["train", "-m", *TINY, f"epochs=2,{LONG}", LOCAL, f"out={sweep}"]
    child = server.start(faults.program, words)
    child.wait_for(lambda: bool(list(sweep.glob("epochs=2-*/result.json"))))
    child.wait_for(lambda: bool(list(sweep.glob(f"epochs={LONG}-*/metrics.csv"))))
    (victim,) = sweep.glob(f"epochs={LONG}-*")
    os.kill(int((victim / ".lock").read_text()), signal.SIGKILL)
    ended = child.wait()
    assert ended.code == 1
    error, hint = two_lines(ended.stderr)
    assert error.startswith(f"{LOCAL} gave up: ") and f"sweep.resume={sweep}" in hint
    first, last = board_of(sweep)["rows"]
    assert (first["rank"], first["state"]) == (1, "completed")
    assert last["failed"] == [
        {
            "job": victim.name, "state": "failed",
            "error": "its process ended before the job was done",
        }
    ]  # fmt: skip


def test_a_job_that_slurm_would_preempt_goes_on_where_it_was(
    mnist_cli: Program, server: Server, tmp_path: Path
) -> None:
    """submitit answers its signal (USR2) by starting the job again; its local executor does too."""
    sweep = tmp_path / "sweep"
    words = [*TINY, "epochs=150"]
    child = server.start(faults.program, ["train", "-m", *words, LOCAL, f"out={sweep}"])
    child.wait_for(lambda: bool(list(sweep.glob("*/metrics.csv"))))
    (run,) = (path.parent for path in sweep.glob("*/metrics.csv"))
    os.kill(int((run / ".lock").read_text()), signal.SIGUSR2)
    assert child.wait().code == 0
    assert (run / "train.log").read_text().count("resuming at step ") == 1
    assert mnist_cli("train", *words, "out=alone", "--quiet") == (0, "", "")
    assert outcome_of(run) == outcome_of(Path("alone"))


def test_a_signal_to_the_launching_process_leaves_a_leaderboard(
    server: Server, tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep"
    words = ["train", "-m", *TINY, f"epochs=2,{LONG}", "hydra/launcher=basic", f"out={sweep}"]
    child = server.start(faults.program, words)
    child.wait_for(lambda: bool(list(sweep.glob(f"epochs={LONG}-*/metrics.csv"))))
    child.kill(signal.SIGTERM)
    ended = child.wait()
    assert ended.code == 143
    error, hint = two_lines(ended.stderr)
    assert "interrupted with 1 of 2 jobs left" in error and f"sweep.resume={sweep}" in hint
    assert [row["state"] for row in board_of(sweep)["rows"]] == ["completed", "interrupted"]


@pytest.mark.parametrize(
    ("launcher", "extra"),
    [("submitit_local", "submitit"), ("submitit_slurm", "submitit"), ("ray", "ray")],
)
def test_without_its_package_the_hint_says_what_to_install(
    mnist_cli: Program, monkeypatch: pytest.MonkeyPatch, launcher: str, extra: str
) -> None:
    Plugins.instance()  # finds what is installed, once
    known: Any = ConfigStore.instance().repo["hydra"]["launcher"]
    monkeypatch.delitem(known, f"{launcher}.yaml", raising=False)
    for words in (GOOD_AND_BAD, ("train", "--cfg", "hydra")):
        outcome = mnist_cli(*words, f"hydra/launcher={launcher}")
        assert outcome.code == 2
        assert (outcome.error, outcome.hint) == (
            f"hydra/launcher={launcher} needs a package that isn't installed",
            f"type pip install 'mnist-cli[{extra}]'",
        )
    assert os.listdir() == []


@pytest.mark.parametrize(
    ("words", "error", "hint"),
    [
        (("hydra/launcher=no",), "there is no hydra/launcher 'no'", "basic"),
        ((LOCAL, "hydra.launcher.no=1"), "no key 'hydra.launcher.no'", f"{LOCAL} --cfg hydra"),
        ((LOCAL, "hydra.launcher.timeout_min=soon"), "timeout_min", ""),
    ],
)
def test_a_launcher_is_checked_before_anything_is_written(
    mnist_cli: Program, words: tuple[str, ...], error: str, hint: str
) -> None:
    outcome = mnist_cli(*GOOD_AND_BAD, *words)
    assert outcome.code == 2
    assert error in outcome.error and hint in outcome.hint
    assert os.listdir() == []


def test_a_launcher_runs_no_command_that_only_prints(
    mnist_cli: Program, trained: Callable[..., Path]
) -> None:
    outcome = mnist_cli("eval", "-m", f"checkpoint={trained(*TINY)}", LOCAL)
    assert outcome.code == 2 and "nothing brings back what eval prints" in outcome.error
    assert mnist_cli("eval", "-m", f"checkpoint={trained(*TINY)}", "hydra/launcher=basic").code == 0


@pytest.fixture
def ray_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a Ray cluster of one machine, of two cores."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    command += ["--node-ip-address=127.0.0.1", f"--port={port}", "--num-cpus=2"]
    log = tmp_path / "ray.log"
    with open(log, "w") as out:
        head = subprocess.Popen(
            [*command, "--include-dashboard=false"], stdout=out, stderr=subprocess.STDOUT
        )
    try:
        end = time.monotonic() + 120
        while "Ray runtime started" not in log.read_text():
            assert time.monotonic() < end and head.poll() is None, log.read_text()
            time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        head.terminate()
        head.wait()


@pytest.mark.skipif(not has_ray, reason="Ray is not installed; make test-ray has it")
def test_ray_leaves_what_a_plain_sweep_leaves(mnist_cli: Program, ray_cluster: str) -> None:
    words = ["hydra/launcher=ray", f"hydra.launcher.ray.init.address='{ray_cluster}'", "out=a"]
    words += ["+hydra.launcher.ray.init.object_store_memory=null", "--json"]
    command = [sys.executable, "-m", "mnist_cli", *GOOD_AND_BAD, *words]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 1, ended.stderr
    assert json.loads(ended.stdout)["winner"] == board_of(Path("a"))["winner"]
    assert_as_plain(Path("a"), mnist_cli)


# --- several processes at one search -------------------------------------------------------------

SEARCH = ("train", "-m", *TINY, "sweep.search=optuna", "sweep.sampler=random")


def finished(sweep: Path) -> list[dict[str, Any]]:
    """The trials, each of which has ended and names a job that lies in the folder."""
    trials: list[dict[str, Any]] = board_of(sweep)["history"]
    assert all(trial["state"] == "complete" for trial in trials)
    assert {trial["job"] for trial in trials} == set(folders(sweep))
    return trials


def started(ended: Ended) -> list[str]:
    """What was run, as said at its start, without what was left to another process."""
    elsewhere = re.findall(r"^elsewhere +\d+/\d+  (.+?)  \d", ended.stdout, re.MULTILINE)
    begun = re.findall(r"^start +\d+/\d+  (.+)$", ended.stdout, re.MULTILINE)
    for label in elsewhere:
        begun.remove(label)
    return begun


@pytest.mark.parametrize(
    ("space", "num_jobs"),
    [(("optim.lr=interval(0.01,0.1)",), 12), (("batch_size=32,64,96", "optim=adam,sgd"), 6)],
)
def test_two_processes_share_a_search(
    mnist_cli: Program, server: Server, tmp_path: Path, space: tuple[str, ...], num_jobs: int
) -> None:
    """The second space has six points, so that both often choose the same."""
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    words = [*SEARCH, *space, "sweep.trials=12", "epochs=8", f"sweep.resume={sweep}"]
    if num_jobs == 6:
        words[words.index("sweep.trials=12")] = "sweep.trials=20"
    children = [server.start(faults.program, words) for _ in range(2)]
    both = [child.wait() for child in children]
    assert [ended.code for ended in both] == [0, 0]
    assert len(finished(sweep)) == (20 if num_jobs == 6 else 12)
    begun = [label for ended in both for label in started(ended)]
    assert all(map(started, both))
    assert len(begun) == len(set(begun)) == len(folders(sweep))
    assert len(begun) == num_jobs or num_jobs == 6
    rows = board_of(sweep)["rows"]
    assert len(rows) == len(folders(sweep)) and all(row["n"] == 1 for row in rows)
    again = shlex.split(rows[-1]["command"])[1:]
    assert mnist_cli(*again, "out=alone", "--quiet") == (0, "", "")
    assert outcome_of(Path("alone")) == outcome_of(sweep / rows[-1]["jobs"][0])


def busy(sweep: Path, child: Child) -> bool:
    """Whether `child` is at a job, with an epoch behind it."""
    return any(
        lock.read_text().strip() == str(child.pid) and (lock.parent / "metrics.csv").exists()
        for lock in sweep.glob("*/.lock")
    )


def test_what_a_killed_process_was_at_is_taken_up_by_the_other(
    server: Server, tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    words = [*SEARCH, "optim.lr=interval(0.01,0.1)", "epochs=60", "sweep.trials=6"]
    victim, other = (
        server.start(faults.program, [*words, f"sweep.resume={sweep}"]) for _ in range(2)
    )
    victim.wait_for(lambda: busy(sweep, victim))
    victim.kill()
    assert victim.wait().code == -9
    assert other.wait().code == 0
    assert len(finished(sweep)) == len(folders(sweep)) == 6


def test_the_last_trial_is_begun_once_however_close_two_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SweepConfig(
        jobs=1, fused="auto", resume=None, fail_fast=False, search="optuna", trials=3,
        sampler="random", pruner="none", objectives=(),
    )  # fmt: skip
    space = [Numbers("optim.lr", 0.01, 0.1, None, False)]

    def study_in(shared: durable.SharedFolder) -> Study:
        with shared.door():
            return Study(tmp_path, space, settings, ["val_loss"], {}, 0, shared.arrive())

    with durable.SharedFolder(tmp_path) as here, durable.SharedFolder(tmp_path) as there:
        one, other = study_in(here), study_in(there)
        assert one.ask() is not None and other.ask() is not None
        ask = one._study.ask

        def ask_late() -> optuna.Trial:
            assert other.ask() is not None
            return ask()

        monkeypatch.setattr(one._study, "ask", ask_late)
        assert one.ask() is None
        assert one.ask() is None and other.ask() is None
        assert len(one.counted()) == len(other.counted()) == 3
        assert one.num_own == 1 and other.num_own == 2


def test_presence_and_the_door(tmp_path: Path) -> None:
    with durable.SharedFolder(tmp_path) as one, durable.SharedFolder(tmp_path) as other:
        with one.door():
            assert one.arrive() and one.arrive()
        with other.door():
            assert not other.arrive()
        with one.door():
            assert not one.arrive()
            one.leave()
        with other.door():
            assert other.arrive()
    with durable.SharedFolder(tmp_path) as third, third.door():
        assert third.arrive()


def test_one_at_a_time_is_behind_the_door(tmp_path: Path) -> None:
    with durable.SharedFolder(tmp_path) as shared, open(tmp_path / ".door", "w") as other:
        with shared.door(), pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
