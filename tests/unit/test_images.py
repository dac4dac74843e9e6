from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from glm_image.request import images
from glm_image.request.geometry import Size


def gradient(size: Size) -> np.ndarray:
    rows, columns = np.mgrid[: size.height, : size.width]
    return np.stack([rows * 3, columns * 2, rows + columns], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("size", [Size(33, 70), Size(64, 96), Size(1, 1)])
def test_crop_keeps_the_top_left(size: Size) -> None:
    whole = gradient(Size(64, 96))
    cropped = images.crop(whole, size)
    assert cropped.shape == (*size, 3)
    assert np.array_equal(cropped, whole[: size.height, : size.width])


@pytest.mark.parametrize(("output_format", "worst"), [("png", 0), ("jpeg", 16), ("webp", 24)])
def test_encoded_files_hold_the_image(output_format: str, worst: int) -> None:
    pixels = images.crop(gradient(Size(64, 80)), Size(50, 70))
    opened = Image.open(io.BytesIO(images.encode(pixels, output_format)))
    assert opened.format == output_format.upper()
    assert (opened.mode, opened.size) == ("RGB", (70, 50))
    assert np.abs(np.asarray(opened).astype(int) - pixels).max() <= worst
