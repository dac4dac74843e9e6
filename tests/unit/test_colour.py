"""Colours of source images: by their profiles in sRGB, without a profile as they are, in every mode of Pillow."""

from __future__ import annotations

import base64
import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from glm_image.errors import InvalidInputError
from glm_image.request import images
from glm_image_client.sources import source_bytes
from icc import P3_PRIMARIES, SRGB_PRIMARIES, cmyk_profile, grey_profile, rgb_profile, srgb_grey, to_srgb
from pictures import encoded, picture

RGB = picture(40, 30, seed=3)
PIXELS = np.asarray(RGB)
P3 = rgb_profile(P3_PRIMARIES, 2.2)
ADOBE_LIKE = rgb_profile(((0.6097, 0.3111, 0.0195), (0.2053, 0.6257, 0.0609), (0.1492, 0.0632, 0.7446)), 2.2)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
LOSSLESS = {"png": {}, "webp": {"lossless": True}}
ROUNDING = 2


def decoded(file: bytes) -> np.ndarray:
    return np.asarray(images.decode_source(file)).astype(float)


@pytest.mark.parametrize("file_format", LOSSLESS)
def test_a_display_p3_image_is_converted_to_srgb(file_format: str) -> None:
    file = encoded(RGB, file_format, icc_profile=P3, **LOSSLESS[file_format])
    expected = to_srgb(PIXELS, P3_PRIMARIES, 2.2)
    assert np.abs(decoded(file) - expected).max() <= ROUNDING
    assert np.abs(expected - PIXELS).max() > 20


def test_a_jpeg_with_a_profile_is_converted() -> None:
    plain = encoded(RGB, "jpeg", quality=95, subsampling=0)
    profiled = encoded(RGB, "jpeg", quality=95, subsampling=0, icc_profile=P3)
    expected = to_srgb(decoded(plain).astype(np.uint8), P3_PRIMARIES, 2.2)
    assert np.abs(decoded(profiled) - expected).max() <= ROUNDING


def test_transparency_is_kept_when_colours_are_converted() -> None:
    rgba = RGB.convert("RGBA")
    rgba.putalpha(Image.linear_gradient("L").resize(RGB.size))
    alpha = np.asarray(rgba)[..., 3:] / 255
    expected = to_srgb(PIXELS, P3_PRIMARIES, 2.2) * alpha + 255 * (1 - alpha)
    assert np.abs(decoded(encoded(rgba, icc_profile=P3)) - expected).max() <= ROUNDING


def test_a_palette_is_converted_with_its_transparent_colour() -> None:
    flat = RGB.quantize(8)
    expected = to_srgb(np.asarray(flat.convert("RGB")), P3_PRIMARIES, 2.2)
    expected[np.asarray(flat) == 3] = 255
    assert np.abs(decoded(encoded(flat, icc_profile=P3, transparency=3)) - expected).max() <= ROUNDING


@pytest.mark.parametrize("mode", ["L", "LA"])
def test_grey_is_converted_by_its_profile(mode: str) -> None:
    grey = np.asarray(RGB.convert("L"))
    expected = to_srgb(np.stack([grey] * 3, axis=-1), SRGB_PRIMARIES, 1.0)
    found = decoded(encoded(RGB.convert(mode), icc_profile=grey_profile(1.0)))
    assert np.abs(found - expected).max() <= ROUNDING


def test_cmyk_is_converted_by_its_profile() -> None:
    inks = Image.new("CMYK", (32, 32), (255, 0, 0, 0))
    inks.paste((255, 255, 0, 255), (0, 0, 16, 32))
    found = decoded(encoded(inks, "jpeg", quality=100, subsampling=0, icc_profile=cmyk_profile()))
    assert np.abs(found[16, 4] - srgb_grey(25)).max() <= 4
    assert np.abs(found[16, 28] - srgb_grey(75)).max() <= 4


