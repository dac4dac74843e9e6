"""The client's parts that need no server: tensors, answers, files, errors, addresses."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from glm_image_client import (
    BadArgumentError,
    BusyError,
    GenerationResult,
    GlmImageClient,
    Metadata,
    PriorTokens,
    RefusedError,
    RequestTimeout,
    ServerFailure,
)
from glm_image_client.calls import prior_inputs
from glm_image_client.errors import answered, sentence
from glm_image_client.grpc_transport import connection_fault
from glm_image_client.result import file_names
from glm_image_client.tensors import request_tensors, source_bytes
from glm_image_client.transport import Endpoint, microseconds, with_integer_shapes

METADATA = {
    "version": "0.1.0",
    "seeds": [41, 42],
    "width": 5,
    "height": 3,
    "generated_width": 32,
    "generated_height": 32,
    "steps": 20,
    "cached_steps": [0, 4],
    "attention_backend": "native",
    "tokens": {"prompt": 9, "source": 0, "preview": 1, "image": 1},
    "seconds": {"prefill": 0.25, "denoise": 1.5},
    "model": {"name": "tiny", "revision": None},
}


def pixels(count: int = 2) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(7).integers(0, 256, (count, 3, 5, 3), dtype=np.uint8)


def encoded(picture: np.ndarray[Any, Any], picture_format: str = "png") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, picture_format)
    return buffer.getvalue()


def objects(*values: bytes) -> np.ndarray[Any, Any]:
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def outputs(files: list[bytes] | None = None, **changed: Any) -> dict[str, Any]:
    raw = files is None
    return {
        "images": pixels() if raw else np.zeros((0, 0, 0, 3), np.uint8),
        "images_base64": objects(*(base64.b64encode(file) for file in files or ())),
        "metadata": objects(json.dumps(METADATA | changed).encode()),
    }


class TestTensors:
    def test_every_input_has_the_type_and_shape_of_the_contract(self) -> None:
        values = {
            "prompt": "雪 'x'",
            "height": 40,
            "width": np.int64(64),
            "num_inference_steps": 3,
            "guidance_scale": 2,
            "seed": -(2**63),
            "num_images": 2,
            "negative_prompt": "",
            "temperature": 0.5,
            "top_p": 0.25,
            "top_k": 4,
            "output_format": "png",
        }
        tensors = {name: (datatype, data) for name, datatype, data in request_tensors(values)}
        expected: dict[str, tuple[str, type]]
        text, whole, real = ("BYTES", np.object_), ("INT32", np.int32), ("FP32", np.float32)
        expected = dict.fromkeys(("prompt", "negative_prompt", "output_format"), text)
        expected |= dict.fromkeys(("height", "width", "num_inference_steps", "num_images", "top_k"), whole)
        expected |= dict.fromkeys(("guidance_scale", "temperature", "top_p"), real)
        expected |= {"seed": ("INT64", np.int64)}
        assert {name: (datatype, data.dtype.type) for name, (datatype, data) in tensors.items()} == expected
        assert {data.shape for _, data in tensors.values()} == {(1,)}
        assert tensors["prompt"][1][0] == "雪 'x'".encode()
        assert tensors["negative_prompt"][1][0] == b""
        assert tensors["seed"][1][0] == -(2**63)

    def test_none_is_not_sent_but_zero_and_empty_are(self) -> None:
        values = {"prompt": "", "seed": 0, "guidance_scale": 0.0, "height": None, "negative_prompt": None}
        assert [tensor.name for tensor in request_tensors(values)] == ["prompt", "seed", "guidance_scale"]

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("height", 512.5),
            ("height", 2**31),
            ("height", "512"),
            ("seed", 2**63),
            ("seed", -(2**63) - 1),
            ("guidance_scale", "much"),
            ("prompt", 7),
            ("prompt", "\ud800"),
        ],
    )
    def test_what_a_type_cannot_hold_is_refused_by_name(self, name: str, value: object) -> None:
        with pytest.raises(BadArgumentError, match=f"^{name} is .*; allowed: "):
            request_tensors({name: value})

    @given(st.lists(st.binary(), min_size=1, max_size=4))
    def test_source_bytes_go_as_they_are(self, files: list[bytes]) -> None:
        (tensor,) = request_tensors({}, files)
        assert (tensor.name, tensor.datatype, tensor.data.shape) == ("image", "BYTES", (len(files),))
        assert tensor.data.tolist() == files

    def test_source_paths_are_read(self, tmp_path: Path) -> None:
        file = tmp_path / "source.bin"
        file.write_bytes(b"any\0bytes\0")
        assert source_bytes(file) == source_bytes(str(file)) == b"any\0bytes\0"
        with pytest.raises(BadArgumentError, match=r"none\.png' cannot be read: No such file"):
            source_bytes(tmp_path / "none.png")

    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "F", "I;16"])
    def test_pil_sources_become_png(self, mode: str) -> None:
        decoded = Image.open(io.BytesIO(source_bytes(Image.new(mode, (3, 2)))))
        assert (decoded.format, decoded.size) == ("PNG", (3, 2))

    def test_pil_sources_stand_upright(self) -> None:
        lying = Image.new("RGB", (3, 2))
        lying.getexif()[0x0112] = 6  # orientation: turn by 90 degrees
        assert Image.open(io.BytesIO(source_bytes(lying))).size == (2, 3)

    def test_a_source_of_another_type_is_refused(self) -> None:
        with pytest.raises(BadArgumentError, match="image is of type int"):
            source_bytes(7)  # type: ignore[arg-type]


class TestResults:
    def test_raw_pixels(self) -> None:
        result = GenerationResult.from_outputs(outputs())
        assert result.encoded == []
        assert np.array_equal(np.stack(result.arrays), pixels())
        assert [image.size for image in result.images] == [(5, 3), (5, 3)]
        assert result.seeds == (41, 42)

    def test_encoded_pictures_are_kept_and_decoded(self) -> None:
        files = [encoded(picture) for picture in pixels()]
        result = GenerationResult.from_outputs(outputs(files))
        assert result.encoded == files
        assert np.array_equal(np.stack(result.arrays), pixels())

    @pytest.mark.parametrize("missing", ["images", "images_base64", "metadata"])
    def test_a_missing_output_is_named(self, missing: str) -> None:
        answer = outputs()
        del answer[missing]
        with pytest.raises(ServerFailure, match=f"no output '{missing}'"):
            GenerationResult.from_outputs(answer)

    def test_metadata_is_typed_and_keeps_what_it_does_not_know(self) -> None:
        metadata = Metadata.from_json(json.dumps(METADATA | {"weather": "fine"}))
        assert metadata.seeds == (41, 42)
        assert metadata.cached_steps == (0, 4)
        assert metadata.attention_backend == "native"
        assert (metadata.generated_width, metadata.steps, metadata.seconds["denoise"]) == (32, 20, 1.5)
        assert metadata.extra == {"weather": "fine"}
        assert metadata.raw == METADATA | {"weather": "fine"}

    def test_metadata_of_an_older_server_lacks_fields(self) -> None:
        assert Metadata.from_json("{}") == Metadata()

    @pytest.mark.parametrize("text", [b"", b"[1]", b"{", b"\xff"])
    def test_metadata_that_is_no_object_is_the_servers_fault(self, text: bytes) -> None:
        with pytest.raises(ServerFailure, match="metadata is not"):
            Metadata.from_json(text)

    def test_the_same_format_is_saved_byte_for_byte_and_another_is_converted(self, tmp_path: Path) -> None:
        files = [encoded(picture) for picture in pixels()]
        result = GenerationResult.from_outputs(outputs(files))
        saved = result.save(tmp_path / "out.png")
        assert saved == [tmp_path / "out_0.png", tmp_path / "out_1.png"]
        assert [file.read_bytes() for file in saved] == files
        (jpeg, _) = result.save(tmp_path / "out.JPG")
        assert Image.open(jpeg).format == "JPEG"

    def test_raw_pixels_are_saved_without_loss(self, tmp_path: Path) -> None:
        saved = GenerationResult.from_outputs(outputs()).save(str(tmp_path / "{seed}.png"))
        assert [file.name for file in saved] == ["41.png", "42.png"]
        assert np.array_equal(np.stack([np.asarray(Image.open(file)) for file in saved]), pixels())

    def test_an_unknown_suffix_writes_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(BadArgumentError, match=r"ends in '\.gif'; allowed: \.png, \.jpg, \.jpeg, \.webp"):
            GenerationResult.from_outputs(outputs()).save(tmp_path / "out.gif")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("template", "count", "names"),
        [
            ("out.png", 1, ["out.png"]),
            ("out.png", 3, ["out_0.png", "out_1.png", "out_2.png"]),
            ("a.b/out.v2.webp", 2, ["a.b/out.v2_0.webp", "a.b/out.v2_1.webp"]),
            ("{index}.png", 2, ["0.png", "1.png"]),
            ("s{seed}.png", 2, ["s41.png", "s42.png"]),
            ("output_{width}x{height}.png", 1, ["output_5x3.png"]),
            ("output_{width}x{height}.png", 2, ["output_5x3_0.png", "output_5x3_1.png"]),
            ("{other}{.png", 1, ["{other}{.png"]),
        ],
    )
    def test_file_names(self, template: str, count: int, names: list[str]) -> None:
        assert file_names(template, count, Metadata.from_mapping(METADATA)) == names


class TestPriorTokens:
    @pytest.fixture
    def prior(self) -> PriorTokens:
        return PriorTokens.from_outputs(
            {
                "prior_token_ids": np.arange(8, dtype=np.int32).reshape(2, 4),
                "prior_grid": np.array([2, 2], np.int32),
                "source_token_ids": np.zeros(0, np.int32),
                "source_grids": np.zeros((0, 2), np.int32),
                "resolved_seed": np.array([41], np.int64),
                "resolved_size": np.array([50, 60], np.int32),
                "deadline_ns": np.array([0], np.int64),
                "ar_metadata": objects(b'{"seeds": [41, 42]}'),
            }
        )

    def test_what_the_first_stage_gave_goes_to_the_second(self, prior: PriorTokens) -> None:
        tensors = {tensor.name: tensor for tensor in prior_inputs(prior)}
        shapes = {name: (tensor.datatype, tensor.data.shape) for name, tensor in tensors.items()}
        assert shapes == {
            "prior_token_ids": ("INT32", (2, 4)),
            "prior_grid": ("INT32", (2,)),
            "source_token_ids": ("INT32", (0,)),
            "source_grids": ("INT32", (0, 2)),
            "resolved_seed": ("INT64", (1,)),
            "resolved_size": ("INT32", (2,)),
            "ar_metadata": ("BYTES", (1,)),
        }
        assert tensors["resolved_seed"].data.tolist() == [41]
        assert json.loads(tensors["ar_metadata"].data[0]) == {"seeds": [41, 42]}

    def test_another_seed_takes_the_place_of_the_first(self, prior: PriorTokens) -> None:
        tensors = {tensor.name: tensor for tensor in prior_inputs(prior, seed=-5)}
        assert tensors["resolved_seed"].data.tolist() == [-5]
        assert tensors["resolved_seed"].data.dtype == np.int64

    def test_tokens_are_kept_in_a_file(self, prior: PriorTokens, tmp_path: Path) -> None:
        kept = PriorTokens.load(prior.save(tmp_path / "tokens.npz"))
        assert kept.ar_metadata == prior.ar_metadata
        for name in set(vars(prior)) - {"ar_metadata"}:
            np.testing.assert_array_equal(getattr(kept, name), getattr(prior, name), strict=True)

    @pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 broken"])
    def test_a_file_of_something_else_is_refused_by_name(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "tokens.npz").write_bytes(content)
        with pytest.raises(BadArgumentError, match=r"tokens\.npz' is no file of PriorTokens\.save"):
            PriorTokens.load(tmp_path / "tokens.npz")
        np.savez(tmp_path / "tokens.npz", prior_grid=np.zeros(2))
        with pytest.raises(BadArgumentError, match="is no file of"):
            PriorTokens.load(tmp_path / "tokens.npz")
        with pytest.raises(BadArgumentError, match="cannot be read: No such file"):
            PriorTokens.load(tmp_path / "none.npz")

    @pytest.mark.parametrize("edited", [np.full((2, 4), 0.5), np.full((2, 4), 2**40), np.full((2, 4), "a")])
    def test_edited_tokens_must_stay_integers(self, prior: PriorTokens, edited: Any) -> None:
        changed = PriorTokens(**{**vars(prior), "prior_token_ids": edited})
        with pytest.raises(BadArgumentError, match="prior_token_ids"):
            prior_inputs(changed)


class TestErrors:
    @pytest.mark.parametrize(
        ("status", "error"),
        [
            ("StatusCode.INVALID_ARGUMENT", RefusedError),
            ("400", RefusedError),
            ("StatusCode.UNIMPLEMENTED", RefusedError),
            ("501", RefusedError),
            ("StatusCode.DEADLINE_EXCEEDED", RequestTimeout),
            ("StatusCode.UNAVAILABLE", BusyError),
            ("503", BusyError),
            ("500", ServerFailure),
            ("404", ServerFailure),
            ("StatusCode.INTERNAL", ServerFailure),
            (None, ServerFailure),
        ],
    )
    def test_status_decides(self, status: str | None, error: type[Exception]) -> None:
        assert type(answered(status, "in ensemble 'glm_image', the queue is full")) is error

    @pytest.mark.parametrize("status", ["StatusCode.NOT_FOUND", "404"])
    def test_a_server_that_has_unloaded_its_models_is_stopping(self, status: str) -> None:
        said = "Request for unknown model: 'glm_image' has no available versions"
        assert type(answered(status, said)) is BusyError

    @pytest.mark.parametrize(
        ("grpc", "http"), [("UNAVAILABLE", "503"), ("INTERNAL", "500"), ("NOT_FOUND", "404"), ("CANCELLED", "499")]
    )
    def test_both_protocols_name_a_status_alike(self, grpc: str, http: str) -> None:
        failures = answered(f"StatusCode.{grpc}", "no"), answered(http, "no")
        assert [failure.status for failure in failures if isinstance(failure, ServerFailure)] == [grpc, grpc]

    def test_a_queue_that_waited_too_long_is_a_timeout(self) -> None:
        assert isinstance(answered("503", "in ensemble 'glm_image', Request timeout expired"), RequestTimeout)

    def test_a_sentence_about_a_deadline_is_still_a_refusal(self) -> None:
        assert type(answered("400", "prompt is 'deadline timeout'; allowed: less")) is RefusedError

    @pytest.mark.parametrize(
        "wrapped",
        [
            "height is 7; allowed: 32..2048",
            "in ensemble 'glm_image', height is 7; allowed: 32..2048",
            "[request id: <id_unknown>] height is 7; allowed: 32..2048",
            "[request id: a b] in ensemble 'glm_image', height is 7; allowed: 32..2048",
            "in ensemble 'glm_image', Failed to process the request(s) for model 'glm_ar_0_0', message: "
            "height is 7; allowed: 32..2048\n\nAt:\n  /models/glm_ar/1/model.py(20): one\n",
            "Failed to process the request(s) for model instance 'glm_ar_0_0', message: height is 7; "
            "allowed: 32..2048\n\nAt:\n  /models/glm_ar/1/model.py(20): one\n",
        ],
    )
    def test_what_triton_puts_around_a_sentence_is_taken_off(self, wrapped: str) -> None:
        assert sentence(wrapped) == "height is 7; allowed: 32..2048"

    def test_a_quoted_prompt_is_left_alone(self) -> None:
        text = "prompt is \"in ensemble 'x', \\n\\nAt:\"; allowed: less"
        assert sentence(text) == text

    def test_an_error_without_words_says_so(self) -> None:
        assert (
            str(answered("StatusCode.INTERNAL", None)) == "the server failed with status INTERNAL and said nothing more"
        )

    @pytest.mark.parametrize(
        ("message", "fault"),
        [
            (
                "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: Failed to connect to "
                "remote host: Connection refused",
                "Failed to connect to remote host: Connection refused",
            ),
            (
                "failed to connect to all addresses; last error: UNAVAILABLE: ipv6:[::1]:1: Socket closed",
                "Socket closed",
            ),
            ("Socket closed", "Socket closed"),
            ("", ""),
        ],
    )
    def test_a_connections_fault_is_told_in_short(self, message: str, fault: str) -> None:
        assert connection_fault(message) == fault


class TestAddresses:
    @pytest.mark.parametrize(
        ("url", "protocol", "expected"),
        [
            (None, "grpc", ("grpc", "127.0.0.1:8001", False)),
            (None, "http", ("http", "127.0.0.1:8000", False)),
            ("", "http", ("http", "127.0.0.1:8000", False)),
            ("box:9", "grpc", ("grpc", "box:9", False)),
            ("box", "http", ("http", "box:8000", False)),
            ("http://box:9", "grpc", ("http", "box:9", False)),
            ("GRPC://box", "http", ("grpc", "box:8001", False)),
            ("https://box", "grpc", ("http", "box:443", True)),
            ("grpcs://box:9/", "http", ("grpc", "box:9", True)),
            ("https://box/images/", "grpc", ("http", "box:443/images", True)),
            ("[::1]:9", "grpc", ("grpc", "[::1]:9", False)),
            ("http://[::1]", "grpc", ("http", "[::1]:8000", False)),
        ],
    )
    def test_urls(self, url: str | None, protocol: str, expected: tuple[str, str, bool]) -> None:
        assert tuple(Endpoint.parse(url, protocol)) == expected

    @pytest.mark.parametrize(
        "url",
        ["ftp://box", "box:port", "box:70000", "http://", ":8001", "grpc://box/path", "user@box:1", "[::1", "box?x"],
    )
    def test_what_is_no_address_is_refused(self, url: str) -> None:
        with pytest.raises(BadArgumentError, match=r"^url is .*; allowed: HOST:PORT"):
            Endpoint.parse(url)

    def test_an_unknown_protocol_is_refused(self) -> None:
        with pytest.raises(BadArgumentError, match="protocol is 'smtp'; allowed: grpc, http"):
            GlmImageClient("box", "smtp")  # type: ignore[arg-type]

    @pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf")])
    def test_a_timeout_is_a_positive_number(self, timeout: float) -> None:
        with pytest.raises(BadArgumentError, match="timeout is"):
            GlmImageClient("box", timeout=timeout)

    def test_kserve_counts_microseconds(self) -> None:
        assert microseconds(None) is None
        assert [microseconds(1.5), microseconds(1e-9)] == [1_500_000, 1]

    def test_shapes_are_integers_whatever_the_protocol(self) -> None:
        told: dict[str, Any] = {
            "inputs": [{"name": "image", "shape": ["-1"]}],
            "outputs": [{"name": "images", "shape": ["-1", 3]}],
        }
        assert with_integer_shapes(told)["outputs"][0]["shape"] == [-1, 3]
        assert told["inputs"][0]["shape"] == [-1]
