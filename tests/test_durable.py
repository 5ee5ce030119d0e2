"""A save is whole or absent: at every crash point, on a full, broken or read-only disk."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import faults
import pytest
from faults import TRAIN, Server, figure, many, outcome_of, state_of, temporaries, two_lines

from mnist_cli import checkpoint, durable, run
from mnist_cli.errors import LockedError, ResourceError

SMALL = (*TRAIN, "epochs=2", "batch_size=500")  # 3 steps an epoch


@pytest.fixture(scope="module")
def two_saves(server: Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The last checkpoints of two runs that are alike but for their seed."""
    paths = []
    for seed in (0, 1):
        folder = tmp_path_factory.mktemp("saves") / "run"
        assert server.run(faults.program, [*SMALL, f"seed={seed}", f"out={folder}"]).code == 0
        paths.append(folder / "last.safetensors")
    return paths[0], paths[1]


# --- crashes -------------------------------------------------------------------------------------


@pytest.mark.torture
@pytest.mark.parametrize("mode", ["before", "after", "torn"])
@pytest.mark.parametrize("place", ["fresh", "older"])
def test_a_save_that_dies_at_any_system_call_leaves_the_old_file_or_the_new(
    server: Server, two_saves: tuple[Path, Path], tmp_path: Path, place: str, mode: str
) -> None:
    old, new = (state_of(path) for path in two_saves)
    target = tmp_path / "last.safetensors"
    seen = []
    for at in range(1, 100):
        for path in tmp_path.iterdir():
            path.unlink()
        if place == "older":
            shutil.copy(two_saves[0], target)
            shutil.copy(two_saves[0], tmp_path / "best.safetensors")
        code = server.run(faults.crash_in_save, str(two_saves[1]), str(target), at, mode).code
        if code == 0:
            break
        assert code == 137
        found = state_of(target) if target.exists() else None
        assert found in ((old if place == "older" else None), new)
        seen.append(found == new)
        if place == "older":
            assert state_of(tmp_path / "best.safetensors") == old
        durable.remove_stale_temporaries(tmp_path)
        assert not temporaries(tmp_path)
    assert state_of(target) == new
    assert seen == sorted(seen), "once the new file is there, it stays"
    assert len(seen) >= 9, "unlink, open, write, fsync, close, replace; open, fsync, close"
    assert seen[0] is False and seen[-1] is True
    figure("crash points of one save", len(seen))


@pytest.mark.torture
def test_a_run_that_dies_at_any_system_call_ends_as_if_it_had_not(
    server: Server, tmp_path: Path
) -> None:
    plain = tmp_path / "plain"
    run = (*SMALL, "report=true", "--quiet") if faults.TORTURE else (*SMALL, "--quiet")
    assert server.run(faults.program, [*run, f"out={plain}"]).code == 0
    expected = outcome_of(plain)
    points = 0
    for mode in ("before", "after") if faults.TORTURE else ("before",):
        for at in range(1, 1000, many(7, 1)):
            folder = tmp_path / f"{mode}{at}"
            words = [*run, "resume=auto", f"out={folder}"]
            code = server.run(faults.crash, words, at, mode).code
            if code == 0:
                break
            assert code == 137
            for path in folder.glob("*.safetensors"):
                state_of(path)
            ended = server.run(faults.program, words)
            assert (ended.code, ended.stderr) == (0, "")
            assert outcome_of(folder) == expected, f"{mode} call {at}"
            assert not temporaries(folder)
            points += 1
        else:
            pytest.fail("the run never came to its end")
    assert points >= 9
    figure("crash points of a whole run, resumed", points)


@pytest.mark.torture
def test_a_reader_sees_whole_files_only(
    server: Server, two_saves: tuple[Path, Path], tmp_path: Path
) -> None:
    target = tmp_path / "last.safetensors"
    shutil.copy(two_saves[0], target)
    child = server.start(faults.save_often, str(two_saves[0]), str(target), many(150, 2000))
    steps, reads = set(), 0
    while not reads or steps != {many(149, 1999)}:
        steps = {checkpoint.load(target).progress.step}
        reads += 1
        assert reads < 1_000_000
    assert child.wait().code == 0
    figure("reads while another process saves", reads)


# --- a broken disk -------------------------------------------------------------------------------


