"""Every protocol: the same image, the same declared tensors, the same refusals."""

from __future__ import annotations

import json
import urllib.request
from contextlib import closing
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.grpc import service_pb2, service_pb2_grpc

from glm_image.pipeline import LocalPipeline
from glm_image.request.parameters import GenerationParameters
from glm_image.supervisor import TritonServer
from glm_image_client import GlmImageClient
from server.kserve import (
    CONTROL_INPUTS,
    OUTPUTS,
    REQUEST_INPUTS,
    SENDERS,
    STAGE_TENSORS,
    KServeError,
    Tensors,
    Values,
    decoded,
    files,
    generate,
    grpc_infer,
    http_binary_infer,
    http_json_infer,
    infer_inputs,
    metadata,
    post,
)

REQUEST: Values = {
    "prompt": "A fox reading 'NEWS'",
    "height": 64,
    "width": 96,
    "num_inference_steps": 3,
    "guidance_scale": 1.5,
    "seed": 11,
    "output_format": "png",
}

SHARED_INPUTS = (
    *("prompt", "image", "glyph_text", "negative_prompt"),
    *("num_inference_steps", "guidance_scale", "output_format", "revision", "file_metadata"),
)
MODELS: dict[str, tuple[Tensors, Tensors]] = {
    "glm_image": (REQUEST_INPUTS, OUTPUTS),
    "glm_ar": (REQUEST_INPUTS, STAGE_TENSORS),
    "glm_dit": ({name: REQUEST_INPUTS[name] for name in SHARED_INPUTS} | STAGE_TENSORS, OUTPUTS),
    "glm_control": (CONTROL_INPUTS, {"result": ("BYTES", [1])}),
}

REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "low": ({"height": 0}, "height is 0; allowed: 32 to 2048"),
    "high": ({"num_inference_steps": 201}, "num_inference_steps is 201; allowed: 1 to 200"),
    "blank": ({"prompt": " \n"}, r"prompt is  \n; allowed: text with something other than white space"),
    "word": ({"output_format": "bmp"}, "output_format is bmp; allowed: raw, png, jpeg, webp"),
    "float": ({"top_p": 0.0}, "top_p is 0.0; allowed: above 0, at most 1"),
}


@pytest.fixture(scope="module")
def png(pipeline: LocalPipeline) -> bytes:
    """The picture of ``REQUEST``, made without a server."""
    (file,) = pipeline.generate(GenerationParameters(**REQUEST)).encoded
    return file


@pytest.mark.parametrize("protocol", SENDERS)
def test_the_same_seed_gives_the_same_bytes(triton: TritonServer, png: bytes, protocol: str) -> None:
    outputs = SENDERS[protocol](triton, REQUEST)
    assert files(outputs) == [png]
    assert metadata(outputs)["seeds"] == [11]


@pytest.mark.parametrize("protocol", SENDERS)
@pytest.mark.parametrize("strings", [["STOP", "雪"], []], ids=["strings", "none"])
def test_the_text_to_render_is_named_over_every_protocol(
    triton: TritonServer, protocol: str, strings: list[str]
) -> None:
    outputs = SENDERS[protocol](triton, {**REQUEST, "num_inference_steps": 1, "glyph_text": strings})
    assert metadata(outputs)["rendered_text"] == strings


@pytest.mark.parametrize("infer", [grpc_infer, http_binary_infer, http_json_infer])
def test_raw_pixels_equal_the_png(triton: TritonServer, png: bytes, infer: Any) -> None:
    outputs = infer(triton, {**REQUEST, "output_format": "raw"})
    assert outputs["images"].dtype == np.uint8
    np.testing.assert_array_equal(outputs["images"], decoded(png)[None])


@pytest.mark.parametrize(
    "extra",
    [
        {"num_inference_steps": 1},
        pytest.param({}, marks=pytest.mark.full),  # the shortest request there is; the default steps have a test each
    ],
    ids=["and steps", "alone"],
)
def test_generate_requires_only_a_prompt_and_a_format(triton: TritonServer, extra: Values) -> None:
    outputs = generate(triton, {"prompt": "a fox", "output_format": "jpeg", **extra})
    reported = metadata(outputs)
    assert decoded(files(outputs)[0]).shape == (1024, 1024, 3)
    steps = extra.get("num_inference_steps", 50)
    assert (reported["height"], reported["width"], reported["steps"], len(reported["seeds"])) == (1024, 1024, steps, 1)


