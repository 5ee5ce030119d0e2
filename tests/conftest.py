"""What all tests share: one cache of decoded data, one thread, and the program in this process."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pytest

pytest_plugins = ["faults"]
pytest.register_assert_rewrite("pages")

ROOT = Path(__file__).parent.parent
REAL_MNIST = Path(os.environ.get("MNIST_CLI_DATA") or ROOT.parent / "shared" / "mnist")

# Read when torch is loaded, here or in a process that a test starts: the small products of these
# tests stall with several threads on busy cores, and bits are only equal with equal threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# What a shell starts in the background ignores SIGINT, and programs of a test would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """All modules are loaded: the collector need not walk through them in every test."""
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # as `imports.thaw`


class Outcome(NamedTuple):
    """How a command ended, and what it wrote to its two streams."""

    code: int
    stdout: str
    stderr: str

    @property
    def error(self) -> str:
        """The `error:` line, without its first word."""
        return self.stderr.splitlines()[-2].removeprefix("error: ")

    @property
    def hint(self) -> str:
        return self.stderr.splitlines()[-1].removeprefix("hint: ")


class Program(Protocol):
    def __call__(self, *words: str) -> Outcome: ...


def run_program(*words: str) -> Outcome:
    """The command line `words`, in this process."""
    from faults import handlers_kept

    from mnist_cli import cli

    stdout, stderr = io.StringIO(), io.StringIO()
    try:
        with (
            handlers_kept(),
            contextlib.redirect_stdout(stdout),
            contextlib.redirect_stderr(stderr),
        ):
            code = cli.main(list(words))
    finally:
        _allow_denormals()
    return Outcome(code, stdout.getvalue(), stderr.getvalue())


def _allow_denormals() -> None:
    """Undo what a run does to its process: Hypothesis draws no floats without such numbers."""
    if torch := sys.modules.get("torch"):
        torch.set_flush_denormal(False)


@pytest.fixture(autouse=True)
def denormals() -> None:
    """A fixture of a wider scope may have trained in this process."""
    _allow_denormals()


@pytest.fixture(scope="session")
def mnist_cli(session_cache: Path) -> Program:
    """Runs a command line in this process."""
    return run_program


@pytest.fixture(scope="session", autouse=True)
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache folder of all tests that ask for no other; never the user's own."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.delenv("MNIST_CLI_DATA", raising=False)
        yield folder


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """Hydra's global state, signal handlers and threads are as before after every test."""
    from faults import handlers_kept

    with handlers_kept():
        yield
    if "hydra" in sys.modules:
        from hydra.core.global_hydra import GlobalHydra

        GlobalHydra.instance().clear()
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture
def empty_cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in which the test stands."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="session")
def real_mnist() -> Path:
    """The folder with the files of the real MNIST."""
    if not REAL_MNIST.is_dir():
        pytest.skip(f"the real MNIST is not at {REAL_MNIST}: set MNIST_CLI_DATA")
    return REAL_MNIST


@pytest.fixture(scope="session")
def trained(mnist_cli: Program, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Gives the run folder of `train` with some words; trained once, so don't write to it.

    No report is drawn but for `report=true`: each takes a third of a second.
    """
    folders: dict[tuple[str, ...], Path] = {}

    def folder_of(*words: str) -> Path:
        if words not in folders:
            folder = tmp_path_factory.mktemp("run") / "run"
            outcome = mnist_cli("train", "report=false", *words, f"out={folder}", "--quiet")
            assert outcome == (0, "", "")
            folders[words] = folder
        return folders[words]

    return folder_of


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip(f"none of {', '.join(names)} is installed")
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()
