"""What the machine denies: open files, temporary files, permissions. It works, or says so in two
lines; never a traceback."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import faults
import pytest
from faults import TRAIN, Ended, Server, figure, many, state_of, temporaries, two_lines

SHORT = (*TRAIN[:-1], "epochs=1", "--quiet")


@pytest.fixture(scope="module")
def run(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one epoch; nothing writes to it."""
    folder = tmp_path_factory.mktemp("denied") / "run"
    assert server.run(faults.program, [*SHORT, f"out={folder}"]).code == 0
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in which permissions may be taken away; they are given back, for the removal."""
    yield tmp_path
    for path in [tmp_path, *tmp_path.rglob("*")]:
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o700)


def works_or(code: int, ended: Ended) -> bool:
    """Whether it worked. If not, it ended with `code` and two lines."""
    if ended.code != 0:
        assert ended.code == code, ended.stderr
        two_lines(ended.stderr)
    return ended.code == 0


# --- open files ----------------------------------------------------------------------------------


@pytest.mark.torture
def test_a_few_open_files_are_enough_or_it_is_said(
    server: Server, run: Path, tmp_path: Path
) -> None:
    limits = (32, *range(12, 3, -many(4, 1)))
    codes = {}
    for most in limits:
        out = tmp_path / str(most)
        for command, words in (
            ("train", [*SHORT, f"out={out}"]),
            ("eval", ["eval", f"checkpoint={run}", "--quiet"]),
            ("export", ["export", f"checkpoint={run}", f"out={out}/export", "--quiet"]),
        ):
            ended = server.run(faults.program_with_files, words, most)
            codes[command, most] = ended.code
            if ended.code != 0:
                assert ended.code == 6 and "Traceback" not in ended.stderr
                # Before them onnxruntime may have written warnings of its own.
                error, hint = two_lines("\n".join(ended.stderr.splitlines()[-2:]))
                assert "many" in error and hint == "allow more with ulimit -n 1024"
        if out.is_dir():
            assert not temporaries(out)
    assert all(codes[command, 32] == 0 for command in ("train", "eval", "export"))
    assert codes["train", 4] == 6
    figure("limits of open files", len(codes))


# --- temporary files -----------------------------------------------------------------------------

COMMANDS = {
    "train": [*SHORT, "out=/mnt/new"],
    "eval": ["eval", "checkpoint=/mnt/run", "--quiet"],
    "safetensors": ["export", "checkpoint=/mnt/run", "format=safetensors", "--quiet"],
    "onnx": ["export", "checkpoint=/mnt/run", "format=onnx", "--quiet"],
    "torch_export": ["export", "checkpoint=/mnt/run", "format=torch_export", "--quiet"],
    "int8": ["export", "checkpoint=/mnt/run", "quantize=int8", "--quiet"],
    "sweep": ["eval", "-m", "checkpoint=/mnt/run", "hydra/launcher=basic", "--quiet"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_without_a_temporary_folder_it_works_or_it_is_said(
    server: Server, namespaces: None, run: Path, tmp_path: Path, command: str
) -> None:
    shutil.copytree(run, tmp_path / "run")
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    job, words = faults.program_without_temporary_folder, COMMANDS[command]
    ended = server.run(job, words, str(tmp_path), 0)
    assert works_or(6, ended) == (command in ("train", "eval", "safetensors"))
    if ended.code != 0:
        error, hint = two_lines(ended.stderr)
        assert "temporary files" in error and "TMPDIR=DIR" in hint
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before


@pytest.mark.torture
def test_a_temporary_folder_too_small_by_any_amount(
    server: Server, namespaces: None, run: Path, tmp_path: Path
) -> None:
    codes = []
    for kibibytes in range(4, 164, 4) if faults.TORTURE else (4, 20, 148):
        folder = tmp_path / str(kibibytes)
        shutil.copytree(run, folder / "run")
        job = faults.program_without_temporary_folder
        ended = server.run(job, COMMANDS["int8"], str(folder), kibibytes)
        codes.append(ended.code)
        assert works_or(6, ended) == (folder / "run" / "model.int8.onnx").exists()
    assert codes == sorted(codes, reverse=True) and set(codes) == {0, 6}
    figure("temporary folders too small, by any amount", len(codes))


# --- permissions ---------------------------------------------------------------------------------


def as_user(server: Server, folder: Path, *words: str, **environment: str) -> Ended:
    return server.run(faults.program_as_plain_user, list(words), environment, str(folder))


@pytest.mark.parametrize("mode", [0o500, 0o300, 0], ids=oct)
def test_a_folder_that_may_not_be_written_to(
    server: Server, run: Path, folder: Path, mode: int
) -> None:
    denied = folder / "denied"
    denied.mkdir(mode)
    for words in (
        [*SHORT, f"out={denied}"],
        [*SHORT, f"out={denied}/below"],
        ["eval", f"checkpoint={run}", f"out={denied}", "--quiet"],
        ["export", f"checkpoint={run}", f"out={denied}", "format=safetensors", "--quiet"],
        list(SHORT),
    ):
        ended = as_user(
            server, denied if words == list(SHORT) and mode == 0o500 else folder, *words
        )
        if words == list(SHORT) and mode != 0o500:
            assert ended.code == 0
        elif not works_or(6, ended):
            error, hint = two_lines(ended.stderr)
            assert "can't write" in error and "Permission denied" in error
            assert hint == "make it writable, or name another folder with out=DIR"
        else:
            assert mode == 0o300, "what can't be listed can still be written to"


@pytest.mark.parametrize("mode", [0o500, 0], ids=oct)
def test_a_run_folder_that_may_not_be_changed(
    server: Server, run: Path, folder: Path, mode: int
) -> None:
    mine = folder / "run"
    shutil.copytree(run, mine)
    before = state_of(mine / "last.safetensors")
    mine.chmod(mode)
    for words in (
        ["train", f"resume={mine}", "epochs=2"],
        [*SHORT, "epochs=2", f"out={mine}", "resume=auto"],
    ):
        ended = as_user(server, folder, *words, "--quiet")
        assert ended.code == (6 if mode else 4)
        error, hint = two_lines(ended.stderr)
        assert str(mine) in error and "Permission denied" in error and hint.startswith("make it ")
    ended = as_user(server, folder, "eval", f"checkpoint={mine}", "--quiet")
    assert works_or(4, ended) == bool(mode)
    ended = as_user(server, folder, "report", f"run={mine}", "--quiet")
    assert not works_or(6 if mode else 4, ended)
    mine.chmod(0o700)
    assert state_of(mine / "last.safetensors") == before


def test_files_of_a_run_that_may_not_be_read(server: Server, run: Path, folder: Path) -> None:
    for name in sorted(path.name for path in run.iterdir()):
        mine = folder / name
        shutil.copytree(run, mine)
        (mine / name).chmod(0)
        ended = as_user(server, folder, "train", f"resume={mine}", "epochs=2", "--json", "--quiet")
        if name.endswith(".safetensors"):
            assert ended.code in (0, 4), ended.stderr
        elif ended.code != 0:
            assert ended.code == 6, ended.stderr
        assert "Traceback" not in ended.stderr
        ended = as_user(server, folder, "eval", f"checkpoint={mine}", "--quiet")
        assert works_or(4, ended) == (name != "best.safetensors")


def test_a_cache_that_may_not_be_used_costs_time_only(server: Server, folder: Path) -> None:
    for mode in (0o500, 0):
        cache = folder / oct(mode)
        cache.mkdir(mode)
        words = [*SHORT, f"out={folder}/run{mode}"]
        ended = as_user(server, folder, *words, XDG_CACHE_HOME=str(cache))
        assert (ended.code, ended.stderr) == (0, "")


def test_data_that_may_not_be_read(server: Server, folder: Path) -> None:
    """A folder without the files, so that they would have to be fetched into it, and one file."""
    words = ["train", "model=linear", "dataset=mnist", "--quiet", f"out={folder}/run"]
    for mode in (0o500, 0):
        root = folder / oct(mode)
        root.mkdir(mode)
        ended = as_user(server, folder, *words, f"dataset.root={root}")
        assert ended.code == 3
        error, hint = two_lines(ended.stderr)
        assert str(root) in error and "Permission denied" in error and "MNIST_CLI_DATA" in hint
    root = folder / "root"
    root.mkdir()
    for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (root / f"{part}-ubyte").touch(0)
    ended = as_user(server, folder, *words, f"dataset.root={root}")
    assert ended.code == 3
    assert "ubyte can't be read: Permission denied" in two_lines(ended.stderr)[0]
    assert not (folder / "run").exists()


def test_options_that_may_not_be_read(server: Server, folder: Path) -> None:
    mine = folder / "mine"
    (mine / "model").mkdir(parents=True)
    (mine / "model" / "odd.yaml").write_text("name: linear\n")
    flags = ("--config-dir", str(mine))
    for path in (mine / "model" / "odd.yaml", mine / "model", mine):
        path.chmod(0)
        ended = as_user(server, folder, *SHORT, *flags, "model=odd", f"out={folder}/run")
        assert ended.code == 2
        two_lines(ended.stderr)
        for words in (("list",), ("train", "--help")):
            assert works_or(2, as_user(server, folder, *words, *flags)) == (path != mine)
    assert not (folder / "run").exists()
