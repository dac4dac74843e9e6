"""The bodies of requests, and the documented form of answers.

Ranges that the server checks are left to it: an operator may have narrowed them.
"""

from __future__ import annotations

from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_IMAGES: Final = 10
MAX_PARTIAL_IMAGES: Final = 3
PROMPT: Final = "A red fox reading a newspaper that says “NEWS”"

OutputFormat = Literal["png", "jpeg", "webp"]
Quality = Literal["low", "medium", "high", "auto", "standard", "hd"]


def option(default: Any, description: str, allowed: str, **constraints: Any) -> Any:
    """Declares a field; ``allowed`` completes the sentence that refuses a value."""
    return Field(default, description=description, json_schema_extra={"allowed": allowed}, **constraints)


def size_option(description: str) -> Any:
    """Declares the field ``size``."""
    allowed = "auto, or WIDTHxHEIGHT in pixels as in 1024x768"
    return option(None, description, allowed, pattern=r"^(auto|\d{1,6}x\d{1,6})$")


class OwnOptions(BaseModel):
    """Options that OpenAI's API does not have, at top level or in ``extra_body``."""

    model_config = ConfigDict(extra="allow")

    width: int | None = option(None, "Width in pixels; with `height` in place of `size`.", "an integer")
    height: int | None = option(None, "Height in pixels; with `width` in place of `size`.", "an integer")
    num_inference_steps: int | None = option(None, "Denoising steps, in place of `quality`.", "an integer")
    guidance_scale: float | None = option(None, "Classifier-free guidance; 1 and below disable it.", "a number")
    seed: int | None = option(
        None,
        "The same seed gives the same image; seeds from 2^63 are the negative seeds modulo 2^64.",
        "an integer from -2^63 to 2^64 - 1",
        ge=-(2**63),
        lt=2**64,
    )
    negative_prompt: str | None = option(None, "Quoted text to steer away from.", "text")
    temperature: float | None = option(None, "Temperature of image token sampling.", "a number")
    top_p: float | None = option(None, "Probability mass of image token sampling.", "a number")
    top_k: int | None = option(None, "Number of most probable image tokens to sample from.", "an integer")
    revision: str | None = option(None, "Revision of the checkpoint that must serve the request.", "text")


class ImageOptions(OwnOptions):
    """Options of generations, edits and jobs."""

    model: str | None = option(None, "One of the model's names.", "a name of GET /v1/models")
    n: int = option(1, "Images; image i has seed + i.", f"1 to {MAX_IMAGES}", ge=1, le=MAX_IMAGES)
    size: str | None = size_option("`WIDTHxHEIGHT`, or `auto`: 1024x1024, of an edit the first image's.")
    quality: Quality = option(
        "auto",
        "Denoising steps: low 20, medium 35, high 50, hd 75; standard and auto: the server's default.",
        "low, medium, high, auto, standard, hd",
    )
    response_format: Literal["b64_json", "url"] | None = option(
        None, "How images are returned; by default b64_json, for models named dall-e-... url.", "b64_json, url"
    )
    output_format: OutputFormat = option("png", "Format of the images.", "png, jpeg, webp")
    output_compression: int | None = option(
        None, "Quality of JPEG or WebP, 0 to 100.", "0 to 100, for jpeg and webp", ge=0, le=100
    )
    background: Literal["opaque", "auto"] = option("auto", "Images have no transparency.", "opaque, auto")
    stream: bool = option(False, "Send events while the images are generated.", "true, false")
    partial_images: int = option(
        0,
        "Largest number of intermediate images in a stream.",
        f"0 to {MAX_PARTIAL_IMAGES}",
        ge=0,
        le=MAX_PARTIAL_IMAGES,
    )
    moderation: Any = Field(None, description="Accepted, without effect.")
    style: Any = Field(None, description="Accepted, without effect.")
    user: Any = Field(None, description="Accepted, without effect.")


class GenerationBody(ImageOptions):
    """``POST /v1/images/generations``."""

    model_config = ConfigDict(
        extra="allow", json_schema_extra={"example": {"prompt": PROMPT, "size": "1024x768", "seed": 42}}
    )

    prompt: str = Field(description="Text to render; text in quotation marks becomes lettering in the image.")


