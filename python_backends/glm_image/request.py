"""What was asked for, validated, and what it comes to: the objects that the stages hand on."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from glm_image import geometry, prompts
from glm_image.errors import ConfigurationError, InvalidInputError, UnsupportedError
from glm_image.geometry import PIXELS_PER_TOKEN, Grid, Size

OUTPUT_FORMATS: Final = ("raw", "png", "jpeg", "webp")
DEFAULT_SIDE: Final = 1024
RANDOM_SEED_BELOW: Final = 2**53  # every JSON client can hold it exactly


@dataclass(frozen=True)
class Limits:
    """The largest request the server takes; the same block stands in the configuration of both stages."""

    prompt_characters: int = 8192
    quoted_strings: int = 64
    glyph_tokens: int = 2048
    min_side: int = 32
    max_side: int = 2048
    num_inference_steps: int = 200
    guidance_scale: float = 20.0
    num_images: int = 8

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
        return {self.PREFIX + limit.name: f"{getattr(self, limit.name):g}" for limit in fields(self)}


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
    images: tuple[bytes, ...] = ()

    def resolve(self, limits: Limits, defaults: Sampling) -> ResolvedRequest:
        """Validates everything and works out sizes, grids and seeds.

        Raises:
            InvalidInputError: names the input, its value and what is allowed.
            UnsupportedError: source images were given.
        """
        check_prompt("prompt", self.prompt, limits)
        if self.negative_prompt:
            check_prompt("negative_prompt", self.negative_prompt, limits, may_be_blank=True)
        requested = Size(*(DEFAULT_SIDE if side is None else side for side in (self.height, self.width)))
        for name, side in zip(("height", "width"), requested, strict=True):
            check_range(name, side, limits.min_side, limits.max_side)
        check_painting(self.num_inference_steps, self.guidance_scale, self.output_format, limits)
        check_range("num_images", self.num_images, 1, limits.num_images)
        sampling = self._sampling(defaults)
        if self.images:
            raise UnsupportedError("image: image-to-image is not available in this version; leave the input out")
        target = geometry.target_grid(geometry.generated_size(requested))
        return ResolvedRequest(
            parameters=self,
            requested=requested,
            grids=geometry.output_grids(target, image_to_image=False),
            sampling=sampling,
            seeds=consecutive_seeds(random_seed() if self.seed is None else self.seed, self.num_images),
        )

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
    """

    parameters: GenerationParameters
    requested: Size
    grids: tuple[Grid, ...]
    sampling: Sampling
    seeds: tuple[int, ...]

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
    ar_metadata: Mapping[str, object] = field(default_factory=dict)

    @property
    def generated(self) -> Size:
        """The size in pixels that the model paints."""
        return Size(*(side * PIXELS_PER_TOKEN for side in self.grid))

    def check(self, limits: Limits, codebook_size: int) -> None:
        """Validates everything.

        Raises:
            InvalidInputError: names the input, its value and what is allowed.
        """
        check_prompt("prompt", self.prompt, limits)
        if self.negative_prompt:
            check_prompt("negative_prompt", self.negative_prompt, limits, may_be_blank=True)
        check_painting(self.num_inference_steps, self.guidance_scale, self.output_format, limits)
        largest = limits.max_side // PIXELS_PER_TOKEN
        if not all(1 <= side <= largest for side in self.grid):
            raise InvalidInputError.of("prior_grid", tuple(self.grid), f"two sides of 1 to {largest}")
        images, tokens = self.prior_token_ids.shape
        check_range("prior_token_ids' number of rows", images, 1, limits.num_images)
        if tokens != self.grid.tokens:
            raise InvalidInputError.of(
                "prior_token_ids' number of columns", tokens, f"{self.grid.tokens}, as prior_grid {tuple(self.grid)}"
            )
        for extreme in (self.prior_token_ids.min(), self.prior_token_ids.max()):
            if not 0 <= extreme < codebook_size:
                raise InvalidInputError.of("prior_token_ids", f"a tensor with {extreme}", f"0 to {codebook_size - 1}")
        if geometry.generated_size(self.requested) != self.generated:
            raise InvalidInputError.of(
                "resolved_size",
                tuple(self.requested),
                f"a size that rounds up to {self.generated.height} x {self.generated.width}, as prior_grid",
            )


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
