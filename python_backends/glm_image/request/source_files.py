"""The file in a source image's bytes: the bytes themselves, or their base64 in any of the forms that clients send."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from typing import Final
from urllib.parse import unquote_to_bytes

from glm_image.errors import InvalidInputError

ALLOWED_FILES: Final = "the bytes of a PNG, JPEG or WebP file, or their base64"

PNG_START: Final = b"\x89PNG\r\n\x1a\n"

KINDS: Final[dict[str, Callable[[bytes], bool]]] = {
    "PNG": lambda file: file.startswith(PNG_START),
    "JPEG": lambda file: file.startswith(b"\xff\xd8\xff"),
    "WebP": lambda file: file[:4] == b"RIFF" and file[8:12] == b"WEBP",
}

OTHER_KINDS: Final = (
    (re.compile(rb"GIF8"), "a GIF file"),
    (re.compile(rb"BM.{4}\0\0\0\0", re.DOTALL), "a BMP file"),
    (re.compile(rb"II[*+]\0|MM\0[*+]"), "a TIFF file"),
    (re.compile(rb".{4}ftyp(hei[a-z]|hev[a-z]|mif1|msf1)", re.DOTALL), "a HEIC file"),
    (re.compile(rb".{4}ftyp(avif|avis)", re.DOTALL), "an AVIF file"),
    (re.compile(rb".{4}ftyp", re.DOTALL), "a video or another file of ISO media"),
    (re.compile(rb"\xff\x0a|\0\0\0\x0cJXL "), "a JPEG XL file"),
    (re.compile(rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51"), "a JPEG 2000 file"),
    (re.compile(rb"\x00\x00\x01\x00"), "an ICO file"),
    (re.compile(rb"8BPS"), "a PSD file"),
    (re.compile(rb"%PDF"), "a PDF file"),
    (re.compile(rb"(\xef\xbb\xbf)?\s*<"), "an SVG, XML or HTML file"),
)

BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
URL: Final = re.compile(rb"([a-z][a-z0-9+.-]{1,15}):(?=//)|(file):", re.IGNORECASE)
HEADER: Final = re.compile(rb"(?:data:|image/)[^,]{0,256},", re.IGNORECASE)
"""Of a ``data:`` URL, perhaps without its scheme."""
QUOTED: Final = re.compile(rb"b?(['\"])(.*)\1", re.DOTALL)
ESCAPED_LINE_BREAKS: Final = re.compile(rb"\\[rn]")
ALPHABET: Final = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
URL_SAFE: Final = bytes.maketrans(b"-_", b"+/")
LONG_WORD: Final = re.compile(rb"[!-~]{60}")
"""What base64 begins with."""
SHOWN_BYTES: Final = 16


def kind_of(file: bytes) -> str | None:
    """Returns the kind of an image file, or None if it is none of the allowed kinds."""
    return next((kind for kind, is_kind in KINDS.items() if is_kind(file)), None)


def file_in(data: bytes, name: str, max_bytes: int) -> tuple[bytes, str]:
    """Returns a PNG, JPEG or WebP file and its kind; ``data`` is the file or its base64.

    Base64 may be URL-safe, lack its padding, have line breaks, follow the header of a ``data:`` URL, be
    percent-encoded, and stand in quotation marks or in Python's ``b'...'``. Nothing is ever fetched.

    Raises:
        InvalidInputError: there is no such file, or it has more than ``max_bytes``.
    """
    if kind := kind_of(data):
        return _checked_size(data, name, max_bytes), kind
    if len(data) > max_bytes * 3 // 2 + 1024:  # base64 takes 4 bytes for 3, and may have line breaks and a header
        raise _too_many_bytes(len(data), name, max_bytes)
    text = _unwrapped(data)
    header = HEADER.match(text)
    payload = _unwrapped(text[header.end() :]) if header else text
    if header and b"base64" not in header[0].lower():
        file, fault = unquote_to_bytes(payload), ""
    else:
        file, fault = _decoded(payload)
    if kind := kind_of(file):
        return _checked_size(file, name, max_bytes), kind
    given = _other_kind(file) or _other_kind(text) or _url(text)
    if given is None and payload and (header or LONG_WORD.match(payload)):
        form = "a data: URL" if header else "base64"
        given = fault or f"{form} of {_shown(file)}"
    raise InvalidInputError.of(name, given or (_shown(payload) if payload else "empty"), ALLOWED_FILES)


def _unwrapped(text: bytes) -> bytes:
    """Removes white space, byte order marks and quotation marks around text."""
    before = None
    while text != before:
        before = text
        text = text.strip().removeprefix(BYTE_ORDER_MARK)
        if quoted := QUOTED.fullmatch(text):
            text = quoted[2]
    return text


def _decoded(text: bytes) -> tuple[bytes, str]:
    """Decodes base64; returns b"" and what is wrong with it where it is none."""
    unquoted = unquote_to_bytes(text) if b"%" in text else text
    compact = ESCAPED_LINE_BREAKS.sub(b"", b"".join(unquoted.split())).translate(URL_SAFE)
    digits = compact.rstrip(b"=")
    if other := digits.translate(None, ALPHABET):
        place = digits.index(other[:1])
        where = "before its end" if other[:1] == b"=" else "which is no character of base64"
        return b"", f"base64 with {repr(other[:1])[1:]} at character {place + 1}, {where}"
    if len(digits) % 4 == 1:
        return b"", f"base64 of {len(digits)} characters, which ends within a byte"
    return base64.b64decode(digits + b"=" * (-len(digits) % 4)), ""


def _other_kind(file: bytes) -> str | None:
    return next((kind for start, kind in OTHER_KINDS if start.match(file)), None)


def _url(text: bytes) -> str | None:
    found = URL.match(text)
    if found is None:
        return None
    return f"a URL ({(found[1] or found[2]).decode().lower()}:), which is never fetched"


def _shown(data: bytes) -> str:
    return f"{len(data)} bytes that begin with {data[:SHOWN_BYTES]!r}"


def _checked_size(file: bytes, name: str, max_bytes: int) -> bytes:
    if len(file) > max_bytes:
        raise _too_many_bytes(len(file), name, max_bytes)
    return file


def _too_many_bytes(count: int, name: str, max_bytes: int) -> InvalidInputError:
    return InvalidInputError.of(name, f"{count} bytes long", f"at most {max_bytes} bytes")
