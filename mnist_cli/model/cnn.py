"""Convolutional networks for images (C, H, W).

Two things here look odd and only buy speed. Max-pool stands before its ReLU: both keep the order
of numbers, so they commute, outputs and gradients are the same bits, and the ReLU has a quarter
of the work. And images are laid out channels last, which the CPU's convolutions want (1.1 to 1.9
times as fast forward and backward). Weights stay as they are: fused optimizers walk through memory
and need weights, gradients and state, also those out of a checkpoint, laid out alike.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnist_cli.errors import UsageError
from mnist_cli.model.dropout import Dropout


class Cnn(nn.Module):
    """Two padded 3x3 convolutions, each with ReLU and max-pool, then one hidden layer."""

    def __init__(
        self,
        channels: tuple[int, int],
        dense: int,
        input_shape: tuple[int, ...],
        num_outputs: int,
    ) -> None:
        super().__init__()
        colours, height, width = _image_shape("cnn", input_shape, smallest=4)
        self.conv1 = nn.Conv2d(colours, channels[0], kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(*channels, kernel_size=3, padding=1)
        self.hidden = nn.Linear(channels[1] * (height // 4) * (width // 4), dense)
        self.output = nn.Linear(dense, num_outputs)
        _he_uniform(self)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) float32 to (B, num_outputs) float32."""
        x = _channels_last(images)
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        x = F.relu(self.hidden(x.flatten(1)))
        logits: Tensor = self.output(x)
        return logits


class CnnDropout(nn.Module):
    """Two unpadded 3x3 convolutions (32, 64), max-pool, dropout, 128 hidden units, dropout.

    The network of pytorch/examples' mnist/main.py, with the second dropout free to choose.
    """

    def __init__(
        self,
        conv_dropout: float,
        dense_dropout: float,
        input_shape: tuple[int, ...],
        num_outputs: int,
    ) -> None:
        super().__init__()
        channels, height, width = _image_shape("cnn_dropout", input_shape, smallest=6)
        self.conv1 = nn.Conv2d(channels, 32, kernel_size=3)
        self.conv2 = nn.Conv2d(32, 64, kernel_size=3)
        self.conv_dropout = Dropout(conv_dropout)
        self.hidden = nn.Linear(64 * ((height - 4) // 2) * ((width - 4) // 2), 128)
        self.dense_dropout = Dropout(dense_dropout)
        self.output = nn.Linear(128, num_outputs)
        _he_uniform(self)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) float32 to (B, num_outputs) float32."""
        x = _channels_last(images)
        x = F.relu(self.conv1(x))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        x = self.conv_dropout(x).flatten(1)
        x = self.dense_dropout(F.relu(self.hidden(x)))
        logits: Tensor = self.output(x)
        return logits


class CnnDeep(nn.Module):
    """Three padded 3x3 convolutions (32, 64, 128), each with ReLU and max-pool, then the logits."""

    def __init__(self, input_shape: tuple[int, ...], num_outputs: int) -> None:
        super().__init__()
        channels, height, width = _image_shape("cnn_deep", input_shape, smallest=8)
        self.conv1 = nn.Conv2d(channels, 32, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, kernel_size=3, padding=1)
        self.conv3 = nn.Conv2d(64, 128, kernel_size=3, padding=1)
        self.output = nn.Linear(128 * (height // 8) * (width // 8), num_outputs)
        _he_uniform(self)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) float32 to (B, num_outputs) float32."""
        x = _channels_last(images)
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        x = F.relu(F.max_pool2d(self.conv3(x), 2))
        logits: Tensor = self.output(x.flatten(1))
        return logits


def _channels_last(images: Tensor) -> Tensor:
    """The same (B, C, H, W) with C innermost in memory."""
    # Not .to(memory_format=torch.channels_last): vmap refuses it.
    inner = images.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format)
    return inner.permute(0, 3, 1, 2)


def _he_uniform(model: nn.Module) -> None:
    """Start the layers before a ReLU as He et al. (2015), "Delving Deep into Rectifiers", do.

    On small sets, where steps are few, torch's own start is too small to learn from in time.
    """
    for name, layer in model.named_children():
        if isinstance(layer, nn.Conv2d | nn.Linear) and name != "output":
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]  # every layer here has a bias


def _image_shape(name: str, input_shape: tuple[int, ...], smallest: int) -> tuple[int, int, int]:
    """`input_shape` as (C, H, W). Raises UsageError where it isn't, or is below `smallest`."""
    if len(input_shape) != 3 or min(input_shape[1:]) < smallest:
        shape = "x".join(map(str, input_shape))
        raise UsageError(
            f"model={name} needs images of at least {smallest}x{smallest} pixels,"
            f" but a sample of the dataset is {shape}",
            "type model=linear or model=mlp",
        )
    channels, height, width = input_shape
    return channels, height, width
