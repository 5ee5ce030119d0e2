"""Getting the source files that are missing: https only, bounded in time and size, verified, whole.

torchvision supplies the checksums; the transfer is ours, because torchvision's falls back to http
in silence, has no time-out and writes to the final name. Everything happens under a lock on the
root, in a folder of its own there; a file gets its final name after its content was verified.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import ssl
import tarfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from mnist_cli import regular_file
from mnist_cli.dataset.decode import read_part
from mnist_cli.dataset.files import GZIP_SLACK_BYTES, FilesError, shown_path
from mnist_cli.dataset.sources import Archive, Part, Source
from mnist_cli.dataset.transfer import (
    CHUNK_BYTES,
    Clock,
    Network,
    Patience,
    TransferError,
    patience_from_environment,
)
from mnist_cli.errors import MnistCliError, ResourceError

LOCK_FILE = ".mnist-cli.lock"
STAGING_FOLDER = ".mnist-cli-download"
FULL = (errno.ENOSPC, errno.EDQUOT)


def fetch(
    source: Source,
    root: Path,
    mirror: str | None = None,
    patience: Patience | None = None,
    context: ssl.SSLContext | None = None,
) -> None:
    """Put the files of `source` that are missing into its folder in `root`.

    Args:
        source: the dataset.
        root: made where it doesn't exist.
        mirror: https address of a folder with the files, instead of the source's own.
        patience: how long it may take; by default the environment decides.
        context: which certificates to trust; by default the system's.

    Raises:
        DataError: the files are not to be had, or `root` can't be written to.
        ResourceError: the disk is full.
        UsageError: MNIST_CLI_DOWNLOAD_TIMEOUT is not what it has to be.
    """
    mirrors = source.mirrors if mirror is None else (f"{mirror.removesuffix('/')}/",)
    patience = patience or patience_from_environment()
    context = context or ssl.create_default_context()
    try:
        with _locked(root, patience.total_s):
            if source.find(root) is None:
                with _staging(root) as folder:
                    network = Network(mirrors, Clock(patience), context)
                    _fetch_missing(source, root, folder, network)
    except TransferError as failure:
        raise _unavailable(source, root, str(failure)) from failure
    except OSError as error:
        raise _unwritable(source, root, error) from error


# --- which files ---------------------------------------------------------------------------------


def _fetch_missing(source: Source, root: Path, folder: Path, network: Network) -> None:
    missing = source.missing(root)
    if source.archive is None:
        staged = [_fetch_part(source, part, folder, network) for part in missing]
    else:
        path = root / source.archive.path
        _fetch_archive(source, source.archive, path, folder, network)
        staged = [_extract_part(source, source.archive, part, path, folder) for part in missing]
    (root / source.folder).mkdir(parents=True, exist_ok=True)
    for path in staged:
        os.replace(path, root / source.folder / path.name)


def _fetch_part(source: Source, part: Part, folder: Path, network: Network) -> Path:
    name = f"{part.file}.gz"

    def check(path: Path) -> None:
        if part.sha256 is None:
            _check_md5(path, published_md5(source)[name])
        read_part(source, part, path)

    most = source.num_bytes(part) + GZIP_SLACK_BYTES
    return network.download(name, folder / name, most, check)


def _fetch_archive(
    source: Source, archive: Archive, path: Path, folder: Path, network: Network
) -> None:
    """Download the archive where it isn't there; one that is there has to be the right one too."""
    md5 = published_md5(source)[archive.file]
    if os.path.lexists(path):
        _check_md5(path, md5)
        return
    staged = network.download(
        archive.file, folder / archive.file, archive.max_bytes, lambda file: _check_md5(file, md5)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    os.replace(staged, path)


def published_md5(source: Source) -> dict[str, str]:
    """The md5 of each download of `source`, from torchvision where it knows them."""
    if source.md5 is not None:
        return dict(source.md5)
    from torchvision import datasets

    if source.archive is not None:
        return {source.archive.file: datasets.EMNIST.md5}
    return dict(getattr(datasets, str(source.torchvision)).resources)


def _check_md5(path: Path, expected: str) -> None:
    with regular_file.opened(path) as file:
        found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != expected:
        raise TransferError(f"{path.name}: expected md5 {expected}, found {found}", final=True)


# --- archives ------------------------------------------------------------------------------------


def _extract_part(
    source: Source, archive: Archive, part: Part, archive_path: Path, folder: Path
) -> Path:
    """Copy one member, named exactly and of a bounded size, out of the archive, and verify it."""
    target = folder / f"{part.file}{archive.suffix}"
    member = f"{archive.prefix}{target.name}"
    try:
        with _member(archive_path, member) as content, open(target, "xb") as file:
            _copy(content, file, source.num_bytes(part) + GZIP_SLACK_BYTES)
    except (
        tarfile.TarError,
        zipfile.BadZipFile,
        KeyError,
        EOFError,
        zlib.error,
        RuntimeError,
    ) as error:
        raise TransferError(
            f"{shown_path(archive_path)}: expected member {member}, found {error}"
        ) from error
    read_part(source, part, target)
    return target


@contextlib.contextmanager
def _member(archive: Path, member: str) -> Iterator[IO[bytes]]:
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as opened, opened.open(member) as content:
            yield content
        return
    with tarfile.open(archive, "r:gz") as tar:
        entry = next((entry for entry in tar if entry.name == member), None)
        extracted = None if entry is None else tar.extractfile(entry)
        if extracted is None:
            raise KeyError("no such file in it")
        with extracted:
            yield extracted


def _copy(content: IO[bytes], file: IO[bytes], most: int) -> None:
    copied = 0
    while chunk := content.read(CHUNK_BYTES):
        copied += len(chunk)
        if copied > most:
            raise TransferError(f"expected at most {most} bytes, found more")
        file.write(chunk)
    file.flush()
    os.fsync(file.fileno())


# --- the folder ----------------------------------------------------------------------------------


@contextlib.contextmanager
def _locked(root: Path, patience_s: float) -> Iterator[None]:
    """Hold the lock of `root`; it ends with the process, however that ends."""
    root.mkdir(parents=True, exist_ok=True)
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    descriptor = os.open(root / LOCK_FILE, flags, 0o644)
    try:
        _wait_for_lock(descriptor, time.monotonic() + patience_s)
        yield
    finally:
        os.close(descriptor)


def _wait_for_lock(descriptor: int, deadline: float) -> None:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise TransferError("another process has been downloading all the time") from None
            time.sleep(0.05)


@contextlib.contextmanager
def _staging(root: Path) -> Iterator[Path]:
    """An empty folder in `root`, without what a killed download left in it; gone afterwards."""
    folder = root / STAGING_FOLDER
    if os.path.lexists(folder):
        shutil.rmtree(folder)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _unavailable(source: Source, root: Path, reason: str) -> FilesError:
    names = [part.file for part in source.lacking(root) or source.parts]
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    hint = (
        "type dataset=digits, which is bundled,"
        f" or set MNIST_CLI_DATA=DIR to a folder that holds {names[0]}{more}"
    )
    if source.pickled_folder is not None and (root / source.pickled_folder).is_dir():
        hint = (
            f"{source.pickled_folder} is not read, because pickle files run code: put the binary"
            f" version's {source.folder} beside it, set MNIST_CLI_DATA=DIR, or type dataset=digits"
        )
    return FilesError(
        f"{source.name}: {names[0]}{more} not found in {shown_path(root)},"
        f" nor downloaded: {reason}",
        hint,
    )


def _unwritable(source: Source, root: Path, error: OSError) -> MnistCliError:
    where = shown_path(root)
    if error.errno in FULL:
        return ResourceError(
            f"{source.name} can't be downloaded to {where}: {error.strerror}",
            "make room there, or name another folder with dataset.root=DIR",
        )
    return FilesError(
        f"{source.name}: {source.parts[0].file} not found in {where},"
        f" and it can't be downloaded there: {error.strerror or error}",
        "set MNIST_CLI_DATA=DIR to a folder that holds the files or can be written to,"
        " or type dataset=digits",
    )
