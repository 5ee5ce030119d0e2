"""A checkpoint is data: one safetensors file with one closed JSON document and a digest.

    8 bytes    length of the header
    header     JSON: name, dtype, shape and place of each tensor, and the document as text
    the rest   the tensors: model.<name>, and optim.<parameter>.<state> where training can go on

The document holds the configuration, what has to be known about the data, the position of the run
and the SHA-256 of the whole file (taken with the digest's own 64 characters as zeros). Nothing in
it is ever executed, resolved or looked up outside a closed registry. Everything is checked before
it is believed: sizes before memory is taken, names and shapes against the model that the
configuration describes, and values for being finite.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import safetensors.torch
import torch
from torch import Tensor, nn

from mnist_cli import __version__, durable, optim, regular_file, seal, strict_json
from mnist_cli.config import TrainConfig, to_plain, train_config
from mnist_cli.dataset import DatasetSpec
from mnist_cli.errors import (
    CheckpointError,
    DivergedError,
    PluginError,
    UsageError,
    shown,
)
from mnist_cli.model import build_model
from mnist_cli.options import PluginModelConfig, UntypedPluginError
from mnist_cli.runtime import Host
from mnist_cli.typed import Range, parse

FORMAT = 1
MAX_FILE_BYTES = 4 * 2**30
MAX_HEADER_BYTES = 2**20
_LARGE_BYTES = 64 * 2**20
_NonNegativeInt = Annotated[int, Range(least=0, most=2**53)]


@dataclass(frozen=True)
class Best:
    """The selected epoch: counted from 1, with the steps taken by its end."""

    epoch: Annotated[int, Range(least=1)]
    step: Annotated[int, Range(least=1)]
    monitor: str | None
    value: float | None


@dataclass(frozen=True)
class Progress:
    """Where a run stands. Randomness is counted, so this and the tensors are all that it needs.

    Attributes:
        step: optimizer steps taken.
        loss_sum: sum of the training losses of this epoch's samples so far.
        epoch_s: seconds this epoch has taken so far.
        train_s: seconds spent training, of all epochs that are done.
        best: the selected epoch so far.
        stale_epochs: epochs since the selected value last improved; a tie is no improvement.
        loss_scale: of float16 training, else None.
        loss_scale_steps: how many steps it has lasted; it grows when they are enough.
    """

    step: _NonNegativeInt = 0
    loss_sum: float = 0.0
    epoch_s: float = 0.0
    train_s: float = 0.0
    best: Best | None = None
    stale_epochs: _NonNegativeInt = 0
    loss_scale: float | None = None
    loss_scale_steps: _NonNegativeInt = 0


@dataclass(frozen=True)
class Checkpoint:
    """What `save` writes and `load` gives back.

    Attributes:
        model: name of each parameter to its tensor, float32.
        optim: `<parameter>.<state>` to its tensor, float32; empty where only answers are wanted.
    """

    config: TrainConfig
    spec: DatasetSpec
    progress: Progress
    host: Host
    model: dict[str, Tensor]
    optim: dict[str, Tensor]

    def build_model(self, device: torch.device) -> nn.Module:
        """The model with the weights of the checkpoint, in evaluation mode on `device`."""
        model = build_model(self.config.model, self.spec.input_shape, self.spec.num_outputs)
        model.load_state_dict(self.model)
        return model.to(device).eval()


@dataclass(frozen=True)
class _Document:
    """The JSON document, without its configuration, which `train_config` reads."""

    format: int
    made_by: str
    digest: str
    dataset: DatasetSpec
    progress: Progress
    host: Host


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write `checkpoint` to `path`, durably and all at once.

    Raises:
        ResourceError: it can't be written; an older file at `path` still stands.
        DivergedError: a tensor is not finite; likewise.
    """
    durable.write(path, encode(checkpoint))


def encode(checkpoint: Checkpoint) -> bytes:
    """The bytes of the file.

    Raises:
        DivergedError: a tensor is not finite; `decode` would refuse it.
    """
    document = {
        "format": FORMAT,
        "made_by": f"mnist-cli {__version__}",
        "digest": seal.BLANK,
        "config": to_plain(checkpoint.config),
        "dataset": dataclasses.asdict(checkpoint.spec),
        "progress": dataclasses.asdict(checkpoint.progress),
        "host": dataclasses.asdict(checkpoint.host),
    }
    tensors = {f"model.{name}": _dense(tensor) for name, tensor in checkpoint.model.items()}
    tensors |= {f"optim.{name}": _dense(tensor) for name, tensor in checkpoint.optim.items()}
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise DivergedError(
                f"training diverged: {name} is not finite after step {checkpoint.progress.step}",
                "type a smaller learning rate, or grad_clip=1",
            )
    data = safetensors.torch.save(tensors, {"mnist_cli": json.dumps(document, allow_nan=False)})
    header_end = 8 + int.from_bytes(data[:8], "little")
    return seal.sealed(data, data.index(seal.BLANK.encode(), 0, header_end))


