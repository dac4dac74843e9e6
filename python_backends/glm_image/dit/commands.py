"""The commands of the DiT's executor: plain data, which is sent to every rank."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from glm_image.parallel.commands import Command, R
from glm_image.request.geometry import Grid
from glm_image.request.source_images import SourcePicture


@dataclass(frozen=True)
class ReadSources(Command[None]):
    """Computes the keys and values of a request's source images, which are kept until ``ForgetSources``."""

    request: int
    sources: tuple[SourcePicture, ...]

    @property
    def megapixels(self) -> float:
        return sum(source.pixels.size for source in self.sources) / 3e6


@dataclass(frozen=True)
class ForgetSources(Command[None]):
    """Drops the keys and values of a request's source images."""

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
