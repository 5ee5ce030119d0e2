"""An exported ONNX file as something that answers: what `export` proves and `eval` measures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mnist_cli import checkpoint as checkpoints
from mnist_cli import seal
from mnist_cli.config import TrainConfig
from mnist_cli.dataset import DatasetSpec, Split
from mnist_cli.errors import CheckpointError
from mnist_cli.imports import importing
from mnist_cli.options import UntypedPluginError
from mnist_cli.scoring import BATCH_SIZE

Answer = Callable[[Split], Tensor]


@dataclass(frozen=True)
class Exported:
    """An exported ONNX file that can be evaluated like a checkpoint."""

    config: TrainConfig
    spec: DatasetSpec
    answer: Answer


def load(path: Path) -> Exported:
    """An ONNX file that `export` wrote, ready to answer.

    Raises:
        CheckpointError: the file is missing, damaged, foreign, or keeps its weights elsewhere.
        UsageError: it was made with a plugin whose name was not typed.
    """
    with importing():
        import onnx

    try:
        data = checkpoints.read_file(path)
        proto = onnx.load_model_from_string(data)
        texts = {entry.key: entry.value for entry in proto.metadata_props}
        config, spec = checkpoints.parse_provenance(texts["mnist_cli"])
        _check_graph(proto)
        _check_digest(data, texts.get("digest", ""))
        answer = answer_of(data)
    except UntypedPluginError:
        raise
    except Exception as error:  # protobuf and onnxruntime have no error class in common
        raise CheckpointError(
            f"{path} is not an ONNX file that mnist-cli exported: {error}",
            "name a file that mnist-cli export wrote",
        ) from error
    return Exported(config, spec, answer)


def _check_graph(proto: Any) -> None:
    """Refuse what `export` never writes: weights in other files, graphs inside of graphs."""
    if proto.functions or proto.graph.sparse_initializer:
        raise ValueError("it holds functions or sparse weights")
    if any(
        a.g.node or a.graphs or a.t.external_data for n in proto.graph.node for a in n.attribute
    ):
        raise ValueError("it holds a graph inside of a node")
    if any(tensor.external_data for tensor in proto.graph.initializer):
        raise ValueError("it keeps its weights in other files")
    if len(proto.graph.input) != 1 or len(proto.graph.output) != 1:
        raise ValueError("it has not one input and one output")


def _check_digest(data: bytes, digest: str) -> None:
    place = data.rfind(digest.encode()) if len(digest) == len(seal.BLANK) else -1
    if place < 0:
        raise ValueError("it has no digest; export it again")
    if not seal.is_intact(data, place):
        raise ValueError("it is damaged: its digest doesn't match its content")


def answer_of(data: bytes) -> Answer:
    """What onnxruntime says to the raw inputs of a split, in batches."""
    with importing():
        import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def answer(split: Split) -> Tensor:
        batches = split.inputs.split(BATCH_SIZE)
        try:
            found = [session.run(None, {name: batch.numpy()})[0] for batch in batches]
            return torch.cat([torch.from_numpy(outputs) for outputs in found])
        except Exception as error:  # onnxruntime has no public error class
            raise CheckpointError(
                f"the graph can't answer: {error}", "name a file that mnist-cli export wrote"
            ) from error

    return answer
