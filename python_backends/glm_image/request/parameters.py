"""What was asked for, validated, and what it comes to: the objects that the stages hand on."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from glm_image.errors import InvalidInputError
from glm_image.request import geometry, source_images
from glm_image.request.geometry import Grid, Size, SourceRule
from glm_image.request.limits import Limits, check_painting, check_prompt, check_range, check_token_ids
from glm_image.request.source_images import Source, SourcePicture

DEFAULT_SIDE: Final = 1024
RANDOM_SEED_BELOW: Final = 2**53  # every JSON client can hold it exactly


@dataclass(frozen=True)
class Sampling:
    """How the AR draws a token: temperature, then the k best, then the best whose probabilities sum to p."""

    temperature: float
    top_p: float
    top_k: int


@dataclass(frozen=True)
class GenerationParameters:
    """What a caller asks of ``glm_image``; None = the default of the server or of the checkpoint."""

    prompt: str
    height: int | None = None
    width: int | None = None
    num_inference_steps: int = 50
    guidance_scale: float = 1.5
    seed: int | None = None
    num_images: int = 1
    negative_prompt: str = ""
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    output_format: str = "raw"
    images: tuple[bytes, ...] | None = None

    def resolve(self, limits: Limits, defaults: Sampling, rule: SourceRule | None = None) -> ResolvedRequest:
        """Validates everything and works out sizes, grids and seeds.

        Args:
            limits: the largest request.
            defaults: the checkpoint's own sampling.
            rule: how the checkpoint sizes source images; None = as the published one.

        Raises:
            InvalidInputError: names the input, its value and what is allowed.
        """
        check_prompt("prompt", self.prompt, limits)
        if self.negative_prompt:
            check_prompt("negative_prompt", self.negative_prompt, limits, may_be_blank=True)
        for name, side in (("height", self.height), ("width", self.width)):
            if side is not None:
                check_range(name, side, limits.min_side, limits.max_side)
        check_painting(self.num_inference_steps, self.guidance_scale, self.output_format, limits)
        check_range("num_images", self.num_images, 1, limits.num_images)
        sampling = self._sampling(defaults)
        # Last, since decoding takes longer than all the rest.
        given = () if self.images is None else source_images.for_vision(self.images, limits, rule or SourceRule())
        requested = self._requested(given, limits)
        target = geometry.target_grid(geometry.generated_size(requested))
        return ResolvedRequest(
            parameters=self,
            requested=requested,
            grids=geometry.output_grids(target, image_to_image=bool(given)),
            sampling=sampling,
            seeds=consecutive_seeds(random_seed() if self.seed is None else self.seed, self.num_images),
            sources=given,
        )

    def _requested(self, given: tuple[Source, ...], limits: Limits) -> Size:
        # What is left out is the first source's, as the model scales it.
        usual = geometry.painted_size(given[0].grid) if given else Size(DEFAULT_SIDE, DEFAULT_SIDE)
        requested = Size(
            usual.height if self.height is None else self.height, usual.width if self.width is None else self.width
        )
        for name, side in zip(("height", "width"), requested, strict=True):
            check_range(name, side, limits.min_side, limits.max_side)
        return requested

    def _sampling(self, defaults: Sampling) -> Sampling:
        temperature = defaults.temperature if self.temperature is None else self.temperature
        top_p = defaults.top_p if self.top_p is None else self.top_p
        top_k = defaults.top_k if self.top_k is None else self.top_k
        check_range("temperature", temperature, 0.01, 2.0)
        if not 0.0 < top_p <= 1.0:
            raise InvalidInputError.of("top_p", top_p, "above 0, at most 1")
        if top_k < 1:
            raise InvalidInputError.of("top_k", top_k, "1 and above")
        return Sampling(temperature, top_p, top_k)


@dataclass(frozen=True)
class ResolvedRequest:
    """A validated request: nothing about it is left to choose.

    Attributes:
        parameters: what was asked for.
        requested: the size of the answer, in pixels.
        grids: the grids the AR writes, in order; the last one is the picture's.
        sampling: how tokens are drawn.
        seeds: one for each picture, signed 64-bit.
        sources: source images as the vision tower reads them.
    """

    parameters: GenerationParameters
    requested: Size
    grids: tuple[Grid, ...]
    sampling: Sampling
    seeds: tuple[int, ...]
    sources: tuple[Source, ...] = ()

    @property
    def target(self) -> Grid:
        """The picture's grid of tokens."""
        return self.grids[-1]