@pytest.mark.parametrize("model", MODELS)
def test_models_declare_exactly_these_tensors(triton: TritonServer, model: str) -> None:
    with closing(tritonclient.grpc.InferenceServerClient(triton.grpc_url)) as client:
        over_grpc = client.get_model_metadata(model)
        config = client.get_model_config(model).config
    with closing(tritonclient.http.InferenceServerClient(triton.http_url)) as client:
        over_http = client.get_model_metadata(model)
    declared = {
        "grpc": [{entry.name: (entry.datatype, list(entry.shape)) for entry in group} for group in _groups(over_grpc)],
        "http": [
            {entry["name"]: (entry["datatype"], entry["shape"]) for entry in over_http[group]}
            for group in ("inputs", "outputs")
        ],
    }
    assert declared["grpc"] == declared["http"] == list(MODELS[model])
    assert config.max_batch_size == 0
    assert not config.model_transaction_policy.decoupled
    # The stages name a missing prompt themselves.
    required = {"glm_dit": {"prior_token_ids", "prior_grid"}, "glm_control": {"request_id", "action"}}
    assert {entry.name for entry in config.input if not entry.optional} == required.get(model, set())


def _groups(declared: Any) -> tuple[Any, Any]:
    return declared.inputs, declared.outputs


@pytest.mark.parametrize("protocol", SENDERS)
@pytest.mark.parametrize("refusal", REFUSALS)
def test_refusal_is_a_single_sentence(triton: TritonServer, protocol: str, refusal: str) -> None:
    changed, sentence = REFUSALS[refusal]
    with pytest.raises(KServeError) as refused:
        SENDERS[protocol](triton, {**REQUEST, **changed})
    assert refused.value.status == ("INVALID_ARGUMENT" if protocol == "grpc" else "400")
    assert refused.value.message.removeprefix("in ensemble 'glm_image', ") == sentence


@pytest.mark.parametrize("protocol", ["grpc", "http-binary", "http-json"])
def test_an_unknown_input_is_refused_by_triton(triton: TritonServer, protocol: str) -> None:
    with pytest.raises(KServeError, match="unexpected inference input 'hoight'") as refused:
        SENDERS[protocol](triton, {**REQUEST, "hoight": 64})
    assert refused.value.status == ("INVALID_ARGUMENT" if protocol == "grpc" else "400")


@pytest.mark.parametrize("shape", [[2], [1, 1]])
def test_a_wrong_shape_is_refused_by_triton(triton: TritonServer, shape: list[int]) -> None:
    with pytest.raises(KServeError, match="unexpected shape for input 'height'") as refused:
        grpc_infer(triton, {**REQUEST, "height": np.full(shape, 64)})
    assert refused.value.status == "INVALID_ARGUMENT"


def test_unknown_parameters_are_ignored(triton: TritonServer, png: bytes) -> None:
    inputs = [
        {"name": name, "datatype": REQUEST_INPUTS[name][0], "shape": [1], "data": [value]}
        for name, value in REQUEST.items()
    ]
    body = {"id": "seven", "parameters": {"colour": "red", "weight": 3}, "inputs": inputs}
    answer = post(triton, "/v2/models/glm_image/infer", body)
    (text,) = next(output["data"] for output in answer["outputs"] if output["name"] == "images_base64")
    assert answer["id"] == "seven"
    np.testing.assert_array_equal(decoded(files({"images_base64": np.array([text])})[0]), decoded(png))


@pytest.mark.full
def test_raw_pixels_beyond_4_mib_need_a_limit_of_the_client(triton: TritonServer) -> None:
    """A bare stub has gRPC's own limit; tritonclient and the project's client set another."""
    values = {**REQUEST, "output_format": "raw", "height": 1184, "width": 1184, "num_inference_steps": 1}
    request = service_pb2.ModelInferRequest(model_name="glm_image")
    for item in infer_inputs(tritonclient.grpc, values):
        request.inputs.append(item._get_tensor())
        request.raw_input_contents.append(item._get_content())

    def images(options: list[tuple[str, int]]) -> bytes:
        with grpc.insecure_channel(triton.grpc_url, options=options) as channel:
            answer = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request)
            return answer.raw_output_contents[[output.name for output in answer.outputs].index("images")]

    with pytest.raises(grpc.RpcError) as lost:
        images([])
    assert lost.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    with GlmImageClient(triton.grpc_url) as client:
        pixels = client.generate(**values).pixels
    assert pixels is not None
    assert images([("grpc.max_receive_message_length", -1)]) == pixels.tobytes()


def test_health_and_metrics(triton: TritonServer) -> None:
    for path in ("/v2/health/live", "/v2/health/ready", *(f"/v2/models/{model}/ready" for model in MODELS)):
        with urllib.request.urlopen(f"http://{triton.http_url}{path}", timeout=10) as response:
            assert response.status == 200
    with urllib.request.urlopen(f"http://{triton.http_url}/v2", timeout=10) as response:
        assert json.load(response)["name"] == "triton"


def test_refused_requests_leave_no_state(triton: TritonServer, png: bytes) -> None:
    """After every refusal there is, the picture is the one from before."""
    for changed in ({"height": 0}, {"image": ["x"]}, {"hoight": 64}, {"prompt": "a\0b"}, {"seed": 2, "top_k": 0}):
        with pytest.raises(KServeError):
            grpc_infer(triton, {**REQUEST, **changed})
    assert files(grpc_infer(triton, REQUEST)) == [png]
