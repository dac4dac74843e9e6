"""The largest request the server takes, and the checks of single values against it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from glm_image.errors import ConfigurationError, InvalidInputError
from glm_image.request import prompts

OUTPUT_FORMATS: Final = ("raw", "png", "jpeg", "webp")


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
