"""The forward pass of `linear` and `mlp` for many members at once.

The members' weights are slices of one tensor, so a layer of all of them is one matrix product.
Members of one seed see the same inputs: they share a lane, in which their first layers are one
product with the inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnist_cli.model.backprop import layers_of
from mnist_cli.model.dropout import draw, scale_of, threshold_of
from mnist_cli.model.linear import Linear
from mnist_cli.model.mlp import Mlp


class Layer(NamedTuple):
    """weight (K, out, in) and bias (K, out) of K models."""

    weight: Tensor
    bias: Tensor


class Network:
    """K models of one shape as one.

    From here on the models' own parameters are views of the stacked ones: what an optimizer does
    to them is done to the stack.

    Args:
        models: K models, all Linear or all Mlp, of one shape; dropout rates may differ.
        num_lanes: a divisor S of K; the first K / S members share the first lane, and so on.

    Attributes:
        drops: whether any of them drops values, so that `forward` needs generators.
    """

    def __init__(self, models: Sequence[Linear | Mlp], num_lanes: int) -> None:
        self.num_lanes = num_lanes
        self.layers = [
            Layer(_joined([one.weight for one in alike]), _joined([one.bias for one in alike]))
            for alike in zip(*map(layers_of, models), strict=True)
        ]
        rates = [model.dropout.p if isinstance(model, Mlp) else 0.0 for model in models]
        self.drops = any(rates)
        like = self.layers[0].bias
        shape = (num_lanes, -1, 1, 1)
        self._threshold = like.new_tensor(list(map(threshold_of, rates))).view(shape)
        self._scale = like.new_tensor(list(map(scale_of, rates))).view(shape)

    def forward(self, inputs: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """The outputs while training.

        Args:
            inputs: (S, B, F) float32, a batch for each lane.
            generators: one for each lane; the masks of dropout are drawn from them.

        Returns:
            (K, num_outputs, B) float32: features before rows, because then the gradients of the
            weights come out as the optimizers want them laid out, without a copy.
        """
        *hidden, output = self.layers
        x = inputs.mT
        for layer in hidden:
            x = F.relu(_linear(x, layer))
            if self.drops:
                x = self._dropout(x, generators)
        return _linear(x, output)

    def _dropout(self, x: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """As model.dropout does on (B, features), with the draws of each lane's generator."""
        _, features, num_rows = x.shape
        draws = torch.stack([draw(x[0].numel(), x.device, lane) for lane in generators])
        draws = draws.view(self.num_lanes, 1, num_rows, features).mT
        mask = torch.empty_like(x).view(self.num_lanes, -1, features, num_rows)
        torch.ge(
            draws.to(x.dtype, memory_format=torch.contiguous_format), self._threshold, out=mask
        )
        return x * mask.mul_(self._scale).view(x.shape)


def _linear(x: Tensor, layer: Layer) -> Tensor:
    """(S, in, B) or (K, in, B) to (K, out, B)."""
    num_members, out, fan_in = layer.weight.shape
    weight, bias = layer.weight.view(len(x), -1, fan_in), layer.bias.view(len(x), -1, 1)
    return torch.baddbmm(bias, weight, x).view(num_members, out, -1)


def _joined(parameters: Sequence[nn.Parameter]) -> Tensor:
    whole = torch.stack([parameter.detach() for parameter in parameters])
    for parameter, part in zip(parameters, whole, strict=True):
        parameter.data = part
    return whole.requires_grad_()