@pytest.mark.parametrize("name", ["broken", "cut", "of sRGB", "of grey", "of CMYK", "empty", "huge"])
def test_a_profile_that_says_nothing_leaves_every_bit(name: str) -> None:
    profile = {
        "broken": b"no profile at all",
        "cut": P3[: len(P3) // 2],
        "of sRGB": SRGB,
        "of grey": grey_profile(1.8),
        "of CMYK": cmyk_profile(),
        "empty": b"\0",
        "huge": P3 + bytes(5 << 20),
    }[name]
    plain, profiled = encoded(RGB, "webp", lossless=True), encoded(RGB, "webp", lossless=True, icc_profile=profile)
    assert len(profiled) > len(plain)
    assert np.array_equal(decoded(profiled), decoded(plain))
    assert np.array_equal(decoded(plain), PIXELS)


@settings(max_examples=60)
@given(st.integers(0, len(P3) - 1), st.binary(min_size=1, max_size=16))
def test_damaged_profiles_are_ignored_or_applied(place: int, noise: bytes) -> None:
    profile = P3[:place] + noise + P3[place + len(noise) :]
    found = images.decode_source(encoded(RGB, icc_profile=profile))
    assert (found.mode, found.size) == ("RGB", RGB.size)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(colour: int, bits: int, rows: list[bytes], width: int, *chunks: bytes) -> bytes:
    """A PNG of any colour type: 0 = grey, 2 = RGB, 3 = palette, 4 = grey and alpha, 6 = RGBA."""
    header = struct.pack(">IIBBBBB", width, len(rows), bits, colour, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", pixels), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def shorts(*values: int) -> bytes:
    return struct.pack(f">{len(values)}H", *values)


PALETTE = chunk(b"PLTE", bytes((10, 20, 30, 40, 50, 60, 70, 80, 90, 200, 210, 220)))
WHITE = [255, 255, 255]
MODES: dict[str, tuple[bytes, list[list[int]]]] = {
    # The file, and the pixels of its one row.
    "1 bit grey": (png(0, 1, [b"\x50"], 4), [[0] * 3, WHITE, [0] * 3, WHITE]),
    "2 bits grey": (png(0, 2, [b"\x1b"], 4), [[0] * 3, [85] * 3, [170] * 3, WHITE]),
    "4 bits grey": (png(0, 4, [b"\x0f"], 2), [[0] * 3, WHITE]),
    "8 bits grey": (png(0, 8, [b"\x07\xf0"], 2), [[7] * 3, [240] * 3]),
    "8 bits grey, one transparent": (png(0, 8, [b"\x07\xf0"], 2, chunk(b"tRNS", shorts(7))), [WHITE, [240] * 3]),
    "16 bits grey": (png(0, 16, [shorts(0x07FF, 0xF000)], 2), [[7] * 3, [240] * 3]),
    "16 bits grey, one transparent": (
        png(0, 16, [shorts(0x07FF, 0xF000)], 2, chunk(b"tRNS", shorts(0x07FF))),
        [WHITE, [240] * 3],
    ),
    "8 bits RGB": (png(2, 8, [bytes((1, 2, 3, 4, 5, 6))], 2), [[1, 2, 3], [4, 5, 6]]),
    "8 bits RGB, one transparent": (
        png(2, 8, [bytes((1, 2, 3, 4, 5, 6))], 2, chunk(b"tRNS", shorts(4, 5, 6))),
        [[1, 2, 3], WHITE],
    ),
    "16 bits RGB": (png(2, 16, [shorts(0x01FF, 0x0200, 0x0300)], 1), [[1, 2, 3]]),
    "palette": (png(3, 8, [b"\0\3"], 2, PALETTE), [[10, 20, 30], [200, 210, 220]]),
    "palette of 2 bits": (
        png(3, 2, [b"\x1b"], 4, PALETTE),
        [[10, 20, 30], [40, 50, 60], [70, 80, 90], [200, 210, 220]],
    ),
    "palette with alpha": (
        png(3, 8, [b"\0\1\2\3"], 4, PALETTE, chunk(b"tRNS", bytes((0, 255, 0)))),
        [WHITE, [40, 50, 60], WHITE, [200, 210, 220]],
    ),
    "grey and alpha": (png(4, 8, [bytes((9, 255, 9, 0))], 2), [[9] * 3, WHITE]),
    "16 bits grey and alpha": (png(4, 16, [shorts(0x0900, 0xFFFF, 0x0900, 0)], 2), [[9] * 3, WHITE]),
    "RGBA": (png(6, 8, [bytes((1, 2, 3, 255, 1, 2, 3, 0))], 2), [[1, 2, 3], WHITE]),
    "16 bits RGBA": (png(6, 16, [shorts(0x0100, 0x0200, 0x0300, 0xFFFF, 0, 0, 0, 0)], 2), [[1, 2, 3], WHITE]),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chunks", ["none", "gAMA and cHRM"])
def test_every_mode_has_its_values(mode: str, chunks: str) -> None:
    """The chunks gAMA and cHRM change nothing, as in the reference."""
    file, row = MODES[mode]
    if chunks != "none":
        primaries = struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)
        extra = chunk(b"gAMA", struct.pack(">I", 100000)) + chunk(b"cHRM", primaries)
        end_of_header = 8 + 25
        file = file[:end_of_header] + extra + file[end_of_header:]
    assert decoded(file).tolist() == [row]


@pytest.mark.parametrize("mode", ["F", "I"])
def test_floating_point_files_are_refused_by_their_format(mode: str) -> None:
    """Only TIFF has such pixels."""
    file = encoded(RGB.convert("L").convert(mode), "tiff")
    with pytest.raises(InvalidInputError, match=r"^image is a TIFF file; allowed: "):
        images.decode_source(base64.b64encode(file))


def test_the_client_converts_a_cmyk_image_as_the_server_does_a_file() -> None:
    """PNG, in which PIL images are sent, has no CMYK."""
    inks = Image.new("CMYK", (32, 32), (255, 0, 0, 0))
    inks.paste((255, 255, 0, 255), (0, 0, 16, 32))
    file = encoded(inks, "jpeg", quality=100, subsampling=0, icc_profile=cmyk_profile())
    opened = Image.open(io.BytesIO(file))
    assert np.array_equal(decoded(source_bytes(opened)), decoded(file))
    assert opened.info["icc_profile"] == cmyk_profile()
    broken = encoded(inks, "jpeg", quality=100, subsampling=0, icc_profile=b"broken")
    assert np.array_equal(decoded(source_bytes(Image.open(io.BytesIO(broken)))), decoded(broken))
