"""One linear layer: softmax regression on classes, linear regression on numbers."""

from __future__ import annotations

import math

from torch import Tensor, nn


class Linear(nn.Module):
    def __init__(self, input_shape: tuple[int, ...], num_outputs: int) -> None:
        super().__init__()
        self.output = nn.Linear(math.prod(input_shape), num_outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, *input_shape) float32 to (B, num_outputs) float32."""
        logits: Tensor = self.output(inputs.flatten(1))
        return logits
