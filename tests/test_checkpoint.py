"""A checkpoint is data: whatever a file holds, it is a checkpoint or a CheckpointError."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import io
import json
import math
import os
import random
import socket
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faults
import pytest
import safetensors.torch
import torch
from faults import (
    TRAIN,
    figure,
    here,
    many,
    peak_mib,
    resident_mib,
    state_of,
    two_lines,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from mnist_cli import checkpoint, find, optim, scoring
from mnist_cli.checkpoint import Checkpoint
from mnist_cli.console import Console
from mnist_cli.dataset.again import load_again
from mnist_cli.errors import CheckpointError, DivergedError, MnistCliError
from mnist_cli.options import UntypedPluginError

CANARY = "canary-7f3a"
LINEAR = (
    "train", "model=linear", "dataset=linear", "dataset.num_samples=40", "dataset.num_features=2",
    "loss=mse", "optim=sgd", "epochs=1", "batch_size=20",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def canary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file that hostile code would make, and a secret in the environment."""
    path = tmp_path_factory.mktemp("canary") / "pwned"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CANARY", CANARY)
        patch.setenv("CANARY_FILE", str(path))
        yield path
    assert not path.exists()


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a small network with the state of Adam."""
    folder = tmp_path_factory.mktemp("digits") / "run"
    words = [*TRAIN[1:-1], "epochs=1", "batch_size=500", "model.hidden=[3]"]
    assert here("train", *words, f"out={folder}", "--quiet").code == 0
    return folder / "best.safetensors"


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest checkpoint: three numbers."""
    folder = tmp_path_factory.mktemp("linear") / "run"
    assert here(*LINEAR, f"out={folder}", "--quiet").code == 0
    return folder / "best.safetensors"


# --- taking a checkpoint apart, and together again ------------------------------------------------


