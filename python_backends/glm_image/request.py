"""What was asked for, validated, and what it comes to: the objects that the stages hand on."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from glm_image import geometry, prompts, sources
from glm_image.errors import ConfigurationError, InvalidInputError
from glm_image.geometry import Grid, Size, SourceRule
from glm_image.sources import Source, SourcePicture

OUTPUT_FORMATS: Final = ("raw", "png", "jpeg", "webp")
DEFAULT_SIDE: Final = 1024
RANDOM_SEED_BELOW: Final = 2**53  # every JSON client can hold it exactly


@dataclass(frozen=True)
class Limits:
    """The largest request the server takes; the same block stands in the configuration of both stages.

    Of source images, ``source_bytes`` and ``source_decoded_pixels`` hold for each file as it comes, and
    ``max_source_pixels`` for all of them together as the model scales them.
    """

    prompt_characters: int = 8192
    quoted_strings: int = 64
    glyph_tokens: int = 2048
    min_side: int = 32
    max_side: int = 2048
    num_inference_steps: int = 200
    guidance_scale: float = 20.0
    num_images: int = 8
    source_images: int = 4
    source_bytes: int = 32 * 1024 * 1024
    source_decoded_pixels: int = 50_000_000
    max_source_pixels: int = 4 * 1024 * 1024

    PREFIX: ClassVar[str] = "limit_"

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str]) -> Limits:
        """Reads the ``limit_*`` parameters of a model's configuration; those not there keep their default."""
        values: dict[str, int | float] = {}
        for limit in fields(cls):
            text = parameters.get(cls.PREFIX + limit.name)
            if text is None:
                continue
            try:
                value = float(text) if isinstance(limit.default, float) else int(text)
            except ValueError:
                value = math.nan
            if not 0 < value < math.inf:
                raise ConfigurationError(f"{cls.PREFIX}{limit.name} is {text!r}; allowed: a number above 0")
            values[limit.name] = value
        return cls(**values)  # type: ignore[arg-type] # each value has its field's type

    def parameters(self) -> dict[str, str]:
        """Returns the limits as configuration parameters."""
        values = {self.PREFIX + limit.name: getattr(self, limit.name) for limit in fields(self)}
        return {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in values.items()}


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
        given = () if self.images is None else sources.for_vision(self.images, limits, rule or SourceRule())
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
        sources.check_count(count, limits)
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
        return sources.for_painting(self.images, self.source_token_ids, self.source_grids, limits, rule)


def check_token_ids(name: str, token_ids: NDArray[np.int32], codebook_size: int) -> None:
    """Refuses ids that are not of the codebook; there is at least one."""
    for extreme in (token_ids.min(), token_ids.max()):
        if not 0 <= extreme < codebook_size:
            raise InvalidInputError.of(name, f"a tensor with {extreme}", f"0 to {codebook_size - 1}")


def check_prompt(name: str, prompt: str, limits: Limits, *, may_be_blank: bool = False) -> None:
    """Refuses a prompt that is too long, blank, no text, or has more quoted text than the glyph encoder takes."""
    if len(prompt) > limits.prompt_characters:
        raise InvalidInputError.of(
            name, f"{len(prompt)} characters long", f"1 to {limits.prompt_characters} characters"
        )
    if not may_be_blank and not prompt.strip():
        raise InvalidInputError.of(name, prompt or "empty", "text with something other than white space")
    if "\0" in prompt:
        raise InvalidInputError.of(name, prompt, "text without NUL characters")
    if any("\ud800" <= character <= "\udfff" for character in prompt):  # how Python keeps bytes that are not UTF-8
        raise InvalidInputError.of(name, prompt, "UTF-8")
    quoted = len(prompts.quoted_strings(prompt))
    if quoted > limits.quoted_strings:
        raise InvalidInputError.of(name, f"text with {quoted} quoted strings", f"at most {limits.quoted_strings}")
    glyph_tokens = prompts.glyph_token_count(prompt)
    if glyph_tokens > limits.glyph_tokens:
        raise InvalidInputError.of(
            name, f"text with {glyph_tokens} tokens in quoted strings", f"at most {limits.glyph_tokens}"
        )


def check_painting(num_inference_steps: int, guidance_scale: float, output_format: str, limits: Limits) -> None:
    """Refuses numbers of steps, guidance scales and formats beyond the limits."""
    check_range("num_inference_steps", num_inference_steps, 1, limits.num_inference_steps)
    check_range("guidance_scale", guidance_scale, 0.0, limits.guidance_scale)
    if output_format not in OUTPUT_FORMATS:
        raise InvalidInputError.of("output_format", output_format, ", ".join(OUTPUT_FORMATS))


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Refuses a number outside [low, high]; NaN is outside."""
    if not low <= value <= high:
        raise InvalidInputError.of(name, value, f"{low:g} to {high:g}")


def random_seed() -> int:
    """Returns a seed from the system's randomness, below 2^53."""
    return secrets.randbelow(RANDOM_SEED_BELOW)


def consecutive_seeds(first: int, count: int) -> tuple[int, ...]:
    """Returns ``first, first + 1, ...`` modulo 2^64, as signed 64-bit integers."""
    return tuple((first + index + 2**63) % 2**64 - 2**63 for index in range(count))
