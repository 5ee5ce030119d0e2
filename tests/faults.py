"""Real faults for tests: a fork server, kills, full disks, crashes at a system call; and figures.

A plugin of pytest (see conftest.py) and, started as a program, the fork server: it imports torch
once, then forks a child for each job, so that a thousand kills take minutes. A job is a function of
this module named in `JOBS`; it runs in the child, in a folder of its own.

The numbers of the tests marked `torture` are small in `make test` and large in `make torture`,
which runs these tests alone (MNIST_CLI_TORTURE=1 and `-m torture`).
"""

from __future__ import annotations

import contextlib
import csv
import ctypes
import gc
import hashlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mnist_cli import signals
from mnist_cli.signals import STOP_SIGNALS

ROOT = Path(__file__).parent.parent
TORTURE = os.environ.get("MNIST_CLI_TORTURE") == "1"

# 1,365 training digits in batches of 69: 20 steps an epoch, 60 in all, about half a second.
TRAIN = (
    *("train", "model=mlp", "model.hidden=[16]", "dataset=digits", "batch_size=69", "epochs=3"),
    "report=false",
)


def many(short: int, long: int) -> int:
    """The number for the suite that runs."""
    return long if TORTURE else short


# --- figures: from the tests, which may run in several processes, to the table at the end ---------

Figures = dict[str, dict[str, int]]
_noted: Figures = {}  # by the test that runs


def figure(name: str, done: int = 1, bad: int = 0, **more: int) -> None:
    """Note how often `name` was tried and went wrong; what several tests note is added up."""
    _add(_noted, name, {"done": done, "bad": bad, **more})


def _add(figures: Figures, name: str, numbers: dict[str, int]) -> None:
    before = figures.get(name, {"done": 0, "bad": 0})
    sums = {key: before[key] + numbers[key] for key in ("done", "bad")}
    figures[name] = {**numbers, **sums}


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item) -> None:
    item.user_properties += _noted.items()
    _noted.clear()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    figures: Figures = {}
    for report in terminalreporter.getreports("passed"):
        for name, numbers in report.user_properties:
            _add(figures, name, numbers)
    if not figures:
        return
    terminalreporter.section(f"reliability, {'long' if TORTURE else 'short'} numbers")
    for name, numbers in sorted(figures.items()):
        words = [f"{value:,} {key}" for key, value in numbers.items()]
        terminalreporter.write_line(f"{name:<58}  {', '.join(words)}")
    if TORTURE:
        path = ROOT / "outputs" / "torture.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(figures, indent=2, sort_keys=True) + "\n")
        terminalreporter.write_line(f"written to {path.relative_to(ROOT)}")


# --- what a run left -----------------------------------------------------------------------------