class EditBody(GenerationBody):
    """``POST /v1/images/edits`` as JSON; the fields of a multipart form have the same names."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={"example": {"prompt": "Make it winter", "image": "data:image/png;base64,iVBORw0KGgo..."}},
    )

    image: Any = Field(None, description="Source image as a data URL or base64, or an array of 1 to 4 of them.")
    images: Any = Field(None, description="As `image`; items may be objects with `image_url`.")
    url: Any = Field(None, description="As `image`: a data URL. Other URLs are refused: nothing is fetched.")
    mask: Any = Field(
        None,
        description="PNG of the first image's size; where it is opaque, the source's pixels are kept.",
    )
    input_fidelity: Any = Field(None, description="Accepted, without effect.")


class JobBody(GenerationBody):
    """``POST /v1/images/jobs``."""

    webhook: str | None = option(None, "URL that gets the finished job; its host must be configured.", "a URL")


class ChatBody(OwnOptions):
    """``POST /v1/chat/completions``: the last message of the user is the prompt."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "example": {
                "messages": [{"role": "user", "content": PROMPT}],
                "extra_body": {"width": 1024, "height": 1024, "num_inference_steps": 50, "seed": 42},
            }
        },
    )

    messages: list[dict[str, Any]] = option(
        ..., "Messages with text and data URLs of images.", "a list of messages", min_length=1
    )
    model: str | None = option(None, "One of the model's names.", "a name of GET /v1/models")
    n: int = option(1, "Choices, one image each.", f"1 to {MAX_IMAGES}", ge=1, le=MAX_IMAGES)
    size: str | None = size_option("As in generations.")
    quality: Quality = option("auto", "As in generations.", "low, medium, high, auto, standard, hd")
    output_format: OutputFormat = option("png", "Format of the images.", "png, jpeg, webp")
    stream: bool = option(False, "Send chunks of progress, and the images at the end.", "true, false")
    stream_options: dict[str, Any] | None = option(None, "`include_usage` adds a last chunk.", "an object")
    modalities: list[str] | None = option(
        None, "With image and text, `content` is text and `images` has the images.", "a list of texts"
    )


CHAT_FIELDS_WITHOUT_EFFECT: Final = frozenset(
    {
        "audio", "frequency_penalty", "function_call", "functions", "logit_bias", "logprobs", "max_completion_tokens",
        "max_tokens", "metadata", "parallel_tool_calls", "prediction", "presence_penalty",
        "prompt_cache_key", "reasoning_effort", "response_format", "safety_identifier", "service_tier", "stop",
        "store", "tool_choice", "tools", "top_logprobs", "user", "verbosity", "web_search_options",
    }
)  # fmt: skip
"""Fields of OpenAI's chat that say nothing about an image."""


class UsageDetails(BaseModel):
    """Tokens by what they stand for."""

    image_tokens: int
    text_tokens: int


class Usage(BaseModel):
    """Tokens of a request: of the prompt and the source images, and of the generated images and their previews."""

    input_tokens: int
    input_tokens_details: UsageDetails
    output_tokens: int
    output_tokens_details: UsageDetails
    total_tokens: int


class ImageItem(BaseModel):
    """One image: ``b64_json`` or ``url``."""

    b64_json: str | None = None
    url: str | None = None


class ImagesAnswer(BaseModel):
    """The answer of generations and edits."""

    created: int
    data: list[ImageItem]
    background: str
    output_format: str
    quality: str
    size: str
    usage: Usage
    seeds: list[int]
    metadata: dict[str, Any]
    warnings: list[str] | None = Field(None, description="Fields that had no effect.")


class ErrorObject(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """The answer of a refused or failed request."""

    error: ErrorObject


class JobAnswer(BaseModel):
    """The state of a job."""

    id: str
    object: Literal["image.job"]
    status: Literal["queued", "running", "done", "failed", "cancelled"]
    created: int
    request_id: str
    stage: str | None = None
    done: int | None = None
    total: int | None = None
    eta_seconds: float | None = None
    finished: int | None = None
    result: ImagesAnswer | None = None
    error: ErrorObject | None = None
