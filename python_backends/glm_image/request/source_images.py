"""Source images of a request, decoded and scaled for each stage; how large they are is decided in one place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from glm_image.errors import InvalidInputError
from glm_image.request import geometry, images
from glm_image.request.geometry import PIXELS_PER_TOKEN, Grid, Size, SourceRule

if TYPE_CHECKING:
    from glm_image.request.limits import Limits


class Source(NamedTuple):
    """A source image for the vision tower.

    Attributes:
        pixels: uint8 [16 * grid.height, 16 * grid.width, 3].
        grid: its tokens.
    """

    pixels: NDArray[np.uint8]
    grid: Grid


@dataclass(frozen=True)
class SourcePicture:
    """A source image for the transformer.

    Attributes:
        pixels: uint8 [32 * grid.height, 32 * grid.width, 3].
        token_ids: int32 [grid.tokens].
        grid: its tokens.
    """

    pixels: NDArray[np.uint8]
    token_ids: NDArray[np.int32]
    grid: Grid


def named(index: int, count: int) -> str:
    """Returns what to call one of the files of the input ``image``."""
    return "image" if count == 1 else f"image {index + 1} of {count}"


def check_count(count: int, limits: Limits) -> None:
    """Refuses requests with no source image where some are announced, or too many."""
    if not 1 <= count <= limits.source_images:
        raise InvalidInputError.of("image", f"{count} files", f"1 to {limits.source_images} files")


def sized(files: Sequence[bytes], limits: Limits, rule: SourceRule) -> Iterator[tuple[Image.Image, Grid]]:
    """Decodes source images, one at a time, and tells the grid of each.

    Raises:
        InvalidInputError: an image is not allowed, or they are too many or too large in all.
    """
    check_count(len(files), limits)
    pixels = 0
    for index, file in enumerate(files):
        name = named(index, len(files))
        picture = images.decode_source(
            file, name, max_bytes=limits.source_bytes, max_pixels=limits.source_decoded_pixels
        )
        grid = geometry.source_grid(Size(picture.height, picture.width), rule, name)
        pixels += grid.tokens * PIXELS_PER_TOKEN**2
        if pixels > limits.max_source_pixels:
            raise InvalidInputError.of(
                "image",
                f"{index + 1} files that make {pixels} pixels in all, as the model scales them",
                f"at most {limits.max_source_pixels}; send fewer or smaller ones",
            )
        yield picture, grid


def for_vision(files: Sequence[bytes], limits: Limits, rule: SourceRule) -> tuple[Source, ...]:
    """Returns what the first stage needs of source images; errors as ``sized``."""
    return tuple(
        Source(images.scale(picture, Size(*(side * rule.patch for side in grid)), rule.resample), grid)
        for picture, grid in sized(files, limits, rule)
    )


def for_painting(
    files: Sequence[bytes], token_ids: NDArray[np.int32], grids: Sequence[Grid], limits: Limits, rule: SourceRule
) -> tuple[SourcePicture, ...]:
    """Returns what the second stage needs of source images.

    Args:
        files: the images.
        token_ids: int32 [tokens of all grids].
        grids: one an image.
        limits: the largest request.
        rule: how images are sized.

    Raises:
        InvalidInputError: as ``sized``, or an image has another grid.
    """
    pictures = []
    start = 0
    for index, (picture, grid) in enumerate(sized(files, limits, rule)):
        if grid != grids[index]:
            raise InvalidInputError.of(
                f"source_grids[{index}]", tuple(grids[index]), f"{tuple(grid)}, as {named(index, len(files))}"
            )
        own = token_ids[start : start + grid.tokens]
        pictures.append(SourcePicture(images.scale(picture, geometry.painted_size(grid)), own, grid))
        start += grid.tokens
    return tuple(pictures)
