"""Images that the benchmarks of the DiT engine have it denoise."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from measure import PROMPT
from numpy.typing import NDArray

from glm_image.dit.engine import DitEngine
from glm_image.lifecycle.context import RequestContext
from glm_image.request.geometry import Grid, Size, generated_size, rendered_size, target_grid
from glm_image.request.limits import Limits
from glm_image.request.parameters import PaintRequest
from glm_image.request.stages import Stage

GUIDANCE = 1.5


@dataclass(frozen=True)
class Image:
    """A finished image and what it took.

    Attributes:
        seconds: all of it.
        context: the seconds of each stage, and how many steps were cached.
        pixels: uint8 [1, height, width, 3].
    """

    seconds: float
    context: RequestContext
    pixels: NDArray[np.uint8]

    @property
    def denoise_seconds(self) -> float:
        """The seconds of its steps, and of all that is done between them."""
        return self.context.seconds[Stage.DENOISE]


def grid_of(size: Size) -> Grid:
    """Returns the token grid of a text-to-image picture."""
    return target_grid(generated_size(size))


def dit_request(grid: Grid, steps: int, codebook_size: int, guidance: float = GUIDANCE) -> PaintRequest:
    """Returns a request of one image with random tokens."""
    tokens = np.random.default_rng(0).integers(0, codebook_size, (1, grid.tokens), dtype=np.int32)
    return PaintRequest(
        PROMPT, tokens, grid, rendered_size(grid), (1,), num_inference_steps=steps, guidance_scale=guidance
    )


def render(engine: DitEngine, request: PaintRequest, context: RequestContext | None = None) -> Image:
    """Has the engine denoise and decode one request."""
    context = context or RequestContext()
    started = time.perf_counter()
    result = engine.paint(context, request, Limits()).result()
    return Image(time.perf_counter() - started, context, result.pixels)
