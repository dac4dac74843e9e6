"""What image files say about their origin, read by Pillow and by the reader of c2pa-python."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import c2pa
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from glm_image.errors import ConfigurationError
from glm_image.pipeline import LocalPipeline
from glm_image.provenance import files
from glm_image.provenance.settings import ProvenanceSettings
from glm_image.provenance.visible import VisibleMark
from glm_image.provenance.writer import Provenance
from glm_image.request.geometry import Grid, Size
from glm_image.request.images import ENCODER_OPTIONS
from glm_image.request.limits import DEFAULT_LIMITS
from glm_image.request.parameters import GenerationParameters, PaintRequest
from glm_image_client import GenerationResult, Metadata
from glm_image_client.file_texts import FileTexts
from glm_image_gateway.pictures import recompressed
from signing import write_identity

PIXELS = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
PROMPT = 'A fox with a sign "NEWS" <&> 狐狸 \uffff\x01'
REQUEST = PaintRequest(
    PROMPT,
    np.zeros((2, 6), np.int32),
    Grid(2, 3),
    Size(64, 96),
    (7, 8),
    num_inference_steps=3,
    negative_prompt="'OLD'",
    ar_metadata={"sampling": {"temperature": 1.0, "top_p": 0.9, "top_k": 5}, "settings": {"quantization": "int8"}},
)
MODEL = {"name": "tiny", "revision": "abc"}
FORMATS = ("png", "jpeg", "webp")


def made(request: PaintRequest, index: int = 1, settings: ProvenanceSettings | None = None) -> bytes:
    provenance = Provenance(settings or ProvenanceSettings(), MODEL, {"quantization": "fp8", "cache": None})
    return provenance.file(PIXELS, provenance.of_request(request, DEFAULT_LIMITS), index, provenance.label(PIXELS))


def texts(file: bytes) -> FileTexts:
    return FileTexts.of_image(Image.open(io.BytesIO(file)))


@pytest.mark.parametrize("output_format", FORMATS)
class TestFiles:
    def test_the_record_repeats_the_image(self, output_format: str) -> None:
        file = made(replace(REQUEST, output_format=output_format, file_metadata="full"))
        found = texts(file)
        record = json.loads(found.record)
        assert (record["prompt"], record["negative_prompt"], record["seed"]) == (PROMPT, "'OLD'", 8)
        assert (record["width"], record["height"], record["steps"], record["guidance_scale"]) == (96, 64, 3, 1.5)
        assert (record["model"], record["sampling"]["top_k"]) == (MODEL, 5)
        assert record["settings"] == {
            "glm_ar": {"quantization": "int8"}, "glm_dit": {"quantization": "fp8", "cache": None}
        }  # fmt: skip
        assert found.parameters.startswith(f"{PROMPT}\nNegative prompt: 'OLD'\nSteps: 3, Sampler: ")
        assert "CFG scale: 1.5, Seed: 8, Size: 96x64, Model: tiny" in found.parameters

    def test_the_label_states_the_hash_of_the_pixels(self, output_format: str) -> None:
        settings = ProvenanceSettings(aigc_producer="某公司", aigc_propagator="P")
        file = made(replace(REQUEST, output_format=output_format, file_metadata="none"), settings=settings)
        content = hashlib.sha256(PIXELS.tobytes()).hexdigest()[:32]
        assert json.loads(texts(file).label) == {
            "Label": "1", "ContentProducer": "某公司", "ProduceID": content, "ReservedCode1": "",
            "ContentPropagator": "P", "PropagateID": content, "ReservedCode2": "",
        }  # fmt: skip
        assert b"trainedAlgorithmicMedia" in file
        assert (texts(file).record, texts(file).parameters) == ("", "")

    def test_the_texts_of_a_request_are_left_out_unless_asked_for(self, output_format: str) -> None:
        file = made(replace(REQUEST, output_format=output_format))
        assert json.loads(texts(file).record)["seed"] == 8
        assert "prompt" not in json.loads(texts(file).record)
        assert "fox" not in texts(file).parameters

    def test_the_same_image_has_the_same_bytes_and_its_pixels(self, output_format: str) -> None:
        request = replace(REQUEST, output_format=output_format, file_metadata="full")
        assert made(request) == made(request)
        bare = files.encode(PIXELS, output_format)
        np.testing.assert_array_equal(*(np.asarray(Image.open(io.BytesIO(file))) for file in (made(request), bare)))

    def test_client_and_gateway_keep_the_texts_in_another_file(self, output_format: str, tmp_path: Path) -> None:
        file = made(replace(REQUEST, output_format="png", file_metadata="full"))
        result = GenerationResult(Metadata(), [base64.b64encode(file)])
        (saved,) = result.save(tmp_path / f"x.{output_format}")
        assert texts(saved.read_bytes()) == texts(file)
        assert texts(recompressed(file, output_format, 50)) == texts(file)

    def test_saved_pixels_have_the_label_that_the_server_states(self, output_format: str, tmp_path: Path) -> None:
        label = {"Label": "1", "ProduceID": "x"}
        (saved,) = GenerationResult(Metadata(aigc=(label,)), [], PIXELS[None]).save(tmp_path / f"x.{output_format}")
        assert json.loads(texts(saved.read_bytes()).label) == label

    def test_manifest_is_valid_until_a_byte_changes(self, output_format: str, tmp_path: Path) -> None:
        certificate, key = write_identity(tmp_path)
        settings = ProvenanceSettings(c2pa_certificate=str(certificate), c2pa_key=str(key))
        source = io.BytesIO()
        Image.fromarray(PIXELS).save(source, "png")
        file = made(replace(REQUEST, output_format=output_format, images=(source.getvalue(),)), settings=settings)
        with c2pa.Reader(f"image/{output_format}", io.BytesIO(file)) as reader:
            assert reader.get_validation_state() == "Valid"
            manifest: Any = reader.get_active_manifest()
        (action,) = manifest["assertions"][0]["data"]["actions"]
        assert (action["action"], action["digitalSourceType"]) == ("c2pa.created", files.SOURCE_TYPE)
        assert [item["relationship"] for item in manifest["ingredients"]] == ["inputTo"]
        assert json.loads(texts(file).record)["sources"]["sha256"] == [hashlib.sha256(source.getvalue()).hexdigest()]
        changed = bytearray(file)
        changed[file.index(b"ProduceID")] ^= 1
        with c2pa.Reader(f"image/{output_format}", io.BytesIO(bytes(changed))) as reader:
            assert reader.get_validation_state() == "Invalid"


@given(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=200), st.sampled_from(FORMATS)
)
def test_any_prompt_is_read_back(prompt: str, output_format: str) -> None:
    found = texts(files.encode(PIXELS[:2, :2], output_format, files.FileTexts.of({"prompt": prompt}, "p", {})))
    assert json.loads(found.record) == {"prompt": prompt}


@pytest.mark.parametrize("output_format", FORMATS)
def test_a_record_of_the_longest_prompts_is_a_valid_file(output_format: str) -> None:
    longest = "🦊" * 8192
    file = made(
        replace(REQUEST, prompt=longest, negative_prompt=longest, output_format=output_format, file_metadata="full")
    )
    assert json.loads(texts(file).label)["Label"] == "1"
    assert (texts(file).record == "") == (output_format == "jpeg")


@pytest.mark.parametrize("output_format", FORMATS)
def test_server_and_client_write_the_same_texts(output_format: str) -> None:
    written = files.FileTexts("{record}", "parameters", '{"Label":"1"}')
    buffer = io.BytesIO()
    options = {**ENCODER_OPTIONS[output_format], **FileTexts(**vars(written)).encoder_options(output_format)}
    Image.fromarray(PIXELS).save(buffer, output_format, **options)
    assert files.encode(PIXELS, output_format, written) == buffer.getvalue()


@pytest.mark.parametrize("corner", ["bottom_right", "bottom_left", "top_right", "top_left"])
def test_visible_text_is_in_its_corner(corner: str) -> None:
    black = np.zeros((400, 600, 3), np.uint8)
    drawn = VisibleMark(ProvenanceSettings(visible_text="AI generated", visible_corner=corner)).drawn(black)
    rows, columns = np.nonzero(drawn.max(axis=2))
    assert rows.max() - rows.min() + 1 >= 0.05 * 400
    assert (rows.min() > 200) == ("bottom" in corner)
    assert (columns.min() > 300) == ("right" in corner)


def test_visible_text_of_any_size_of_image_is_drawn() -> None:
    mark = VisibleMark(ProvenanceSettings(visible_text="AI generated"))
    for shape in ((32, 32, 3), (2048, 32, 3), (32, 2048, 3)):
        drawn = mark.drawn(np.zeros(shape, np.uint8))
        assert drawn.shape == shape
        assert drawn.any()


def test_what_cannot_be_used_is_refused_at_load(tmp_path: Path) -> None:
    for settings, message in (
        (ProvenanceSettings(visible_text="人工智能生成"), "its font has no '人'"),
        (ProvenanceSettings(visible_text="AI", visible_font=str(tmp_path / "no.ttf")), "cannot be read"),
        (ProvenanceSettings(c2pa_certificate="/no.pem", c2pa_key="/no.pem"), "cannot be used"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            Provenance(settings, MODEL, {})
    with pytest.raises(ConfigurationError, match="allowed: both or neither"):
        ProvenanceSettings(c2pa_key="/key.pem")


def test_an_image_of_the_engines_is_repeated_by_its_record(pipeline: LocalPipeline) -> None:
    parameters = GenerationParameters(
        prompt="x", height=32, width=64, num_inference_steps=1, num_images=2, output_format="png", file_metadata="full"
    )
    result = pipeline.generate(parameters)
    record = json.loads(texts(result.encoded[1]).record)
    again = replace(parameters, prompt=record["prompt"], seed=record["seed"], num_images=1, **record["sampling"])
    assert pipeline.generate(again).encoded == [result.encoded[1]]
    assert [label["ProduceID"] for label in result.metadata["aigc"]] == [
        hashlib.sha256(image.tobytes()).hexdigest()[:32] for image in result.pixels
    ]


def test_visible_text_is_drawn_on_raw_pixels(pipeline: LocalPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = GenerationParameters(prompt="x", height=32, width=64, num_inference_steps=1, seed=1)
    plain = pipeline.generate(parameters)
    monkeypatch.setattr(pipeline.dit, "_provenance", Provenance(ProvenanceSettings(visible_text="AI"), MODEL, {}))
    assert (pipeline.generate(parameters).pixels != plain.pixels).any()
