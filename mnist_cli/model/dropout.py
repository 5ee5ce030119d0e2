"""Dropout whose masks cost little on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

LEVELS = 2**16  # resolution of the probability: it is off by at most 1 / LEVELS


class Dropout(nn.Module):
    """Zero each value with probability `p` while training and scale the others by 1 / (1 - p).

    One draw of 64 random bits decides on four values. `torch.nn.Dropout` draws for each value,
    which takes 2.4 times as long here, a sixth of a perceptron's training step.

    Source: Srivastava et al., "Dropout" (2014), in its inverted form.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, values: Tensor) -> Tensor:
        """Any shape and float dtype; the same comes back."""
        if not self.training or self.p == 0:
            return values
        if torch.compiler.is_compiling():  # it draws with a generator of its own, and fuses that
            return functional.dropout(values, self.p)
        return values * self.mask(values)

    def mask(self, values: Tensor) -> Tensor:
        """A newly drawn factor for each of `values`, float32: 0 or 1 / (1 - p)."""
        draws = draw(values.numel(), values.device).to(torch.float32)
        # In place, as floats: a comparison that gives bools takes three times as long on a CPU.
        return draws.ge_(threshold_of(self.p)).mul_(scale_of(self.p)).view(values.shape)


def draw(count: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """(count,) int16, each of the 2^16 as likely; from torch's global generator if from no other.

    A value is kept where its draw is not below the threshold.
    """
    words = torch.empty((count + 3) // 4, dtype=torch.int64, device=device)
    return words.random_(-(2**63), None, generator=generator).view(torch.int16)[:count]


def threshold_of(p: float) -> int:
    """The threshold for `p`, as a signed number of 16 bits; all draws reach that of p = 0."""
    return min(round(p * LEVELS), LEVELS - 1) - LEVELS // 2


def scale_of(p: float) -> float:
    return 1 / (1 - p)