def test_short_writes_are_completed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:1]))
    durable.write(tmp_path / "file", b"0123456789")
    assert (tmp_path / "file").read_bytes() == b"0123456789"


@pytest.mark.parametrize("name", ["open", "write", "fsync", "replace"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_failed_call_keeps_the_old_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, number: int
) -> None:
    path = tmp_path / "file"
    durable.write(path, b"old")

    def fail(*arguments: Any, **more: Any) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, name, fail)
        with pytest.raises(ResourceError, match=os.strerror(number)) as caught:
            durable.write(path, b"new")
    assert str(path) in caught.value.message
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_temporary_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    (tmp_path / f".file.{os.getpid()}.tmp").symlink_to(victim)
    durable.write(tmp_path / "file", b"new")
    assert victim.read_text() == "untouched"
    assert (tmp_path / "file").read_bytes() == b"new" and not (tmp_path / "file").is_symlink()


@pytest.mark.torture
def test_a_disk_too_small_by_any_amount(server: Server, namespaces: None, tmp_path: Path) -> None:
    codes = {}
    for kibibytes in range(4, many(60, 132), many(10, 4)):
        folder = tmp_path / str(kibibytes)
        folder.mkdir()
        words = [*SMALL, f"out={folder}", "--quiet"]
        ended = server.run(faults.program_on_small_disk, words, str(folder), kibibytes)
        code = codes[kibibytes] = ended.value["code"]
        assert code in (0, 6)
        if code == 6:
            error, hint = two_lines(ended.stderr)
            assert f"can't write {folder}" in error and "No space left" in error
            assert "free some space" in hint
        assert not ended.value["temporaries"]
        for name, state in ended.value["checkpoints"].items():
            assert isinstance(state, dict), f"{kibibytes} KiB: {name}: {state}"
    assert 6 in codes.values()
    if faults.TORTURE:
        assert codes[128] == 0
    figure("disks too small, by any amount", len(codes))