def tensors_hash(*groups: dict[str, Any]) -> str:
    """SHA-256 over names, shapes and bytes of tensors."""
    found = hashlib.sha256()
    for group in groups:
        for name, tensor in sorted(group.items()):
            found.update(f"{name}{tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return found.hexdigest()


def metrics_rows(folder: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv without what a clock decides."""
    with open(folder / "metrics.csv", newline="") as file:
        return [
            {k: v for k, v in row.items() if k not in ("seconds", "samples_per_s")}
            for row in csv.DictReader(file)
        ]


def state_of(path: Path) -> dict[str, Any]:
    """What a checkpoint says, without what a clock decides; raises CheckpointError."""
    from mnist_cli import checkpoint
    from mnist_cli.config import config_hash

    found = checkpoint.load(path)
    return {
        "tensors": tensors_hash(found.model, found.optim),
        "step": found.progress.step,
        "loss_sum": found.progress.loss_sum,
        "best": str(found.progress.best),
        "stale_epochs": found.progress.stale_epochs,
        "config": config_hash(found.config),
    }


def outcome_of(folder: Path) -> dict[str, Any]:
    """All that must be equal between two runs of one configuration, however often interrupted."""
    result = json.loads((folder / "result.json").read_text())
    return {
        "last": state_of(folder / "last.safetensors"),
        "best": state_of(folder / "best.safetensors"),
        "metrics": metrics_rows(folder),
        "result": {key: result[key] for key in ("status", "config_hash", "best", "val", "test")},
    }


def assert_agrees(folder: Path) -> None:
    """`best`, `last`, metrics.csv and result.json tell one story."""
    outcome = outcome_of(folder)
    selected = outcome["result"]["best"]
    assert outcome["last"]["best"] == outcome["best"]["best"]
    assert outcome["best"]["step"] == selected["step"]
    row = outcome["metrics"][selected["epoch"] - 1]
    assert int(row["epoch"]) == selected["epoch"] and int(row["step"]) == selected["step"]
    if selected["monitor"]:
        assert float(row[selected["monitor"]]) == selected["value"]
    assert [int(row["epoch"]) for row in outcome["metrics"]] == list(
        range(1, len(outcome["metrics"]) + 1)
    )


def temporaries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.endswith(".tmp"))


def two_lines(stderr: str) -> tuple[str, str]:
    """The text of the `error:` and the `hint:` line, which must be all that was said."""
    lines = stderr.splitlines()
    assert len(lines) == 2, stderr
    assert lines[0].startswith("error: ") and lines[1].startswith("hint: "), stderr
    assert len(lines[0]) <= 500 and len(lines[1]) <= 500
    assert all(character.isprintable() for line in lines for character in line)
    return lines[0].removeprefix("error: "), lines[1].removeprefix("hint: ")


@contextlib.contextmanager
def handlers_kept() -> Iterator[None]:
    """What the block does with the handlers of signals ends with it."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def here(*words: str) -> Ended:
    """The program in this process."""
    from mnist_cli import cli

    started_s = time.monotonic()
    stdout, stderr = io.StringIO(), io.StringIO()
    with (
        handlers_kept(),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        code = cli.main(list(words))
    return Ended(code, stdout.getvalue(), stderr.getvalue(), None, time.monotonic() - started_s)


def resident_mib() -> int:
    """The memory that this process holds; `peak_mib` counts from here on."""
    ctypes.CDLL(None).malloc_trim(0)  # what is free already would hide what is asked for next
    Path("/proc/self/clear_refs").write_text("5")
    return _memory_mib("VmRSS")


def peak_mib() -> int:
    """The most memory that this process has held since `resident_mib`."""
    return _memory_mib("VmHWM")


def _memory_mib(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) >> 10


# --- the fork server, seen from a test -----------------------------------------------------------


class Ended(NamedTuple):
    """How a child ended: `code` is negative for a signal; `value` is what its job returned."""

    code: int
    stdout: str
    stderr: str
    value: Any
    seconds: float


class Child:
    def __init__(self, server: Server, pid: int, folder: Path) -> None:
        self._server, self.pid, self._folder = server, pid, folder
        self._started_s = time.monotonic()

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def stdout(self) -> str:
        return (self._folder / "stdout").read_text()

    def is_over(self) -> bool:
        """Whether the process has ended, though nobody has waited for it."""
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"

    def wait_for(self, is_there: Callable[[], bool], timeout_s: float = 60) -> None:
        """Until `is_there`; the child may not take longer than `timeout_s`."""
        end = time.monotonic() + timeout_s
        while not is_there():
            assert time.monotonic() < end, f"{self.stdout()}{self._folder}"
            time.sleep(0.002)

    def wait(self, timeout_s: float = 120) -> Ended:
        answer = self._server.ask({"wait": self.pid, "timeout_s": timeout_s})
        value = self._folder / "value.json"
        return Ended(
            answer["code"],
            (self._folder / "stdout").read_text(),
            (self._folder / "stderr").read_text(),
            json.loads(value.read_text()) if value.exists() else None,
            time.monotonic() - self._started_s,
        )


class Server:
    """Forks children that have torch and mnist_cli loaded already."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CANARY": "canary-7f3a"}
        self._process = subprocess.Popen(
            # A signal that ends a job may find a file between its opening and its closing.
            [sys.executable, "-W", "error", "-W", "ignore::ResourceWarning", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | environment,
            text=True,
        )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def start(self, job: Callable[..., Any], *arguments: Any) -> Child:
        self._count += 1
        folder = self._folder / str(self._count)
        folder.mkdir()
        for name in ("stdout", "stderr"):
            (folder / name).touch()
        request = {"job": job.__name__, "arguments": arguments, "folder": str(folder)}
        return Child(self, self.ask(request)["pid"], folder)

    def run(self, job: Callable[..., Any], *arguments: Any, timeout_s: float = 120) -> Ended:
        return self.start(job, *arguments).wait(timeout_s)

    def close(self) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(10)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("children"))
    with contextlib.closing(server):
        yield server


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Bits are only equal with equal threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def namespaces(server: Server) -> None:
    """Skips where the kernel gives no mount namespace to a plain user."""
    ended = server.run(enter_namespace)
    if ended.code != 0:
        pytest.skip(f"no unprivileged mount namespaces here: {ended.stderr.splitlines()[-1]}")


# --- jobs: what a child does ---------------------------------------------------------------------


def program(words: list[str], file_bytes: int | None = None) -> int:
    """The program with a command line; no file may grow beyond `file_bytes`."""
    from mnist_cli import cli

    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    return cli.main(words)


def program_signalled_at_the_end(words: list[str], number: int) -> int:
    """The program, which gets a signal when it has written the answers of the first completed job,
    and of a stack the last one of the first stack."""
    from mnist_cli import cli, outcome

    real, num_shown = outcome.show, 3 if "sweep.fused=true" in words else 1
    shown = []

    def show(*arguments: Any) -> None:
        shown.append(real(*arguments))
        if len(shown) == num_shown:
            os.kill(os.getpid(), number)

    outcome.show = show
    return cli.main(words)


def program_with_stdout(words: list[str], path: str | None) -> int:
    """The program with its standard output at `path`, or closed."""
    from mnist_cli import cli

    os.close(1)
    if path is None:
        sys.stdout = None  # type: ignore[assignment]  # as Python does where it finds it closed
    else:
        descriptor = os.open(path, os.O_WRONLY)
        if descriptor != 1:
            os.dup2(descriptor, 1)
    return cli.main(words)


def program_with_memory(words: list[str], extra_bytes: int) -> int:
    """The program with at most `extra_bytes` more of address space than it has now."""
    from mnist_cli import cli

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + extra_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return cli.main(words)


def program_with_files(words: list[str], most: int) -> int:
    """The program with at most `most` files open at once, as after `ulimit -n`."""
    from mnist_cli import cli

    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return cli.main(words)


def program_as_plain_user(words: list[str], environment: dict[str, str], folder: str) -> int:
    """The program in `folder`, for which root too is bound by the permissions of its own files."""
    from mnist_cli import cli

    os.environ.update(environment)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    _libc("capset", header, (ctypes.c_uint32 * 6)())
    os.chdir(folder)
    return cli.main(words)


def program_without_temporary_folder(words: list[str], folder: str, kibibytes: int) -> int:
    """The program, which finds `folder` at /mnt and temporary files on a disk of `kibibytes`.

    With 0 there is none: every folder that Python would take for them is read-only.
    """
    from mnist_cli import cli

    enter_namespace()
    _mount(folder, "/mnt", None, 0x1000)  # MS_BIND
    os.environ["TMPDIR"] = "/mnt/missing"
    if kibibytes:
        os.environ["TMPDIR"] = "/mnt/small"
        os.makedirs("/mnt/small", exist_ok=True)
        _mount("tmpfs", "/mnt/small", "tmpfs", 0, f"size={kibibytes}k")
    for candidate in {
        "/tmp",
        "/var/tmp",
        "/usr/tmp",
        os.environ.get("TEMP"),
        os.environ.get("TMP"),
    }:
        if not kibibytes and candidate and os.path.isdir(candidate):
            _make_read_only(candidate)
    tempfile.tempdir = None
    os.chdir("/proc")
    return cli.main(words)


def program_with_threads(words: list[str], threads: int) -> int:
    import torch

    from mnist_cli import cli

    torch.set_num_threads(threads)
    return cli.main(words)


def denormals_after(words: list[str], threads: int) -> None:
    """After the program multiply a number below 1e-38 by 1, in each of so many threads."""
    import torch

    assert program_with_threads(words, threads) == 0
    assert not (torch.full((2**20 * threads,), 1e-40) * 1).any()


def program_in(folder: str, words: list[str]) -> int:
    """The program, started in `folder`."""
    os.chdir(folder)
    return program(words)


def program_in_group(words: list[str]) -> int:
    """The program, with its children in a process group of its own."""
    os.setsid()
    return program(words)


def add_row_below(folder: str, file_bytes: int) -> None:
    """Add a row to metrics.csv, which may not grow beyond `file_bytes`."""
    from mnist_cli import run

    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    try:
        run.RunFolder(Path(folder)).add_metrics({"epoch": 3, "step": 60, "lr": 0.123456789})
    except OSError:
        return
    raise AssertionError("the row fits")


def crash(words: list[str], at: int, mode: str) -> int:
    """The program, dead at its `at`-th system call that writes."""
    from mnist_cli import cli

    _crash_at(at, mode)
    return cli.main(words)


def crash_in_save(source: str, target: str, at: int, mode: str) -> None:
    """A save of the checkpoint `source` to `target`, dead at its `at`-th system call."""
    from mnist_cli import checkpoint

    found = checkpoint.load(Path(source))
    _crash_at(at, mode)
    checkpoint.save(Path(target), found)


def signal_twice_while_held() -> int:
    with signals.held():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
    return 0


def signal_in_save(words: list[str], at: int) -> int:
    """The program; SIGTERM arrives inside its `at`-th system call that writes."""
    from mnist_cli import cli

    def call(number: int, real: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
        if number == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments, **more)

    _watch_calls(call)
    return cli.main(words)


def save_often(source: str, target: str, times: int) -> None:
    """Save the checkpoint `source` to `target` again and again, with other steps."""
    import dataclasses

    from mnist_cli import checkpoint

    found = checkpoint.load(Path(source))
    for step in range(times):
        progress = dataclasses.replace(found.progress, step=step)
        checkpoint.save(Path(target), dataclasses.replace(found, progress=progress))


def hold(folder: str, ready: str) -> None:
    """Hold the lock of `folder` until killed."""
    from mnist_cli import durable

    with durable.locked(Path(folder)):
        Path(ready).touch()
        time.sleep(600)


def enter_namespace() -> None:
    """Give this process mounts of its own; raises OSError where the kernel forbids."""
    uid, gid = os.getuid(), os.getgid()
    _libc("unshare", 0x10000000 | 0x00020000)  # CLONE_NEWUSER | CLONE_NEWNS
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
    Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    _mount("none", "/", None, 0x4000 | 0x40000)  # MS_REC | MS_PRIVATE


def program_on_small_disk(words: list[str], folder: str, kibibytes: int) -> dict[str, Any]:
    """The program, with `folder` on a disk of `kibibytes`."""
    from mnist_cli import cli

    enter_namespace()
    _mount("tmpfs", folder, "tmpfs", 0, f"size={kibibytes}k")
    return {"code": cli.main(words), **_left_in(Path(folder))}


def program_on_read_only(words: list[str], folder: str, step: int) -> dict[str, Any]:
    """The program, with `folder` read-only from `step` on."""
    from mnist_cli import cli, train_step

    enter_namespace()
    real = train_step.take_step

    def take_step(job: Any, indices: Any, number: int) -> float:
        if number == step:
            _make_read_only(folder)
        return real(job, indices, number)

    train_step.take_step = take_step
    if step == 0:
        _make_read_only(folder)
    return {"code": cli.main(words), **_left_in(Path(folder))}


def program_without_folder(words: list[str], folder: str, step: int) -> int:
    """The program, whose `folder` is removed at `step`."""
    import shutil

    from mnist_cli import cli, train_step

    real = train_step.take_step

    def take_step(job: Any, indices: Any, number: int) -> float:
        if number == step:
            shutil.rmtree(folder)
        return real(job, indices, number)

    train_step.take_step = take_step
    return cli.main(words)


def _make_read_only(folder: str) -> None:
    """A mount over the old one: that one has files open for writing, and can't be changed."""
    _mount(folder, folder, None, 0x1000)  # MS_BIND
    _mount(None, folder, None, 0x20 | 0x1000 | 0x1)  # MS_REMOUNT | MS_BIND | MS_RDONLY


def _left_in(folder: Path) -> dict[str, Any]:
    from mnist_cli.errors import CheckpointError

    states: dict[str, Any] = {}
    for path in folder.glob("*.safetensors"):
        try:
            states[path.name] = state_of(path)
        except CheckpointError as error:
            states[path.name] = str(error)
    return {"checkpoints": states, "temporaries": temporaries(folder)}


def _libc(name: str, *arguments: Any) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str = "") -> None:
    texts = [text.encode() if text is not None else None for text in (source, target, kind)]
    _libc("mount", *texts, ctypes.c_ulong(flags), data.encode())


def _watch_calls(call: Callable[..., Any]) -> None:
    """Put `call(number, real, *arguments)` around every call that changes files."""
    count = 0

    def wrapped(real: Callable[..., Any]) -> Callable[..., Any]:
        def inner(*arguments: Any, **more: Any) -> Any:
            nonlocal count
            count += 1
            return call(count, real, *arguments, **more)

        return inner

    for name in ("open", "write", "fsync", "replace", "close", "unlink", "mkdir", "ftruncate"):
        setattr(os, name, wrapped(getattr(os, name)))


def _crash_at(at: int, mode: str) -> None:
    """End this process, as SIGKILL would, at the `at`-th call; `torn` writes half of it first."""
    write = os.write

    def call(number: int, real: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
        if number != at:
            return real(*arguments, **more)
        if mode == "after":
            with contextlib.suppress(OSError):
                real(*arguments, **more)
        elif mode == "torn" and real is write:
            descriptor, data = arguments
            real(descriptor, data[: len(data) // 2])
        os._exit(137)

    _watch_calls(call)


JOBS: dict[str, Callable[..., Any]] = {
    job.__name__: job
    for job in (
        program,
        program_in,
        program_in_group,
        add_row_below,
        program_signalled_at_the_end,
        program_with_stdout,
        program_with_memory,
        program_with_files,
        program_as_plain_user,
        program_without_temporary_folder,
        program_with_threads,
        denormals_after,
        program_on_small_disk,
        program_on_read_only,
        program_without_folder,
        crash,
        crash_in_save,
        signal_in_save,
        signal_twice_while_held,
        save_often,
        hold,
        enter_namespace,
    )
}


# --- the fork server itself ----------------------------------------------------------------------


def serve() -> None:
    import optuna  # noqa: F401
    import torch

    import mnist_cli.compose
    import mnist_cli.evaluate
    import mnist_cli.export
    import mnist_cli.sweep.fused
    import mnist_cli.train  # noqa: F401

    torch.set_num_threads(1)
    _warm_up()
    torch.set_flush_denormal(False)  # as it is in a new process
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        answer = _reap(**request) if "wait" in request else {"pid": _fork(**request)}
        print(json.dumps(answer), flush=True)  # noqa: T201 - the answer to the test
    os._exit(0)


def _warm_up() -> None:
    """Import and fill all that is lazy. No step is taken: after a backward pass no child may."""
    from mnist_cli import cli, train_step

    real, train_step.take_step = train_step.take_step, lambda *arguments: 1.0
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        handlers_kept(),
    ):
        code = cli.main([*TRAIN, f"out={folder}"])
    train_step.take_step = real
    assert code == 0, "the fork server can't train"


def _reap(wait: int, timeout_s: float) -> dict[str, int]:
    end = time.monotonic() + timeout_s
    while True:
        pid, status = os.waitpid(wait, os.WNOHANG)
        if pid:
            return {"code": os.waitstatus_to_exitcode(status)}
        if time.monotonic() > end:
            os.kill(wait, signal.SIGKILL)
        time.sleep(0.002)


def _fork(job: str, arguments: list[Any], folder: str) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        os.chdir(folder)
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        value = JOBS[job](*arguments)
        code = value if isinstance(value, int) else 0
        if value is not None and not isinstance(value, int):
            (Path(folder) / "value.json").write_text(json.dumps(value))
        if sys.stdout is not None:
            sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup's deafness would be inherited
    serve()
