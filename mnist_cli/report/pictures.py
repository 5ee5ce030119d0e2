"""Tensors as small PNG files in `data:` addresses; the page enlarges them without smoothing."""

from __future__ import annotations

import base64
import io
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mnist_cli.dataset import Split

POSITIVE = (38, 120, 190)
NEGATIVE = (213, 94, 0)
MAX_TILES = 24


def tiles(split: Split, rows: Tensor, *texts: list[str], hidden: int = 0) -> dict[str, Any]:
    """Images of `split` at `rows`, each with its texts; and how many more there are."""
    images = [of_image(split.inputs[row]) for row in rows[:MAX_TILES].tolist()]
    captions = list(zip(*texts, strict=True))
    return {"tiles": list(zip(images, rows.tolist(), captions, strict=False)), "hidden": hidden}


def of_image(image: Tensor) -> str:
    """A (1, H, W) or (3, H, W) uint8 image."""
    pixels = image.movedim(0, -1).contiguous().numpy()
    return _address(Image.fromarray(pixels[:, :, 0] if image.shape[0] == 1 else pixels))


def of_weights(weights: Tensor, largest: float) -> str:
    """Weights (H, W): blue above zero, orange below, and the less of it the nearer they are to 0.

    Zero is transparent, so that the picture goes with any background.

    Args:
        largest: the absolute value that has the full colour.
    """
    strength = (weights.abs() / largest).clamp(max=1).mul(255).round().to(torch.uint8)
    colours = torch.where(
        (weights > 0)[..., None],
        torch.tensor(POSITIVE, dtype=torch.uint8),
        torch.tensor(NEGATIVE, dtype=torch.uint8),
    )
    pixels = torch.cat([colours, strength[..., None]], dim=-1)
    return _address(Image.fromarray(pixels.contiguous().numpy()))


def _address(image: Image.Image) -> str:
    data = io.BytesIO()
    image.save(data, format="png", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
