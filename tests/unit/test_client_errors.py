"""Every error of the client is a ``GlmImageClientError``, whatever its arguments, files and answers are."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from glm_image_client import (
    AsyncGlmImageClient,
    BadArgumentError,
    GenerationResult,
    GlmImageClient,
    GlmImageClientError,
    Metadata,
    PriorTokens,
    Retries,
    ServerFailure,
    StreamEvent,
)
from glm_image_client.calls import control, generate, paint, prior_tokens, stream
from glm_image_client.grpc_transport import outputs_of
from glm_image_client.http_transport import stream_outputs
from glm_image_client.options import StreamOptions
from glm_image_client.sources import source_bytes, source_images
from glm_image_client.transport import Endpoint, object_array

FOX = Image.effect_noise((6, 4), 60).convert("RGB")
RESULT = GenerationResult(Metadata(seeds=(1,), width=6, height=4), pixels=np.asarray(FOX)[None])


def png(image: Image.Image = FOX) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def truncated() -> Image.Image:
    return Image.open(io.BytesIO(png()[:60]))


def closed() -> Image.Image:
    image = Image.open(io.BytesIO(png()))
    image.close()
    return image


def sent_images(**options: Any) -> list[bytes]:
    (tensor,) = (tensor for tensor in generate("x", **options).tensors if tensor.name == "image")
    return list(tensor.data)


def pixels_of(file: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


class TestSources:
    @pytest.mark.parametrize("name", ["images", "image"])
    def test_a_single_image_of_every_kind_is_one_source(self, name: str, tmp_path: Path) -> None:
        file = tmp_path / "photo.png"
        file.write_bytes(png())
        for one in (str(file), file, png(), bytearray(png()), memoryview(png())):
            assert sent_images(**{name: one}) == [png()]
        for one in (FOX, np.asarray(FOX)):
            (sent,) = sent_images(**{name: one})
            assert np.array_equal(pixels_of(sent), np.asarray(FOX))

    @pytest.mark.parametrize("several", [[FOX, FOX], (FOX, FOX), iter([FOX, FOX]), np.stack([FOX, FOX])])
    def test_several_images_are_as_many_sources(self, several: Any) -> None:
        assert [pixels_of(file).tolist() for file in sent_images(images=several)] == [np.asarray(FOX).tolist()] * 2

    @pytest.mark.parametrize("channels", [None, 1, 3, 4])
    def test_arrays_become_images_of_the_same_pixels(self, channels: int | None) -> None:
        array = np.arange(24 * (channels or 1), dtype=np.uint8).reshape((4, 6, channels) if channels else (4, 6))
        decoded = np.asarray(Image.open(io.BytesIO(source_bytes(array))))
        assert np.array_equal(decoded, array.squeeze(-1) if channels == 1 else array)

    def test_both_names_together_are_refused(self) -> None:
        with pytest.raises(BadArgumentError, match="image and images are both given"):
            generate("x", images=[FOX], image=FOX)

    @pytest.mark.parametrize("images", [7, {"a": FOX}, io.BytesIO(png())])
    def test_what_is_no_image_nor_several_is_refused(self, images: Any) -> None:
        with pytest.raises(BadArgumentError, match=rf"^images is of type {type(images).__name__}; allowed: a path"):
            source_images(images)

    @pytest.mark.parametrize(
        ("image", "message"),
        [
            (truncated(), "of mode RGB that cannot be read or encoded: .*truncated"),
            (closed(), "that cannot be read or encoded: "),
            ("a\0b.png", "cannot be read: embedded null byte"),
            ("\ud800.png", "cannot be read: "),
            (Path(__file__).parent, "cannot be read: Is a directory"),
            ("", "cannot be read: Is a directory"),
            (np.zeros((2, 2), np.float32), r"array of type float32 and shape \[2, 2\]; allowed: uint8"),
            (np.zeros((2, 2, 5), np.uint8), "shape"),
            (np.zeros((0, 2, 3), np.uint8), "shape"),
            (np.array(3, np.uint8), "shape"),
            (None, "image is of type NoneType"),
        ],
    )
    def test_an_image_that_cannot_be_sent_is_refused(self, image: Any, message: str) -> None:
        with pytest.raises(BadArgumentError, match=message):
            source_bytes(image)

    @pytest.mark.parametrize(
        ("mode", "value", "sent_mode", "sent"),
        [
            ("I", 40000, "I;16", 40000),
            ("I;16B", 40000, "I;16", 40000),
            ("I;16L", 40000, "I;16", 40000),
            ("I;16N", 40000, "I;16", 40000),
            ("La", (64, 128), "LA", (127, 128)),
            ("RGBa", (64, 0, 0, 128), "RGBA", (127, 0, 0, 128)),
            ("PA", (3, 128), "RGBA", (3, 3, 3, 128)),
            ("F", 7.0, "RGB", (7, 7, 7)),
            ("CMYK", (255, 0, 0, 0), "RGB", (0, 255, 255)),
            ("1", 255, "1", 255),
        ],
    )
    def test_pil_modes(self, mode: str, value: Any, sent_mode: str, sent: Any) -> None:
        image = Image.new(mode, (3, 2))
        if mode == "PA":
            image.putpalette([index // 3 for index in range(768)])
        if mode.startswith("I;16"):  # Image.new cannot fill all of them
            wide = np.full((2, 3), value, {"I;16B": ">u2", "I;16L": "<u2", "I;16N": "=u2"}[mode])
            image = Image.frombytes(mode, (3, 2), wide.tobytes())
        else:
            image.paste(value, (0, 0, 3, 2))
        decoded = Image.open(io.BytesIO(source_bytes(image)))
        assert (decoded.mode, decoded.getpixel((1, 1))) == (sent_mode, sent)


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.sampled_from(["", "x", "7", "a\0b", "\ud800", "雪"]),
    st.binary(max_size=5),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.sampled_from("ab"), st.integers()),
    st.sampled_from([object(), Path("/"), np.zeros(3), np.array("x"), int, FOX, RESULT]),
)


CALLS: list[Callable[..., Any]] = [generate, stream, prior_tokens, lambda x, **options: paint(x, x, **options)]
OPTION_NAMES = st.sampled_from([*StreamOptions.__annotations__, "size"])


@given(prompt=st.one_of(st.just("x"), ANYTHING), options=st.dictionaries(OPTION_NAMES, ANYTHING))
@pytest.mark.parametrize("call", CALLS)
def test_arguments_of_any_kind_raise_nothing_else(
    call: Callable[..., Any], prompt: Any, options: dict[str, Any]
) -> None:
    with suppress(GlmImageClientError):
        call(prompt, **options)


@given(value=ANYTHING)
@pytest.mark.parametrize(
    "call",
    [
        lambda value: control("cancel", value, 1.0),
        lambda value: control("cancel", "id", value),
        Endpoint.parse,
        lambda value: Endpoint.parse("box", value),
        lambda value: Retries(attempts=value),
        lambda value: Retries(jitter=value),
        lambda value: RESULT.save(value) if not isinstance(value, (str, Path)) else None,
        PriorTokens.load,
        Metadata.from_json,
        lambda value: Metadata.from_mapping({"seeds": value, "width": value}),
    ],
)
def test_values_of_any_kind_raise_nothing_else(call: Callable[[Any], Any], value: Any) -> None:
    with suppress(GlmImageClientError):
        call(value)


class TestFiles:
    @pytest.mark.parametrize(
        "name", ["no/such/folder/a.png", "a\0b.png", "\ud800.png", "folder.png", "n" * 300 + ".png"]
    )
    def test_a_result_that_cannot_be_saved(self, tmp_path: Path, name: str) -> None:
        (tmp_path / "folder.png").mkdir()
        with pytest.raises(BadArgumentError, match="cannot be written: "):
            RESULT.save(f"{tmp_path}/{name}")

    def test_tokens_that_cannot_be_saved(self, tmp_path: Path) -> None:
        arrays = [np.zeros((1, 1), np.int32)] * 7
        for path in ("no/such/folder/a.npz", "a\0b"):
            with pytest.raises(BadArgumentError, match="cannot be written: "):
                PriorTokens(*arrays, {}).save(f"{tmp_path}/{path}")
        with pytest.raises(BadArgumentError, match="the tokens cannot be saved"):
            PriorTokens(*arrays, {"a": object()}).save(tmp_path / "a.npz")

    def test_damaged_tokens_are_loaded_or_refused(self, tmp_path: Path) -> None:
        buffer = io.BytesIO()
        arrays = {name: np.zeros((1, 1), np.int32) for name in PriorTokens.__dataclass_fields__}
        np.savez_compressed(buffer, **arrays | {"ar_metadata": np.array("{}")})
        whole, file = buffer.getvalue(), tmp_path / "tokens.npz"
        for place in range(0, len(whole), 5):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
            with suppress(BadArgumentError):
                PriorTokens.load(file)


class TestAnswers:
    @pytest.mark.parametrize("file", [b"", b"no image", png()[:60]])
    def test_an_image_that_cannot_be_read_is_a_server_failure(self, file: bytes, tmp_path: Path) -> None:
        result = GenerationResult(Metadata(seeds=(1,)), [base64.b64encode(file)])
        with pytest.raises(ServerFailure, match="an image of the server's response cannot be read"):
            _ = result.image
        with pytest.raises(ServerFailure, match="an image of the server's response cannot be read"):
            result.save(tmp_path / "a.jpg")

    def test_a_result_without_images(self) -> None:
        with pytest.raises(ServerFailure, match="no image"):
            _ = GenerationResult(Metadata()).image

    @pytest.mark.parametrize(
        "texts", [(), (b"{}", b"{}"), (b"[]",), (b"\xff",), (b"{",), (b"{}",), (b'{"event": []}',)]
    )
    def test_a_malformed_event(self, texts: tuple[bytes, ...]) -> None:
        with pytest.raises(ServerFailure, match="the server's "):
            StreamEvent.from_outputs({"event": object_array(list(texts))})

    @pytest.mark.parametrize("data", [b"[]", b"7", b'{"error": 7}', b"{", b'{"event": "no JSON"}'])
    def test_a_malformed_event_over_http(self, data: bytes) -> None:
        with pytest.raises(GlmImageClientError):
            StreamEvent.from_outputs(stream_outputs(b"data: " + data) or {})

    def test_a_tensor_without_its_data(self) -> None:
        class Broken:
            def get_response(self) -> Any:
                return type("Response", (), {"outputs": [type("Output", (), {"name": "images"})]})

            def as_numpy(self, name: str) -> Any:
                return np.zeros(3).reshape(2, 2)

        with pytest.raises(ServerFailure, match="does not have the data that it declares"):
            outputs_of(Broken())

    def test_files_that_are_not_base64(self) -> None:
        metadata = object_array([json.dumps({}).encode()])
        for text in (b"!", base64.b64encode(b"abc")[:-1], "\xe4"):
            with pytest.raises(ServerFailure, match="is not base64"):
                _ = GenerationResult.from_outputs(
                    {"metadata": metadata, "images_base64": object_array([text])}  # type: ignore[list-item]
                ).encoded


class TestClosedClient:
    @pytest.mark.parametrize("protocol", ["grpc", "http"])
    def test_every_call_is_refused(self, protocol: Any) -> None:
        client = GlmImageClient("127.0.0.1:1", protocol)
        client.close()
        client.close()
        calls: list[Callable[[], Any]] = [
            client.server_ready,
            client.model_metadata,
            lambda: client.generate("x"),
            lambda: list(client.stream("x")),
            lambda: client.prior_tokens("x"),
            lambda: client.status("x"),
            lambda: client.cancel("x"),
        ]
        for call in calls:
            with pytest.raises(BadArgumentError, match="the client is closed"):
                call()

        async def send() -> None:
            asynchronous = AsyncGlmImageClient("127.0.0.1:1", protocol)
            await asynchronous.close()
            await asynchronous.generate("x")

        with pytest.raises(BadArgumentError, match="the client is closed"):
            asyncio.run(send())
