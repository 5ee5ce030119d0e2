"""The losses of `mnist_cli.loss` for K members at once, each with a label smoothing of its own.

The formulas and their sources stand there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mnist_cli.options import LossConfig, MseConfig, SmoothedLossConfig

Losses = Callable[[Tensor, Tensor], Tensor]


def build_losses(
    configs: Sequence[LossConfig],
    task: Literal["classification", "regression"],
    device: torch.device,
) -> Losses:
    """A function of (outputs, targets) to the mean loss of each member, (K,).

    Outputs are (K, C, B) floats. Targets are (K, B) int64 on classification, and (K, B, C) floats
    on regression. The names of the K losses must be the same.
    """
    first = configs[0]
    if task == "regression":
        return lambda outputs, targets: (outputs - targets.mT).square().mean((1, 2))
    if isinstance(first, MseConfig):
        return lambda logits, labels: (logits - _onehot(labels, logits)).square().mean((1, 2))
    rates = [c.label_smoothing for c in configs if isinstance(c, SmoothedLossConfig)]
    smoothing = torch.tensor(rates, device=device).view(-1, 1, 1)
    is_smooth = any(rates)

    def targets_of(labels: Tensor, logits: Tensor) -> Tensor:
        onehot = _onehot(labels, logits)
        if not is_smooth:
            return onehot
        return onehot * (1 - smoothing) + smoothing / logits.shape[1]

    def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
        if not is_smooth:
            return F.cross_entropy(logits, labels, reduction="none").mean(1)
        return -(targets_of(labels, logits) * F.log_softmax(logits, 1)).sum(1).mean(1)

    def kl_div(logits: Tensor, labels: Tensor) -> Tensor:
        targets = targets_of(labels, logits)
        divergence = torch.xlogy(targets, targets) - targets * F.log_softmax(logits, 1)
        return divergence.sum(1).mean(1)

    def bce(logits: Tensor, labels: Tensor) -> Tensor:
        targets = targets_of(labels, logits)
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean((1, 2))

    return {"cross_entropy": cross_entropy, "kl_div": kl_div, "bce": bce}[first.name]


def _onehot(labels: Tensor, logits: Tensor) -> Tensor:
    classes = torch.arange(logits.shape[1], device=labels.device)
    return (labels[:, None] == classes[:, None]).to(logits.dtype)
