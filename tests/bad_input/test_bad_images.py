"""Files that are no source images: refused with a message, in bounded time and memory; the server keeps working."""

from __future__ import annotations

import base64
import io
import os
import struct
import time
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from glm_image.supervisor import TritonServer
from pictures import encoded, picture
from server.kserve import KServeError, Outputs, grpc_infer, http_binary_infer, http_json_infer

REQUEST: dict[str, Any] = {"prompt": "x", "height": 32, "width": 32, "num_inference_steps": 1, "seed": 1}
REFUSED_WITHIN_SECONDS = 10
MEGABYTE = 1 << 20
KEPT_BYTES = 300 * MEGABYTE
"""What the largest refused files may leave in the memory of the server's processes: allocators keep some."""


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*chunks: bytes, width: int = 64, height: int = 64) -> bytes:
    """A grey PNG; ``chunks`` come before its pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    rows = zlib.compress(bytes((1 + width) * min(height, 2000)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@cache
def good(file_format: str = "png", **options: Any) -> bytes:
    return encoded(picture(96, 96), file_format, **options)


def webp_declaring(width: int, height: int) -> bytes:
    file = bytearray(encoded(picture(64, 64).convert("RGBA"), "webp"))
    canvas = bytes(10) if file[12:16] != b"VP8X" else b""
    body = b"VP8X" + struct.pack("<I", 10) + struct.pack("<I", 0x10)
    body += (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    rest = bytes(file[12:]) if canvas else bytes(file[30:])
    return b"RIFF" + struct.pack("<I", 4 + len(body) + len(rest)) + b"WEBP" + body + rest


def jpeg_declaring(width: int, height: int) -> bytes:
    file = bytearray(good("jpeg"))
    start_of_frame = file.index(b"\xff\xc0")
    file[start_of_frame + 5 : start_of_frame + 9] = struct.pack(">HH", height, width)
    return bytes(file)


def gif() -> bytes:
    buffer = io.BytesIO()
    picture(64, 64).save(buffer, "gif")
    return buffer.getvalue()


NO_FILE = "allowed: the bytes of a PNG, JPEG or WebP file, or their base64"
BROKEN = "file that cannot be decoded"

Files = Callable[[], list[bytes]]

CASES: dict[str, tuple[Files, str]] = {
    "no files": (list, "image is 0 files; allowed: 1 to 4 files"),
    "five files": (lambda: [good()] * 5, "image is 5 files; allowed: 1 to 4 files"),
    "an empty file": (lambda: [b""], "image is empty; allowed: the bytes of"),
    "the second of two is empty": (lambda: [good(), b""], "image 2 of 2 is empty; allowed: the bytes of"),
    "words": (lambda: [b"a red fox"], NO_FILE),
    "bytes of no kind": (lambda: [bytes(range(256))], NO_FILE),
    "a URL": (lambda: [b"https://example.com/fox.png"], r"image is a URL \(https:\), which is never fetched; allowed"),
    "a file URL": (lambda: [b"file:///etc/passwd"], r"image is a URL \(file:\), which is never fetched; allowed"),
    "a path": (lambda: [b"/etc/passwd"], NO_FILE),
    "an SVG": (lambda: [b'<svg xmlns="http://www.w3.org/2000/svg"/>'], "image is an SVG, XML or HTML file; allowed"),
    "an SVG in base64": (lambda: [base64.b64encode(b"<svg/>")], "image is an SVG, XML or HTML file; allowed"),
    "a GIF": (lambda: [gif()], "image is a GIF file; allowed"),
    "a TIFF": (lambda: [good("tiff")], "image is a TIFF file; allowed"),
    "a BMP": (lambda: [good("bmp")], "image is a BMP file; allowed"),
    "a PDF": (lambda: [b"%PDF-1.7\n" + bytes(200)], "image is a PDF file; allowed"),
    "broken base64": (lambda: [base64.b64encode(good())[:-3] + b"@@@"], r"image is base64 with '@' at character \d+"),
    "base64 cut short": (
        lambda: [base64.b64encode(good())[:4001]],
        "image is base64 of 4001 characters, which ends within",
    ),
    "base64 of base64": (
        lambda: [base64.b64encode(base64.b64encode(good()))],
        r"image is base64 of \d+ bytes that begin",
    ),
    "base64 of half a file": (lambda: [base64.b64encode(good()[: len(good()) // 2])], BROKEN),
    "a data URL without base64": (
        lambda: [b"data:image/png," + good()[8:]],
        r"image is a data: URL of \d+ bytes that begin",
    ),
    "half a PNG": (lambda: [good()[: len(good()) // 2]], BROKEN),
    "half a JPEG": (lambda: [good("jpeg")[: len(good("jpeg")) // 2]], BROKEN),
    "half a WebP": (lambda: [good("webp")[: len(good("webp")) // 2]], BROKEN),
    "a PNG of its mark alone": (lambda: [b"\x89PNG\r\n\x1a\n"], BROKEN),
    "a JPEG of its mark alone": (lambda: [b"\xff\xd8\xff\xe0"], BROKEN),
    "a WebP of its mark alone": (lambda: [b"RIFF\x04\0\0\0WEBP"], BROKEN),
    "a PNG with a wrong checksum": (lambda: [good().replace(b"IHDR\0", b"IHDR\1", 1)], r"image is a PNG file"),
    "a PNG with noise for pixels": (lambda: [good()[:60] + bytes(range(256)) * 20 + good()[5180:]], BROKEN),
    "a PNG declaring 50,000 x 50,000": (
        lambda: [png(width=50_000, height=50_000)],
        "image is a PNG file of 50000 x 50000 pixels; allowed: at most 50000000 pixels",
    ),
    "a PNG declaring 2^31 - 1 squared": (
        lambda: [png(width=1, height=2**31 - 1)],
        "image is a PNG file of 1 x 2147483647",
    ),
    "a PNG declaring nothing": (lambda: [png(width=0, height=0)], "image is a PNG file"),
    "a JPEG declaring 65,500 x 65,500": (lambda: [jpeg_declaring(65_500, 65_500)], "JPEG file of 65500 x 65500 pixels"),
    "a WebP declaring 16,000 x 16,000": (lambda: [webp_declaring(16_000, 16_000)], "WebP file of 16000 x 16000 pixels"),
    "a strip 65,000 wide": (
        lambda: [png(width=65_000, height=8)],
        "image is 65000 x 8 pixels; allowed: the longer side at most 4 times the shorter side",
    ),
    "a strip 65,000 high": (lambda: [png(width=1, height=65_000)], "image is 1 x 65000 pixels; allowed: the longer"),
    "an aspect just beyond 4": (lambda: [encoded(picture(257, 64))], "image is 257 x 64 pixels; allowed: the longer"),
    "a PNG with a huge text": (
        lambda: [png(chunk(b"tEXt", b"Comment\0" + b"x" * (8 * MEGABYTE)))],
        "image is a PNG file with 8388616 bytes of text and profiles; allowed: at most 1048576 bytes",
    ),
    "a PNG with a text that unpacks to 64 MB": (
        lambda: [png(chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(64 * MEGABYTE))))],
        BROKEN,
    ),
    "a PNG with an international text that unpacks to 64 MB": (
        lambda: [png(chunk(b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(bytes(64 * MEGABYTE))))],
        BROKEN,
    ),
    "a PNG with a profile that unpacks to 64 MB": (
        lambda: [png(chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(64 * MEGABYTE))))],
        BROKEN,
    ),
    "a PNG with a huge profile": (
        lambda: [png(chunk(b"iCCP", b"icc\0\0" + np.random.default_rng(0).bytes(4 * MEGABYTE)))],
        "bytes of text and profiles; allowed",
    ),
    "a PNG of a million chunks": (
        lambda: [png(chunk(b"teSt", b"") * 1_000_000)],
        "image is a PNG file of more than 65536 parts; allowed",
    ),
    "a JPEG of a million comments": (
        lambda: [b"\xff\xd8" + b"\xff\xfe\0\2" * 1_000_000 + good("jpeg")[2:]],
        "image is a JPEG file of more than 65536 parts; allowed",
    ),
    "a JPEG of a thousand scans": (
        lambda: [good("jpeg", progressive=True)[:-2] + b"\xff\xda\0\x08\1\1\0\0\0\0" * 1000],
        r"image is a JPEG file of 10\d\d scans; allowed: at most 64",
    ),
    "more than the byte limit": (
        lambda: [good() + bytes(33 * MEGABYTE)],
        r"image is 346\d+ bytes long; allowed: at most 33554432 bytes",
    ),
    "more than the byte limit in base64": (
        lambda: [b"A" * (52 * MEGABYTE)],
        r"image is 545\d+ bytes long; allowed: at most 33554432 bytes",
    ),
    "more pixels than the limit in all": (
        lambda: [encoded(Image.new("RGB", (1536, 1536)))] * 2,
        "image is 2 files that make 4718592 pixels in all, as the model scales them; allowed: at most 4194304",
    ),
}

SENDERS: dict[str, Callable[..., Outputs]] = {"grpc": grpc_infer, "http": http_binary_infer}


def as_array(files: list[bytes]) -> Any:
    array = np.empty(len(files), dtype=object)
    array[:] = files
    return array


def server_processes() -> set[int]:
    """All that descend from this process: servers and their models."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has just ended
            continue
    found, fresh = set(), {os.getpid()}
    while fresh:
        fresh = {pid for pid, parent in parents.items() if parent in fresh}
        found |= fresh
    return found


