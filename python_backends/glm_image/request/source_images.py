"""Source images of a request, decoded and scaled for each stage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from glm_image.errors import InvalidInputError
from glm_image.request import geometry, images
from glm_image.request.geometry import PIXELS_PER_TOKEN, Grid, Size, SourceRule
from glm_image.request.limits import Limits


class Source(NamedTuple):
    """A source image for the vision tower: ``pixels`` is uint8 [16 * grid.height, 16 * grid.width, 3]."""

    pixels: NDArray[np.uint8]
    grid: Grid


@dataclass(frozen=True)
class SourcePicture:
    """A source image for the transformer: ``pixels`` is uint8 [32 * grid.height, 32 * grid.width, 3]."""

    pixels: NDArray[np.uint8]
    token_ids: NDArray[np.int32]  # [grid.tokens]
    grid: Grid


def source_name(index: int, count: int) -> str:
    """Returns the name of a source image in error messages."""
    return "image" if count == 1 else f"image {index + 1} of {count}"


def check_count(count: int, limits: Limits) -> None:
    """Refuses an input ``image`` without files or with too many."""
    if not 1 <= count <= limits.source_images:
        raise InvalidInputError.of("image", f"{count} files", f"1 to {limits.source_images} files")


def decode_sources(files: Sequence[bytes], limits: Limits, rule: SourceRule) -> Iterator[tuple[Image.Image, Grid]]:
    """Decodes source images, one at a time, and yields each with its grid; refuses too many or too large ones."""
    check_count(len(files), limits)
    pixels = 0
    for index, file in enumerate(files):
        name = source_name(index, len(files))
        image = images.decode_source(file, name, limits)
        grid = geometry.source_grid(Size(image.height, image.width), rule, name)
        pixels += grid.tokens * PIXELS_PER_TOKEN**2
        if pixels > limits.max_source_pixels:
            raise InvalidInputError.of(
                "image",
                f"{index + 1} files that make {pixels} pixels in all, as the model scales them",
                f"at most {limits.max_source_pixels}; send fewer or smaller images",
            )
        yield image, grid


def for_ar(files: Sequence[bytes], limits: Limits, rule: SourceRule) -> tuple[Source, ...]:
    """Returns source images as the AR stage needs them."""
    return tuple(
        Source(images.scale(image, Size(*(side * rule.patch for side in grid)), rule.resample), grid)
        for image, grid in decode_sources(files, limits, rule)
    )


def for_dit(
    files: Sequence[bytes], token_ids: NDArray[np.int32], grids: Sequence[Grid], limits: Limits, rule: SourceRule
) -> Iterator[SourcePicture]:
    """Yields source images as the DiT stage needs them; refuses an image whose grid differs from ``grids``."""
    start = 0
    for index, (image, grid) in enumerate(decode_sources(files, limits, rule)):
        if grid != grids[index]:
            raise InvalidInputError.of(
                f"source_grids[{index}]", tuple(grids[index]), f"{tuple(grid)}, as {source_name(index, len(files))}"
            )
        image_tokens = token_ids[start : start + grid.tokens]
        yield SourcePicture(images.scale(image, geometry.rendered_size(grid)), image_tokens, grid)
        start += grid.tokens
