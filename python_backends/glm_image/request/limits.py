"""The largest request the server takes, and the checks of single values against it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from glm_image.errors import InvalidInputError
from glm_image.request import prompts
from glm_image.request.declaration import positive
from glm_image.request.geometry import Size

PIXELS_PER_MEGAPIXEL: Final = 1_000_000

OUTPUT_FORMATS: Final = ("raw", "png", "jpeg", "webp")
FILE_METADATA: Final = ("full", "no_prompt", "none")


@dataclass(frozen=True)
class Limits:
    """The largest request the server takes; both stages are configured with the same limits."""

    prompt_characters: int = positive(8192, "Characters of a prompt.")
    quoted_strings: int = positive(64, "Quoted strings in a prompt.")
    glyph_tokens: int = positive(2048, "Tokens of all quoted strings in a prompt.")
    min_side: int = positive(32, "Shortest side of an image.", unit="pixels")
    max_side: int = positive(2048, "Longest side of an image.", unit="pixels")
    num_inference_steps: int = positive(200, "Denoising steps.")
    guidance_scale: float = positive(20.0, "Guidance scale.")
    num_images: int = positive(8, "Images of a request.")
    work: float = positive(
        2000.0,
        "Work of a request for `glm_dit`: images x megapixels (10^6, as generated) x denoising steps. The other limits "
        "together allow 6711.",
        unit="megapixel steps",
    )
    source_images: int = positive(4, "Source images of a request.")
    source_bytes: int = positive(32 * 1024 * 1024, "Size of each source file.", unit="bytes")
    source_decoded_pixels: int = positive(
        50_000_000, "Pixels of each source image as stored in its file.", unit="pixels"
    )
    max_source_pixels: int = positive(
        4 * 1024 * 1024, "Pixels of all source images together, as scaled for the model.", unit="pixels"
    )


DEFAULT_LIMITS: Final = Limits()

LIMIT_PREFIX: Final = "limit_"
"""Begins the names of the limits' configuration parameters."""


def check_work(images: int, generated: Size, steps: int, limits: Limits) -> None:
    """Refuses a request that takes the device for too long; ``generated`` is the size of its images."""
    work = images * generated.height * generated.width / PIXELS_PER_MEGAPIXEL * steps
    if work > limits.work:
        raise InvalidInputError.of(
            "num_images x height x width x num_inference_steps",
            f"{images} x {generated.height} x {generated.width} x {steps}, {work:.0f} megapixel steps",
            f"at most {limits.work:g} (limit_work)",
        )


def check_token_ids(name: str, token_ids: NDArray[np.int32], codebook_size: int) -> None:
    """Refuses ids outside the codebook; ``token_ids`` is not empty."""
    for extreme in (token_ids.min(), token_ids.max()):
        if not 0 <= extreme < codebook_size:
            raise InvalidInputError.of(name, f"a tensor with {extreme}", f"0 to {codebook_size - 1}")


def check_prompt(
    name: str, prompt: str, limits: Limits, *, may_be_blank: bool = False, is_glyph_text: bool = True
) -> None:
    """Refuses a prompt that is too long, blank or not UTF-8, or has more quoted text than the glyph encoder takes.

    ``is_glyph_text`` is whether its quoted text is the glyph encoder's input.
    """
    if len(prompt) > limits.prompt_characters:
        raise InvalidInputError.of(
            name, f"{len(prompt)} characters long", f"1 to {limits.prompt_characters} characters"
        )
    if not may_be_blank and not prompt.strip():
        raise InvalidInputError.of(name, prompt or "empty", "text with something other than white space")
    _check_characters(name, prompt)
    if not is_glyph_text:
        return
    quoted = prompts.quoted_strings(prompt)
    if len(quoted) > limits.quoted_strings:
        raise InvalidInputError.of(name, f"text with {len(quoted)} quoted strings", f"at most {limits.quoted_strings}")
    glyph_tokens = prompts.glyph_token_count(quoted)
    if glyph_tokens > limits.glyph_tokens:
        raise InvalidInputError.of(
            name, f"text with {glyph_tokens} tokens in quoted strings", f"at most {limits.glyph_tokens}"
        )


def check_glyph_text(strings: Sequence[str], limits: Limits) -> None:
    """Refuses more strings, or longer ones, than the glyph encoder takes, and those that are not UTF-8."""
    name = "glyph_text"
    if len(strings) > limits.quoted_strings:
        raise InvalidInputError.of(name, f"{len(strings)} strings", f"at most {limits.quoted_strings}")
    for string in strings:
        _check_characters(name, string)
    glyph_tokens = prompts.glyph_token_count(strings)
    if glyph_tokens > limits.glyph_tokens:
        raise InvalidInputError.of(name, f"strings with {glyph_tokens} tokens in all", f"at most {limits.glyph_tokens}")


def _check_characters(name: str, text: str) -> None:
    if "\0" in text:
        raise InvalidInputError.of(name, text, "text without NUL characters")
    if any("\ud800" <= character <= "\udfff" for character in text):  # Python's stand-ins for invalid UTF-8
        raise InvalidInputError.of(name, text, "UTF-8")
