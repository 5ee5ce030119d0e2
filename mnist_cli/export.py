"""The command `export`: a file to deploy, and the proof that it answers as its checkpoint does.

The exported graph takes raw inputs, uint8 images (N, C, H, W) as they come out of a file or float32
numbers (N, F), with a free batch size, and holds the normalisation. Nothing stands at the target
path before every test sample has been put through both.
"""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import shlex
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mnist_cli import __version__, durable, find, onnx_file, scoring, seal
from mnist_cli import checkpoint as checkpoints
from mnist_cli.checkpoint import Checkpoint
from mnist_cli.config import ExportConfig, to_plain
from mnist_cli.console import Console
from mnist_cli.dataset import DatasetSpec, Normalise, Split
from mnist_cli.dataset.again import load_again
from mnist_cli.errors import ParityError, UsageError
from mnist_cli.imports import importing
from mnist_cli.onnx_file import Answer
from mnist_cli.options import plugin_words

SUFFIXES = {"onnx": ".onnx", "torch_export": ".pt2", "safetensors": ".safetensors"}
BENCHMARKED_BATCHES = (1, 64, 1000)


class Deployable(nn.Module):
    """A model with its normalisation inside: raw inputs to logits (N, K) float32."""

    def __init__(self, model: nn.Module, spec: DatasetSpec) -> None:
        super().__init__()
        self.normalise = Normalise(spec)
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(self.normalise(inputs))  # type: ignore[no-any-return]


def run(config: ExportConfig, console: Console) -> dict[str, Any]:
    """The command `export`.

    Returns:
        The JSON document: path, format, bytes, parity.

    Raises:
        CheckpointError, DataError: the checkpoint or its test data can't be used.
        UsageError: there is a file already.
        ParityError: the export answers differently; no file is left.
        ResourceError: the file can't be written.
    """
    source = find.checkpoint(config.checkpoint)
    found = checkpoints.load(source)
    target = _target(config, source)
    if config.quantize != "none" and found.spec.task == "regression":
        raise UsageError(
            f"quantize={config.quantize} is measured by the accuracy that it costs,"
            f" but {found.spec.name} holds numbers",
            "type quantize=none",
        )
    model = found.build_model(torch.device("cpu"))
    data = load_again(found.config, found.spec, config.dataset.root, console)
    encoded, answer = _FORMATS[config.format](config, found, model)
    parity = compare(
        lambda split: scoring.answers(model, found.spec, split), answer, data.test, found.spec
    )
    _require(parity, config)
    durable.make_folder(target.parent)
    durable.write(target, encoded)
    document = {
        "path": str(target),
        "format": config.format,
        "bytes": len(encoded),
        "parity": parity,
    }
    if config.benchmark:
        document["benchmark"] = _benchmark(model, found.spec, answer, data.test)
    _show(document, found, console)
    return document


def _target(config: ExportConfig, source: Path) -> Path:
    quantized = ".int8" if config.quantize == "int8" else ""
    folder = Path(config.out) if config.out is not None else source.parent
    target = folder / f"model{quantized}{SUFFIXES[config.format]}"
    with durable.writing(target):
        is_there = target.exists()
    if is_there and not config.overwrite:
        raise UsageError(
            f"{target} is there already", "type overwrite=true, or name a folder with out=DIR"
        )
    return target


# --- formats -------------------------------------------------------------------------------------


def _example(spec: DatasetSpec) -> Tensor:
    """Two raw samples of zeros; an export keeps their number free."""
    dtype = torch.uint8 if spec.task == "classification" else torch.float32
    return torch.zeros((2, *spec.input_shape), dtype=dtype)


def _program(found: Checkpoint, model: nn.Module) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    deployable = Deployable(model, found.spec).eval()
    with durable.temporary_folder():  # torch needs one to be possible, though it writes nothing
        program = torch.export.export(
            deployable, (_example(found.spec),), dynamic_shapes=({0: batch},)
        )
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # with paths of this machine
    return program


def _provenance(found: Checkpoint) -> dict[str, Any]:
    return {
        "format": checkpoints.FORMAT,
        "made_by": f"mnist-cli {__version__}",
        "config": to_plain(found.config),
        "dataset": dataclasses.asdict(found.spec),
    }


def _to_onnx(config: ExportConfig, found: Checkpoint, model: nn.Module) -> tuple[bytes, Answer]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns of its own internals
        exported = torch.onnx.export(
            _program(found, model),
            dynamo=True,
            opset_version=config.opset,
            input_names=["images" if found.spec.task == "classification" else "inputs"],
            output_names=["logits" if found.spec.task == "classification" else "outputs"],
            external_data=False,
            verbose=False,
        )
    assert exported is not None
    proto = exported.model_proto
    del proto.graph.value_info[:]  # what the exporter inferred; the quantizer infers it anew
    for node in proto.graph.node:
        del node.metadata_props[:]  # where in the source it comes from, with paths of this machine
    if config.quantize == "int8":
        proto = _quantized(proto)
    texts = {
        "classes": json.dumps(found.spec.classes),
        "mnist_cli": json.dumps(_provenance(found)),
        "digest": seal.BLANK,
    }
    for key, text in texts.items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, text
    data: bytes = proto.SerializeToString()
    data = seal.sealed(data, data.rindex(seal.BLANK.encode()))
    return data, onnx_file.answer_of(data)


