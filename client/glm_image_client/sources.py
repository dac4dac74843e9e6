"""Source images of a request: paths, bytes, PIL images and arrays in, bytes of image files out."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps

from glm_image_client.errors import BadArgumentError, reason_of

SourceImage = str | os.PathLike[str] | bytes | Image.Image | NDArray[np.uint8]

ALLOWED: Final = "a path, the bytes of an image file, a PIL image, or a uint8 array [height, width, 3]"

_PNG_MODES: Final = {"1", "L", "LA", "I;16", "P", "RGB", "RGBA"}
_STEPS: Final = {"La": "LA", "RGBa": "RGBA", "I;16B": "I", "I;16L": "I", "I;16N": "I", "I": "I;16"}
"""Conversions of modes that PIL cannot write as PNG, without a loss; a mode may need two of them."""

_CHANNELS: Final = (1, 3, 4)
_COLOUR_IMAGE, _COLOUR_IMAGES = 3, 4
"""Dimensions of an array with channels."""


def source_images(images: object) -> list[SourceImage]:
    """Returns the source images of an argument, which is one image or several.

    An array of four dimensions is several images.

    Raises:
        BadArgumentError: the argument is neither.
    """
    if images is None:
        return []
    if isinstance(images, np.ndarray):
        return list(images) if images.ndim == _COLOUR_IMAGES else [images]
    if isinstance(images, (str, os.PathLike, bytes, bytearray, memoryview, Image.Image)):
        return [bytes(images) if isinstance(images, (bytearray, memoryview)) else images]
    if isinstance(images, Mapping) or not isinstance(images, Iterable) or hasattr(images, "read"):
        raise BadArgumentError(f"images is of type {type(images).__name__}; allowed: {ALLOWED}, or a list of them")
    return list(images)


def source_bytes(image: SourceImage) -> bytes:
    """Returns the bytes to send for one source image; only PIL images (upright) and arrays are encoded, as PNG.

    Raises:
        BadArgumentError: the image cannot be read or encoded.
    """
    if isinstance(image, (bytes, bytearray, memoryview)):
        return bytes(image)
    if isinstance(image, Image.Image):
        return _png(image)
    if isinstance(image, np.ndarray):
        return _png(_from_array(image))
    if not isinstance(image, (str, os.PathLike)):
        raise BadArgumentError(f"image is of type {type(image).__name__}; allowed: {ALLOWED}")
    try:
        return Path(image).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL, or text that the file system cannot hold
        raise BadArgumentError(f"image {os.fspath(image)!r} cannot be read: {reason_of(error)}") from error


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    try:
        upright = ImageOps.exif_transpose(image)
        while upright.mode in _STEPS:
            upright = upright.convert(_STEPS[upright.mode])
        if upright.mode == "CMYK":
            upright = _from_cmyk(upright)
        if upright.mode not in _PNG_MODES:
            upright = upright.convert("RGBA" if upright.has_transparency_data else "RGB")
        upright.save(buffer, "png", compress_level=1)
    except Exception as error:  # a PIL image reads its file only now, and each format's reader has its own errors
        raise BadArgumentError(
            f"image is a PIL image of mode {image.mode} that cannot be read or encoded: {error}"
        ) from error
    return buffer.getvalue()


def _from_cmyk(image: Image.Image) -> Image.Image:
    # Here, as PNG has no CMYK: the server converts the colours of files, RGB and grey ones.
    profile = image.info.pop("icc_profile", None)
    if profile is None:
        return image
    try:
        source, srgb = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
        intent = ImageCms.Intent.PERCEPTUAL
        return ImageCms.profileToProfile(image, source, srgb, renderingIntent=intent, outputMode="RGB") or image
    except (ImageCms.PyCMSError, OSError):  # a broken profile, which is ignored
        return image


def _from_array(array: NDArray[np.uint8]) -> Image.Image:
    is_image = array.ndim == _COLOUR_IMAGE - 1 or (array.ndim == _COLOUR_IMAGE and array.shape[-1] in _CHANNELS)
    if array.dtype != np.uint8 or not is_image or not array.size:
        raise BadArgumentError(
            f"image is an array of type {array.dtype} and shape {list(array.shape)}; "
            "allowed: uint8 [height, width] or [height, width, 1, 3 or 4]"
        )
    return Image.fromarray(array.squeeze(-1) if array.ndim == _COLOUR_IMAGE and array.shape[-1] == 1 else array)
