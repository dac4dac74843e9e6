"""Settings of what image files say about their origin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from glm_image.errors import ConfigurationError
from glm_image.request.declaration import choice, optional, switch, text
from glm_image.request.limits import FILE_METADATA

CORNERS: Final = ("bottom_right", "bottom_left", "top_right", "top_left")
SIGNATURES: Final = ("es256", "es384", "es512", "ps256", "ps384", "ps512", "ed25519")


@dataclass(frozen=True, kw_only=True)
class ProvenanceSettings:
    """The parameters that begin with ``provenance_``.

    Raises:
        ConfigurationError: only one of certificate and key is given.
    """

    file_metadata: str = choice(
        "no_prompt",
        FILE_METADATA,
        "What files say about how they were made, unless the request states it: everything, everything but texts of "
        "the request, or nothing. See [provenance](provenance.md).",
    )
    aigc_label: bool = switch(True, "Write the label `AIGC` of GB 45438-2025 into files, and an IPTC source type.")
    aigc_producer: str = text(
        "GLM-Image",
        "`ContentProducer` of the label: the name or code of the service provider.",
        allowed="a text",
    )
    aigc_propagator: str = optional(
        "`ContentPropagator` of the label, if this service also distributes the images.", allowed="a text"
    )
    visible_text: str = optional("Text drawn onto every image, of all formats.", allowed="a text")
    visible_corner: str = choice("bottom_right", CORNERS, "Where the text is drawn.")
    visible_font: str = optional(
        "Font file of the text; `none` is the font of Pillow, which has Latin letters only.", allowed="a path"
    )
    c2pa_certificate: str = optional(
        "PEM file of the certificate chain for C2PA manifests, the signer's first; needs the extra `c2pa`.",
        allowed="a path",
    )
    c2pa_key: str = optional("PEM file of the signer's private key (PKCS 8).", allowed="a path")
    c2pa_algorithm: str = choice("es256", SIGNATURES, "Signature algorithm of the key.")
    c2pa_timestamp_url: str = optional(
        "Timestamp authority (RFC 3161), asked for each image; `none` asks nothing of the network.",
        allowed="an http or https URL",
        pattern=r"https?://\S+",
    )

    def __post_init__(self) -> None:
        if bool(self.c2pa_certificate) != bool(self.c2pa_key):
            raise ConfigurationError(
                f"provenance_c2pa_certificate and provenance_c2pa_key are {self.c2pa_certificate or 'none'!r} and "
                f"{self.c2pa_key or 'none'!r}; allowed: both or neither"
            )
