"""A trained model, ready to answer: a checkpoint, or an .onnx file that `export` wrote."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mnist_cli import checkpoint as checkpoints
from mnist_cli import onnx_file, runtime, scoring
from mnist_cli.config import TrainConfig
from mnist_cli.console import Console
from mnist_cli.dataset import DatasetSpec, Split
from mnist_cli.errors import CheckpointError


@dataclass(frozen=True)
class Trained:
    """What `load` gives.

    Attributes:
        path: the file that it came from.
        config: the configuration that it was trained with.
        spec: the data that it was trained on.
    """

    path: Path
    config: TrainConfig
    spec: DatasetSpec
    _outputs: Callable[[Split], Tensor]

    def answer(self, split: Split) -> Tensor:
        """The outputs for the inputs of `split`, in order: (N, K) float32, on the model's device.

        Raises:
            CheckpointError: they have another shape or type, or aren't finite.
        """
        outputs = self._outputs(split)
        if outputs.shape != (len(split), self.spec.num_outputs) or outputs.dtype != torch.float32:
            raise CheckpointError(
                f"{self.path} gives answers of shape {tuple(outputs.shape)}"
                f" and type {outputs.dtype}",
                "name a file that mnist-cli export wrote",
            )
        if not outputs.isfinite().all():
            raise CheckpointError(
                f"{self.path} gives answers that are not finite numbers",
                "train again, or take another one",
            )
        return outputs


def load(checkpoint: str, device_name: str, console: Console) -> Trained:
    """The model that `checkpoint` means: a run folder, a .safetensors or an exported .onnx file.

    Raises:
        CheckpointError: it is missing, damaged, foreign or from a newer version.
        UsageError: the device isn't there.
    """
    path = checkpoints.find(checkpoint)
    device = runtime.resolve_device(device_name)
    runtime.keep_freed_memory()
    if path.suffix == ".onnx":
        exported = onnx_file.load(path)
        return Trained(path, exported.config, exported.spec, exported.answer)
    found = checkpoints.load(path)
    for difference in runtime.Host.of(device).differences(found.host):
        console.warn(difference)
    model = found.build_model(device)

    def outputs(split: Split) -> Tensor:
        return scoring.answers(model, found.spec, split.to(device))

    return Trained(path, found.config, found.spec, outputs)
