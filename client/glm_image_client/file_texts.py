"""The texts in an image file about its origin: read from a file, and kept when an image is encoded anew.

The forms are those of the server: text chunks and XMP in PNG, EXIF and XMP in JPEG and WebP.
"""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from xml.sax.saxutils import escape

from PIL import Image, PngImagePlugin

RECORD_KEY: Final = "glm_image"
PARAMETERS_KEY: Final = "parameters"
LABEL_KEY: Final = "AIGC"
XMP_KEY: Final = "XML:com.adobe.xmp"

SOURCE_TYPE: Final = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
LABEL_NAMESPACE: Final = "http://www.tc260.org.cn/ns/AIGC/1.0/"
RECORD_NAMESPACE: Final = "urn:glm-image-triton:provenance:1"

EXIF_IFD: Final = 0x8769
USER_COMMENT: Final = 0x9286
UNICODE: Final = b"UNICODE\0"
MAX_SEGMENT_BYTES: Final = 60_000

PACKET: Final = f"""\
<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">\
<rdf:Description rdf:about="" xmlns:TC260="{LABEL_NAMESPACE}" \
xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" \
xmlns:glm_image="{RECORD_NAMESPACE}">{{properties}}</rdf:Description></rdf:RDF></x:xmpmeta>
<?xpacket end="r"?>"""


@dataclass(frozen=True)
class FileTexts:
    """What a file says; "" = nothing.

    Attributes:
        record: how the image was made, as JSON.
        parameters: the same, as other tools read it.
        label: the AIGC label, as JSON.
    """

    record: str = ""
    parameters: str = ""
    label: str = ""

    @classmethod
    def of_label(cls, label: Mapping[str, Any]) -> FileTexts:
        """Returns the texts of pixels, of which the server states the label alone."""
        return cls(label=json.dumps(label, ensure_ascii=False, separators=(",", ":")))

    @classmethod
    def of_image(cls, image: Image.Image) -> FileTexts:
        """Returns the texts of an opened image file; of broken ones, as far as they can be read."""
        if isinstance(image, PngImagePlugin.PngImageFile):
            try:
                chunks = {key: str(text) for key, text in image.text.items()}  # decodes the pixels too
            except Exception:  # a broken file, whose reader has its own errors
                return cls()
            return cls(chunks.get(RECORD_KEY, ""), chunks.get(PARAMETERS_KEY, ""), chunks.get(LABEL_KEY, ""))
        properties = _xmp_properties(image.info.get("xmp", b""))
        label = properties.get(f"{{{LABEL_NAMESPACE}}}AIGC", "")
        comment = _user_comment(image)
        return cls(
            properties.get(f"{{{RECORD_NAMESPACE}}}record", ""), "" if comment.startswith("{") else comment, label
        )

    def encoder_options(self, image_format: str) -> dict[str, Any]:
        """Returns the arguments of Pillow's encoder that write the texts into ``png``, ``jpeg`` or ``webp``."""
        if image_format == "png":
            return {"pnginfo": self._chunks()} if self != FileTexts() else {}
        exif, packet = user_comment(self.parameters or self.label), xmp(self.record, self.label)
        if image_format == "jpeg":
            exif = exif if len(exif) <= MAX_SEGMENT_BYTES else user_comment(self.label)
            packet = packet if len(packet) <= MAX_SEGMENT_BYTES else xmp("", self.label)
        return {name: value for name, value in (("exif", exif), ("xmp", packet)) if value}

    def _chunks(self) -> PngImagePlugin.PngInfo:
        chunks = PngImagePlugin.PngInfo()
        for key, text in ((RECORD_KEY, self.record), (PARAMETERS_KEY, self.parameters)):
            if text:
                chunks.add_itxt(key, text)
        if self.label:
            chunks.add_text(LABEL_KEY, self.label)
            chunks.add_itxt(XMP_KEY, xmp("", self.label).decode())
        return chunks


def xmp(record: str, label: str) -> bytes:
    """Returns an XMP packet; b"" without a text."""
    properties = "".join(
        f"<{name}>{escape(text)}</{name}>"
        for name, text in (
            ("TC260:AIGC", label),
            ("Iptc4xmpExt:DigitalSourceType", SOURCE_TYPE if label else ""),
            ("glm_image:record", record),
        )
        if text
    )
    return PACKET.format(properties=properties).encode() if properties else b""


def user_comment(text: str) -> bytes:
    """Returns EXIF with a UserComment; b"" without a text."""
    if not text:
        return b""
    exif = Image.Exif()
    exif.endian = ">"
    exif.get_ifd(EXIF_IFD)[USER_COMMENT] = UNICODE + text.encode("utf-16-be", "surrogatepass")
    return exif.tobytes()


def _user_comment(image: Image.Image) -> str:
    try:
        comment = image.getexif().get_ifd(EXIF_IFD).get(USER_COMMENT, b"")
        is_unicode = isinstance(comment, bytes) and comment.startswith(UNICODE)
        return comment[len(UNICODE) :].decode("utf-16-be", "replace") if is_unicode else ""
    except Exception:  # Pillow raises many kinds of errors for broken EXIF
        return ""


def _xmp_properties(packet: object) -> dict[str, str]:
    """Returns the properties of a packet that are elements, by their names with namespace."""
    data = packet.encode() if isinstance(packet, str) else packet
    if not isinstance(data, bytes) or b"<!" in data:  # declarations of entities may expand without limit
        return {}
    try:
        return {element.tag: element.text or "" for element in ET.fromstring(data.strip(b"\0")).iter()}
    except (ET.ParseError, ValueError):
        return {}
