"""Small ICC profiles, made from their definitions."""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

D50 = (0.9642, 1.0, 0.8249)
SRGB_PRIMARIES = ((0.4360, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141))
P3_PRIMARIES = ((0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841))
"""XYZ of red, green and blue, adapted to D50, as the profiles of the vendors have them."""


def fixed(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def xyz(*values: float) -> bytes:
    return b"XYZ \0\0\0\0" + fixed(*values)


def gamma_curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"


def profile(kind: bytes, space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    header_size, entry_size = 128, 12
    offset = header_size + 4 + entry_size * len(tags)
    table, data = struct.pack(">I", len(tags)), b""
    for name, tag in tags.items():
        table += name + struct.pack(">II", offset + len(data), len(tag))
        data += tag + bytes(-len(tag) % 4)
    size = offset + len(data)
    header = struct.pack(">I4sI4s4s4s", size, b"none", 0x02400000, kind, space, connection)
    header += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + fixed(*D50)
    return header.ljust(header_size, b"\0") + table + data


def described(tags: dict[bytes, bytes]) -> dict[bytes, bytes]:
    text = b"test\0"
    description = b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(4 + 4 + 2 + 1 + 67)
    return {b"desc": description, b"cprt": b"text\0\0\0\0none\0", b"wtpt": xyz(*D50), **tags}


def rgb_profile(primaries: tuple[tuple[float, float, float], ...], gamma: float) -> bytes:
    names = (b"rXYZ", b"gXYZ", b"bXYZ")
    tags = {name: xyz(*values) for name, values in zip(names, primaries, strict=True)}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), gamma_curve(gamma))
    return profile(b"mntr", b"RGB ", b"XYZ ", described(tags))


def grey_profile(gamma: float) -> bytes:
    return profile(b"mntr", b"GRAY", b"XYZ ", described({b"kTRC": gamma_curve(gamma)}))


def cmyk_profile() -> bytes:
    """A printer whose inks only differ in lightness: L* is 100 without ink, 25 less for each of them."""
    identity = bytes(range(256))
    lightness = [100 - 25 * bin(corner).count("1") for corner in range(16)]
    colours = b"".join(bytes((round(value * 255 / 100), 128, 128)) for value in lightness)
    table = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    table += identity * 4 + colours + identity * 3
    return profile(b"prtr", b"CMYK", b"Lab ", described({b"A2B0": table}))


def to_srgb(pixels: NDArray[np.uint8], primaries: tuple[tuple[float, float, float], ...], gamma: float) -> NDArray:
    """Converts uint8 [..., 3] by the definitions of the colour spaces, to float [..., 3] of 0 to 255."""
    linear = (pixels / 255.0) ** gamma
    light = linear @ np.array(primaries) @ np.linalg.inv(np.array(SRGB_PRIMARIES))
    light = light.clip(0, 1)
    encoded = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return encoded * 255


def srgb_grey(lightness: NDArray | float) -> NDArray:
    """Returns the sRGB value, 0 to 255, of a neutral colour of L* 0 to 100."""
    f = (np.asarray(lightness) + 16) / 116
    light = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29))
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055) * 255
