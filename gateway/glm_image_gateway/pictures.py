"""Work on finished images that the server does not do: edits through a mask, and a chosen JPEG or WebP quality."""

from __future__ import annotations

import io
import warnings
from typing import Any, Final

from PIL import Image, ImageOps

from glm_image_client.file_texts import FileTexts
from glm_image_gateway.errors import ApiError

MAX_PIXELS: Final = 50_000_000
"""Of a source image or a mask that the gateway decodes."""
FORMATS: Final = ("PNG", "JPEG", "WEBP")


class Mask:
    """An edit's first source image, and where it is kept: the opaque part of a mask.

    Args:
        source: the file of the source image.
        mask: a PNG file of the same size with an alpha channel.

    Raises:
        ApiError: one of them cannot be read, or they do not match.
    """

    def __init__(self, source: bytes, mask: bytes) -> None:
        self._source = _opened(source, "image").convert("RGB")
        alpha = _opened(mask, "mask")
        if "A" not in alpha.getbands() and "transparency" not in alpha.info:
            message = "mask has no alpha channel; allowed: a PNG that is transparent where the image may change"
            raise ApiError(400, message, "invalid_value", param="mask")
        if alpha.size != self._source.size:
            sizes = ["{}x{}".format(*image.size) for image in (alpha, self._source)]
            message = f"mask is {sizes[0]}; allowed: {sizes[1]}, the size of the first image"
            raise ApiError(400, message, "invalid_value", param="mask")
        self._kept = alpha.convert("RGBA").getchannel("A")

    def composited(self, file: bytes, output_format: str, compression: int | None) -> bytes:
        """Returns an edited image in which the masked pixels are those of the source, scaled to its size.

        It keeps the texts of the file about its origin.
        """
        opened = Image.open(io.BytesIO(file))
        edited = opened.convert("RGB")
        source, kept = self._source, self._kept
        if source.size != edited.size:
            source = source.resize(edited.size, Image.Resampling.LANCZOS)
            kept = kept.resize(edited.size, Image.Resampling.BILINEAR)
        return encoded(Image.composite(source, edited, kept), output_format, compression, FileTexts.of_image(opened))


def recompressed(file: bytes, output_format: str, compression: int | None) -> bytes:
    """Returns an image file in another format or quality, with its texts about its origin."""
    opened = Image.open(io.BytesIO(file))
    return encoded(opened.convert("RGB"), output_format, compression, FileTexts.of_image(opened))


def encoded(image: Image.Image, output_format: str, compression: int | None, texts: FileTexts) -> bytes:
    """Returns an image as a file with texts; ``compression`` is the quality of JPEG and WebP."""
    options: dict[str, Any] = texts.encoder_options(output_format)
    if output_format == "png":
        options["compress_level"] = 1
    if output_format != "png":
        options["quality"] = 95 if compression is None else compression
    if output_format == "jpeg":
        options["subsampling"] = 0
    buffer = io.BytesIO()
    image.save(buffer, output_format, **options)
    return buffer.getvalue()


def _opened(file: bytes, name: str) -> Image.Image:
    """Returns an upright image; its size is checked before its pixels are decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(file), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            message = f"{name} has {image.width}x{image.height} pixels; allowed: {MAX_PIXELS} in all"
            raise ApiError(400, message, "invalid_value", param=name)
        image.load()
        return ImageOps.exif_transpose(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        message = f"{name} cannot be decoded; allowed: a PNG, JPEG or WebP file"
        raise ApiError(400, message, "invalid_value", param=name) from None
