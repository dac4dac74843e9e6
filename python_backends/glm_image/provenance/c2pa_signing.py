"""C2PA manifests, signed with the operator's key by the package c2pa-python."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from glm_image import __version__
from glm_image.errors import ConfigurationError, SigningError
from glm_image.provenance.files import SOURCE_TYPE
from glm_image.provenance.record import SOFTWARE
from glm_image.provenance.settings import ProvenanceSettings

# Thumbnails take 90 ms an image of 1024x1024, and a second verification as long as the signature.
CONTEXT: Final = {
    "builder": {"thumbnail": {"enabled": False}},
    "verify": {"verify_after_sign": False, "remote_manifest_fetch": False, "ocsp_fetch": False},
}


class C2paSigner:
    """Signs image files; used by one thread.

    Raises:
        ConfigurationError: the package is missing, or certificate and key cannot be used.
    """

    def __init__(self, settings: ProvenanceSettings) -> None:
        try:
            import c2pa  # noqa: PLC0415 - an extra
        except ImportError as error:
            raise ConfigurationError(
                f"provenance_c2pa_certificate is {settings.c2pa_certificate!r}, but the package c2pa-python cannot be "
                f"used ({error}): pip install 'glm-image-triton[c2pa]'"
            ) from error
        self._c2pa: Any = c2pa
        try:
            info = c2pa.C2paSignerInfo(
                settings.c2pa_algorithm.encode(),
                Path(settings.c2pa_certificate).read_bytes(),
                Path(settings.c2pa_key).read_bytes(),
                settings.c2pa_timestamp_url.encode() or None,
            )
            self._signer = c2pa.Signer.from_info(info)
            self._context = c2pa.Context.from_dict(CONTEXT)
        except (OSError, c2pa.C2paError) as error:
            given = f"{settings.c2pa_certificate!r}, {settings.c2pa_key!r} and {settings.c2pa_algorithm!r}"
            raise ConfigurationError(
                f"provenance_c2pa_certificate, _key and _algorithm are {given}, which cannot be used: {error}; "
                "allowed: PEM files of a certificate chain and its private key, and the key's algorithm"
            ) from error

    def signed(self, file: bytes, output_format: str, sources: Sequence[tuple[bytes, str]]) -> bytes:
        """Returns a file with a manifest: created by a trained model, from the source images if there are any.

        ``sources`` are files and their kinds, as of ``source_files.file_in``. The signature has a time, so the bytes
        differ each time.

        Raises:
            SigningError: the library refuses the key or a source image, or the timestamp authority does not answer.
        """
        manifest = {
            "claim_generator_info": [{"name": SOFTWARE, "version": __version__}],
            "assertions": [
                {
                    "label": "c2pa.actions.v2",
                    "data": {"actions": [{"action": "c2pa.created", "digitalSourceType": SOURCE_TYPE}]},
                }
            ],
        }
        target = io.BytesIO()
        try:
            builder = self._c2pa.Builder(manifest, self._context)
            for index, (source, kind) in enumerate(sources):
                ingredient = {"title": f"source image {index + 1}", "relationship": "inputTo"}
                builder.add_ingredient(ingredient, f"image/{kind.lower()}", io.BytesIO(source))
            builder.sign(self._signer, f"image/{output_format}", io.BytesIO(file), target)
        except self._c2pa.C2paError as error:
            raise SigningError(f"the image cannot be signed: {error}") from error
        return target.getvalue()
