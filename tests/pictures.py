"""Source images for tests, a function of their size and seed."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """An RGB picture with large shapes and fine grain, so that its tokens are of many kinds."""
    rows, columns = np.mgrid[:height, :width]
    waves = np.sin(np.stack([rows / 7 + seed, columns / 5, (rows + columns) / 11 - seed], axis=-1)) * 90 + 128
    grain = np.random.default_rng(seed).normal(0, 25, (height, width, 3))
    return Image.fromarray((waves + grain).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, file_format: str = "png", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()
