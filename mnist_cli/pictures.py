"""Image files as inputs of a model: read, decoded, and made like the pictures it was trained on.

    read       a file of bounded size, whatever lies at its path
    decode     its bytes as a picture, grey or RGB, upright, without transparency
    prepare    that picture as an input tensor

A picture may come from anybody: its format is one of a closed list, and its size is checked before
memory is taken for its pixels.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageOps, ImageStat, UnidentifiedImageError
from torch import Tensor

from mnist_cli import regular_file, runtime
from mnist_cli.dataset import DatasetSpec
from mnist_cli.errors import DataError, one_line

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "GIF", "WEBP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".gif", ".webp")
MAX_FILE_BYTES = 64 * 2**20
MAX_PIXELS = 64 * 10**6
HINT = "name PNG, JPEG, BMP, TIFF, GIF or WebP files: images=PATH"

INK = 0.2  # what is brighter than this part of the brightest ink belongs to the character
LEAST_CONTRAST = 16  # levels of 255 between paper and ink; less is noise on an empty picture

Preprocess = Literal["auto", "none"]
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Layout:
    """How a dataset of handwriting places a character: light ink on black, fitted into a square.

    Attributes:
        side: of the square picture, in pixels.
        margin: pixels kept free on each side of the longer side of the ink.
        centered: what of the ink is put in the middle, its center of mass or its bounding box.
        middle: the index of the pixel, as a float, that counts as the middle.
    """

    side: int
    margin: int
    centered: Literal["mass", "box"]
    middle: float


# Sources: http://yann.lecun.com/exdb/mnist/ (the 20x20 box and the center of mass; the middle is
# that of its images), Cohen et al., "EMNIST", 2017 (figure 1). The numbers of
# scikit-learn's digits are measured. Pictures of other datasets are only resized.
LAYOUTS = {
    "mnist": Layout(28, 4, "mass", 14.0),
    "emnist": Layout(28, 2, "box", 13.5),
    "kmnist": Layout(28, 0, "box", 13.5),
    "digits": Layout(8, 0, "mass", 3.5),
}


def read(path: str) -> bytes:
    """The content of a regular file; never waits for a pipe or a device.

    Raises:
        DataError: it is missing, no regular file, or larger than MAX_FILE_BYTES.
    """
    try:
        return regular_file.read(path, MAX_FILE_BYTES + 1)
    except OSError as error:
        raise DataError(f"can't be read: {error.strerror}", HINT) from error


def decode(data: bytes) -> Image.Image:
    """The picture in the bytes of a file; of an animation, the first frame.

    It is turned as its EXIF orientation says. Transparent parts are laid on white, or on black
    where what is drawn is light. 16-bit grey becomes 8-bit; grey values without a fixed range
    (32-bit integers, floats) are spread over it.

    Returns:
        A picture of mode "L" or "RGB", of at most MAX_PIXELS.

    Raises:
        DataError: the bytes are no whole picture of a known format, or it is too large.
    """
    if not data:
        raise DataError("is empty", HINT)
    if len(data) > MAX_FILE_BYTES:
        raise DataError(f"is larger than {MAX_FILE_BYTES:,} bytes", HINT)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of what it can put up with
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                _check_size(image.size)
                is_tiff = image.format == "TIFF"  # libtiff says on stderr what it dislikes
                with runtime.silent_stderr() if is_tiff else contextlib.nullcontext():
                    image.load()
                return _plain(ImageOps.exif_transpose(image))
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise DataError(f"has more than {MAX_PIXELS:,} pixels", HINT) from error
    except UnidentifiedImageError as error:
        raise DataError("is no PNG, JPEG, BMP, TIFF, GIF or WebP picture", HINT) from error
    except Exception as error:  # a broken file makes a decoder raise nearly anything
        reason = one_line(str(error), 100) or type(error).__name__
        raise DataError(f"is a damaged picture: {reason}", HINT) from error


def prepare(image: Image.Image, spec: DatasetSpec, preprocess: Preprocess = "auto") -> Tensor:
    """`image` as an input of a model that was trained on `spec`.

    With "auto", where the dataset is handwriting, the picture is treated as those of the dataset
    were: made grey, inverted where its border is light, cropped to the ink, scaled and centered.
    All other pictures are resized to the input's size, their proportions not kept.

    Args:
        image: of mode "L" or "RGB", as `decode` gives it.
        spec: of images (C, H, W) with 1 or 3 channels.

    Returns:
        (C, H, W) uint8.

    Raises:
        DataError: nothing is drawn on the picture.
    """
    channels, height, width = spec.input_shape
    image = image.convert("L" if channels == 1 else "RGB")
    layout = LAYOUTS.get(spec.name) if preprocess == "auto" else None
    if layout is not None and spec.input_shape == (1, layout.side, layout.side):
        return torch.from_numpy(_laid_out(np.asarray(image), layout)).unsqueeze(0)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.array(image).reshape(height, width, channels)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _check_size(size: tuple[int, int]) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise DataError(
            f"has {width}x{height} pixels, more than {MAX_PIXELS:,}",
            "make it smaller: a model looks at 28x28 pixels or so",
        )


# --- modes ---------------------------------------------------------------------------------------


def _plain(image: Image.Image) -> Image.Image:
    """`image` as 8-bit grey ("L") or color ("RGB") without transparency."""
    if image.mode.startswith("I;16"):
        return _from_range(np.asarray(image), 0, 65_535)
    if image.mode in ("I", "F"):
        values = np.asarray(image)
        if not np.isfinite(values).all():
            raise DataError("holds values that are not finite", HINT)
        return _from_range(values, float(values.min()), float(values.max()))
    if image.has_transparency_data:
        return _on_background(image.convert("RGBA"))
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def _from_range(values: NDArray[np.generic], low: float, high: float) -> Image.Image:
    share = (values.astype(np.float32) - low) / max(high - low, 1e-30)
    return Image.fromarray(np.rint(share * 255).astype(np.uint8))


def _on_background(image: Image.Image) -> Image.Image:
    """An RGBA picture on the one of white and black that what is drawn stands out from."""
    grey, alpha = image.convert("L"), image.getchannel("A")
    drawn = ImageStat.Stat(alpha).mean[0]
    light = ImageStat.Stat(ImageChops.multiply(grey, alpha)).mean[0]
    background = "black" if drawn and light / drawn >= 0.5 else "white"
    return Image.alpha_composite(Image.new("RGBA", image.size, background), image).convert("RGB")


# --- handwriting ---------------------------------------------------------------------------------


def _laid_out(pixels: Pixels, layout: Layout) -> Pixels:
    """The character in a grey picture, light on black, as `layout` places it: (side, side)."""
    ink = _ink(pixels)
    mask = ink > INK * ink.max()
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    inner = layout.side - 2 * layout.margin
    longer = int(max(bottom - top, right - left))
    # One pixel of the result more on each side: the faint rim of a stroke isn't cut off.
    rim = -(-longer // inner)
    cut = np.zeros((bottom - top + 2 * rim, right - left + 2 * rim), np.float32)
    _paste(ink, cut, rim - int(top), rim - int(left))
    height, width = (max(1, round(length * inner / longer)) for length in cut.shape)
    scaled = np.asarray(
        Image.fromarray(cut).resize((width, height), Image.Resampling.BICUBIC)
    ).clip(min=0)  # bicubic weights may be negative
    result = np.zeros((layout.side, layout.side), np.float32)
    free = round(rim * inner / longer)  # what may fall outside, for it is no ink
    _paste(scaled, result, *(_start(scaled.sum(axis=1 - axis), free, layout) for axis in (0, 1)))
    light: Pixels = np.rint(result * (255 / result.max())).astype(np.uint8)
    return light


def _ink(pixels: Pixels) -> Pixels:
    """How much lighter than the background each pixel is, once the background is the dark part.

    Raises:
        DataError: the picture is nearly of one color.
    """
    border = np.concatenate((pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))
    if np.median(border) >= 128:
        pixels, border = 255 - pixels, 255 - border
    # The lower quartile: ink may touch the border, and paper is never quite even.
    background = np.uint8(np.quantile(border, 0.25))
    ink = np.maximum(pixels, background) - background
    if ink.max() < LEAST_CONTRAST:
        raise DataError(
            "shows nothing: it is all of one color",
            "name a picture with a character, or type preprocess=none",
        )
    return ink


def _start(profile: NDArray[np.float32], free: int, layout: Layout) -> int:
    """Where the scaled ink begins on one axis of the result.

    Args:
        profile: (length,) sums of the ink along the other axis.
        free: how far it may begin or end outside.
    """
    length = len(profile)
    if layout.centered == "box":
        return round(layout.middle - (length - 1) / 2)
    mass = float(profile @ np.arange(length)) / float(profile.sum())
    last = max(-free, layout.side - length + free)
    start = round(round(layout.middle - mass, 3))  # a tie is one in spite of float32
    return min(max(start, -free), last)


def _paste(source: NDArray[np.generic], target: NDArray[np.generic], top: int, left: int) -> None:
    """Copy what of `source` falls inside of `target` with its corner at (top, left)."""
    here, there = [], []
    for start, length, limit in zip((top, left), source.shape, target.shape, strict=True):
        begin, end = max(start, 0), min(start + length, limit)
        here.append(slice(begin, end))
        there.append(slice(begin - start, end - start))
    target[tuple(here)] = source[tuple(there)]
