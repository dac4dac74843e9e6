"""From bodies of OpenAI's API to requests of images in the client's terms."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from glm_image_client import GenerateOptions
from glm_image_gateway.bodies import Read, unknown_fields, validated
from glm_image_gateway.errors import ApiError, not_allowed, shown
from glm_image_gateway.schemas import (
    CHAT_FIELDS_WITHOUT_EFFECT,
    ChatBody,
    EditBody,
    GenerationBody,
    OwnOptions,
)

STEPS_OF_QUALITY: Final[Mapping[str, int | None]] = {
    "low": 20, "medium": 35, "high": 50, "hd": 75, "auto": None, "standard": None,
}  # fmt: skip
"""Denoising steps; None = the server's default."""
MAX_SOURCES: Final = 4
URL_MODELS: Final = "dall-e-"
"""Of these models, OpenAI's API returns URLs unless it is asked for base64, and their clients rely on it."""
CHAT_SAMPLING: Final = ("temperature", "top_p", "top_k")
"""Fields that chat clients send with a meaning for text."""

_URL: Final = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_DATA_URL: Final = re.compile(rb"\s*data:[^,]{0,200},")


@dataclass(frozen=True)
class ImageRequest:
    """A request of any route.

    Attributes:
        options: the client's options, except those about images and their number.
        count: images to generate.
        images: source images: files, or their base64.
        mask: a PNG file; None = the whole image is edited.
        has_size: whether the size was given as ``size``.
        echoed: fields of the answer that repeat the request.
        warnings: what had no effect.
    """

    prompt: str
    options: GenerateOptions
    count: int = 1
    images: tuple[bytes, ...] = ()
    mask: bytes | None = None
    output_format: str = "png"
    compression: int | None = None
    response_format: str = "b64_json"
    stream: bool = False
    partial_images: int = 0
    has_size: bool = False
    echoed: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def pixels(self) -> int:
        """Pixels of an image; of an edit whose size its source decides, an estimate."""
        width, height = self.options.get("width"), self.options.get("height")
        return (width or 1024) * (height or 1024)

    @property
    def steps(self) -> int:
        return self.options.get("num_inference_steps") or 50


def generation(body: GenerationBody, *, strict: bool) -> ImageRequest:
    """Returns the request of a body of generations."""
    return _image_request(body, unknown_fields(body, frozenset(), strict=strict))


def edit(read: Read, *, strict: bool) -> tuple[EditBody, ImageRequest]:
    """Returns an edit's body and request."""
    body = validated(EditBody, read.fields)
    images = tuple(_source(name, item) for name in ("image", "images", "url") for item in _listed(getattr(body, name)))
    if not 1 <= len(images) <= MAX_SOURCES:
        raise ApiError(
            400, f"image is given {len(images)} times; allowed: 1 to {MAX_SOURCES}", "invalid_value", param="image"
        )
    mask = None if body.mask is None else decoded(_source("mask", body.mask), "mask")
    warnings = unknown_fields(body, frozenset(), strict=strict)
    return body, _image_request(body, warnings, images, mask)


def chat(read: Read, *, strict: bool) -> tuple[ChatBody, ImageRequest]:
    """Returns a chat's body and request."""
    ignored = [name for name in CHAT_SAMPLING if name in read.fields and name not in read.nested]
    body = validated(ChatBody, {name: value for name, value in read.fields.items() if name not in ignored})
    warnings = list(unknown_fields(body, CHAT_FIELDS_WITHOUT_EFFECT, strict=strict))
    if ignored:
        names = ", ".join(ignored)
        warnings.append(f"{names} at top level was ignored, as it is about text; put it into extra_body")
    prompt, images = _chat_content(body.messages)
    return body, ImageRequest(
        prompt=prompt,
        options=_options(body, body.size, body.quality),
        count=body.n,
        images=images,
        output_format=body.output_format,
        stream=body.stream,
        has_size=body.size is not None,
        warnings=tuple(warnings),
    )


def _image_request(
    body: GenerationBody,
    warnings: tuple[str, ...],
    images: tuple[bytes, ...] = (),
    mask: bytes | None = None,
) -> ImageRequest:
    if body.output_compression is not None and body.output_format == "png":
        warnings = (*warnings, "output_compression was ignored, as output_format is png")
    return ImageRequest(
        prompt=body.prompt,
        options=_options(body, body.size, body.quality),
        count=body.n,
        images=images,
        mask=mask,
        output_format=body.output_format,
        compression=None if body.output_format == "png" else body.output_compression,
        response_format=body.response_format or ("url" if _is_url_model(body.model) else "b64_json"),
        stream=body.stream,
        partial_images=body.partial_images,
        has_size=body.size is not None,
        echoed={"background": "opaque", "quality": body.quality},
        warnings=warnings,
    )


