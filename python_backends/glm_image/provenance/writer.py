"""Turns the finished pixels of a request into files that state their origin."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from glm_image.provenance.c2pa_signing import C2paSigner
from glm_image.provenance.files import FileTexts, encode
from glm_image.provenance.label import aigc_label
from glm_image.provenance.record import image_record, parameters_text
from glm_image.provenance.settings import ProvenanceSettings
from glm_image.provenance.visible import VisibleMark
from glm_image.request import source_files
from glm_image.request.limits import Limits
from glm_image.request.parameters import PaintRequest
from glm_image.telemetry.metrics import Kind, MetricSink, MetricSpec, null_sink

LABELS: Final = ("record", "aigc", "c2pa", "visible")

LABELLED_IMAGES: Final = {
    label: MetricSpec(
        "glm_image_dit_labelled_images_total",
        Kind.COUNTER,
        f"Images with a label, by label: {', '.join(LABELS)}",
        label=label,
    )
    for label in LABELS
}


@dataclass(frozen=True)
class RequestOrigin:
    """What the images of a request have in common.

    Attributes:
        sources: the SHA-256 of each source image's file.
        source_files: the files and their kinds, for a manifest.
    """

    request: PaintRequest
    sources: tuple[str, ...]
    source_files: tuple[tuple[bytes, str], ...]


class Provenance:
    """The labels of an instance.

    Args:
        settings: which ones.
        model: the checkpoint's ``name`` and ``revision``.
        engine_settings: those of the DiT that change pixels.
        record: counts the labels.

    Raises:
        ConfigurationError: a font, certificate or key cannot be used.
    """

    def __init__(
        self,
        settings: ProvenanceSettings,
        model: Mapping[str, Any],
        engine_settings: Mapping[str, Any],
        record: MetricSink = null_sink,
    ) -> None:
        self._settings, self._model, self._engine_settings = settings, model, engine_settings
        self._record = record
        self._mark = VisibleMark(settings) if settings.visible_text else None
        self._signer = C2paSigner(settings) if settings.c2pa_certificate else None

    def of_request(self, request: PaintRequest, limits: Limits) -> RequestOrigin:
        """Returns what the images of a valid request have in common. Hashes its source images, once."""
        files = request.images or ()
        is_encoded = request.output_format != "raw"
        has_record = is_encoded and self._detail(request) != "none"
        is_signed = is_encoded and self._signer is not None
        read = files if has_record or is_signed else ()
        named = tuple(source_files.file_in(bytes(file), "image", limits.source_bytes) for file in read)
        hashes = tuple(hashlib.sha256(file).hexdigest() for file, _ in named) if has_record else ()
        return RequestOrigin(request, hashes, named if is_signed else ())

    def marked(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Returns an image, uint8 [height, width, 3], with the visible text where one is configured."""
        return pixels if self._mark is None else self._mark.drawn(pixels)

    def count_marked(self, images: int) -> None:
        """Counts finished images with the visible text; intermediate images are not counted."""
        if self._mark is not None:
            self._record(LABELLED_IMAGES["visible"], images)

    def label(self, pixels: NDArray[np.uint8]) -> dict[str, str] | None:
        """Returns the AIGC label of an image, uint8 [height, width, 3]; None if none is configured."""
        settings = self._settings
        return aigc_label(pixels, settings.aigc_producer, settings.aigc_propagator) if settings.aigc_label else None

    def file(
        self, pixels: NDArray[np.uint8], origin: RequestOrigin, index: int, label: Mapping[str, str] | None
    ) -> bytes:
        """Encodes image ``index`` of a request, uint8 [height, width, 3], with its ``label`` and its other texts."""
        request = origin.request
        record = self._image_record(origin, index)
        parameters = "" if record is None else parameters_text(record)
        file = encode(pixels, request.output_format, FileTexts.of(record, parameters, label))
        if self._signer is not None:
            file = self._signer.signed(file, request.output_format, origin.source_files)
        for name, is_there in (("record", record), ("aigc", label), ("c2pa", self._signer)):
            if is_there is not None:
                self._record(LABELLED_IMAGES[name], 1)
        return file

    def _detail(self, request: PaintRequest) -> str:
        return self._settings.file_metadata if request.file_metadata is None else request.file_metadata

    def _image_record(self, origin: RequestOrigin, index: int) -> dict[str, Any] | None:
        detail = self._detail(origin.request)
        if detail == "none":
            return None
        return image_record(
            origin.request,
            index,
            self._model,
            self._engine_settings,
            origin.sources,
            has_texts=detail == "full",
        )
