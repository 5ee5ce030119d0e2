"""Signals and streams: the step is finished, a checkpoint is written, the exit code says why."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import faults
import pytest
from faults import TRAIN, Server, figure, many, outcome_of, state_of, temporaries, two_lines

from mnist_cli import signals
from mnist_cli.errors import Interrupted
from mnist_cli.signals import STOP_SIGNALS, SignalWatch

NUM_STEPS = 1600
LONG = (*TRAIN, "epochs=80", "--quiet")  # so many steps, more than a second


@pytest.fixture(scope="module")
def plain(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`LONG`, never interrupted."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    assert server.run(faults.program, [*LONG, f"out={folder}"]).code == 0
    return folder


@pytest.mark.torture
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_the_step_and_the_run_goes_on_with_the_same_bits(
    server: Server, plain: Path, tmp_path: Path, number: int, code: int
) -> None:
    chance, slowest_s, steps = random.Random(number), 0.0, []
    for attempt in range(many(2, 50)):
        folder = tmp_path / str(attempt)
        child = server.start(faults.program, [*LONG, f"out={folder}"])
        child.wait_for((folder / "metrics.csv").exists)
        time.sleep(chance.uniform(0, 0.3))
        asked_s = time.monotonic()
        child.kill(number)
        ended = child.wait()
        slowest_s = max(slowest_s, time.monotonic() - asked_s)
        assert (ended.code, ended.stdout) == (code, "")
        state = state_of(folder / "last.safetensors")
        steps.append(state["step"])
        error, hint = two_lines(ended.stderr)
        assert error == f"interrupted at step {steps[-1]}; everything is saved in {folder}"
        assert hint == f"type mnist-cli train resume={folder}"
        result = json.loads((folder / "result.json").read_text())
        assert (result["status"], result["error"]) == ("interrupted", error)
        assert result["config_hash"] == state["config"]
        assert not temporaries(folder)
        ended = server.run(faults.program, ["train", f"resume={folder}", "--quiet"])
        assert (ended.code, ended.stderr) == (0, "")
        assert outcome_of(folder) == outcome_of(plain)
    assert slowest_s < 5
    assert all(0 < step < NUM_STEPS for step in steps)
    name = signal.Signals(number).name
    figure(f"{name}, then resume", len(steps), slowest_ms=round(1000 * slowest_s))


@pytest.mark.torture
def test_a_second_signal_leaves_at_once_with_a_whole_checkpoint(
    server: Server, plain: Path, tmp_path: Path
) -> None:
    for attempt in range(many(2, 50)):
        folder = tmp_path / str(attempt)
        child = server.start(faults.program, [*LONG, f"out={folder}"])
        child.wait_for((folder / "metrics.csv").exists)
        child.kill(signal.SIGSTOP)
        child.kill(signal.SIGTERM)
        child.kill(signal.SIGINT)
        child.kill(signal.SIGCONT)  # both arrive before the step is over
        ended = child.wait()
        assert ended.code in (130, 143) and ended.seconds < 5
        error, hint = two_lines(ended.stderr)
        assert error == "stopped at once by a second signal" and "resume=" in hint
        state_of(folder / "last.safetensors")
        assert not temporaries(folder)
        assert server.run(faults.program, ["train", f"resume={folder}", "--quiet"]).code == 0
        assert outcome_of(folder) == outcome_of(plain)
    figure("two signals at once, then resume", many(2, 50))


@pytest.mark.torture
def test_a_signal_inside_any_system_call_of_a_save(server: Server, tmp_path: Path) -> None:
    words = [*TRAIN, "epochs=2", "batch_size=500", "--quiet"]
    assert server.run(faults.program, [*words, f"out={tmp_path}/plain"]).code == 0
    expected = outcome_of(tmp_path / "plain")
    points = 0
    for at in range(1, 1000, many(11, 1)):
        folder = tmp_path / str(at)
        auto = [*words, "resume=auto", f"out={folder}"]
        ended = server.run(faults.signal_in_save, auto, at)
        if ended.code == 0:
            assert outcome_of(folder) == expected
        else:
            assert ended.code == 143
            two_lines(ended.stderr)
            if folder.exists():
                assert not temporaries(folder)
            for path in folder.glob("*.safetensors"):
                state_of(path)
            assert server.run(faults.program, auto).code == 0
            assert outcome_of(folder) == expected
            points += 1
        if at > 110:
            break
    assert points >= 5
    figure("SIGTERM inside a system call of a save, then resume", points)


def test_a_closed_terminal_ends_the_run_with_a_whole_checkpoint(
    server: Server, plain: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    child = server.start(faults.program, [*LONG, f"out={folder}"])
    child.wait_for((folder / "metrics.csv").exists)
    child.kill(signal.SIGHUP)
    assert child.wait().code == -signal.SIGHUP
    assert server.run(faults.program, ["train", f"resume={folder}", "--quiet"]).code == 0
    assert outcome_of(folder) == outcome_of(plain)


def test_a_reader_that_leaves_does_not_end_the_run(server: Server, tmp_path: Path) -> None:
    """As `mnist-cli train | head -1`."""
    folder, pipe = tmp_path / "run", tmp_path / "pipe"
    os.mkfifo(pipe)
    child = server.start(faults.program_with_stdout, [*TRAIN, f"out={folder}"], str(pipe))
    with open(pipe) as reader:
        reader.readline()
    ended = child.wait()
    assert (ended.code, ended.stderr) == (0, "")
    assert outcome_of(folder)["result"]["status"] == "completed"


def test_what_was_asked_for_is_no_first_signal() -> None:
    """A worker that is asked to end, and then gets the signal of its group, still saves."""
    with faults.handlers_kept(), SignalWatch() as watch:
        watch.ask(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert watch.received == signal.SIGTERM
        with pytest.raises(Interrupted, match="second signal"):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("path", ["/dev/full", None])
def test_a_standard_output_that_is_full_or_closed_does_not_end_the_run(
    server: Server, tmp_path: Path, path: str | None
) -> None:
    folder = tmp_path / "run"
    ended = server.run(faults.program_with_stdout, [*TRAIN, f"out={folder}"], path)
    assert "Traceback" not in ended.stderr
    assert outcome_of(folder)["result"]["status"] == "completed"
    assert ended.code == 0


def test_a_full_standard_output_is_an_error_where_nothing_else_holds_the_answers(
    server: Server, plain: Path
) -> None:
    ended = server.run(faults.program_with_stdout, ["eval", f"checkpoint={plain}"], "/dev/full")
    assert ended.code == 6
    assert "can't write to the standard output" in two_lines(ended.stderr)[0]


def test_a_real_process_too(plain: Path, tmp_path: Path) -> None:
    """The one test here that pays for a start of its own."""
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "mnist_cli", *LONG, "epochs=100000", f"out={folder}"],
        cwd=faults.ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 60
    while not (folder / "metrics.csv").exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=5)
    assert (process.returncode, stdout) == (130, "")
    assert f"resume={folder}" in two_lines(stderr)[1]
    assert state_of(folder / "last.safetensors")["step"] >= 20


# --- before there is anything to save ------------------------------------------------------------


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_waits_for_the_end_of_what_would_swallow_it(number: int) -> None:
    signals.raise_them()
    done = []
    with pytest.raises(Interrupted) as caught, signals.held():
        with contextlib.suppress(BaseException):
            signal.raise_signal(number)
            done.append("after it")
        done.append("the rest")
    assert done == ["after it", "the rest"]
    assert caught.value.exit_code == 128 + number
    with pytest.raises(Interrupted):
        signal.raise_signal(number)


def test_a_second_signal_does_not_wait(server: Server) -> None:
    ended = server.run(faults.signal_twice_while_held)
    assert (ended.code, ended.stderr) == (143, "")


def test_a_process_without_ctrl_c_stays_without_it() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signals.raise_them()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    with signals.held():
        signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)


AT_THE_START = """
import signal, sys
class Finder:
    def find_spec(self, name, path, target=None):
        if name == "mnist_cli.cli":
            signal.raise_signal(int(sys.argv.pop()))
