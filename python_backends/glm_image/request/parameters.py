"""Requests of both stages: declared fields, validation, and the resolved request of the AR stage.

A refused request raises ``InvalidInputError``, which names the input, its value and what is allowed.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, Final, TypedDict

import numpy as np
from numpy.typing import NDArray

from glm_image.errors import InvalidInputError
from glm_image.request import geometry, source_images
from glm_image.request.geometry import PUBLISHED_RULE, Grid, Size, SourceRule
from glm_image.request.limits import (
    OUTPUT_FORMATS,
    Limits,
    check_glyph_text,
    check_prompt,
    check_token_ids,
    check_work,
)
from glm_image.request.prompts import quoted_strings
from glm_image.request.source_images import Source, SourcePicture
from glm_image.request.stages import Stage
from glm_image.request.tensors import (
    CheckedElsewhere,
    Choice,
    Range,
    check_fields,
    request_fields,
    tensor,
    tensor_metadata,
)

DEFAULT_SIDE: Final = 1024


@dataclass(frozen=True)
class Sampling:
    """How the AR samples a token: by temperature, then top-k, then top-p."""

    temperature: float
    top_p: float
    top_k: int


SIDE: Final = Range("min_side", "max_side")


@dataclass(frozen=True)
class SharedParameters:
    """The request fields that both stages read."""

    prompt: str = field(
        metadata=tensor_metadata(
            "STRING",
            CheckedElsewhere(
                "1 to {prompt_characters} characters of UTF-8, not only white space, without NUL; at most "
                "{quoted_strings} quoted strings and {glyph_tokens} glyph tokens in all. Text that spells a special "
                "token is treated as text."
            ),
            "Text to render; text in '…', \"…\", “…” or 「…」 is rendered as lettering in the image.",
            shown="",
        )
    )
    _: KW_ONLY
    images: tuple[bytes, ...] | None = tensor(
        None,
        "STRING",
        CheckedElsewhere("1 to {source_images} files: PNG, JPEG or WebP, as bytes or [base64](image_to_image.md#json)"),
        "Source images; they select [image to image](image_to_image.md).",
        shown="none",
        name="image",
        dims=(-1,),
        is_text=False,
    )
    glyph_text: tuple[str, ...] | None = tensor(
        None,
        "STRING",
        CheckedElsewhere("0 to {quoted_strings} strings, {glyph_tokens} glyph tokens in all"),
        "Strings to render as lettering, in place of the quoted text of `prompt`; see [lettering](#lettering).",
        shown="the quoted text",
        dims=(-1,),
    )
    negative_prompt: str = tensor(
        "",
        "STRING",
        CheckedElsewhere("as `prompt`, may be empty"),
        "Its quoted text is the glyph condition of the unconditional branch.",
    )
    num_inference_steps: int = tensor(50, "INT32", Range(1, "num_inference_steps"), "Denoising steps.")
    guidance_scale: float = tensor(
        1.5, "FP32", Range(0, "guidance_scale"), "Classifier-free guidance; 1 and below disable it."
    )
    output_format: str = tensor(
        "raw",
        "STRING",
        Choice(OUTPUT_FORMATS),
        "`raw` returns pixels in `images`, the other formats return files in `images_base64`.",
        is_parameter=True,
    )
    revision: str = tensor(
        "",
        "STRING",
        CheckedElsewhere("`revision` of the metadata, or the checkpoint's fingerprint"),
        "The checkpoint that must serve the request; another one refuses it. See [pools](fleet.md#revisions).",
        shown="any",
        is_parameter=True,
    )

    def shared(self) -> dict[str, Any]:
        """Returns these fields by their names, of a subclass too."""
        return {declared.attribute: getattr(self, declared.attribute) for declared in request_fields(SharedParameters)}

    @property
    def input_bytes(self) -> int:
        """The size of the inputs of any length; characters count as bytes."""
        return len(self.prompt) + len(self.negative_prompt) + sum(map(len, self.images or ()))

    @property
    def rendered_text(self) -> tuple[str, ...]:
        """The strings that the image shows as lettering."""
        return tuple(quoted_strings(self.prompt) if self.glyph_text is None else self.glyph_text)

    def check_shared(self, limits: Limits) -> None:
        """Checks every declared field; source images only when they are decoded."""
        check_prompt("prompt", self.prompt, limits, is_glyph_text=self.glyph_text is None)
        if self.glyph_text is not None:
            check_glyph_text(self.glyph_text, limits)
        if self.negative_prompt:
            check_prompt("negative_prompt", self.negative_prompt, limits, may_be_blank=True)
        check_fields(self, limits)


@dataclass(frozen=True, kw_only=True)
class GenerationParameters(SharedParameters):
    """A request of ``glm_image``; None = the default of the server or of the checkpoint."""

    height: int | None = tensor(
        None,
        "INT32",
        SIDE,
        "Pixels. The next multiple of 32 is generated and the image cropped at the top left.",
        shown=f"{DEFAULT_SIDE}; with `image` that of the first source, scaled",
        is_parameter=True,
    )
    width: int | None = tensor(None, "INT32", SIDE, "As `height`.", shown="as `height`", is_parameter=True)
    seed: int | None = tensor(
        None,
        "INT64",
        CheckedElsewhere("any; -1 is a seed as any other"),
        "The metadata reports the seed in use. The same seed gives the same image; see [seeds](#seeds).",
        shown="random, below 2^53",
    )
    num_images: int = tensor(
        1,
        "INT32",
        Range(1, "num_images"),
        "Images to generate. Image i equals the single image of seed + i (modulo 2^64).",
        is_parameter=True,
    )
    temperature: float | None = tensor(
        None, "FP32", Range(0.01, 2.0), "Temperature of image token sampling.", shown="the checkpoint's, else 0.9"
    )
    top_p: float | None = tensor(
        None,
        "FP32",
        Range(0, 1, excludes_low=True),
        "Probability mass of nucleus sampling of image tokens.",
        shown="the checkpoint's, else 0.75",
    )
    top_k: int | None = tensor(
        None,
        "INT32",
        Range(1),
        "Number of most probable image tokens to sample from.",
        shown="the checkpoint's, else the vision vocabulary",
    )

    def resolve(self, limits: Limits, defaults: Sampling, rule: SourceRule = PUBLISHED_RULE) -> ResolvedRequest:
        """Validates the request and computes sizes, grids and seeds; ``defaults`` and ``rule`` are the checkpoint's."""
        self.check_shared(limits)
        sampling = self._sampling(defaults, limits)
        # Last: decoding images takes longer than all other checks.
        sources = () if self.images is None else source_images.for_ar(self.images, limits, rule)
        requested = self._requested(sources, limits)
        generated = geometry.generated_size(requested)
        check_work(self.num_images, generated, self.num_inference_steps, limits)
        target = geometry.target_grid(generated)
        return ResolvedRequest(
            parameters=self,
            requested=requested,
            grids=geometry.output_grids(target, image_to_image=bool(sources)),
            sampling=sampling,
            seeds=consecutive_seeds(random_seed() if self.seed is None else self.seed, self.num_images),
            sources=sources,
        )

    def _requested(self, sources: tuple[Source, ...], limits: Limits) -> Size:
        height, width = geometry.rendered_size(sources[0].grid) if sources else (DEFAULT_SIDE, DEFAULT_SIDE)
        requested = Size(height if self.height is None else self.height, width if self.width is None else self.width)
        check_fields(replace(self, height=requested.height, width=requested.width), limits)
        return requested

    def _sampling(self, defaults: Sampling, limits: Limits) -> Sampling:
        sampling = Sampling(
            defaults.temperature if self.temperature is None else self.temperature,
            defaults.top_p if self.top_p is None else self.top_p,
            defaults.top_k if self.top_k is None else self.top_k,
        )
        check_fields(replace(self, **vars(sampling)), limits)
        return sampling