def taken_apart(data: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """Header without metadata, document, tensors."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    return header, json.loads(header.pop("__metadata__")["mnist_cli"]), data[end:]


def framed(header: bytes, tensors: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + tensors


def put_together(header: dict[str, Any], document: Any, tensors: bytes) -> bytes:
    """A file whose digest is right, whatever else is wrong."""
    if isinstance(document, dict) and "digest" in document:
        document = {**document, "digest": "0" * 64}
    text = document if isinstance(document, str) else json.dumps(document)
    data = framed(json.dumps({"__metadata__": {"mnist_cli": text}, **header}).encode(), tensors)
    return signed(data)


def signed(data: bytes) -> bytes:
    place = data.find(b"0" * 64)
    if place < 0:
        return data
    return data[:place] + hashlib.sha256(data).hexdigest().encode() + data[place + 64 :]


def test_the_first_checkpoints_are_read(linear: Path) -> None:
    """They knew nothing of how long a loss scale has lasted."""
    data = linear.read_bytes()
    old = edited(data, lambda header, document: document["progress"].pop("loss_scale_steps"))
    assert len(old) < len(data)
    assert checkpoint.decode(old).progress == checkpoint.decode(data).progress


def edited(data: bytes, edit: Callable[[dict[str, Any], dict[str, Any]], Any]) -> bytes:
    """`data` after `edit(header, document)`, with the right digest."""
    header, document, tensors = taken_apart(data)
    edit(header, document)
    return put_together(header, document, tensors)


def saved(tensors: dict[str, torch.Tensor], document: dict[str, Any]) -> bytes:
    document = {**document, "digest": "0" * 64}
    return signed(safetensors.torch.save(tensors, {"mnist_cli": json.dumps(document)}))


def refused(data: bytes, path: Path) -> CheckpointError:
    """The error of loading `data` from `path`; fails for any other end, or a slow one."""
    path.write_bytes(data)
    return refused_file(path)


def refused_file(path: Path) -> CheckpointError:
    before_mib = resident_mib()
    started_s = time.perf_counter()
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(path)
    assert time.perf_counter() - started_s < 2
    assert peak_mib() - before_mib < 300
    for text in (caught.value.message, caught.value.hint):
        assert text.isprintable() and 0 < len(text) <= 400
        assert CANARY not in text
    return caught.value


# --- what is written is read ----------------------------------------------------------------------


def test_what_is_saved_is_loaded_to_the_bit(digits: Path, tmp_path: Path) -> None:
    found = checkpoint.load(digits)
    checkpoint.save(tmp_path / "again.safetensors", found)
    again = checkpoint.load(tmp_path / "again.safetensors")
    assert dataclasses.replace(again, model={}, optim={}) == dataclasses.replace(
        found, model={}, optim={}
    )
    assert state_of(tmp_path / "again.safetensors") == state_of(digits)
    assert (tmp_path / "again.safetensors").read_bytes() == digits.read_bytes()


@pytest.mark.torture
@settings(max_examples=many(50, 2000), deadline=None)
@given(
    step=st.integers(0, 2**53),
    numbers=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=3, max_size=3),
    weights=st.lists(
        st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=3, max_size=3
    ),
    scale=st.none() | st.floats(0, 1e30),
)
def test_every_number_survives(
    linear: Path, step: int, numbers: list[float], weights: list[float], scale: float | None
) -> None:
    found = checkpoint.load(linear)
    progress = dataclasses.replace(
        found.progress,
        step=step,
        loss_sum=numbers[0],
        epoch_s=numbers[1],
        train_s=numbers[2],
        loss_scale=scale,
    )
    model = {
        "output.weight": torch.tensor([weights[:2]]),
        "output.bias": torch.tensor(weights[2:]),
    }
    again = checkpoint.decode(
        checkpoint.encode(dataclasses.replace(found, progress=progress, model=model))
    )
    assert again.progress == progress
    assert all(torch.equal(again.model[name], tensor) for name, tensor in model.items())


@pytest.mark.parametrize("layout", ["transposed", "overlapping", "tied", "sliced", "double"])
def test_tensors_in_any_layout_are_saved_by_their_values(digits: Path, layout: str) -> None:
    found = checkpoint.load(digits)
    weight = found.model["hidden.0.weight"]  # (3, 64) float32
    shapes = {
        "transposed": weight.t().contiguous().t(),
        "overlapping": weight[:1].expand(3, 64),
        "tied": weight,
        "sliced": torch.cat([weight, weight])[:3],
        "double": weight.double(),
    }
    model = found.model | {"hidden.0.weight": shapes[layout]}
    optim = found.optim | {"hidden.0.weight.exp_avg": shapes[layout]}  # and the same memory
    changed = dataclasses.replace(found, model=model, optim=optim)
    again = checkpoint.decode(checkpoint.encode(changed))
    for saved in (again.model["hidden.0.weight"], again.optim["hidden.0.weight.exp_avg"]):
        assert torch.equal(saved, shapes[layout].float())
        assert saved.is_contiguous()


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_never_written(digits: Path, tmp_path: Path, number: float) -> None:
    found = checkpoint.load(digits)
    path = tmp_path / "last.safetensors"
    checkpoint.save(path, found)
    for part in ("model", "optim"):
        tensors = {name: tensor.clone() for name, tensor in getattr(found, part).items()}
        next(iter(tensors.values())).view(-1)[0] = number
        with pytest.raises(DivergedError):
            checkpoint.save(path, dataclasses.replace(found, **{part: tensors}))
    assert state_of(path) == state_of(digits)
    assert os.listdir(tmp_path) == ["last.safetensors"]


@pytest.mark.parametrize(
    "words",
    [
        *("sgd", "momentum", "adam", "adamw", "rmsprop", "adagrad", "adadelta"),
        *("sgd optim.momentum=0.5", "rmsprop optim.momentum=0.5", "momentum optim.momentum=0"),
    ],
)
def test_the_state_of_every_optimizer_is_known(tmp_path: Path, words: str) -> None:
    path = tmp_path / "run" / "last.safetensors"
    line = [*TRAIN[:-1], "epochs=1", "batch_size=1000", *f"optim={words}".split()]
    assert here(*line, f"out={path.parent}", "--quiet").code == 0
    found = checkpoint.load(path)
    kept = {name.rpartition(".")[2] for name in found.optim}
    assert kept == set(optim.state_names(found.config.optim))


# --- hand-made files ------------------------------------------------------------------------------


class Bomb:
    """Makes the canary's file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch $CANARY_FILE",)


def pickled() -> bytes:
    import pickle

    return pickle.dumps(Bomb())


def torch_saved() -> bytes:
    buffer = io.BytesIO()
    torch.save({"model": Bomb(), "weight": torch.zeros(3)}, buffer)
    return buffer.getvalue()


def zip_bomb() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(64 * 2**20))
    return buffer.getvalue()


def table(data: bytes, edit: Callable[[dict[str, Any]], Any], extra: bytes = b"") -> bytes:
    """`data` after an edit of the table of tensors."""
    header, document, tensors = taken_apart(data)
    edit(header)
    return put_together(header, document, tensors + extra)


def raw(data: bytes, old: bytes, new: bytes) -> bytes:
    """`data` with `old` replaced in its header, and a right length and digest."""
    header, document, tensors = taken_apart(data)
    text = json.dumps(document | {"digest": "0" * 64})
    whole = json.dumps({"__metadata__": {"mnist_cli": text}, **header}).encode()
    assert old in whole
    return signed(framed(whole.replace(old, new, 1), tensors))


def retyped(name: str, dtype: torch.dtype) -> Callable[[bytes], bytes]:
    def make(data: bytes) -> bytes:
        tensors = safetensors.torch.load(data)
        tensors[name] = tensors[name].to(dtype)
        return saved(tensors, taken_apart(data)[1])

    return make


