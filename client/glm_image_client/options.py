"""Options of a client's calls, each declared once: type, tensor, help and flag of the command.

The methods of both clients take them as ``**options: Unpack[GenerateOptions]``. An option that is omitted or None is
not sent, so that the server's default applies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, Literal, NamedTuple, TypedDict, get_args, get_type_hints

from glm_image_client.sources import SourceImage

OutputFormat = Literal["raw", "png", "jpeg", "webp"]


class Input(NamedTuple):
    """The tensor of an option.

    Attributes:
        datatype: KServe's name of its type.
        help: what the option means.
        flags: the flags of ``glm-image generate`` that set it; () = the command derives the value from another flag.
    """

    datatype: str
    help: str
    flags: tuple[str, ...] = ()


class CommonOptions(TypedDict, total=False):
    """Options of every call that generates.

    Attributes:
        seed: any integer from -2^63 to 2^64 - 1, of which -1 is one as any other; image i is that of ``seed + i``.
        glyph_text: strings to render as lettering, in place of the quoted text of the prompt; () = no lettering.
        revision: the checkpoint that must serve the request: ``revision`` of a result's metadata.
        images: source image or images for image to image: paths, bytes of image files, PIL images, or uint8 arrays
            [height, width, 3].
        image: the same as ``images``; only one of the two may be given.
        request_id: the id for ``cancel`` and ``status``; by default a new one.
        timeout: seconds for all attempts together, here and on the server; by default the client's.
    """

    seed: Annotated[int | None, Input("INT64", "Seed; the same seed gives the same image.", ("--seed",))]
    glyph_text: Annotated[
        Sequence[str] | None,
        Input("BYTES", "Text to render, in place of the quoted text; may be given several times.", ("--glyph-text",)),
    ]
    revision: Annotated[
        str | None, Input("BYTES", "Revision of the checkpoint that must serve the request.", ("--revision",))
    ]
    images: SourceImage | Sequence[SourceImage] | None
    image: SourceImage | Sequence[SourceImage] | None
    request_id: str | None
    timeout: float | None


class ArOptions(TypedDict, total=False):
    """Options of the AR stage.

    Attributes:
        height: pixels.
        width: pixels.
        num_images: images to generate.
        temperature: temperature of image token sampling.
        top_p: probability mass of image token sampling.
        top_k: number of most probable image tokens to sample from.
    """

    height: Annotated[int | None, Input("INT32", "Height in pixels.")]
    width: Annotated[int | None, Input("INT32", "Width in pixels.")]
    num_images: Annotated[int | None, Input("INT32", "Images to generate.", ("--num-images", "-n"))]
    temperature: Annotated[float | None, Input("FP32", "Temperature of image token sampling.", ("--temperature",))]
    top_p: Annotated[float | None, Input("FP32", "Probability mass of image token sampling.", ("--top-p",))]
    top_k: Annotated[int | None, Input("INT32", "Number of most probable image tokens to sample from.", ("--top-k",))]


class DitOptions(TypedDict, total=False):
    """Options of the DiT stage.

    Attributes:
        num_inference_steps: denoising steps.
        guidance_scale: classifier-free guidance; 1 and below disable it.
        negative_prompt: its quoted text is the glyph condition of the unconditional branch.
        output_format: what the server sends, by default ``png``; ``raw`` = uint8 pixels.
    """

    num_inference_steps: Annotated[int | None, Input("INT32", "Denoising steps.", ("--steps",))]
    guidance_scale: Annotated[
        float | None, Input("FP32", "Classifier-free guidance; 1 and below disable it.", ("--guidance",))
    ]
    negative_prompt: Annotated[
        str | None,
        Input("BYTES", "Quoted text to steer away from; unquoted text has no effect.", ("--negative-prompt",)),
    ]
    output_format: Annotated[OutputFormat | None, Input("BYTES", "Format of the images.")]


class PreviewOptions(TypedDict, total=False):
    """Options of a stream.

    Attributes:
        preview_steps: denoising steps of a small preview image, sent while tokens are still decoded; 0 = no preview.
        preview_every: denoising steps between two images of the latents; 0 = no such images.
    """

    preview_steps: Annotated[int | None, Input("INT32", "Denoising steps of the preview; 0 = none.")]
    preview_every: Annotated[int | None, Input("INT32", "Denoising steps between two images; 0 = none.")]


class GenerateOptions(CommonOptions, ArOptions, DitOptions, total=False):
    """Options of ``generate``: those of both stages."""


class StreamOptions(CommonOptions, ArOptions, DitOptions, PreviewOptions, total=False):
    """Options of ``stream``: those of ``generate`` and of the previews."""


class PriorOptions(CommonOptions, ArOptions, total=False):
    """Options of ``prior_tokens``: those of the AR stage."""


class PaintOptions(CommonOptions, DitOptions, total=False):
    """Options of ``paint``: those of the DiT stage."""


class Option(NamedTuple):
    """An option that is sent as a tensor: its Python type and its ``Input``."""

    kind: Any
    input: Input


def _declared() -> dict[str, Option]:
    hints = get_type_hints(StreamOptions, include_extras=True)
    annotated = {name: get_args(hint) for name, hint in hints.items() if hasattr(hint, "__metadata__")}
    return {name: Option(kind, declared) for name, (kind, declared) in annotated.items()}


OPTIONS: Final[Mapping[str, Option]] = _declared()
"""Every option that is sent as a tensor of its name."""

PROMPT: Final = Input("BYTES", "Text to render; text in quotation marks becomes lettering.")
