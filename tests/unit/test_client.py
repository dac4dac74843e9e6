"""The client's parts that need no server: tensors, answers, files, errors, addresses."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from glm_image.config.schema import DIT_INPUTS, REQUEST_INPUTS, STREAM_INPUTS
from glm_image.request.limits import OUTPUT_FORMATS
from glm_image.request.parameters import GenerationParameters, PreviewParameters, consecutive_seeds
from glm_image.request.tensors import request_fields
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
from glm_image_client.calls import (
    generate,
    paint,
    prior_inputs,
    prior_tokens,
    request_tensors,
    stream,
)
from glm_image_client.core import run
from glm_image_client.errors import answered, sentence
from glm_image_client.grpc_transport import connection_fault, with_integer_shapes
from glm_image_client.options import (
    OPTIONS,
    PROMPT,
    GenerateOptions,
    OutputFormat,
    PaintOptions,
    PriorOptions,
    StreamOptions,
)
from glm_image_client.result import file_names
from glm_image_client.sources import source_bytes
from glm_image_client.transport import Endpoint, microseconds

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


def encoded(image: np.ndarray[Any, Any], image_format: str = "png") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, image_format)
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
            "glyph_text": ["x"],
        }
        tensors = {name: (datatype, data) for name, datatype, data in request_tensors(values)}
        expected: dict[str, tuple[str, type]]
        text, whole, real = ("BYTES", np.object_), ("INT32", np.int32), ("FP32", np.float32)
        expected = dict.fromkeys(("prompt", "negative_prompt", "output_format", "glyph_text"), text)
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
            ("seed", 2**64),
            ("seed", -(2**63) - 1),
            ("guidance_scale", "much"),
            ("prompt", 7),
            ("prompt", "\ud800"),
        ],
    )
    def test_value_outside_the_type_is_refused_by_name(self, name: str, value: object) -> None:
        with pytest.raises(BadArgumentError, match=f"^{name} is .*; allowed: "):
            request_tensors({name: value})

    @given(st.integers(-(2**63), 2**64 - 1))
    def test_a_seed_is_sent_as_the_signed_integer_of_the_same_bits(self, seed: int) -> None:
        (tensor,) = request_tensors({"seed": seed})
        assert tensor.data.dtype == np.int64
        assert int(tensor.data[0]) % 2**64 == seed % 2**64
        assert (int(tensor.data[0]),) == consecutive_seeds(seed, 1)

    @given(st.lists(st.binary(), min_size=1, max_size=4))
    def test_source_bytes_are_sent_unchanged(self, files: list[bytes]) -> None:
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

    def test_pil_sources_are_turned_upright(self) -> None:
        lying = Image.new("RGB", (3, 2))
        lying.getexif()[0x0112] = 6  # orientation: turn by 90 degrees
        assert Image.open(io.BytesIO(source_bytes(lying))).size == (2, 3)

    def test_source_of_another_type_is_refused(self) -> None:
        with pytest.raises(BadArgumentError, match="image is of type int"):
            source_bytes(7)  # type: ignore[arg-type]


class TestOptions:
    def test_options_match_the_declaration_of_the_server(self) -> None:
        """The client imports nothing of the server, so its own declaration is compared here."""
        declared = {
            field.spec.name: field.spec
            for kind in (GenerationParameters, PreviewParameters)
            for field in request_fields(kind)
        }
        sent = {"prompt": PROMPT.datatype, **{name: option.input.datatype for name, option in OPTIONS.items()}}
        assert sent == {
            name: {"STRING": "BYTES"}.get(spec.data_type, spec.data_type)
            for name, spec in declared.items()
            if name != "image"
        }
        assert declared["image"].data_type == "STRING"
        formats = get_args(OutputFormat)
        assert formats == OUTPUT_FORMATS

    def test_options_have_the_types_of_the_server(self) -> None:
        hints = {**get_type_hints(GenerationParameters), **get_type_hints(PreviewParameters)}
        hints |= {"output_format": OutputFormat, "glyph_text": Sequence[str]}
        kinds = {name: set(get_args(option.kind)) - {type(None)} for name, option in OPTIONS.items()}
        assert kinds == {name: set(get_args(hints[name]) or {hints[name]}) - {type(None)} for name in OPTIONS} | {
            "output_format": {OutputFormat},
            "glyph_text": {Sequence[str]},
        }

    def test_stages_take_the_inputs_of_their_models(self) -> None:
        ar = {tensor.name for tensor in prior_tokens("x", **_every(PriorOptions)).tensors}
        assert ar <= {spec.name for spec in REQUEST_INPUTS}
        prior = PriorTokens(*[np.zeros((1, 1), np.int32)] * 7, {})
        dit = {tensor.name for tensor in paint("x", prior, **_every(PaintOptions)).tensors}
        assert dit <= {spec.name for spec in DIT_INPUTS}
        assert {"num_inference_steps", "guidance_scale", "negative_prompt", "image", "output_format"} <= dit
        streamed = {tensor.name for tensor in stream("x", **_every(StreamOptions)).tensors}
        assert streamed == {spec.name for spec in STREAM_INPUTS}
        generated = {tensor.name for tensor in generate("x", **_every(GenerateOptions)).tensors}
        assert generated == {spec.name for spec in REQUEST_INPUTS}

    @pytest.mark.parametrize("call", [generate, stream, prior_tokens])
    def test_unknown_option_is_refused_by_name(self, call: Any) -> None:
        with pytest.raises(TypeError, match=r"unexpected keyword argument 'sed'; allowed: .*seed"):
            call("x", sed=3)
        with pytest.raises(TypeError, match="unexpected keyword argument 'seeds'"), GlmImageClient() as client:
            client.generate("x", seeds=3)  # type: ignore[call-arg]

    def test_images_are_png_unless_another_format_is_requested(self) -> None:
        def output_format(**options: Any) -> list[Any]:
            return [t.data.tolist() for t in generate("x", **options).tensors if t.name == "output_format"]

        assert output_format() == [[b"png"]]
        assert output_format(output_format="raw") == [[b"raw"]]
        assert output_format(output_format=None) == []

    def test_a_blocking_call_that_suspends_is_an_error(self) -> None:
        async def suspends() -> None:
            await asyncio.sleep(0)

        with pytest.raises(RuntimeError, match="suspended"):
            run(suspends())


def _every(kind: Any) -> dict[str, Any]:
    """A value for each option of a call."""
    values = {int: 1, float: 0.5, str: "x"}
    options = {}
    for name in kind.__annotations__:
        if name in OPTIONS:
            options[name] = next((values[part] for part in get_args(OPTIONS[name].kind) if part in values), "png")
    return {**options, "images": [b"file"], "request_id": "id", "timeout": 5.0}


class TestResults:
    def test_raw_pixels(self) -> None:
        result = GenerationResult.from_outputs(outputs())
        assert result.encoded == []
        assert np.array_equal(np.stack(result.arrays), pixels())
        assert [image.size for image in result.images] == [(5, 3), (5, 3)]
        assert result.seeds == (41, 42)

    def test_encoded_images_are_kept_and_decoded(self) -> None:
        files = [encoded(image) for image in pixels()]
        result = GenerationResult.from_outputs(outputs(files))
        assert result.encoded == files
        assert np.array_equal(np.stack(result.arrays), pixels())

    @pytest.mark.parametrize("missing", ["images", "images_base64", "metadata"])
    def test_missing_output_is_named(self, missing: str) -> None:
        answer = outputs()
        del answer[missing]
        with pytest.raises(ServerFailure, match=f"no output '{missing}'"):
            GenerationResult.from_outputs(answer)

    def test_metadata_is_typed_and_keeps_unknown_fields(self) -> None:
        metadata = Metadata.from_json(json.dumps(METADATA | {"weather": "fine"}))
        assert metadata.seeds == (41, 42)
        assert metadata.cached_steps == (0, 4)
        assert metadata.attention_backend == "native"
        assert (metadata.generated_width, metadata.steps, metadata.seconds["denoise"]) == (32, 20, 1.5)
        assert metadata.extra == {"weather": "fine"}
        assert metadata.raw == METADATA | {"weather": "fine"}

    def test_missing_metadata_fields_have_defaults(self) -> None:
        assert Metadata.from_json("{}") == Metadata()

    @pytest.mark.parametrize("text", [b"", b"[1]", b"{", b"\xff"])
    def test_malformed_metadata_is_a_server_failure(self, text: bytes) -> None:
        with pytest.raises(ServerFailure, match="metadata is not"):
            Metadata.from_json(text)

    def test_save_keeps_the_bytes_of_the_same_format_and_converts_others(self, tmp_path: Path) -> None:
        files = [encoded(image) for image in pixels()]
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

    def test_unknown_suffix_writes_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(BadArgumentError, match=r"ends in '\.gif'; allowed: \.png, \.jpg, \.jpeg, \.webp"):
            GenerationResult.from_outputs(outputs()).save(tmp_path / "out.gif")
        assert list(tmp_path.iterdir()) == []

    def test_unknown_placeholder(self) -> None:
        with pytest.raises(BadArgumentError, match=r"'out_\{foo\}.png' has \{foo\}; allowed: \{index\}, \{seed\}, "):
            GenerationResult.from_outputs(outputs()).save("out_{foo}.png")

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

    def test_outputs_of_the_ar_stage_are_inputs_of_the_dit_stage(self, prior: PriorTokens) -> None:
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

    def test_a_large_seed_for_the_noise_is_folded(self, prior: PriorTokens) -> None:
        tensors = {tensor.name: tensor.data for tensor in prior_inputs(prior, 2**64 - 1)}
        assert tensors["resolved_seed"].tolist() == [-1]

    def test_seed_replaces_that_of_the_prior(self, prior: PriorTokens) -> None:
        tensors = {tensor.name: tensor for tensor in prior_inputs(prior, seed=-5)}
        assert tensors["resolved_seed"].data.tolist() == [-5]
        assert tensors["resolved_seed"].data.dtype == np.int64

    def test_tokens_are_saved_and_loaded(self, prior: PriorTokens, tmp_path: Path) -> None:
        kept = PriorTokens.load(prior.save(tmp_path / "tokens.npz"))
        assert kept.ar_metadata == prior.ar_metadata
        for name in set(vars(prior)) - {"ar_metadata"}:
            np.testing.assert_array_equal(getattr(kept, name), getattr(prior, name), strict=True)

    @pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 broken"])
    def test_load_refuses_other_files_by_name(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "tokens.npz").write_bytes(content)
        with pytest.raises(BadArgumentError, match=r"tokens\.npz' was not written by PriorTokens\.save"):
            PriorTokens.load(tmp_path / "tokens.npz")
        np.savez(tmp_path / "tokens.npz", prior_grid=np.zeros(2))
        with pytest.raises(BadArgumentError, match="was not written by"):
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
    def test_status_decides_the_error_class(self, status: str | None, error: type[Exception]) -> None:
        assert type(answered(status, "in ensemble 'glm_image', the queue is full")) is error

    @pytest.mark.parametrize("status", ["StatusCode.NOT_FOUND", "404"])
    def test_unloaded_models_mean_a_stopping_server(self, status: str) -> None:
        said = "Request for unknown model: 'glm_image' has no available versions"
        assert type(answered(status, said)) is BusyError

    @pytest.mark.parametrize(
        ("grpc", "http"), [("UNAVAILABLE", "503"), ("INTERNAL", "500"), ("NOT_FOUND", "404"), ("CANCELLED", "499")]
    )
    def test_status_names_are_the_same_over_both_protocols(self, grpc: str, http: str) -> None:
        failures = answered(f"StatusCode.{grpc}", "no"), answered(http, "no")
        assert [failure.status for failure in failures if isinstance(failure, ServerFailure)] == [grpc, grpc]

    def test_expired_queue_time_is_a_timeout(self) -> None:
        assert isinstance(answered("503", "in ensemble 'glm_image', Request timeout expired"), RequestTimeout)

    def test_refusal_that_mentions_a_deadline_is_a_refusal(self) -> None:
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
    def test_sentence_is_stripped_of_tritons_wrapping(self, wrapped: str) -> None:
        assert sentence(wrapped) == "height is 7; allowed: 32..2048"

    def test_quoted_wrapping_is_kept(self) -> None:
        text = "prompt is \"in ensemble 'x', \\n\\nAt:\"; allowed: less"
        assert sentence(text) == text

    def test_error_without_a_message(self) -> None:
        assert str(answered("StatusCode.INTERNAL", None)) == "the server failed with status INTERNAL and no message"

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
    def test_connection_fault_is_extracted(self, message: str, fault: str) -> None:
        assert connection_fault(message) == fault


class TestAddresses:
    @pytest.mark.parametrize(
        ("url", "protocol", "expected"),
        [
            (None, "grpc", ("grpc", "127.0.0.1:8001", False)),
            (None, "http", ("http", "127.0.0.1:8000", False)),
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
        [
            "",
            "ftp://box",
            "box:port",
            "box:70000",
            "http://",
            ":8001",
            "grpc://box/path",
            "user@box:1",
            "[::1",
            "box?x",
        ],
    )
    def test_invalid_url_is_refused(self, url: str) -> None:
        with pytest.raises(BadArgumentError, match=r"^url is .*; allowed: HOST:PORT"):
            Endpoint.parse(url)

    def test_unknown_protocol_is_refused(self) -> None:
        with pytest.raises(BadArgumentError, match="protocol is 'smtp'; allowed: grpc, http"):
            GlmImageClient("box", "smtp")  # type: ignore[arg-type]

    @pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf")])
    def test_timeout_must_be_positive(self, timeout: float) -> None:
        with pytest.raises(BadArgumentError, match="timeout is"):
            GlmImageClient("box", timeout=timeout)

    def test_timeouts_are_sent_in_microseconds(self) -> None:
        assert microseconds(None) is None
        assert [microseconds(1.5), microseconds(1e-9)] == [1_500_000, 1]

    def test_shapes_in_metadata_are_integers(self) -> None:
        metadata: dict[str, Any] = {
            "inputs": [{"name": "image", "shape": ["-1"]}],
            "outputs": [{"name": "images", "shape": ["-1", 3]}],
        }
        assert with_integer_shapes(metadata)["outputs"][0]["shape"] == [-1, 3]
        assert metadata["inputs"][0]["shape"] == [-1]


def test_stream_refuses_a_wrong_option_when_it_is_called() -> None:
    with GlmImageClient("127.0.0.1:1") as client, pytest.raises(TypeError, match="steps_of_another_api"):
        client.stream("a fox", steps_of_another_api=3)  # type: ignore[call-arg]