def memory() -> int:
    """Resident bytes of the servers."""
    pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in server_processes())
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module")
def before(triton: TritonServer) -> Outputs:
    return grpc_infer(triton, {**REQUEST, "image": [good()]})


@pytest.mark.parametrize("protocol", SENDERS)
@pytest.mark.parametrize("case", CASES)
def test_bad_image_is_refused_with_a_message(triton: TritonServer, before: Outputs, case: str, protocol: str) -> None:
    files, sentence = CASES[case]
    image = as_array(files())
    started = time.monotonic()
    with pytest.raises(KServeError, match=sentence) as refused:
        SENDERS[protocol](triton, {**REQUEST, "image": image})
    assert time.monotonic() - started < REFUSED_WITHIN_SECONDS
    assert refused.value.status == ("INVALID_ARGUMENT" if protocol == "grpc" else "400")
    assert "allowed" in refused.value.message
    assert len(refused.value.message) < 400


def test_json_takes_only_base64(triton: TritonServer) -> None:
    with pytest.raises(KServeError, match=r"image is a URL \(http:\), which is never fetched"):
        http_json_infer(triton, {**REQUEST, "image": ["http://127.0.0.1:1/x.png"]})
    with pytest.raises(KServeError, match="image 2 of 2 is a GIF file"):
        http_json_infer(triton, {**REQUEST, "image": [base64.b64encode(file).decode() for file in (good(), gif())]})


def test_bad_images_leave_no_memory_and_no_process(triton: TritonServer, before: Outputs) -> None:
    running = server_processes()
    costly = [
        as_array(CASES[name][0]())
        for name in ("more than the byte limit", "a PNG declaring 50,000 x 50,000", "more pixels than the limit in all",
                     "a PNG with a text that unpacks to 64 MB")
    ]  # fmt: skip
    for _ in range(2):
        for image in costly:
            with pytest.raises(KServeError):
                grpc_infer(triton, {**REQUEST, "image": image})
    settled = memory()
    for _ in range(4):
        for image in costly:
            with pytest.raises(KServeError):
                grpc_infer(triton, {**REQUEST, "image": image})
    assert memory() - settled < KEPT_BYTES
    assert server_processes() == running
    after = grpc_infer(triton, {**REQUEST, "image": [good()]})
    np.testing.assert_array_equal(after["images"], before["images"])
