"""Pictures as files: crop and encode."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from glm_image.geometry import Size

# Lossless but fast for PNG (level 1 is 4 times faster than 6 at a tenth more bytes); near-lossless for the others.
ENCODER_OPTIONS: dict[str, dict[str, Any]] = {
    "png": {"compress_level": 1},
    "jpeg": {"quality": 95, "subsampling": 0},
    "webp": {"quality": 95},
}


def crop(pixels: NDArray[np.uint8], size: Size) -> NDArray[np.uint8]:
    """Keeps the top left ``size`` of a picture uint8 [height, width, 3]."""
    return pixels[: size.height, : size.width]


def encode(pixels: NDArray[np.uint8], output_format: str) -> bytes:
    """Encodes a picture uint8 [height, width, 3] as a ``png``, ``jpeg`` or ``webp`` file."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, output_format, **ENCODER_OPTIONS[output_format])
    return buffer.getvalue()
