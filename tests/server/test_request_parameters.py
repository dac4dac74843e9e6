"""Request parameters that take the place of inputs: height, width, num_images and output_format."""

from __future__ import annotations

import base64
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc

from glm_image.request.parameters import GenerationParameters
from glm_image.request.tensors import request_fields
from glm_image.supervisor import TritonServer
from server.kserve import KServeError, grpc_infer, infer_inputs, metadata, post

VALUES = {"prompt": "A red fox", "num_inference_steps": 1, "seed": 7}
GIVEN = {"width": 64, "height": "32", "num_images": 2, "output_format": "png"}


def infer(server: TritonServer, parameters: dict[str, Any], **inputs: int) -> dict[str, list[Any]]:
    """Sends a request over HTTP and returns the data of each output."""
    types = {"prompt": "BYTES", "seed": "INT64"}
    tensors = [
        {"name": name, "datatype": types.get(name, "INT32"), "shape": [1], "data": [value]}
        for name, value in {**VALUES, **inputs}.items()
    ]
    answer = post(server, "/v2/models/glm_image/infer", {"inputs": tensors, "parameters": parameters})
    return {output["name"]: output["data"] for output in answer["outputs"]}


@pytest.fixture(scope="module")
def expected(triton: TritonServer) -> list[str]:
    """The images of a request that has the values as inputs, in base64."""
    outputs = grpc_infer(triton, {**VALUES, **GIVEN, "height": 32})
    return [file.decode() for file in outputs["images_base64"]]


def test_the_fields_are_those_of_the_documentation() -> None:
    names = [field.spec.name for field in request_fields(GenerationParameters) if field.spec.is_parameter]
    # A revision is that of one checkpoint: the tests of pools send it.
    assert sorted(names) == sorted([*GIVEN, "revision"])


def test_over_http(triton: TritonServer, expected: list[str]) -> None:
    assert infer(triton, GIVEN)["images_base64"] == expected


def test_over_grpc(triton: TritonServer, expected: list[str]) -> None:
    with closing(tritonclient.grpc.InferenceServerClient(triton.grpc_url)) as client:
        result = client.infer("glm_image", infer_inputs(tritonclient.grpc, VALUES), parameters=GIVEN)
    assert [file.decode() for file in result.as_numpy("images_base64")] == expected


def test_in_a_stream(triton: TritonServer, expected: list[str]) -> None:
    results: list[Any] = []
    with closing(tritonclient.grpc.InferenceServerClient(triton.grpc_url)) as client:
        client.start_stream(lambda result, error: results.append(error or result))
        client.async_stream_infer("glm_image_stream", infer_inputs(tritonclient.grpc, VALUES), parameters=GIVEN)
        client.stop_stream()
    assert [file.decode() for file in results[-1].as_numpy("images_base64")] == expected


def test_an_input_wins(triton: TritonServer) -> None:
    outputs = infer(triton, {**GIVEN, "width": 96, "num_images": 1}, width=32)
    described = metadata({"metadata": np.array([text.encode() for text in outputs["metadata"]], dtype=object)})
    assert (described["width"], described["height"]) == (32, 32)
    assert base64.b64decode(outputs["images_base64"][0]).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"width": 5000}, "width is 5000; allowed: 32 to 2048"),
        ({"width": "wide"}, "width is wide; allowed: a signed 32-bit integer"),
        ({"height": True}, "height is True; allowed: a signed 32-bit integer"),
        ({"num_images": 9}, "num_images is 9; allowed: 1 to 8"),
        ({"num_images": 2**40}, "num_images is 1099511627776; allowed: a signed 32-bit integer"),
        ({"output_format": "gif"}, "output_format is gif; allowed: raw, png, jpeg, webp"),
        ({"output_format": 5}, "output_format is 5; allowed: text"),
    ],
)
def test_they_are_validated_as_the_inputs_are(triton: TritonServer, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(KServeError, match=message):
        infer(triton, parameters)