def _dense(tensor: Tensor) -> Tensor:
    return (
        tensor.detach()
        .to("cpu", torch.float32, memory_format=torch.contiguous_format)
        .clone(memory_format=torch.contiguous_format)
    )


def load(path: Path) -> Checkpoint:
    """Read and verify a checkpoint, from whoever it may come.

    Raises:
        CheckpointError: it is missing, damaged, foreign or from a newer version.
        UsageError: it was made with a plugin whose name was not typed, or that fails.
    """
    try:
        return decode(read_file(path, _check_start))
    except _Refused as refused:
        raise CheckpointError(f"{path}: {refused}", refused.hint) from refused


class _Refused(Exception):
    """Why a file isn't a checkpoint that can be used."""

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.hint = hint or "train again, or take another checkpoint of the run"


_FOREIGN = "only checkpoints that mnist-cli wrote are read; pickle files never are"


def read_file(path: Path, before: Callable[[bytes, int], None] | None = None) -> bytes:
    """All bytes of a regular file of at most MAX_FILE_BYTES.

    Args:
        before: is given the first mebibyte and the size, to refuse the file before it is read.
    """
    try:
        with regular_file.opened(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_FILE_BYTES:
                raise _Refused(f"is larger than {MAX_FILE_BYTES} bytes", _FOREIGN)
            if before is not None:
                before(file.read(8 + MAX_HEADER_BYTES), size)
                file.seek(0)
            return file.read()
    except OSError as error:
        raise CheckpointError(
            f"can't read {path}: {error.strerror}",
            "name a run folder or a .safetensors file: checkpoint=RUN",
        ) from error


def _check_start(start: bytes, size: int) -> None:
    """Refuse what can't be a checkpoint before memory is taken: a file of holes needs no disk."""
    _check_header_size(start, size)
    if size > _LARGE_BYTES:
        header_end, header, document = _read_header(start)
        _read_document(header, document, size - header_end)


def _check_header_size(start: bytes, size: int) -> None:
    if len(start) < 9 or start[8:9] != b"{":
        raise _Refused("is not a safetensors file", _FOREIGN)
    length = int.from_bytes(start[:8], "little")
    if length > MAX_HEADER_BYTES or 8 + length > size:
        raise _Refused(f"has a header of {length} bytes, which can't be", _FOREIGN)


def decode(data: bytes) -> Checkpoint:
    """A checkpoint out of its bytes; `_Refused` for anything that `encode` didn't make."""
    _check_header_size(data[:9], len(data))
    header_end, header, document = _read_header(data)
    _check_digest(data, header_end, document.get("digest"))
    config, rest = _read_document(header, document, len(data) - header_end)
    try:
        tensors = safetensors.torch.load(data)
    except Exception as error:  # the library's own error class, for a layout that it refuses
        raise _Refused(f"is damaged: {error}") from error
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise _Refused(f"has values in {name} that are not finite")
    return Checkpoint(
        config=config,
        spec=rest.dataset,
        progress=rest.progress,
        host=rest.host,
        model={n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")},
        optim={n.removeprefix("optim."): t for n, t in tensors.items() if n.startswith("optim.")},
    )


def _read_header(data: bytes) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """Where the header ends, its tensors, and its document."""
    header_end = 8 + int.from_bytes(data[:8], "little")
    header = _json(data[8:header_end], "header")
    text = header.pop("__metadata__", None)
    if (
        not isinstance(text, dict)
        or set(text) != {"mnist_cli"}
        or not isinstance(text["mnist_cli"], str)
    ):
        raise _Refused("is not a checkpoint of mnist-cli", _FOREIGN)
    document = _json(text["mnist_cli"].encode("utf-8", "surrogatepass"), "document")
    _check_format(document)
    return header_end, header, document


def _read_document(
    header: dict[str, Any], document: dict[str, Any], size: int
) -> tuple[TrainConfig, _Document]:
    """The run that the header describes, its `size` bytes of tensors fitting it."""
    config, rest = _parse_document(document)
    _check_spec(config, rest.dataset)
    _check_tensors(header, config, rest.dataset, size)
    return config, rest


def _json(data: bytes, what: str) -> dict[str, Any]:
    try:
        return strict_json.parse(data)
    except ValueError as error:
        raise _Refused(f"has a {what} that is not sound JSON ({error})", _FOREIGN) from error


def _check_format(document: dict[str, Any]) -> None:
    found = document.get("format")
    if type(found) is not int or found < 1:
        raise _Refused(f"has no format number, but {shown(found)}", _FOREIGN)
    if found > FORMAT:
        raise _Refused(
            f"has format {found} (made by {shown(document.get('made_by'))}),"
            f" but mnist-cli {__version__} reads up to {FORMAT}",
            "install a newer mnist-cli",
        )


def _check_digest(data: bytes, header_end: int, digest: Any) -> None:
    stored = digest.encode() if isinstance(digest, str) and digest.isascii() else b""
    place = data.find(stored, 0, header_end) if len(stored) == 64 else -1
    if place < 0:
        raise _Refused("has no digest")
    if not seal.is_intact(data, place):
        raise _Refused("is damaged: its digest doesn't match its content")


def _parse_document(document: dict[str, Any]) -> tuple[TrainConfig, _Document]:
    rest = dict(document)
    if isinstance(rest.get("progress"), dict):  # it came later than the format
        rest["progress"] = {"loss_scale_steps": 0} | rest["progress"]
    try:
        config = train_config(rest.pop("config", None))
        return config, parse(_Document, rest)
    except UntypedPluginError:
        raise
    except UsageError as error:
        raise _Refused(f"describes no run that can be: {error}", _FOREIGN) from error


@dataclass(frozen=True)
class _Provenance:
    """The JSON document of an exported file, without its configuration."""

    format: int
    made_by: str
    dataset: DatasetSpec


def parse_provenance(text: str) -> tuple[TrainConfig, DatasetSpec]:
    """Configuration and data out of an exported file. Raises ValueError or UsageError."""
    try:
        document = _json(text.encode("utf-8", "surrogatepass"), "document")
        _check_format(document)
        config = train_config(document.pop("config", None))
        spec = parse(_Provenance, document).dataset
        _check_spec(config, spec)
    except _Refused as refused:
        raise ValueError(str(refused)) from refused
    return config, spec


def _check_spec(config: TrainConfig, spec: DatasetSpec) -> None:
    """The data must be what the configuration names, in numbers that can be, as names to print."""
    channels = spec.input_shape[:1] if spec.task == "classification" else (0,)
    fits = (
        (spec.name, spec.task) == (config.dataset.name, config.task)
        and 1 <= len(spec.input_shape) <= 3
        and all(0 < length < 2**16 for length in spec.input_shape)
        and bool(spec.classes) == (spec.task == "classification")
        and all(name.isprintable() and len(name) <= 100 for name in spec.classes)
        and channels == (len(spec.mean),) == (len(spec.std),)
        and all(
            abs(mean) <= 1 and 1e-9 <= std <= 1
            for mean, std in zip(spec.mean, spec.std, strict=True)
        )
        and re.fullmatch(r"[0-9a-f]{64}", spec.digest)
    )
    if not fits:
        raise _Refused("describes data that can't be", _FOREIGN)


def _check_tensors(
    header: dict[str, Any], config: TrainConfig, spec: DatasetSpec, size: int
) -> None:
    """Names, types, shapes and total size against the model, before any tensor is made."""
    try:
        with torch.device("meta"):
            model = build_model(config.model, spec.input_shape, spec.num_outputs)
    except PluginError:
        raise
    except (UsageError, RuntimeError, ValueError, OverflowError) as error:
        raise _Refused(f"describes a model that can't be built: {error}", _FOREIGN) from error
    shapes = {f"model.{name}": list(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: _shape(name, entry) for name, entry in header.items()}
    missing = sorted(shapes.keys() - found.keys())
    of_parameters = {
        name: {
            f"optim.{name}.{key}": [] if key == "step" else list(parameter.shape)
            for key in optim.state_names(config.optim)
        }
        for name, parameter in model.named_parameters()
    }
    states = {key: shape for own in of_parameters.values() for key, shape in own.items()}
    has_states = any(name.startswith("optim.") for name in found)
    is_plugin = isinstance(config.model, PluginModelConfig)  # which may have what is never trained
    for own in of_parameters.values():
        if any(key in found for key in own) if is_plugin else has_states:
            missing += sorted(own.keys() - found.keys())
    extra = sorted(found.keys() - shapes.keys() - states.keys())
    if missing or extra:
        names = ", ".join(shown(name) for name in (missing or extra)[:5])
        raise _Refused(f"{'lacks the tensors' if missing else 'has unknown tensors'} {names}")
    expected = shapes | states
    for name, shape in found.items():
        if shape != expected[name]:
            raise _Refused(
                f"has a tensor {shown(name)} of shape {shape} instead of {expected[name]}"
            )
    if 4 * sum(math.prod(shape) for shape in found.values()) != size:
        raise _Refused(f"holds {size} bytes of tensors, which doesn't fit its header")


def _shape(name: str, entry: Any) -> list[int]:
    fits = (
        isinstance(entry, dict)
        and set(entry) == {"dtype", "shape", "data_offsets"}
        and isinstance(entry["dtype"], str)
        and isinstance(entry["shape"], list)
        and all(type(length) is int and 0 <= length < 2**40 for length in entry["shape"])
    )
    if not fits:
        raise _Refused(f"has a malformed entry for the tensor {shown(name)}")
    if entry["dtype"] != "F32":
        raise _Refused(f"has a tensor {shown(name)} of type {shown(entry['dtype'])} instead of F32")
    return list(entry["shape"])
