"""A trained model, ready to answer: a checkpoint, or an .onnx file that `export` wrote."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mnist_cli import checkpoint as checkpoints
from mnist_cli import find, metrics, onnx_file, runtime, scoring
from mnist_cli.checkpoint import Progress
from mnist_cli.config import TrainConfig
from mnist_cli.console import Console
from mnist_cli.dataset import DatasetSpec, Split
from mnist_cli.errors import CheckpointError, UsageError


@dataclass(frozen=True)
class Trained:
    """What `load` gives.

    Attributes:
        path: the file that it came from.
        config: the configuration that it was trained with.
        spec: the data that it was trained on.
        progress: where its run stood; None of an exported file, which doesn't say.
    """

    path: Path
    config: TrainConfig
    spec: DatasetSpec
    progress: Progress | None
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

    def label(self, inputs: Sequence[Tensor]) -> list[dict[str, Any]]:
        """What it takes pictures for: label, index, probability, and probabilities in the order of
        the classes, of each.

        Args:
            inputs: (C, H, W) uint8 each, as `pictures.prepare` makes them; at least one.

        Raises:
            CheckpointError: as `answer` does.
        """
        unknown = torch.zeros(len(inputs), dtype=torch.int64)
        logits = self.answer(Split(torch.stack(list(inputs)), unknown))
        labels = []
        for probabilities in metrics.probabilities_of(logits).tolist():
            index = max(range(len(probabilities)), key=probabilities.__getitem__)
            labels.append(
                {
                    "label": self.spec.classes[index],
                    "index": index,
                    "probability": probabilities[index],
                    "probabilities": probabilities,
                }
            )
        return labels

    def check_takes_pictures(self) -> None:
        """Raises UsageError where it answers with numbers, CheckpointError for odd shapes."""
        if self.spec.task == "regression":
            raise UsageError(
                f"{self.path} was trained on {self.spec.name}, which holds numbers and no pictures",
                "name a run on images: checkpoint=RUN",
            )
        if len(self.spec.input_shape) != 3 or self.spec.input_shape[0] not in (1, 3):
            raise CheckpointError(
                f"{self.path} takes inputs of shape {self.spec.input_shape}, which no picture has",
                "name a run on images: checkpoint=RUN",
            )


def load(checkpoint: str, device_name: str, console: Console) -> Trained:
    """The model that `checkpoint` means: a run folder, a .safetensors or an exported .onnx file.

    Raises:
        CheckpointError: it is missing, damaged, foreign or from a newer version.
        UsageError: the device isn't there.
    """
    path = find.checkpoint(checkpoint)
    device = runtime.resolve_device(device_name)
    runtime.set_up_cpu()
    if path.suffix == ".onnx":
        exported = onnx_file.load(path)
        return Trained(path, exported.config, exported.spec, None, exported.answer)
    found = checkpoints.load(path)
    for difference in runtime.Host.of(device).differences(found.host):
        console.warn(difference)
    model = found.build_model(device)

    def outputs(split: Split) -> Tensor:
        return scoring.answers(model, found.spec, split.to(device))

    return Trained(path, found.config, found.spec, found.progress, outputs)