MAX_PREVIEW_EVERY: Final = 200


@dataclass(frozen=True, kw_only=True)
class PreviewParameters:
    """The request fields that ``glm_image_stream`` has in addition."""

    preview_steps: int = tensor(
        6,
        "INT32",
        Range(0, 50),
        "Denoising steps of a small preview image, sent while the AR stage still decodes; 0 = no preview.",
    )
    preview_every: int = tensor(
        0,
        "INT32",
        Range(0, MAX_PREVIEW_EVERY),
        "Denoising steps between two images of the latents; 0 = no such images.",
    )


@dataclass(frozen=True, kw_only=True)
class ArStreamParameters:
    """The request fields that ``glm_ar_stream`` has in addition to those of ``glm_ar``."""

    preview_tokens: int = tensor(
        0, "INT32", Range(0, 1), "1: an event brings the tokens of the preview as soon as they are sampled."
    )


@dataclass(frozen=True, kw_only=True)
class DitStreamParameters:
    """The request fields that ``glm_dit_stream`` has in addition to those of ``glm_dit``."""

    preview_every: int = tensor(
        0,
        "INT32",
        Range(0, MAX_PREVIEW_EVERY),
        "Denoising steps between two images of the latents; 0 = no such images.",
    )
    is_preview: int = tensor(
        0,
        "INT32",
        Range(0, 1),
        "1: the tokens are those of a preview, which is rendered between the steps of other requests.",
    )


