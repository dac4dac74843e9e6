"""Image files with texts in them: text chunks and XMP in PNG, EXIF and XMP in JPEG and WebP."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from xml.sax.saxutils import escape

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from glm_image.request import images

RECORD_KEY: Final = "glm_image"
PARAMETERS_KEY: Final = "parameters"
LABEL_KEY: Final = "AIGC"
XMP_KEY: Final = "XML:com.adobe.xmp"

SOURCE_TYPE: Final = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
"""IPTC's term for what a trained model has generated."""

EXIF_IFD: Final = 0x8769
USER_COMMENT: Final = 0x9286
UNICODE: Final = b"UNICODE\0"

MAX_SEGMENT_BYTES: Final = 60_000
"""Of the EXIF and of the XMP of a JPEG file, whose segments have at most 65,533 bytes."""

PACKET: Final = """\
<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">\
<rdf:Description rdf:about="" xmlns:TC260="http://www.tc260.org.cn/ns/AIGC/1.0/" \
xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" \
xmlns:glm_image="urn:glm-image-triton:provenance:1">{properties}</rdf:Description></rdf:RDF></x:xmpmeta>
<?xpacket end="r"?>"""


@dataclass(frozen=True)
class FileTexts:
    """What a file says; "" = nothing.

    Attributes:
        record: how the image was made, as JSON.
        parameters: the same for other tools.
        label: the AIGC label, as JSON.
    """

    record: str = ""
    parameters: str = ""
    label: str = ""

    @classmethod
    def of(cls, record: Mapping[str, Any] | None, parameters: str, label: Mapping[str, str] | None) -> FileTexts:
        return cls(_json(record), parameters, _json(label))


NO_TEXTS: Final = FileTexts()


def _json(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return ""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.replace("\ufffe", "\\ufffe").replace("\uffff", "\\uffff")  # which XML cannot hold


def encode(pixels: NDArray[np.uint8], output_format: str, texts: FileTexts = NO_TEXTS) -> bytes:
    """Encodes an image, uint8 [height, width, 3], as a file with texts; the same input gives the same bytes.

    A record that exceeds what a JPEG file can hold is left out.
    """
    return images.encode(pixels, output_format, _options(output_format, texts))


def _options(output_format: str, texts: FileTexts) -> dict[str, Any]:
    if texts == NO_TEXTS:
        return {}
    if output_format == "png":
        chunks = PngImagePlugin.PngInfo()
        for key, text in ((RECORD_KEY, texts.record), (PARAMETERS_KEY, texts.parameters)):
            if text:
                chunks.add_itxt(key, text)
        if texts.label:
            chunks.add_text(LABEL_KEY, texts.label)
            chunks.add_itxt(XMP_KEY, xmp("", texts.label))
        return {"pnginfo": chunks}
    exif, packet = user_comment(texts.parameters or texts.label), xmp(texts.record, texts.label).encode()
    if output_format == "jpeg":
        exif = exif if len(exif) <= MAX_SEGMENT_BYTES else user_comment(texts.label)
        packet = packet if len(packet) <= MAX_SEGMENT_BYTES else xmp("", texts.label).encode()
    return {name: value for name, value in (("exif", exif), ("xmp", packet)) if value}


def xmp(record: str, label: str) -> str:
    """Returns an XMP packet; "" without a text."""
    properties = "".join(
        f"<{name}>{escape(text)}</{name}>"
        for name, text in (
            ("TC260:AIGC", label),
            ("Iptc4xmpExt:DigitalSourceType", SOURCE_TYPE if label else ""),
            ("glm_image:record", record),
        )
        if text
    )
    return PACKET.format(properties=properties) if properties else ""


def user_comment(text: str) -> bytes:
    """Returns EXIF with a UserComment; b"" without a text."""
    if not text:
        return b""
    exif = Image.Exif()
    exif.endian = ">"
    exif.get_ifd(EXIF_IFD)[USER_COMMENT] = UNICODE + text.encode("utf-16-be", "surrogatepass")
    return exif.tobytes()
