"""The commands of the DiT's executor: plain data, which is sent to every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from glm_image.parallel.commands import Command, R
from glm_image.request.geometry import PIXELS_PER_TOKEN, Grid
from glm_image.request.source_images import SourcePicture


@dataclass(frozen=True)
class ReserveSources(Command[bool]):
    """Prepares for the source images of a request, which are kept until ``ForgetSources``.

    Returns False if their keys and values do not fit the memory that those of other requests leave.
    """

    request: int
    grids: tuple[Grid, ...]

    @property
    def megapixels(self) -> float:
        return sum(grid.tokens for grid in self.grids) * PIXELS_PER_TOKEN**2 / 1e6


@dataclass(frozen=True)
class SourceCommand(Command[None]):
    """A command on source image ``index`` of a request; the images follow in their order."""

    request: int
    index: int


@dataclass(frozen=True)
class EncodeSource(SourceCommand):
    """Encodes a source image to latents. All of a request are encoded before the first is read."""

    source: SourcePicture


@dataclass(frozen=True)
class ReadSource(SourceCommand):
    """Computes the keys and values of a source image."""


def source_commands(request: int, sources: Sequence[SourcePicture]) -> list[SourceCommand]:
    """Returns the commands that read the source images of a request, after ``ReserveSources``.

    Each takes about as long as a denoising step of an image of the source's size.
    """
    encode = [EncodeSource(request, index, source) for index, source in enumerate(sources)]
    return [*encode, *(ReadSource(request, index) for index in range(len(sources)))]


@dataclass(frozen=True)
class ForgetSources(Command[None]):
    """Drops what is kept of a request's source images."""

    request: int


@dataclass(frozen=True)
class ImageCommand(Command[R]):
    """A command on one image, which has a number of the scheduler's choice."""

    image: int


@dataclass(frozen=True)
class Prepare(ImageCommand[NDArray[np.float32]]):
    """Samples an image's noise and prepares its conditioning; returns its noise levels, fp32 [steps + 1]."""

    rendered_text: tuple[str, ...]
    negative_text: tuple[str, ...]
    prior_token_ids: NDArray[np.int32]
    grid: Grid
    num_inference_steps: int
    guidance_scale: float
    seed: int
    sources_of: int | None = None


@dataclass(frozen=True)
class Step(ImageCommand[bool]):
    """Takes an image's next denoising step; returns whether the cache skipped it.

    ``for_estimate`` says whether ``Estimate`` may follow.
    """

    for_estimate: bool = False


@dataclass(frozen=True)
class Estimate(ImageCommand[NDArray[np.uint8]]):
    """Renders a latent preview of the clean image that the latest step points to, uint8 [height / 8, width / 8, 3].

    The step went from latents x at noise level s to x' at s', along the velocity v = (x' - x) / (s' - s). At noise
    level 0 the same velocity leads to x' - s' v = (s x' - s' x) / (s - s').
    """


@dataclass(frozen=True)
class Decode(ImageCommand[NDArray[np.uint8]]):
    """Decodes an image's latents to uint8 [height, width, 3], and drops the image."""


@dataclass(frozen=True)
class Drop(ImageCommand[None]):
    """Drops an image, if it has not been dropped."""