def renumbered(number: float) -> Callable[[bytes], bytes]:
    def make(data: bytes) -> bytes:
        tensors = safetensors.torch.load(data)
        tensors["model.output.weight"].view(-1)[1] = number
        return saved(tensors, taken_apart(data)[1])

    return make


def metadata(edit: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    """A file whose document was changed by `edit`."""
    return lambda data: edited(data, lambda header, document: edit(document))


def within(group: str, **values: Any) -> Callable[[bytes], bytes]:
    """A file with other values in a part of its document (`config.model`)."""

    def edit(document: dict[str, Any]) -> None:
        for part in filter(None, group.split(".")):
            document = document[part]
        document |= values

    return metadata(edit)


W = "model.output.weight"
DEEP = "[" * 100_000
HAND_MADE: dict[str, Callable[[bytes], bytes]] = {
    # not safetensors
    "empty": lambda data: b"",
    "one byte": lambda data: b"{",
    "a pickle": lambda data: pickled(),
    "a torch file": lambda data: torch_saved(),
    "a zip bomb": lambda data: zip_bomb(),
    "a page": lambda data: b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "a numpy file": lambda data: b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'}" + bytes(100),
    "a text": lambda data: b"model: linear\n" * 100,
    "zeros": lambda data: bytes(10_000),
    "an ELF": lambda data: b"\x7fELF" + bytes(1000),
    # the length of the header
    "header of 0": lambda data: bytes(8) + data[8:],
    "header of 7": lambda data: struct.pack("<Q", 7) + data[8:],
    "header longer than the file": lambda data: struct.pack("<Q", len(data)) + data[8:],
    "header of a billion": lambda data: struct.pack("<Q", 10**9) + data[8:],
    "header of 2^63": lambda data: struct.pack("<Q", 2**63) + data[8:],
    "header of 2^64 - 1": lambda data: b"\xff" * 8 + data[8:],
    "header of 90 MB": lambda data: framed(b'{"a":"' + b"x" * 90_000_000 + b'"}'),
    "a million tensors": lambda data: framed(
        b"{"
        + b",".join(
            b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(1_000_000)
        )
        + b"}"
    ),
    "ten thousand tensors": lambda data: table(
        data,
        lambda t: t.update(
            {str(i): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(10_000)}
        ),
    ),
    # JSON
    "no JSON": lambda data: framed(b"{nothing}"),
    "deep JSON": lambda data: framed(b'{"a":' + DEEP.encode()),
    "deep document": lambda data: put_together({}, '{"a":' + DEEP, b""),
    "deep objects": lambda data: framed(b'{"a":' * 50_000),
    "a list": lambda data: framed(b"{}".ljust(8).replace(b"{}", b"[]")),
    "a list of a document": lambda data: put_together(taken_apart(data)[0], [], b""),
    "text of a document": lambda data: put_together(taken_apart(data)[0], '"x"', b""),
    "an empty document": lambda data: put_together(taken_apart(data)[0], "", b""),
    "invalid UTF-8": lambda data: framed(b'{"\xff\xfe": 1}'),
    "half a surrogate": lambda data: framed(b'{"__metadata__": {"mnist_cli": "\\ud800"}}'),
    "half a surrogate as digest": lambda data: framed(
        b'{"__metadata__": {"mnist_cli": "{\\"format\\": 1, \\"digest\\": \\"'
        + b"\\\\ud800" * 64
        + b'\\"}"}}'
    ),
    "NUL in a name": lambda data: table(data, lambda t: t.update({"model.\0": t.pop(W)})),
    "a key twice": lambda data: raw(data, b'\\"format\\": 1', b'\\"format\\": 1, \\"format\\": 1'),
    "a tensor twice": lambda data: raw(
        data, b'"' + W.encode(), b'"' + W.encode() + b'": {}, "' + W.encode()
    ),
    "NaN": lambda data: raw(data, b'\\"loss_sum\\": 0.0', b'\\"loss_sum\\": NaN'),
    "Infinity": lambda data: raw(data, b'\\"loss_sum\\": 0.0', b'\\"loss_sum\\": -Infinity'),
    "1e999": lambda data: raw(data, b'\\"loss_sum\\": 0.0', b'\\"loss_sum\\": 1e999'),
    "a long integer": lambda data: raw(
        data, b'\\"loss_sum\\": 0.0', b'\\"loss_sum\\": ' + b"9" * 5000
    ),
    "metadata that is no text": lambda data: framed(b'{"__metadata__": {"mnist_cli": {}}}'),
    "metadata of a stranger": lambda data: framed(b'{"__metadata__": {"format": "pt"}}'),
    "more metadata": lambda data: framed(b'{"__metadata__": {"mnist_cli": "{}", "more": ""}}'),
    "no metadata": lambda data: safetensors.torch.save({"weight": torch.zeros(3)}),
    "200 tensors of a stranger": lambda data: safetensors.torch.save(
        {f"layer.{i}.weight": torch.zeros(3) for i in range(200)}
    ),
    # the table of tensors
    "a hole": lambda data: table(data, lambda t: None, bytes(8)),
    "a byte too many": lambda data: data + b"\0",
    "overlap": lambda data: table(data, lambda t: t[W].update(data_offsets=[0, 8])),
    "an offset beyond the end": lambda data: table(
        data, lambda t: t[W].update(data_offsets=[4, 2**40])
    ),
    "a negative offset": lambda data: table(data, lambda t: t[W].update(data_offsets=[-8, 0])),
    "offsets as text": lambda data: table(data, lambda t: t[W].update(data_offsets="all")),
    "a shape that overflows": lambda data: table(data, lambda t: t[W].update(shape=[2**63, 4])),
    "a shape of no size": lambda data: table(data, lambda t: t[W].update(shape=[0, 2**62])),
    "a negative shape": lambda data: table(data, lambda t: t[W].update(shape=[-1, -2])),
    "a shape of bools": lambda data: table(data, lambda t: t[W].update(shape=[True, 2])),
    "another shape": lambda data: table(data, lambda t: t[W].update(shape=[2, 1])),
    "a shape that is no list": lambda data: table(data, lambda t: t[W].update(shape=2)),
    "a field too many": lambda data: table(data, lambda t: t[W].update(more=1)),
    "a missing field": lambda data: table(data, lambda t: t[W].pop("dtype")),
    "an entry that is no object": lambda data: table(data, lambda t: t.update({W: []})),
    "a dtype that is a list": lambda data: table(data, lambda t: t[W].update(dtype=[])),
    "a dtype that isn't": lambda data: table(data, lambda t: t[W].update(dtype="F33")),
    "float64": retyped(W, torch.float64),
    "float16": retyped(W, torch.float16),
    "int32": retyped(W, torch.int32),
    "bool": retyped(W, torch.bool),
    "complex64": retyped(W, torch.complex64),
    "a missing tensor": lambda data: table(data, lambda t: t.pop(W)),
    "an extra tensor": lambda data: table(
        data,
        lambda t: t.update(x={"dtype": "F32", "shape": [1], "data_offsets": [12, 16]}),
        b"1234",
    ),
    "a renamed tensor": lambda data: table(data, lambda t: t.update({"model.out": t.pop(W)})),
    "state of no parameter": lambda data: table(
        data,
        lambda t: t.update(
            {"optim.x.step": {"dtype": "F32", "shape": [], "data_offsets": [12, 16]}}
        ),
        b"1234",
    ),
    "NaN weights": renumbered(math.nan),
    "infinite weights": renumbered(-math.inf),
    # the document
    "a wrong digest": lambda data: data.replace(taken_apart(data)[1]["digest"].encode(), b"f" * 64),
    "a digest of another length": lambda data: data.replace(
        b'digest\\": \\"' + taken_apart(data)[1]["digest"].encode(),
        b'digest\\": \\"abc\\"' + b" " * 60,
    ),
    "no digest": metadata(lambda document: document.pop("digest")),
    "a newer format": within("", format=2, made_by="mnist-cli 9.9"),
    "format 0": within("", format=0),
    "a format as text": within("", format="1"),
    "a format that is true": within("", format=True),
    "no format": metadata(lambda document: document.pop("format")),
    "a missing key": metadata(lambda document: document.pop("host")),
    "a key too many": within("", more=1),
    "a config that is none": within("", config=None),
    "a config that is text": within("", config="linear"),
    "a model that isn't": within("config.model", name="resnet50"),
    "a model that is a path": within("config.model", name="../../etc/passwd"),
    "a model that is a number": within("config.model", name=7),
    "a model that is a list": within("config.model", name=["linear"]),
    "a model that is another": within("config", model={"name": "cnn"}),
    "a network too wide": within(
        "config", model={"name": "mlp", "hidden": [10**9], "dropout": 0.0}
    ),
    "a network too deep": within(
        "config", model={"name": "mlp", "hidden": [65_536] * 65, "dropout": 0.0}
    ),
    "a network as wide and deep as can be": within(
        "config", model={"name": "mlp", "hidden": [65_536] * 64, "dropout": 0.0}
    ),
    "a negative width": within("config", model={"name": "mlp", "hidden": [-1], "dropout": 0.0}),
    "a bool for a number": within("config", epochs=True),
    "a fraction for a count": within("config", epochs=1.5),
    "a seed too large": within("config", seed=2**64),
    "a rate of 1e999": lambda data: raw(data, b'\\"lr\\": 0.01', b'\\"lr\\": 1e999'),
    "a negative step": within("progress", step=-1),
    "a step of 2^60": within("progress", step=2**60),
    "a dataset that isn't": within("config.dataset", name="imagenet"),
    "data of another name": within("dataset", name="digits"),
    "data of another task": within("dataset", task="classification"),
    "samples without a shape": within("dataset", input_shape=[]),
    "samples of a huge shape": within("dataset", input_shape=[2**40]),
    "samples of very many axes": within("dataset", input_shape=[60_000] * 1000),
    "samples of no size": within("dataset", input_shape=[0]),
    "samples of a negative size": within("dataset", input_shape=[-2]),
    "classes of a regression": within("dataset", classes=["a"]),
    "a mean of a regression": within("dataset", mean=[0.0]),
    "a digest of data that isn't": within("dataset", digest="\x1b[31m"),
    "a best epoch of 0": within("progress", best={"epoch": 0, "step": 1, "monitor": None,
                                                  "value": None}),
    "a name of 10 MB": within("config.model", name="x" * 10_000_000),
    "a name of 500 KB": within("config.model", name="x" * 500_000),
    "escapes in a name": within("config.model", name="\x1b[2J\x1b[31mowned\r\n\u202e"),
    "a device that isn't": within("config", device="cuda:0; rm -rf /"),
    "two folders": within("config", resume="/a", out="/b"),
}  # fmt: skip


@pytest.mark.torture
@pytest.mark.parametrize("name", HAND_MADE)
def test_a_hand_made_file_is_refused(linear: Path, tmp_path: Path, name: str) -> None:
    data = HAND_MADE[name](linear.read_bytes())
    error = refused(data, tmp_path / "x.safetensors")
    assert error.message.startswith(f"{tmp_path}/x.safetensors: ") or len(error.message) == 400
    figure("malformed checkpoints, hand-made")


def test_the_hand_made_edits_start_from_a_file_that_loads(linear: Path, tmp_path: Path) -> None:
    """Else they would be refused for another reason."""
    path = tmp_path / "x.safetensors"
    data = linear.read_bytes()
    for whole in (
        edited(data, lambda header, document: None),
        table(data, lambda header: None),
        raw(data, b'\\"format\\": 1', b'\\"format\\":  1'),
        saved(safetensors.torch.load(data), taken_apart(data)[1]),
    ):
        path.write_bytes(whole)
        assert state_of(path) == state_of(linear)


REASONS = {
    "a pickle": "pickle files never are",
    "NaN weights": f"has values in {W} that are not finite",
    "float64": "of type 'F64' instead of F32",
    "a missing tensor": f"lacks the tensors '{W}'",
    "a renamed tensor": f"lacks the tensors '{W}'",
    "a wrong digest": "is damaged: its digest doesn't match its content",
    "a newer format": "has format 2 (made by 'mnist-cli 9.9'), but mnist-cli",
    "200 tensors of a stranger": "is not a checkpoint of mnist-cli",
    "a model that isn't": "config.model.name='resnet50' is not a choice",
    "escapes in a name": r"\x1b[2J\x1b[31mowned\r\n\u202e",
    "deep document": "too deep",
    "a key twice": "a key stands there twice",
    "no JSON": "is not sound JSON",
    "a network too wide": "config.model.hidden",
}


@pytest.mark.parametrize("name", REASONS)
def test_the_reason_is_said(linear: Path, tmp_path: Path, name: str) -> None:
    error = refused(HAND_MADE[name](linear.read_bytes()), tmp_path / "x.safetensors")
    wanted = REASONS[name].replace("config.", "")
    assert wanted in error.message.replace("config.", "") + error.hint


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        here_ = os.getcwd()
        os.chdir(path.parent)  # the name of a socket may only be short
        try:
            listener.bind(path.name)
        finally:
            os.chdir(here_)


def holes(path: Path) -> None:
    """A file of 3 GiB that takes no room, behind the header of a small checkpoint."""
    with open(path, "r+b") as file:
        file.truncate(3 * 2**30)


PLACES: dict[str, Callable[[Path], Any]] = {
    "nothing": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a FIFO": lambda path: (path.unlink(), os.mkfifo(path)),
    "a socket": lambda path: (path.unlink(), a_socket(path)),
    "/dev/zero": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
    "/dev/null": lambda path: (path.unlink(), path.symlink_to("/dev/null")),
    "a link to itself": lambda path: (path.unlink(), path.symlink_to(path.name)),
    "a link to nothing": lambda path: (path.unlink(), path.symlink_to("nothing")),
    "a file of holes": holes,
    "a file of 5 GiB": lambda path: os.truncate(path, 5 * 2**30),
}


@pytest.mark.torture
@pytest.mark.parametrize("name", PLACES)
def test_what_is_no_plain_file_is_refused(linear: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(linear.read_bytes())
    PLACES[name](path)
    refused_file(path)
    figure("malformed checkpoints, hand-made")


@pytest.mark.parametrize("name", ["with space", "mit\nnewline", "emoji 🎲", "per%cent", "a" * 200])
def test_any_name_of_a_file_will_do(linear: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / f"{name}.safetensors"
    path.write_bytes(linear.read_bytes())
    assert state_of(path) == state_of(linear)
    refused(b"", path)


@pytest.mark.parametrize("name", ["x" * 300, "y/" * 3000, "~nobody-of-this-name/x", "loop", "\0"])
def test_a_path_that_can_not_be_is_one_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(CheckpointError):
        checkpoint.load(find.checkpoint(name if name[0] == "~" else f"{tmp_path}/{name}"))


def test_a_file_cut_short_while_it_is_read_is_refused(
    linear: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes are read, not mapped: no SIGBUS."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(linear.read_bytes())
    real = checkpoint._check_start

    def check_start(start: bytes, size: int) -> None:
        real(start, size)
        os.truncate(path, size // 2)

    monkeypatch.setattr(checkpoint, "_check_start", check_start)
    refused_file(path)


# --- bits and mutants -----------------------------------------------------------------------------


@pytest.mark.torture
@pytest.mark.parametrize("name", ["linear", "digits"] if faults.TORTURE else ["linear"])
def test_every_flipped_bit_is_noticed(name: str, request: pytest.FixtureRequest) -> None:
    data = request.getfixturevalue(name).read_bytes()
    checkpoint.decode(data)
    accepted = []
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            checkpoint.decode(bytes(changed))
        except checkpoint._Refused:
            continue
        accepted.append(bit)
    assert accepted == []
    figure(f"single bit flips, all of a checkpoint of {name}", 8 * len(data), len(accepted))


HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**53, 2**63, 2**64, -(2**63), 10**19, 0.0, -0.0, 0.5,
    1.5, 1e308, -1e308, 5e-324, "", "x", "0", "null", "../../x", "/etc/passwd", "\x1b[31m", "\0",
    "\ud800", "é", "x" * 300, "${oc.env:CANARY}", "${now:%Y}", "???", "!!python/object", "auto",
    [], [[]], [0], [1, 2], [None], ["a"], {}, {"name": "mlp"}, {"_target_": "os.system"},
    {"name": "linear"}, {"a": {"a": {"a": 1}}},
)  # fmt: skip


def nodes(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items: Any = ()
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, list):
        items = enumerate(tree)
    for key, value in items:
        yield (*path, key)
        yield from nodes(value, (*path, key))


def mutate_tree(tree: Any, chance: random.Random) -> None:
    """Change one place of a tree of dicts and lists."""
    *path, last = chance.choice(list(nodes(tree)))
    for key in path:
        tree = tree[key]
    kind = chance.randrange(6)
    if kind == 0 and isinstance(tree, dict):
        del tree[last]
    elif kind == 1 and isinstance(tree, dict):
        tree[chance.choice(["_target_", "more", "name", "", "\x1b"])] = chance.choice(HOSTILE)
    elif kind == 2 and isinstance(tree[last], int | float) and not isinstance(tree[last], bool):
        tree[last] = tree[last] * chance.choice([-1, 2, 10**6, 1e300]) + chance.choice([0, 1, 0.5])
        if isinstance(tree[last], float) and not math.isfinite(tree[last]):
            tree[last] = 1e308
    elif kind == 3 and isinstance(tree[last], list):
        tree[last] = tree[last] * 2 + [chance.choice(HOSTILE)]
    elif kind == 4 and isinstance(tree, dict):
        tree[last + chance.choice("x._")] = tree.pop(last)
    else:
        tree[last] = copy.deepcopy(chance.choice(HOSTILE))


def mutant_bytes(data: bytes, other: bytes, chance: random.Random) -> bytes:
    """Damage as disks and networks do it: nothing knows of the digest."""
    at, until = sorted(chance.sample(range(len(data)), 2))
    kind = chance.randrange(8)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + chance.randbytes(until - at) + data[until:]
    if kind == 2:
        return data[:at] + data[until:]
    if kind == 3:
        return data[:until] + data[at:]
    if kind == 4:
        return data[:at] + bytes(until - at) + data[until:]
    if kind == 5:
        return data[:at] + other[at:]
    if kind == 6:
        return data + chance.randbytes(chance.randrange(1, 1000))
    changed = bytearray(data)
    for _ in range(chance.randrange(1, 5)):
        changed[chance.randrange(len(data))] ^= chance.randrange(1, 256)
    return bytes(changed)


def mutant(data: bytes, other: bytes, chance: random.Random) -> tuple[bytes, bool]:
    """A mutant, and whether its digest is right."""
    if chance.random() < 0.4:
        return mutant_bytes(data, other, chance), False
    header, document, tensors = taken_apart(data)
    for _ in range(chance.randrange(1, 4)):
        mutate_tree(header if chance.random() < 0.3 else document, chance)
        if not header or not document:
            break
    if chance.random() < 0.1:
        tensors = tensors[: chance.randrange(len(tensors))]
    elif chance.random() < 0.1:
        tensors = chance.randbytes(len(tensors))
    return put_together(header, document, tensors), True


def document_of(found: Checkpoint) -> dict[str, Any]:
    document = taken_apart(checkpoint.encode(found))[1]
    return {key: value for key, value in document.items() if key not in ("made_by", "digest")}


def answers_or_says_why(found: Checkpoint, console: Console) -> None:
    """What `eval` does with a checkpoint, but for its figures."""
    size = getattr(found.config.dataset, "num_samples", 0) * math.prod(found.spec.input_shape)
    if size > 10**5 or found.config.dataset.name not in ("linear", "digits"):
        return
    try:
        data = load_again(found.config, found.spec, None, console)
    except MnistCliError:
        return
    answers = scoring.answers(found.build_model(torch.device("cpu")), found.spec, data.test)
    assert answers.shape == (len(data.test), found.spec.num_outputs)


@pytest.mark.torture
def test_mutants_are_refused_or_mean_exactly_what_they_say(digits: Path, linear: Path) -> None:
    sources = [digits.read_bytes(), linear.read_bytes()]
    console = Console(quiet=True)
    count, accepted, slowest_s = many(1500, 12_000), 0, 0.0
    before_mib = resident_mib()
    for number in range(count):
        chance = random.Random(number)
        chance.shuffle(sources)
        data, is_signed = mutant(*sources, chance)
        started_s = time.perf_counter()
        try:
            found = checkpoint.decode(data)
        except (checkpoint._Refused, UntypedPluginError) as error:
            assert CANARY not in str(error)
            continue
        finally:
            slowest_s = max(slowest_s, time.perf_counter() - started_s)
        accepted += 1
        if not is_signed:
            assert data in sources, f"mutant {number} is damaged and accepted"
            continue
        document = taken_apart(data)[1]
        said = {key: value for key, value in document.items() if key not in ("made_by", "digest")}
        said["progress"] = {"loss_scale_steps": 0} | said["progress"]  # which may be left out
        assert document_of(found) == said, f"mutant {number}"
        answers_or_says_why(found, console)
    grown_mib = peak_mib() - before_mib
    assert slowest_s < 2 and grown_mib < 300
    assert accepted < count / 4, "the mutants are too harmless"
    figure(
        "malformed checkpoints, generated",
        count - accepted,
        other_valid=accepted,
        slowest_ms=round(1000 * slowest_s),
        grown_mib=grown_mib,
    )


# --- hostile metadata, through the program --------------------------------------------------------

PAYLOADS: tuple[Any, ...] = (
    {"_target_": "os.system", "command": "touch $CANARY_FILE"},
    {"_target_": "torch.load", "f": "evil.pt", "weights_only": False},
    {"_target_": "builtins.eval", "_args_": ["__import__('os').system('touch $CANARY_FILE')"]},
    {"_target_": "subprocess.Popen", "args": "touch $CANARY_FILE", "shell": True},
    {"_target_": "logging.FileHandler", "filename": "pwned"},
    {"_call_": "os.system", "_partial_": True},
    {"()": "os.system", "command": "touch $CANARY_FILE"},
    {"hydra": {"callbacks": {"c": {"_target_": "os.system"}}}},
    {"hydra.job_logging": {"handlers": {"h": {"()": "os.system"}}}},
    {"__reduce__": ["os.system", ["touch $CANARY_FILE"]]},
    {"$ref": "file:///etc/passwd"},
    "${oc.env:CANARY}",
    "${oc.decode:${oc.env:CANARY}}",
    "${oc.env:CANARY,x}",
    "???",
    "!!python/object/apply:os.system ['touch $CANARY_FILE']",
    "&a [*a, *a, *a]",
    "__import__('os').system('touch $CANARY_FILE')",
    "{{ cycler.__init__.__globals__.os.system('touch $CANARY_FILE') }}",
    "$(touch $CANARY_FILE)",
    "; touch $CANARY_FILE",
    "%(CANARY)s",
    "{os.environ[CANARY]}",
    "../../../../etc/passwd",
    "file:///etc/passwd",
    "http://127.0.0.1:9/x",
    "\x1b]0;owned\x07\x1b[31mred",
    "a\r\nerror: b\nhint: c",
    "\ud800",
)
POSITIONS = (
    ("more",), ("config", "hydra"), ("config", "model"), ("config", "model", "_target_"),
    ("config", "model", "name"), ("config", "optim", "name"), ("config", "device"),
    ("config", "save_every"), ("dataset", "name"), ("dataset", "digest"), ("dataset", "classes"),
    ("progress", "best"), ("format",), ("digest",),
)  # fmt: skip
LITERAL = (("made_by",), ("host", "torch_version"), ("host", "device"), ("config", "out"))


def with_payload(data: bytes, position: tuple[str, ...], payload: Any) -> bytes:
    header, document, tensors = taken_apart(data)
    *path, last = position
    place = document
    for key in path:
        place = place[key]
    place[last] = [payload] if last == "classes" else payload
    text = json.dumps(document if last == "digest" else document | {"digest": "0" * 64})
    return signed(
        framed(json.dumps({"__metadata__": {"mnist_cli": text}, **header}).encode(), tensors)
    )


@pytest.mark.torture
def test_a_payload_is_refused_and_never_run(
    linear: Path, tmp_path: Path, canary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = linear.read_bytes()
    for payload in PAYLOADS:
        for position in POSITIONS:
            refused(with_payload(data, position, payload), tmp_path / "x.safetensors")
    assert os.listdir(tmp_path) == ["x.safetensors"] and not canary.exists()
    figure("hostile payloads times their places", len(PAYLOADS) * len(POSITIONS))


def test_a_text_that_may_be_anything_stays_a_text(
    linear: Path, tmp_path: Path, canary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Printed escaped, never resolved, never a path."""
    monkeypatch.chdir(tmp_path)
    data = linear.read_bytes()
    for payload in (text for text in PAYLOADS if isinstance(text, str)):
        for position in LITERAL:
            data = with_payload(data, position, payload)
        (tmp_path / "x.safetensors").write_bytes(data)
        ended = here("eval", "checkpoint=x.safetensors")
        assert ended.code == 0
        said = ended.stdout + ended.stderr
        assert CANARY not in said and "\x1b" not in said
        assert "\nerror" not in said and "root:" not in said
    assert os.listdir(tmp_path) == ["x.safetensors"] and not canary.exists()


@pytest.mark.parametrize(
    "name", ["a pickle", "a zip bomb", "deep document", "NaN weights", "escapes in a name",
             "a newer format", "half a surrogate", "a name of 10 MB"],
)  # fmt: skip
def test_the_program_says_it_in_two_lines(linear: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / "best.safetensors"
    path.write_bytes(HAND_MADE[name](linear.read_bytes()))
    for words in (
        ("eval", f"checkpoint={path}"),
        ("eval", f"checkpoint={tmp_path}"),
        ("export", f"checkpoint={path}", "format=onnx"),
        ("train", f"resume={tmp_path}", "--quiet"),
    ):
        ended = here(*words)
        assert (ended.code, ended.stdout) == (4, "")
        two_lines(ended.stderr)
        assert CANARY not in ended.stderr
    assert {entry.name for entry in tmp_path.iterdir()} <= {"best.safetensors", ".lock"}


def test_data_that_the_model_can_not_be_fed_with_is_one_error(
    digits: Path, linear: Path, tmp_path: Path
) -> None:
    """The file is sound, and claims what the data here is not."""
    found = checkpoint.load(digits)
    spec = dataclasses.replace(found.spec, input_shape=(1, 4, 4))
    model = found.model | {"hidden.0.weight": torch.zeros(3, 16)}
    smaller = dataclasses.replace(found, spec=spec, model=model, optim={})
    fewer = dataclasses.replace(
        found,
        spec=dataclasses.replace(found.spec, classes=("a", "b")),
        model=found.model | {"output.weight": torch.zeros(2, 3), "output.bias": torch.zeros(2)},
        optim={},
    )
    for foreign in (smaller, fewer):
        checkpoint.save(tmp_path / "x.safetensors", foreign)
        ended = here("eval", f"checkpoint={tmp_path}/x.safetensors")
        assert (ended.code, ended.stdout) == (4, "")
        two_lines(ended.stderr)


def test_weights_too_large_to_answer_are_one_error(digits: Path, tmp_path: Path) -> None:
    """Finite weights, infinite answers: no figure can be made of them."""
    found = checkpoint.load(digits)
    model = {name: torch.full_like(tensor, 3e38) for name, tensor in found.model.items()}
    checkpoint.save(tmp_path / "x.safetensors", dataclasses.replace(found, model=model, optim={}))
    for flags in ((), ("--json",)):
        ended = here("eval", f"checkpoint={tmp_path}/x.safetensors", *flags)
        assert "Traceback" not in ended.stderr
        assert ended.code == 4


def test_what_lies_beside_a_checkpoint_is_never_read(
    linear: Path, tmp_path: Path, canary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "best.safetensors").write_bytes(linear.read_bytes())
    code = "import os; open(os.environ['CANARY_FILE'], 'w')\n"
    for name in ("sitecustomize.py", "mnist_cli.py", "torch.py", "conftest.py"):
        (theirs / name).write_text(code)
    (theirs / "config.yaml").write_text("x: !!python/object/apply:os.system ['touch $CANARY_FILE']")
    (theirs / ".hydra").mkdir()
    (theirs / ".hydra" / "config.yaml").write_text(
        "hydra: {callbacks: {c: {_target_: os.system, command: touch $CANARY_FILE}}}"
    )
    (theirs / "config.pickle").write_bytes(pickled())
    monkeypatch.chdir(theirs)
    # In a process that has imported nothing yet. Without -P Python itself looks here.
    command = [sys.executable, "-P", "-m", "mnist_cli", "eval", "checkpoint=."]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert not canary.exists()
