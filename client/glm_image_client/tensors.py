"""Converts the values of a request into tensors."""

from __future__ import annotations

import io
import operator
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, SupportsFloat, SupportsIndex, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from glm_image_client.errors import BadArgumentError
from glm_image_client.options import OPTIONS, PROMPT, SourceImage
from glm_image_client.transport import Tensor, object_array

_INTEGERS: Final[Mapping[str, type[np.signedinteger[Any]]]] = {"INT32": np.int32, "INT64": np.int64}
_PNG_MODES: Final = {"1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA"}


def request_tensors(values: Mapping[str, object], images: Sequence[SourceImage] | None = None) -> list[Tensor]:
    """Returns the inputs of a request: each value as a tensor [1], the source images as ``image`` BYTES [k].

    Args:
        values: the values of the inputs; None is not sent, so that the server's default applies.
        images: source images: paths, the bytes of image files, or PIL images (sent as PNG).

    Raises:
        BadArgumentError: a value does not fit its input's type, or an image cannot be read.
    """
    tensors = [
        Tensor(name, datatype, _scalar(name, datatype, value))
        for name, value in values.items()
        if value is not None
        for datatype in [(PROMPT if name == "prompt" else OPTIONS[name].input).datatype]
    ]
    if images:
        tensors.append(Tensor("image", "BYTES", object_array([source_bytes(image) for image in images])))
    return tensors


def source_bytes(image: SourceImage) -> bytes:
    """Returns the bytes to send for one source image; only a PIL image is encoded (PNG, upright).

    Raises:
        BadArgumentError: the file cannot be read, or the value is no image.
    """
    if isinstance(image, bytes):
        return image
    if isinstance(image, Image.Image):
        upright = ImageOps.exif_transpose(image)
        buffer = io.BytesIO()
        (upright if upright.mode in _PNG_MODES else upright.convert("RGB")).save(buffer, "png", compress_level=1)
        return buffer.getvalue()
    if not isinstance(image, (str, os.PathLike)):
        raise BadArgumentError(f"image is of type {type(image).__name__}; allowed: a path, bytes or a PIL image")
    try:
        return Path(image).read_bytes()
    except OSError as error:
        raise BadArgumentError(f"image {os.fspath(image)!r} cannot be read: {error.strerror}") from error


def _scalar(name: str, datatype: str, value: object) -> NDArray[Any]:
    try:
        if datatype == "BYTES":
            return object_array([cast("str", value).encode("utf-8")])
        if datatype == "FP32":
            return np.array([float(cast("SupportsFloat", value))], dtype=np.float32)
        # operator.index refuses 512.5, which numpy would truncate to 512.
        number = operator.index(cast("SupportsIndex", value))
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        kind = {"BYTES": "text that UTF-8 can hold", "FP32": "a number"}.get(datatype, "an integer")
        raise BadArgumentError(f"{name} is {value!r}; allowed: {kind}") from error
    dtype = _INTEGERS[datatype]
    limits = np.iinfo(dtype)
    if not limits.min <= number <= limits.max:
        raise BadArgumentError(f"{name} is {number}; allowed: a signed {limits.bits}-bit integer")
    return np.array([number], dtype=dtype)
