"""A source image's bytes: every form of base64 that clients send, and the sentence for what is none."""

from __future__ import annotations

import base64
import io
import json
import re
from urllib.parse import quote, quote_from_bytes

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from glm_image.errors import InvalidInputError
from glm_image.request.source_files import file_in, kind_of
from pictures import encoded, picture

FILE = encoded(picture(40, 31))
BASE64 = base64.b64encode(FILE)
PLAIN = BASE64.rstrip(b"=")
URL_SAFE = base64.urlsafe_b64encode(FILE)
LINES = base64.encodebytes(FILE)
MAX_BYTES = 1 << 20
ALLOWED = "; allowed: the bytes of a PNG, JPEG or WebP file, or their base64"

FORMS = {
    "the file": FILE,
    "base64": BASE64,
    "unpadded": PLAIN,
    "URL-safe": URL_SAFE,
    "URL-safe, unpadded": URL_SAFE.rstrip(b"="),
    "line breaks": LINES,
    "line breaks of Windows": LINES.replace(b"\n", b"\r\n"),
    "escaped line breaks": LINES.replace(b"\n", rb"\n"),
    "white space around": b" \t\r\n" + BASE64 + b"\n ",
    "a byte order mark": b"\xef\xbb\xbf" + BASE64,
    "percent-encoded": quote(BASE64, safe="").encode(),
    "double quotes": b'"' + BASE64 + b'"',
    "single quotes": b"'" + BASE64 + b"'",
    "bytes of Python": repr(BASE64).encode(),
    "bytes of Python with line breaks": repr(LINES).encode(),
    "bytes of Python as JSON": json.dumps(repr(BASE64)).encode(),
    "a data URL": b"data:image/png;base64," + BASE64,
    "a data URL in capitals": b"DATA:image/PNG;BASE64," + BASE64,
    "a data URL without a type": b"data:;base64," + BASE64,
    "a data URL with a character set": b"data:image/png;charset=utf-8;base64," + BASE64,
    "a data URL of another type": b"data:application/octet-stream;base64," + BASE64,
    "a data URL with white space": b"data:image/png; base64, " + LINES,
    "a data URL after white space": b"\n data:image/png;base64," + BASE64,
    "a data URL after a byte order mark": b"\xef\xbb\xbfdata:image/png;base64," + BASE64,
    "a data URL in quotes": b'"data:image/png;base64,' + BASE64 + b'"',
    "a data URL, unpadded": b"data:image/png;base64," + PLAIN,
    "a data URL, URL-safe": b"data:image/png;base64," + URL_SAFE,
    "a data URL, percent-encoded": b"data:image/png;base64," + quote(BASE64, safe="").encode(),
    "a data URL without base64": b"data:image/png," + quote_from_bytes(FILE).encode(),
    "a data URL of bytes of Python": b"data:image/png;base64," + repr(BASE64).encode(),
    "a data URL without its scheme": b"image/png;base64," + BASE64,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_base64_is_the_file(form: str) -> None:
    assert file_in(FORMS[form], "image", MAX_BYTES) == (FILE, "PNG")


@given(st.binary(max_size=40), st.booleans(), st.booleans(), st.booleans())
def test_base64_of_any_length_is_decoded(end: bytes, is_url_safe: bool, is_padded: bool, has_header: bool) -> None:
    file = FILE + end
    text = base64.urlsafe_b64encode(file) if is_url_safe else base64.b64encode(file)
    text = text if is_padded else text.rstrip(b"=")
    assert file_in(b"data:image/png;base64," * has_header + text, "image", MAX_BYTES) == (file, "PNG")


def of_brand(brand: bytes) -> bytes:
    return b"\0\0\0\x20ftyp" + brand + bytes(40)


def saved(file_format: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, file_format)
    return buffer.getvalue()


OTHERS = {
    "GIF": (saved("gif"), "a GIF file"),
    "BMP": (saved("bmp"), "a BMP file"),
    "TIFF": (saved("tiff"), "a TIFF file"),
    "HEIC": (of_brand(b"heic"), "a HEIC file"),
    "HEIF": (of_brand(b"mif1"), "a HEIC file"),
    "AVIF": (of_brand(b"avif"), "an AVIF file"),
    "MP4": (of_brand(b"isom"), "a video or another file of ISO media"),
    "JPEG XL": (b"\xff\x0a" + bytes(40), "a JPEG XL file"),
    "JPEG XL container": (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(40), "a JPEG XL file"),
    "JPEG 2000": (saved("jpeg2000"), "a JPEG 2000 file"),
    "ICO": (saved("ico"), "an ICO file"),
    "PSD": (b"8BPS\0\1" + bytes(40), "a PSD file"),
    "PDF": (b"%PDF-1.7\n" + bytes(40), "a PDF file"),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG, XML or HTML file"),
    "SVG after white space": (b'\xef\xbb\xbf\n<?xml version="1.0"?><svg/>', "an SVG, XML or HTML file"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_files_are_named(kind: str) -> None:
    file, named = OTHERS[kind]
    for data in (file, base64.b64encode(file), b"data:image/x;base64," + base64.b64encode(file)):
        refused(data, named)
    refused(b"data:image/x," + quote_from_bytes(file).encode(), named)


@pytest.mark.parametrize(
    ("url", "scheme"),
    [
        ("http://example.com/a.png", "http"),
        ("HTTPS://example.com/a.png", "https"),
        ("s3://bucket/a.png", "s3"),
        ("gs://bucket/a.png", "gs"),
        ("file:///a.png", "file"),
        ("file:a.png", "file"),
        (' "https://example.com/a.png"\n', "https"),
    ],
)
def test_urls_are_named(url: str, scheme: str) -> None:
    refused(url.encode(), f"a URL ({scheme}:), which is never fetched")


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (BASE64[:200] + b"@" + BASE64[200:], "base64 with '@' at character 201, which is no character of base64"),
        (b"data:image/png;base64,@@", "base64 with '@' at character 1, which is no character of base64"),
        (BASE64[:100] + b"=" + BASE64[100:], "base64 with '=' at character 101, before its end"),
        (BASE64[:4001], "base64 of 4001 characters, which ends within a byte"),
        (b"data:image/png;base64,", "empty"),
        (b"data:image/png;base64,YWJj", "a data: URL of 3 bytes that begin with b'abc'"),
        (b"data:image/png,abc", "a data: URL of 3 bytes that begin with b'abc'"),
        (base64.b64encode(BASE64), f"base64 of {len(BASE64)} bytes that begin with b'iVBORw0KGgoAAAAN'"),
        (b"", "empty"),
        (b" \n", "empty"),
        (b'""', "empty"),
        (b"a red fox", "9 bytes that begin with b'a red fox'"),
        (b"/etc/passwd", "11 bytes that begin with b'/etc/passwd'"),
        (bytes(range(256)), r"256 bytes that begin with b'\x00\x01\x02"),
    ],
)
def test_what_is_no_file_is_refused_with_its_fault(data: bytes, fault: str) -> None:
    refused(data, fault, is_whole=not fault.endswith("x02"))


def refused(data: bytes, given: str, *, is_whole: bool = True) -> None:
    end = re.escape(ALLOWED) if is_whole else ".*" + re.escape(ALLOWED)
    with pytest.raises(InvalidInputError, match=f"^image is {re.escape(given)}{end}$"):
        file_in(data, "image", MAX_BYTES)


@given(st.binary(max_size=200), st.sampled_from([b"", b"data:image/png;base64,", b"%", b"b'", b"http"]))
def test_any_other_bytes_are_refused_in_a_sentence(data: bytes, start: bytes) -> None:
    try:
        file, kind = file_in(start + data, "image", MAX_BYTES)
    except InvalidInputError as refused:
        message = str(refused)
        assert message.startswith("image is ")
        assert message.isprintable()
        assert len(message) < 250
        assert "allowed: " in message
    else:
        # It begins as an image file does; whether it is one, decoding finds out.
        assert kind_of(file) == kind


def test_the_size_of_a_file_is_limited_in_every_form() -> None:
    for data in (
        FILE,
        BASE64,
        b"data:image/png;base64," + BASE64,
        b"data:image/png," + quote_from_bytes(FILE).encode(),
    ):
        with pytest.raises(
            InvalidInputError, match=rf"^image is \d+ bytes long; allowed: at most {len(FILE) - 1} bytes$"
        ):
            file_in(data, "image", len(FILE) - 1)
