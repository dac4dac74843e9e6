"""What the scheduler of the second stage has its executor do: plain data, which can be sent to other ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glm_image.request.geometry import Grid
from glm_image.request.source_images import SourcePicture


@dataclass(frozen=True)
class ReadSources:
    """Read a request's source images, for all its pictures, until they are forgotten."""

    request: int
    sources: tuple[SourcePicture, ...]


@dataclass(frozen=True)
class ForgetSources:
    """Forget a request's source images."""

    request: int


@dataclass(frozen=True)
class Prepare:
    """Draw a picture's noise and prepare its conditions."""

    picture: int
    prompt: str
    negative_prompt: str
    prior_token_ids: NDArray[np.int32]
    grid: Grid
    num_inference_steps: int
    guidance_scale: float
    seed: int
    sources_of: int | None = None


@dataclass(frozen=True)
class Step:
    """Take a picture's next denoising step, after which it may be asked for an ``Estimate`` if ``for_estimate``."""

    picture: int
    for_estimate: bool = False


@dataclass(frozen=True)
class Estimate:
    """Sketch what a picture will be, by the step that it has just taken.

    That went from latents x at noise level s to x' at s', along the velocity v = (x' - x) / (s' - s); so the clean
    latents that it made for are x' - s' v = (s x' - s' x) / (s - s').
    """

    picture: int


@dataclass(frozen=True)
class Decode:
    """Make pixels of a picture's latents, and forget it."""

    picture: int


@dataclass(frozen=True)
class Drop:
    """Forget a picture."""

    picture: int


@dataclass(frozen=True)
class NameAttention:
    """Name what attends in the blocks, as diffusers' attention dispatch does."""


Command = ReadSources | ForgetSources | Prepare | Step | Estimate | Decode | Drop | NameAttention


Result = NDArray[Any] | bool | str | None
"""``Prepare`` gives the noise levels, fp32 [steps + 1], ``Step`` whether the cache skipped it, ``Decode`` the picture,
uint8 [height, width, 3], ``Estimate`` one of 1/8 of each side, ``NameAttention`` the name."""