def test_a_file_that_may_not_grow_keeps_the_checkpoint_before(
    server: Server, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    words = [*TRAIN, f"out={folder}", "--quiet"]
    ended = server.run(faults.program, words, 10_000)  # fits step 0, which has no optimizer state
    assert ended.code == 6
    error, _ = two_lines(ended.stderr)
    assert "File too large" in error
    assert state_of(folder / "last.safetensors")["step"] == 0
    assert not temporaries(folder)
    assert server.run(faults.program, ["train", f"resume={folder}", "--quiet"]).code == 0
    faults.assert_agrees(folder)


def test_a_folder_that_becomes_read_only_ends_the_run(
    server: Server, namespaces: None, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    words = [*TRAIN, f"out={folder}", "--quiet"]
    ended = server.run(faults.program_on_read_only, words, str(folder), 30)
    assert ended.value["code"] == 6
    error, hint = two_lines(ended.stderr)
    assert "Read-only file system" in error and "out=DIR" in hint
    states = ended.value["checkpoints"]
    assert states["last.safetensors"]["step"] == states["best.safetensors"]["step"] == 20
    assert not ended.value["temporaries"]


def test_a_folder_that_is_read_only_from_the_start(
    server: Server, namespaces: None, tmp_path: Path
) -> None:
    ended = server.run(
        faults.program_on_read_only, [*TRAIN, f"out={tmp_path}/run"], str(tmp_path), 0
    )
    assert ended.value["code"] == 6
    error, hint = two_lines(ended.stderr)
    assert "Read-only file system" in error and "out=DIR" in hint
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_removed_ends_the_run(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = [*TRAIN, f"out={folder}", "--quiet"]
    ended = server.run(faults.program_without_folder, words, str(folder), 30)
    assert ended.code == 6
    assert "No such file or directory" in two_lines(ended.stderr)[0]


@pytest.mark.parametrize("name", ["train.log", "metrics.csv"])
def test_a_record_that_can_not_be_written_is_said_but_ends_nothing(
    server: Server, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / name).symlink_to("/dev/full")
    ended = server.run(faults.program, [*TRAIN, f"out={folder}"])
    assert ended.code == 0
    warnings = ended.stderr.splitlines()
    assert all(line.startswith("warning: ") and name in line for line in warnings)
    assert all("can't be written" in line and "No space left" in line for line in warnings)
    assert len(warnings) == (1 if name == "train.log" else 3)
    assert state_of(folder / "last.safetensors")["step"] == 60


def test_a_row_that_can_not_be_written_leaves_no_part_of_itself(
    server: Server, tmp_path: Path
) -> None:
    """The third row doesn't fit below the limit; what stands before it stays readable."""
    folder = tmp_path / "run"
    assert server.run(faults.program, [*TRAIN, f"out={folder}", "--quiet"]).code == 0
    text = (folder / "metrics.csv").read_text()
    (folder / "metrics.csv").write_text("".join(text.splitlines(keepends=True)[:3]))
    size = (folder / "metrics.csv").stat().st_size
    ended = server.run(faults.add_row_below, str(folder), size + 10)
    assert ended.code == 0, ended.stderr
    assert (folder / "metrics.csv").stat().st_size == size


# --- locks and names -----------------------------------------------------------------------------


def test_a_second_run_in_the_folder_is_refused_with_the_pid_of_the_first(
    server: Server, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    first = server.start(faults.program, [*TRAIN, "epochs=100000", f"out={folder}", "--quiet"])
    first.wait_for((folder / "last.safetensors").exists)
    for words in ([*TRAIN, f"out={folder}"], ["train", f"resume={folder}"]):
        second = server.run(faults.program, words)
        assert second.code == 7
        error, hint = two_lines(second.stderr)
        assert error == f"{folder} is in use by process {first.pid}"
        assert f"kill {first.pid}" in hint
    first.kill()
    assert first.wait().code == -9
    with run.reopen(folder):
        assert (folder / ".lock").read_text() == f"{os.getpid()}\n"


@pytest.mark.torture
def test_the_lock_of_a_killed_process_is_free_at_once(server: Server, tmp_path: Path) -> None:
    for _ in range(many(3, 50)):
        ready = tmp_path / "ready"
        child = server.start(faults.hold, str(tmp_path), str(ready))
        child.wait_for(ready.exists)
        with (
            pytest.raises(LockedError, match=f"process {child.pid}$"),
            durable.locked(tmp_path),
        ):
            pass
        child.kill()
        child.wait()
        ready.unlink()
        with durable.locked(tmp_path):
            pass


def test_a_file_system_without_locks_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(ResourceError, match="No locks available"), durable.locked(tmp_path):
        pass


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    (tmp_path / ".lock").symlink_to(victim)
    with pytest.raises(ResourceError), durable.locked(tmp_path):
        pass
    assert victim.read_text() == "untouched"


def test_starts_in_one_second_get_folders_of_their_own(tmp_path: Path) -> None:
    folders: list[Path] = []

    def start() -> None:
        for _ in range(50):
            folders.append(run.unique_folder(tmp_path / "train"))  # noqa: PERF401 - each at once

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(folders)) == 200 and all(folder.is_dir() for folder in folders)


def test_two_runs_started_together_get_two_folders(server: Server, tmp_path: Path) -> None:
    words = [*SMALL, "--json"]
    children = [server.start(faults.program_in, str(tmp_path), words) for _ in range(2)]
    assert [child.wait().code for child in children] == [0, 0]
    assert len(list((tmp_path / "outputs" / "train").iterdir())) == 2


def test_stale_temporaries_go_and_all_else_stays(server: Server, tmp_path: Path) -> None:
    dead = server.start(faults.program, ["--version"])
    dead.wait()
    stale = [f".last.safetensors.{dead.pid}.tmp", f".metrics.csv.{dead.pid}.tmp"]
    kept = [
        ".last.safetensors.1.tmp",  # a process that lives
        "notes.tmp",
        f"last.safetensors.{dead.pid}.tmp",
        f".last.safetensors.{dead.pid}.tmp.bak",
        ".last.safetensors.x.tmp",
        f".{dead.pid}.tmp",
        ".last.safetensors.99999999999999999999.tmp",
    ]
    for name in stale + kept:
        (tmp_path / name).write_text("x")
    (tmp_path / f".folder.{dead.pid}.tmp").mkdir()
    with run.create(str(tmp_path), "unused"):
        pass
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {*kept, f".folder.{dead.pid}.tmp", ".lock"}
