"""Measures what labels add to encoding an image, in CPU time: python scripts/bench/provenance.py [--size 1024]."""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from glm_image.provenance.files import encode
from glm_image.provenance.settings import ProvenanceSettings
from glm_image.provenance.writer import Provenance
from glm_image.request.geometry import Grid, Size
from glm_image.request.limits import DEFAULT_LIMITS
from glm_image.request.parameters import PaintRequest
from signing import write_identity

REPETITIONS = 20


def median_ms(function: Callable[[], object]) -> float:
    function()
    times = []
    for _ in range(REPETITIONS):
        began = time.process_time()
        function()
        times.append(time.process_time() - began)
    return 1000 * statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=1024, metavar="PIXELS")
    size = parser.parse_args().size
    coarse = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))
    grid = Grid(size // 32, size // 32)
    request = PaintRequest("A red fox " * 20, np.zeros((1, grid.tokens), np.int32), grid, Size(size, size), (1,))
    plain = Provenance(ProvenanceSettings(), {"name": "tiny"}, {})
    marked = Provenance(ProvenanceSettings(visible_text="AI generated"), {"name": "tiny"}, {})
    encode_ms = {name: median_ms(lambda name=name: encode(pixels, name)) for name in ("png", "jpeg", "webp")}  # type: ignore[misc]
    print("encode without labels, ms:", {name: round(value, 1) for name, value in encode_ms.items()})
    print(f"aigc label (SHA-256 of the pixels): {median_ms(lambda: plain.label(pixels)):.2f} ms")
    print(f"visible text: {median_ms(lambda: marked.marked(pixels)):.2f} ms")
    with tempfile.TemporaryDirectory() as folder:
        certificate, key = write_identity(Path(folder))
        signing = ProvenanceSettings(c2pa_certificate=str(certificate), c2pa_key=str(key))
        signer = Provenance(signing, {"name": "tiny"}, {})._signer
        assert signer is not None
        for name in encode_ms:
            asked = PaintRequest(**{**vars(request), "output_format": name, "file_metadata": "full"})
            asked_origin = plain.of_request(asked, DEFAULT_LIMITS)
            label = plain.label(pixels)

            def tiny(asked_origin: object = asked_origin, label: object = label) -> bytes:
                return plain.file(pixels[:32, :32], asked_origin, 0, label)  # type: ignore[arg-type]

            bare = median_ms(lambda name=name: encode(pixels[:32, :32], name))  # type: ignore[misc]
            file = plain.file(pixels, asked_origin, 0, label)
            signed = median_ms(lambda name=name, file=file: signer.signed(file, name, ()))  # type: ignore[misc]
            print(f"{name}: texts {median_ms(tiny) - bare:.2f} ms, C2PA {signed:.2f} ms")


if __name__ == "__main__":
    main()
