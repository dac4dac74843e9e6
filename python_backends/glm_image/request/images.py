"""Image files: decode source images safely and scale them; crop and encode results."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from glm_image.errors import InvalidInputError, shown
from glm_image.request import colour, geometry, source_files
from glm_image.request.geometry import Size
from glm_image.request.limits import DEFAULT_LIMITS, Limits
from glm_image.request.source_files import ALLOWED_FILES, PNG_START

# Lossless but fast for PNG (level 1 is 4 times faster than 6 at a tenth more bytes); near-lossless for the others.
ENCODER_OPTIONS: dict[str, dict[str, Any]] = {
    "png": {"compress_level": 1},
    "jpeg": {"quality": 95, "subsampling": 0},
    "webp": {"quality": 95},
}

NO_OPTIONS: Final[Mapping[str, Any]] = {}

# The plugins themselves rather than Image.open, which checks the size only after the plugin has parsed the file.
READERS: Final[dict[str, Callable[[io.BytesIO], Image.Image]]] = {
    "PNG": PngImagePlugin.PngImageFile,
    "JPEG": JpegImagePlugin.JpegImageFile,
    "WebP": WebPImagePlugin.WebPImageFile,
}

PNG_METADATA_CHUNKS: Final = (b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf")
MAX_PNG_METADATA_BYTES: Final = 1 << 20
MAX_FILE_PARTS: Final = 1 << 16
"""Chunks or segments of a file: real files have tens, hostile files have millions."""
MAX_JPEG_SCANS: Final = 64
JPEG_START_OF_SCAN: Final = 0xDA
WEBP_HEADER_BYTES: Final = 30

# EXIF's orientation -> the transposition that turns the stored image upright.
UPRIGHT: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
EXIF_ORIENTATION: Final = 0x0112


def decode_source(data: bytes, name: str = "image", limits: Limits = DEFAULT_LIMITS) -> Image.Image:
    """Decodes a source image: upright, its first frame, over white, in mode RGB and the colours of sRGB.

    Size and aspect ratio are checked before any pixel is decoded, so that a file's declared size costs no memory.
    ``data`` is a PNG, JPEG or WebP file, or its base64; see ``source_files.file_in``.
    """
    file, kind = source_files.file_in(bytes(data), name, limits.source_bytes)
    _check_parts(file, kind, name)
    try:
        image = _opened(file, kind, name, limits.source_decoded_pixels)
        image.load()
        return _over_white(_upright(image))
    except (InvalidInputError, MemoryError):
        raise
    except Exception as error:  # Pillow raises many kinds of errors for broken files
        raise InvalidInputError(
            f"{name} is a {kind} file that cannot be decoded ({shown(str(error) or type(error).__name__)}); "
            f"allowed: {ALLOWED_FILES}, complete and intact"
        ) from error


def scale(image: Image.Image, size: Size, resample: int = Image.Resampling.LANCZOS) -> NDArray[np.uint8]:
    """Scales an RGB image to uint8 [height, width, 3]."""
    return np.array(image.resize((size.width, size.height), Image.Resampling(resample)), np.uint8)


def crop(pixels: NDArray[np.uint8], size: Size) -> NDArray[np.uint8]:
    """Returns the top left ``size`` of an image, uint8 [height, width, 3]."""
    return pixels[: size.height, : size.width]


def encode(pixels: NDArray[np.uint8], output_format: str, options: Mapping[str, Any] = NO_OPTIONS) -> bytes:
    """Encodes an image, uint8 [height, width, 3], as a ``png``, ``jpeg`` or ``webp`` file.

    ``options`` are further arguments of Pillow's encoder.
    """
    buffer = io.BytesIO()
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.save(buffer, output_format, **{**ENCODER_OPTIONS[output_format], **options})
    return buffer.getvalue()


def _check_parts(file: bytes, kind: str, name: str) -> None:
    """Refuses files whose structure alone would exhaust a reader's time or memory."""
    if kind == "PNG":
        metadata = sum(length for chunk, length in _png_chunks(file, name) if chunk in PNG_METADATA_CHUNKS)
        if metadata > MAX_PNG_METADATA_BYTES:
            given = f"a PNG file with {metadata} bytes of text and profiles"
            raise InvalidInputError.of(name, given, f"at most {MAX_PNG_METADATA_BYTES} bytes of them")
    elif kind == "JPEG":
        _check_jpeg_segments(file, name)
        scans = file.count(bytes((0xFF, JPEG_START_OF_SCAN)))
        if scans > MAX_JPEG_SCANS:
            raise InvalidInputError.of(name, f"a JPEG file of {scans} scans", f"at most {MAX_JPEG_SCANS}")


