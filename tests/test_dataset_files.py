"""Data files that aren't what they should be: each refused, naming file, expectation, finding."""

from __future__ import annotations

import gzip
import os
import socket
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_files import (
    Array,
    encode_idx,
    gzip_bomb,
    part_contents,
    small_source,
    write,
    write_mnist_like,
)
from faults import figure, peak_mib, resident_mib
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mnist_cli.dataset import idx, image_files
from mnist_cli.dataset.sources import MNIST, Source
from mnist_cli.errors import DataError

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
NUM_TRAIN, NUM_TEST = 30, 10


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@settings(deadline=None)
@given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=1, max_dims=5, max_side=6)))
def test_idx_gives_back_what_was_encoded(array: Array) -> None:
    content = np.frombuffer(encode_idx(array), np.uint8).copy()
    assert np.array_equal(idx.parse(content, array.shape, Path("file")).numpy(), array)
    assert idx.num_bytes(array.shape) == len(content)


@settings(deadline=None)
@given(content=st.binary(max_size=80), shape=st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_any_bytes_are_an_array_or_a_data_error(content: bytes, shape: list[int]) -> None:
    try:
        parsed = idx.parse(np.frombuffer(content, np.uint8).copy(), tuple(shape), Path("file"))
    except DataError as error:
        assert "expected" in error.message and "found" in error.message
    else:
        assert encode_idx(parsed.numpy()) == content


def header(magic: int, *dimensions: int) -> bytes:
    return struct.pack(f">{1 + len(dimensions)}I", magic, *dimensions)


PIXELS = bytes(NUM_TRAIN * 784)
Damage = Callable[[bytes], bytes]

# name: file, what becomes of its unpacked content, what the message says
CONTENT: dict[str, tuple[str, Damage, str]] = {
    "empty": (IMAGES, lambda c: b"", "found 0 bytes"),
    "half a header": (IMAGES, lambda c: c[:7], "found 7 bytes"),
    "header only": (IMAGES, lambda c: c[:16], "found 16 bytes"),
    "wrong magic": (IMAGES, lambda c: b"\x12" + c[1:], "found 12000803"),
    "zero magic": (IMAGES, lambda c: bytes(4) + c[4:], "found 00000000"),
    "little-endian magic": (IMAGES, lambda c: c[3::-1] + c[4:], "found 03080000"),
    "signed bytes": (IMAGES, lambda c: header(0x903, NUM_TRAIN, 28, 28) + PIXELS, "found 00000903"),
    "floats": (IMAGES, lambda c: header(0xD03, NUM_TRAIN, 28, 28) + PIXELS * 4, "found 00000d03"),
    "two dimensions": (IMAGES, lambda c: header(0x802, NUM_TRAIN, 784) + PIXELS, "found 00000802"),
    "four dimensions": (IMAGES, lambda c: header(0x804, NUM_TRAIN, 1, 28, 28) + PIXELS, "00000804"),
    "255 dimensions": (IMAGES, lambda c: header(0x8FF) + c[4:], "found 000008ff"),
    "28x27": (IMAGES, lambda c: header(0x803, NUM_TRAIN, 28, 27) + PIXELS, "found 30x28x27"),
    "27x28": (IMAGES, lambda c: header(0x803, NUM_TRAIN, 27, 28) + PIXELS, "found 30x27x28"),
    "count 0": (IMAGES, lambda c: header(0x803, 0, 28, 28), "found 0x28x28"),
    "count 2**32 - 1": (IMAGES, lambda c: header(0x803, 2**32 - 1, 28, 28) + PIXELS, "4294967295x"),
    "count one too high": (IMAGES, lambda c: header(0x803, 31, 28, 28) + PIXELS, "found 31x28x28"),
    "count one too low": (IMAGES, lambda c: header(0x803, 29, 28, 28) + PIXELS, "found 29x28x28"),
    "little-endian count": (
        IMAGES,
        lambda c: header(0x803, 30 << 24, 28, 28) + PIXELS,
        "503316480x",
    ),
    "trailing byte": (IMAGES, lambda c: c + b"x", "found 23537 or more bytes"),
    "a megabyte behind it": (IMAGES, lambda c: c + bytes(1 << 20), "found 23537 or more bytes"),
    "one byte short": (IMAGES, lambda c: c[:-1], "found 23535 bytes"),
    "half": (IMAGES, lambda c: c[: len(c) // 2], "found 11768 bytes"),
    "a web page": (IMAGES, lambda c: b"<!DOCTYPE html><html>404</html>", "found 3c21444f"),
    "a gzip file in a gzip file": (IMAGES, lambda c: gzip.compress(c), "found 1f8b0800"),
    "labels for images": (IMAGES, lambda c: encode_idx(labels()), "found 00000801"),
    "images for labels": (LABELS, lambda c: encode_idx(images()), "found 00000803"),
    "test images for training": (IMAGES, lambda c: encode_idx(images()[:10]), "found 10x28x28"),
    "training labels for test": (TEST_LABELS, lambda c: encode_idx(labels()), "found 30"),
    "fewer labels": (LABELS, lambda c: encode_idx(labels()[:7]), "expected 30, found 7"),
    "label 10": (LABELS, lambda c: c[:-1] + b"\x0a", "labels from 0 to 9, found 10 at index 29"),
    "label 255": (LABELS, lambda c: c[:8] + b"\xff" + c[9:], "found 255 at index 0"),
    "one class only": (LABELS, lambda c: c[:8] + bytes(30), "all 10 classes, found none of class"),
    "a class is missing": (TEST_LABELS, lambda c: c[:-1] + b"\x08", "found none of class"),
    "labels truncated": (LABELS, lambda c: c[:-3], "expected 38 bytes, found 35 bytes"),
    "labels with a tail": (TEST_LABELS, lambda c: c + b"\n", "expected 18 bytes, found 19 or more"),
}


def images() -> Array:
    return np.zeros((NUM_TRAIN, 28, 28), np.uint8)


def labels() -> Array:
    return np.arange(NUM_TRAIN, dtype=np.uint8) % 10


@pytest.mark.torture
@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("case", CONTENT)
def test_malformed_content(tmp_path: Path, case: str, suffix: str) -> None:
    source = write_mnist_like(tmp_path, "fashion_mnist", NUM_TRAIN, NUM_TEST, ".", suffix)
    file, damage, found = CONTENT[case]
    write(tmp_path / f"{file}{suffix}", damage(part_contents(source)[file]))
    refused(source, tmp_path, f"{file}{suffix}", found)


def refused(source: Source, root: Path, file: str, found: str) -> None:
    started = time.monotonic()
    with pytest.raises(DataError) as caught:
        image_files.load(source, str(root))
    message = caught.value.message
    assert file in message and "expected" in message and found in message
    assert caught.value.hint and caught.value.exit_code == 3 and "..." not in message[-3:]
    assert time.monotonic() - started < 2
    figure("malformed data files")


PACKED: dict[str, tuple[Damage, str]] = {
    "not gzip": (lambda c: c, "damage: Error -3"),
    "zlib for gzip": (zlib.compress, "damage: Error -3"),
    "empty": (lambda c: b"", "found an end after 0 bytes"),
    "truncated": (lambda c: gzip.compress(c)[:-100], "found an end after"),
    "without its CRC": (lambda c: gzip.compress(c)[:-8], "found an end after"),
    "wrong CRC": (lambda c: flipped(gzip.compress(c), -6), "incorrect data check"),
    "wrong length": (lambda c: flipped(gzip.compress(c), -2), "incorrect length check"),
    "one bit": (lambda c: flipped(gzip.compress(c), 200), "found damage"),
    "junk behind it": (lambda c: gzip.compress(c) + b"junk", "found 4 more bytes behind it"),
    "zeros behind it": (lambda c: gzip.compress(c) + bytes(9), "found 9 more bytes behind it"),
    "two members": (lambda c: gzip.compress(c) * 2, "more bytes behind it"),
    "content in two members": (lambda c: gzip.compress(c[:9]) + gzip.compress(c[9:]), "behind it"),
    "unknown method": (lambda c: flipped(gzip.compress(c), 2), "unknown compression method"),
    "larger than any packing": (lambda c: os.urandom(2 << 20), "found 2097152 bytes"),
}


def flipped(content: bytes, index: int) -> bytes:
    changed = bytearray(content)
    changed[index] ^= 1
    return bytes(changed)


@pytest.mark.torture
@pytest.mark.parametrize("case", PACKED)
def test_malformed_gzip(tmp_path: Path, case: str) -> None:
    source = write_mnist_like(tmp_path, "fashion_mnist", NUM_TRAIN, NUM_TEST, ".")
    damage, found = PACKED[case]
    (tmp_path / f"{IMAGES}.gz").write_bytes(damage(part_contents(source)[IMAGES]))
    refused(source, tmp_path, f"{IMAGES}.gz", found)


@pytest.mark.torture
def test_gzip_bomb_takes_neither_time_nor_memory(tmp_path: Path) -> None:
    source = write_mnist_like(tmp_path, "fashion_mnist", NUM_TRAIN, NUM_TEST, ".")
    bomb = gzip_bomb(header(0x803, NUM_TRAIN, 28, 28))
    (tmp_path / f"{IMAGES}.gz").write_bytes(bomb)
    before_mib = resident_mib()
    refused(source, tmp_path, f"{IMAGES}.gz", "found 23537 or more bytes")
    assert peak_mib() - before_mib < 50


@pytest.mark.torture
@pytest.mark.parametrize("kind", ["pipe", "folder", "socket", "device", "dangling", "loop"])
def test_not_a_file(tmp_path: Path, kind: str) -> None:
    source = write_mnist_like(tmp_path, "fashion_mnist", NUM_TRAIN, NUM_TEST, ".", "")
    path = tmp_path / LABELS
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        here = os.getcwd()
        os.chdir(tmp_path)  # a socket's whole path may have 108 bytes
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(LABELS)
        os.chdir(here)
    else:
        path.symlink_to({"device": "/dev/zero", "dangling": "nowhere", "loop": LABELS}[kind])
    started = time.monotonic()
    with pytest.raises(DataError, match=LABELS):
        image_files.load(source, str(tmp_path))
    assert time.monotonic() - started < 2
    figure("malformed data files")


RECORDS: dict[str, tuple[Damage, str]] = {
    "empty": (lambda c: b"", "found 0 bytes"),
    "truncated": (lambda c: c[:-1], "expected 20 records, 61460 bytes, found 61459 bytes"),
    "tail": (lambda c: c + b"x", "found 61461 or more bytes"),
    "label 10": (lambda c: b"\x0a" + c[1:], "found 10 at index 0"),
    "coarse and fine label": (
        lambda c: b"".join(b"\0" + c[n : n + 3073] for n in range(0, 61460, 3073)),
        "61461",
    ),
}


@pytest.mark.torture
@pytest.mark.parametrize("case", RECORDS)
def test_malformed_cifar_batch(tmp_path: Path, case: str) -> None:
    source = write_mnist_like(tmp_path, "cifar10", 100, 20, suffix="")
    damage, found = RECORDS[case]
    content = part_contents(source)["data_batch_3.bin"]
    write(tmp_path / source.folder / "data_batch_3.bin", damage(content))
    refused(source, tmp_path, "data_batch_3.bin", found)


@pytest.mark.torture
@pytest.mark.parametrize("label", [0, 27])
def test_letters_are_numbered_from_1_to_26(tmp_path: Path, label: int) -> None:
    source = write_mnist_like(tmp_path, "emnist-letters", 52, 26, suffix="")
    file = "emnist-letters-test-labels-idx1-ubyte"
    content = part_contents(source)[file]
    write(tmp_path / source.folder / file, content[:-1] + bytes([label]))
    refused(source, tmp_path, file, f"expected labels from 1 to 26, found {label} at index 25")


@pytest.mark.torture
def test_one_flipped_bit_in_the_real_mnist(tmp_path: Path) -> None:
    here = Path(__file__).parents[2] / "shared" / "mnist"
    real = Path(os.environ.get("MNIST_CLI_DATA") or here)
    if not real.is_dir():
        pytest.skip("the real MNIST is not here: set MNIST_CLI_DATA")
    for file in real.glob("*.gz"):
        (tmp_path / file.name).symlink_to(file)
    content = bytearray(gzip.decompress((tmp_path / f"{TEST_IMAGES}.gz").read_bytes()))
    content[4_000_000] ^= 1
    write(tmp_path / TEST_IMAGES, bytes(content))
    refused(MNIST, tmp_path, TEST_IMAGES, "SHA-256 0fa7898d")


def test_count_of_malformed_files() -> None:
    assert 2 * len(CONTENT) + len(PACKED) + len(RECORDS) + 10 >= 90
    assert small_source("mnist", 10, 10).train[0].sha256 is None