def _quantized(proto: Any) -> Any:
    """The model with int8 matrix products (onnxruntime's dynamic quantization)."""
    with importing():
        import onnx
        from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.disable(logging.WARNING)  # the quantizer advises a step that changes nothing here
    try:
        # The quantizer writes the model, the model with its shapes, and the result.
        with durable.temporary_folder(room_bytes=4 * proto.ByteSize() + 2**16) as folder:
            target = folder / "model.onnx"
            quantize_dynamic(
                proto,
                target,
                weight_type=QuantType.QInt8,
                op_types_to_quantize=["MatMul", "Gemm"],
            )
            return onnx.load(target)
    finally:
        logging.disable(logging.NOTSET)


def _to_torch_export(
    config: ExportConfig, found: Checkpoint, model: nn.Module
) -> tuple[bytes, Answer]:
    buffer = io.BytesIO()
    extra_files = {"mnist_cli.json": json.dumps(_provenance(found))}
    torch.export.save(_program(found, model), buffer, extra_files=extra_files)
    # Only our own bytes of a moment ago are loaded: the format of a foreign file may run code.
    reloaded = torch.export.load(io.BytesIO(buffer.getvalue())).module()

    def answer(split: Split) -> Tensor:
        with torch.inference_mode():
            return torch.cat([reloaded(batch) for batch in split.inputs.split(scoring.BATCH_SIZE)])

    return buffer.getvalue(), answer


def _to_safetensors(
    config: ExportConfig, found: Checkpoint, model: nn.Module
) -> tuple[bytes, Answer]:
    data = checkpoints.encode(dataclasses.replace(found, optim={}))
    reloaded = checkpoints.decode(data).build_model(torch.device("cpu"))
    return data, lambda split: scoring.answers(reloaded, found.spec, split)


_FORMATS: dict[str, Callable[[ExportConfig, Checkpoint, nn.Module], tuple[bytes, Answer]]] = {
    "onnx": _to_onnx,
    "torch_export": _to_torch_export,
    "safetensors": _to_safetensors,
}


# --- parity --------------------------------------------------------------------------------------


def compare(checkpoint: Answer, export: Answer, split: Split, spec: DatasetSpec) -> dict[str, Any]:
    """How far two models agree on every sample of `split`: `parity` in the JSON document."""
    expected, found = checkpoint(split), export(split)
    classes, found_classes = expected.argmax(dim=1), found.argmax(dim=1)
    is_classification = spec.task == "classification"
    return {
        "n": len(split),
        "max_abs_diff": float((expected - found).abs().max()),
        "argmax_agreement": float((classes == found_classes).double().mean()),
        "accuracy_checkpoint": float((classes == split.targets).double().mean())
        if is_classification
        else None,
        "accuracy_export": float((found_classes == split.targets).double().mean())
        if is_classification
        else None,
    }


def _require(parity: dict[str, Any], config: ExportConfig) -> None:
    if config.quantize != "none":
        drop = (parity["accuracy_checkpoint"] or 0.0) - (parity["accuracy_export"] or 0.0)
        if drop > config.max_accuracy_drop:
            raise ParityError(
                f"the int8 export loses {drop:.2%} of accuracy, more than"
                f" max_accuracy_drop={config.max_accuracy_drop}",
                "type quantize=none, or allow more with max_accuracy_drop=",
            )
    elif parity["argmax_agreement"] < 1 or not parity["max_abs_diff"] <= config.tolerance:
        raise ParityError(
            f"the export answers differently: largest difference {parity['max_abs_diff']:.2g}"
            f" (tolerance={config.tolerance:g}),"
            f" {1 - parity['argmax_agreement']:.2%} of {parity['n']:,} answers changed",
            "no file was written; if the difference is acceptable, type a larger tolerance=",
        )


def _benchmark(
    model: nn.Module, spec: DatasetSpec, answer: Answer, test: Split
) -> list[dict[str, Any]]:
    """Milliseconds per batch of checkpoint and export, the median of interleaved calls."""
    rows = []
    for size in BENCHMARKED_BATCHES:
        if size > len(test):
            continue
        batch = Split(test.inputs[:size], test.targets[:size])
        times: dict[str, list[float]] = {"checkpoint": [], "export": []}
        for _ in range(20):
            for name, call in (
                ("checkpoint", lambda s: scoring.answers(model, spec, s)),
                ("export", answer),
            ):
                started = time.perf_counter()
                call(batch)
                times[name].append(time.perf_counter() - started)
        medians = {name: 1000 * statistics.median(values) for name, values in times.items()}
        rows.append(
            {"batch_size": size, **{f"{name}_ms": value for name, value in medians.items()}}
        )
    return rows


def _show(document: dict[str, Any], found: Checkpoint, console: Console) -> None:
    parity = document["parity"]
    console.say(f"wrote    {document['path']} ({document['bytes']:,} bytes)")
    console.say(
        f"parity   {parity['n']:,} test samples: largest difference {parity['max_abs_diff']:.2g},"
        f" {parity['argmax_agreement']:.2%} same answers"
    )
    if parity["accuracy_export"] is not None:
        console.say(
            f"accuracy {parity['accuracy_checkpoint']:.2%} checkpoint,"
            f" {parity['accuracy_export']:.2%} export"
        )
    for row in document.get("benchmark", []):
        console.say(
            f"batch    {row['batch_size']:>4}: {row['checkpoint_ms']:.2f} ms checkpoint,"
            f" {row['export_ms']:.2f} ms export"
        )
    if document["format"] != "torch_export":
        words = [f"checkpoint={document['path']}", *plugin_words(found.config.plugin)]
        checkpoint = shlex.join(words)
        console.say(f"next     mnist-cli eval {checkpoint}")