def _too_many_parts(kind: str, name: str) -> InvalidInputError:
    given = f"a {kind} file of more than {MAX_FILE_PARTS} parts"
    return InvalidInputError.of(name, given, f"at most {MAX_FILE_PARTS} parts")


def _png_chunks(file: bytes, name: str) -> Iterator[tuple[bytes, int]]:
    place = len(PNG_START)
    for _ in range(MAX_FILE_PARTS):
        if place + 8 > len(file):
            return
        length, chunk = struct.unpack_from(">I4s", file, place)
        yield chunk, length
        place += 12 + length
    raise _too_many_parts("PNG", name)


def _check_jpeg_segments(file: bytes, name: str) -> None:
    place = 2
    for _ in range(MAX_FILE_PARTS):
        if place + 4 > len(file) or file[place] != 0xFF or file[place + 1] == JPEG_START_OF_SCAN:  # noqa: PLR2004
            return  # the end of the header, or a broken one, which Pillow refuses
        bare = file[place + 1] in (0x00, 0x01, *range(0xD0, 0xDA))
        padding = file[place + 1] == 0xFF  # noqa: PLR2004
        (length,) = struct.unpack_from(">H", file, place + 2)
        place += 1 if padding else 2 if bare else 2 + length
    raise _too_many_parts("JPEG", name)


def _opened(file: bytes, kind: str, name: str, max_pixels: int) -> Image.Image:
    if kind == "WebP":  # its reader allocates the whole canvas
        _check_size(_webp_size(file), kind, name, max_pixels)
    image = READERS[kind](io.BytesIO(file))
    _check_size(Size(image.height, image.width), kind, name, max_pixels)
    return image


def _check_size(size: Size, kind: str, name: str, max_pixels: int) -> None:
    given = f"a {kind} file of {size.width} x {size.height} pixels"
    if size.height * size.width > max_pixels:
        raise InvalidInputError.of(name, given, f"at most {max_pixels} pixels")
    if min(size) < 1:
        raise InvalidInputError.of(name, given, "1 pixel and above")
    geometry.check_aspect(size, name)


def _webp_size(file: bytes) -> Size:
    if len(file) < WEBP_HEADER_BYTES:
        raise ValueError("the file ends within its header")
    kind = file[12:16]
    if kind == b"VP8X":
        width, height = (int.from_bytes(file[at : at + 3], "little") + 1 for at in (24, 27))
    elif kind == b"VP8L":
        bits = int.from_bytes(file[21:25], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        width, height = (int.from_bytes(file[at : at + 2], "little") & 0x3FFF for at in (26, 28))
    return Size(height, width)


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(EXIF_ORIENTATION)
    except Exception:  # broken metadata does not invalidate the image
        orientation = None
    turn = UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    if turn is None:
        return image
    turned = image.transpose(turn)
    if "transparency" in image.info:
        turned.info["transparency"] = image.info["transparency"]
    return turned


def _over_white(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    if image.mode not in ("LA", "PA", "La", "RGBA", "RGBa") and "transparency" not in image.info:
        return colour.in_srgb(image, profile)
    layer = image.convert("RGBA")
    if profile is not None:
        opaque = colour.in_srgb(image.convert("L") if image.mode.startswith("L") else layer.convert("RGB"), profile)
        opaque.putalpha(layer.getchannel("A"))
        layer = opaque
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    # The high byte, as Pillow reads 16-bit colour; its own conversion of 16-bit grey clips at 255.
    levels = np.asarray(image).astype(np.int64)
    grey = (levels.clip(0, 0xFFFF) >> 8).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey = np.where(levels == transparent, np.uint8(255), grey)
    return Image.fromarray(grey)