def _is_url_model(name: str | None) -> bool:
    return name is not None and name.startswith(URL_MODELS)


def _options(body: OwnOptions, size: str | None, quality: str) -> GenerateOptions:
    width, height = sides(size)
    steps = STEPS_OF_QUALITY[quality] if body.num_inference_steps is None else body.num_inference_steps
    return GenerateOptions(
        width=width if body.width is None else body.width,
        height=height if body.height is None else body.height,
        num_inference_steps=steps,
        guidance_scale=body.guidance_scale,
        seed=folded(body.seed),
        negative_prompt=body.negative_prompt,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        revision=body.revision,
    )


def sides(size: str | None) -> tuple[int | None, int | None]:
    """Returns the width and height of ``WIDTHxHEIGHT``; ``auto`` leaves them to the server."""
    if size is None or size == "auto":
        return None, None
    width, _, height = size.partition("x")
    return int(width), int(height)


def folded(seed: int | None) -> int | None:
    """Returns a seed as a signed 64-bit integer: seeds from 2^63 are the negative ones modulo 2^64."""
    return seed - 2**64 if seed is not None and seed >= 2**63 else seed


def _listed(value: Any) -> Sequence[Any]:
    if value is None:
        return ()
    return value if isinstance(value, list) else [value]


def _source(name: str, item: Any) -> bytes:
    """Returns a source image: a file of a form, or base64 with or without ``data:``, as it was sent."""
    if isinstance(item, dict):
        item = item.get("image_url", item.get("url", item))
        item = item.get("url", item) if isinstance(item, dict) else item
    if isinstance(item, bytes) and item:
        return item
    if not isinstance(item, str) or not item:
        raise not_allowed(name, item, "a file, a data URL or base64")
    if _URL.match(item):
        raise not_allowed(name, item, "a file, a data URL or base64; nothing is fetched", "url_not_allowed")
    return item.encode("utf-8", "surrogatepass")


def decoded(image: bytes, name: str) -> bytes:
    """Returns the file of a source image that may be base64."""
    if image[:4] in {b"\x89PNG", b"RIFF"} or image[:2] == b"\xff\xd8":
        return image
    found = _DATA_URL.match(image)
    try:
        return base64.b64decode(image[found.end() :] if found else image)
    except binascii.Error:
        raise ApiError(
            400, f"{name} is neither a PNG, JPEG or WebP file nor base64", "invalid_value", param=name
        ) from None


def _chat_content(messages: Sequence[Mapping[str, Any]]) -> tuple[str, tuple[bytes, ...]]:
    """Returns the prompt and the source images: of the last message of the user, after the system's texts."""
    users = [index for index, message in enumerate(messages) if message.get("role") == "user"]
    if not users:
        raise ApiError(400, "messages has none with role user; allowed: one or more", "invalid_value", param="messages")
    texts = [
        text
        for index, message in enumerate(messages)
        if message.get("role") in {"system", "developer"}
        for text in _parts(message.get("content"), f"messages[{index}].content")[0]
    ]
    last = users[-1]
    spoken, images = _parts(messages[last].get("content"), f"messages[{last}].content")
    if len(images) > MAX_SOURCES:
        raise ApiError(
            400,
            f"messages[{last}] has {len(images)} images; allowed: at most {MAX_SOURCES}",
            "invalid_value",
            param="messages",
        )
    return "\n".join(text for text in (*texts, *spoken) if text), tuple(images)


def _parts(content: Any, place: str) -> tuple[list[str], list[bytes]]:
    """Returns the texts and the images of a message's content."""
    if isinstance(content, str):
        return [content], []
    if not isinstance(content, list):
        raise ApiError(
            400, f"{place} is {shown(content)}; allowed: text or a list of parts", "invalid_value", param="messages"
        )
    texts: list[str] = []
    images: list[bytes] = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in {"text", "input_text"} and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in {"image_url", "input_image"}:
            images.append(_chat_image(part, f"{place}[{index}].image_url"))
        else:
            allowed = "parts of type text or image_url"
            raise ApiError(
                400, f"{place}[{index}] is {shown(part)}; allowed: {allowed}", "invalid_value", param="messages"
            )
    return texts, images


def _chat_image(part: Mapping[str, Any], place: str) -> bytes:
    try:
        return _source(place, dict(part))
    except ApiError as error:
        error.param = "messages"
        raise