sys.meta_path.insert(0, Finder())
from mnist_cli.__main__ import program
sys.exit(program())
"""


def run_code(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        env=os.environ | {"PYTHONPATH": str(faults.ROOT)},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_among_the_first_imports_ends_it_in_two_lines(number: signal.Signals) -> None:
    ended = run_code(AT_THE_START, "list", "model", str(int(number)))
    assert (ended.returncode, ended.stdout) == (128 + number, "")
    error, hint = two_lines(ended.stderr)
    assert error == f"interrupted by {number.name}" and hint.startswith("type the command again")
    ended = run_code(AT_THE_START, "list", "--json", str(int(number)))
    document = {"error": error, "hint": hint, "exit_code": 128 + number}
    assert (json.loads(ended.stdout), two_lines(ended.stderr)) == (document, (error, hint))


AT_THE_END = """
import atexit, os, sys
from mnist_cli.__main__ import program
atexit.register(os.kill, os.getpid(), int(sys.argv.pop()))
sys.exit(program())
"""


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_changes_nothing_when_all_is_done(number: int) -> None:
    ended = run_code(AT_THE_END, "list", "model", str(int(number)))
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "cnn_deep" in ended.stdout


STARTS = {
    "training": ("train", "dataset=digits", "epochs=100000", "--quiet"),
    "composing": ("train", "--cfg", "job"),
    "eval": ("eval", "checkpoint={run}"),
    "report": ("report", "run={run}", "out=report"),
    "eval of onnx": ("eval", "checkpoint={onnx}"),
}
LONGEST_S = {"training": 2.5, "composing": 0.4, "eval": 2.8, "report": 3.5, "eval of onnx": 3.0}


def catches(pid: int, number: int) -> bool:
    """Whether the process has a handler for the signal. Source: proc(5)."""
    status = Path(f"/proc/{pid}/status").read_text()
    [caught] = [line.split()[1] for line in status.splitlines() if line.startswith("SigCgt")]
    return bool(int(caught, 16) >> (number - 1) & 1)


@pytest.mark.torture
def test_a_signal_at_any_instant_of_a_start_ends_it_as_promised(
    plain: Path, server: Server, tmp_path: Path
) -> None:
    exporting = ["export", f"checkpoint={plain}", "format=onnx", f"out={tmp_path}"]
    assert server.run(faults.program, exporting).code == 0
    chance, count = random.Random(0), many(5, 100)
    for attempt in range(count):
        kind, number = list(STARTS)[attempt % len(STARTS)], STOP_SIGNALS[attempt % 2]
        words = [word.format(run=plain, onnx=tmp_path / "model.onnx") for word in STARTS[kind]]
        process = subprocess.Popen(
            [sys.executable, "-m", "mnist_cli", *words],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(faults.ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        while not catches(process.pid, signal.SIGTERM):  # from where this program has started
            time.sleep(0.001)
        time.sleep(chance.uniform(0, LONGEST_S[kind]))
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
        if process.returncode == 0:  # it was done before
            assert stdout and stderr == ""
            continue
        assert process.returncode == 128 + number, stderr
        assert two_lines(stderr)[0].startswith("interrupted")
    figure("SIGINT or SIGTERM at a random instant of a start", count)