@dataclass(frozen=True)
class ResolvedRequest:
    """A validated request with every default filled in.

    Attributes:
        requested: size of the images in pixels.
        grids: the grids the AR generates, in order; the last one is the image's.
        seeds: one for each image, signed 64-bit.
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
        return self.grids[-1]

    @property
    def source_bytes(self) -> int:
        """The size of the source images as the vision tower reads them: fp32 of each value."""
        return sum(source.pixels.size for source in self.sources) * np.dtype(np.float32).itemsize


class ArMetadata(TypedDict, total=False):
    """The tensor ``ar_metadata``: what the AR stage reports about a request to the DiT stage.

    Attributes:
        tokens: the sequence's tokens, by kind: prompt, source, preview, image.
        seconds: the AR stage's durations, by ``Stage``.
        request_id: the request's id.
        arrived_ns: ``time.monotonic_ns()`` when the request arrived.
        finished_ns: ``time.monotonic_ns()`` when the AR stage had finished.
        fingerprint: of the checkpoint that made the tokens.
    """

    fingerprint: str
    tokens: Mapping[str, int]
    seconds: Mapping[Stage, float]
    request_id: str
    arrived_ns: int
    finished_ns: int


@dataclass(frozen=True)
class PaintRequest(SharedParameters):
    """A request of ``glm_dit``: image tokens to render.

    Attributes:
        prior_token_ids: int32 [n, grid.tokens], ids of the codebook, before upsampling.
        grid: the grid of each row.
        requested: size of the images in pixels; rounded up to multiples of 32 it is the size of the grid.
        seeds: one for each image, signed 64-bit.
        source_token_ids: int32 [tokens of all source grids], ids of the codebook.
        source_grids: the grid of each source image.
        ar_metadata: what the AR stage reported; {} for tokens that a client sends.
    """

    prior_token_ids: NDArray[np.int32]
    grid: Grid
    requested: Size
    seeds: tuple[int, ...]
    source_token_ids: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    source_grids: tuple[Grid, ...] = ()
    ar_metadata: ArMetadata = field(default_factory=ArMetadata)

    @property
    def generated(self) -> Size:
        """The size in pixels before cropping."""
        return geometry.rendered_size(self.grid)

    def check(self, limits: Limits, codebook_size: int) -> None:
        """Validates everything except the contents of the source images; see ``read_sources``."""
        self.check_shared(limits)
        largest = limits.max_side // geometry.PIXELS_PER_TOKEN
        if not all(1 <= side <= largest for side in self.grid):
            raise InvalidInputError.of("prior_grid", tuple(self.grid), f"two sides of 1 to {largest}")
        images, tokens = self.prior_token_ids.shape
        if not 1 <= images <= limits.num_images:
            raise InvalidInputError.of("prior_token_ids' number of rows", images, f"1 to {limits.num_images}")
        if tokens != self.grid.tokens:
            raise InvalidInputError.of(
                "prior_token_ids' number of columns", tokens, f"{self.grid.tokens}, as prior_grid {tuple(self.grid)}"
            )
        check_work(images, self.generated, self.num_inference_steps, limits)
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

    def read_sources(
        self, limits: Limits, rule: SourceRule, check: Callable[[], None] = lambda: None
    ) -> tuple[SourcePicture, ...]:
        """Decodes the source images of a request that ``check`` accepted; errors as ``source_images.for_dit``.

        Calls ``check`` after each image: it may raise, to end a request that must not go on.
        """
        sources = []
        if self.images is not None:
            for source in source_images.for_dit(self.images, self.source_token_ids, self.source_grids, limits, rule):
                sources.append(source)
                check()
        return tuple(sources)


def random_seed() -> int:
    """Returns a random seed below 2^53, which every JSON client can hold exactly."""
    return secrets.randbelow(2**53)


def consecutive_seeds(first: int, count: int) -> tuple[int, ...]:
    """Returns ``first, first + 1, ...`` modulo 2^64, as signed 64-bit integers."""
    return tuple((first + index + 2**63) % 2**64 - 2**63 for index in range(count))


INPUT_PARAMETERS = tuple(field.spec.name for field in request_fields(GenerationParameters) if field.spec.is_parameter)
"""Names of inputs in whose place a request parameter counts."""