@dataclass(frozen=True)
class PaintRequest:
    """What the second stage is asked for: tokens to paint.

    Attributes:
        prompt: its quoted strings are the glyph condition.
        negative_prompt: its quoted strings are the glyph condition of the unconditional branch.
        prior_token_ids: int32 [n, grid.tokens], ids of the codebook, before upsampling.
        grid: the grid they fill.
        requested: the size of the answer in pixels; at most that of the grid, and needing all of it.
        seeds: one for each picture, signed 64-bit.
        num_inference_steps: denoising steps.
        guidance_scale: classifier-free guidance; at most 1 = off.
        output_format: one of ``OUTPUT_FORMATS``.
        images: source images, as files; None = no image-to-image.
        source_token_ids: int32 [tokens of all source grids], ids of the codebook.
        source_grids: the grid of each source image.
    """

    prompt: str
    prior_token_ids: NDArray[np.int32]
    grid: Grid
    requested: Size
    seeds: tuple[int, ...]
    negative_prompt: str = ""
    num_inference_steps: int = 50
    guidance_scale: float = 1.5
    output_format: str = "raw"
    images: tuple[bytes, ...] | None = None
    source_token_ids: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    source_grids: tuple[Grid, ...] = ()
    ar_metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def generated(self) -> Size:
        """The size in pixels that the model paints."""
        return geometry.painted_size(self.grid)

    def check(self, limits: Limits, codebook_size: int) -> None:
        """Validates everything but what is in the source images' files; see ``read_sources``.

        Raises:
            InvalidInputError: names the input, its value and what is allowed.
        """
        check_prompt("prompt", self.prompt, limits)
        if self.negative_prompt:
            check_prompt("negative_prompt", self.negative_prompt, limits, may_be_blank=True)
        check_painting(self.num_inference_steps, self.guidance_scale, self.output_format, limits)
        largest = limits.max_side // geometry.PIXELS_PER_TOKEN
        if not all(1 <= side <= largest for side in self.grid):
            raise InvalidInputError.of("prior_grid", tuple(self.grid), f"two sides of 1 to {largest}")
        images, tokens = self.prior_token_ids.shape
        check_range("prior_token_ids' number of rows", images, 1, limits.num_images)
        if tokens != self.grid.tokens:
            raise InvalidInputError.of(
                "prior_token_ids' number of columns", tokens, f"{self.grid.tokens}, as prior_grid {tuple(self.grid)}"
            )
        check_token_ids("prior_token_ids", self.prior_token_ids, codebook_size)
        self._check_sources(limits, codebook_size)
        if geometry.generated_size(self.requested) != self.generated:
            raise InvalidInputError.of(
                "resolved_size",
                tuple(self.requested),
                f"a size that rounds up to {self.generated.height} x {self.generated.width}, as prior_grid",
            )

    def _check_sources(self, limits: Limits, codebook_size: int) -> None:
        if self.images is None and not self.source_grids and not self.source_token_ids.size:
            return
        count = len(self.images or ())
        source_images.check_count(count, limits)
        if len(self.source_grids) != count:
            raise InvalidInputError.of(
                "source_grids' number of rows", len(self.source_grids), f"{count}, one for each image"
            )
        for index, grid in enumerate(self.source_grids):
            if min(grid) < 1:
                raise InvalidInputError.of(f"source_grids[{index}]", tuple(grid), "two sides of 1 and above")
        tokens = sum(grid.tokens for grid in self.source_grids)
        if self.source_token_ids.shape != (tokens,):
            raise InvalidInputError.of(
                "source_token_ids' number", self.source_token_ids.size, f"{tokens}, as source_grids"
            )
        check_token_ids("source_token_ids", self.source_token_ids, codebook_size)

    def read_sources(self, limits: Limits, rule: SourceRule) -> tuple[SourcePicture, ...]:
        """Decodes the source images of a request that ``check`` let through.

        Raises:
            InvalidInputError: an image is not allowed, or is not the one that the tokens are of.
        """
        if self.images is None:
            return ()
        return source_images.for_painting(self.images, self.source_token_ids, self.source_grids, limits, rule)


def random_seed() -> int:
    """Returns a seed from the system's randomness, below 2^53."""
    return secrets.randbelow(RANDOM_SEED_BELOW)


def consecutive_seeds(first: int, count: int) -> tuple[int, ...]:
    """Returns ``first, first + 1, ...`` modulo 2^64, as signed 64-bit integers."""
    return tuple((first + index + 2**63) % 2**64 - 2**63 for index in range(count))
