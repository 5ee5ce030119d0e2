"""Fully connected layers, each with ReLU and dropout, then a linear one to the logits."""

from __future__ import annotations

import math
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from mnist_cli.model.dropout import Dropout


class Mlp(nn.Module):
    """A perceptron with `len(hidden)` hidden layers; without any it is the linear model."""

    def __init__(
        self,
        hidden: tuple[int, ...],
        dropout: float,
        input_shape: tuple[int, ...],
        num_outputs: int,
    ) -> None:
        super().__init__()
        widths = (math.prod(input_shape), *hidden)
        self.hidden = nn.ModuleList(nn.Linear(fan_in, out) for fan_in, out in pairwise(widths))
        self.dropout = Dropout(dropout)
        self.output = nn.Linear(widths[-1], num_outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, *input_shape) float32 to (B, num_outputs) float32."""
        x = inputs.flatten(1)
        for layer in self.hidden:
            x = self.dropout(F.relu(layer(x)))
        logits: Tensor = self.output(x)
        return logits
