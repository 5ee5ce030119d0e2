"""Backpropagation through `linear` and `mlp`, written out: autograd's gradients, to the bit.

On a CPU small models spend much of a step on what autograd does besides: nodes, saved tensors,
fresh memory. Here the two passes are a handful of calls. (A layer of one unit that is fed a batch
of one is the exception: there torch transposes a product, and a last digit may differ.)

Source: Rumelhart, Hinton and Williams, "Learning representations by back-propagating errors", 1986.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnist_cli.model.dropout import scale_of
from mnist_cli.model.linear import Linear
from mnist_cli.model.mlp import Mlp


def layers_of(model: Linear | Mlp) -> list[nn.Linear]:
    """From the inputs to the outputs. After each but the last come ReLU and dropout."""
    hidden = model.hidden if isinstance(model, Mlp) else ()
    return [*cast("list[nn.Linear]", hidden), model.output]


class Backprop:
    """The forward and the backward pass of a model that is in training.

    Args:
        model: on the CPU.
        loss: a function of (outputs, targets) that gives the loss, (), and its gradient with
            respect to the outputs, (B, num_outputs).
    """

    def __init__(
        self, model: Linear | Mlp, loss: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    ) -> None:
        self._layers = layers_of(model)
        self._loss = loss
        drops = isinstance(model, Mlp) and model.dropout.p > 0
        self._dropout = model.dropout if isinstance(model, Mlp) and drops else None

    @torch.no_grad()
    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of a batch, () float32; it leaves its gradients in the parameters.

        Args:
            inputs: (B, *input_shape) float32.
            targets: as the loss takes them.
        """
        *hidden, output = self._layers
        fed = [inputs.flatten(1)]  # to each layer
        for layer in hidden:
            x = F.linear(fed[-1], layer.weight, layer.bias).relu_()
            fed.append(x if self._dropout is None else x.mul_(self._dropout.mask(x)))
        loss, grad = self._loss(F.linear(fed[-1], output.weight, output.bias), targets)
        for number, layer in reversed(list(enumerate(self._layers))):
            x = fed[number]
            layer.weight.grad = grad.T @ x
            layer.bias.grad = grad.sum(0)
            if number > 0:
                # Where ReLU or dropout stopped a value, x is 0, and its gradient stops too.
                grad = torch.ops.aten.threshold_backward(grad @ layer.weight, x, 0)
                if self._dropout is not None:
                    grad.mul_(scale_of(self._dropout.p))
        return loss
