"""The stages on their own: tokens that are kept, edited and rendered again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from glm_image.pipeline import LocalPipeline
from glm_image.supervisor import TritonServer
from glm_image_client import GlmImageClient
from server.kserve import (
    KServeError,
    Outputs,
    Values,
    grpc_infer,
    http_binary_infer,
    http_json_infer,
    metadata,
    post,
)
from server.streaming import http_stream

REQUEST: Values = {"prompt": "A fox reading 'NEWS'", "height": 70, "width": 128, "seed": 21, "num_images": 2}
DIT_VALUES: Values = {"num_inference_steps": 3, "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def prior(triton: TritonServer) -> Outputs:
    """The outputs of the AR for ``REQUEST``."""
    return grpc_infer(triton, REQUEST, "glm_ar")


def paint(triton: TritonServer, prior: Outputs, **changed: Any) -> Outputs:
    return grpc_infer(triton, {"prompt": REQUEST["prompt"], **prior, **DIT_VALUES, **changed}, "glm_dit")


def test_the_ar_returns_all_inputs_of_the_dit(prior: Outputs, pipeline: LocalPipeline) -> None:
    assert {name: (str(array.dtype), array.shape) for name, array in prior.items()} == {
        "prior_token_ids": ("int32", (2, 12)),
        "prior_grid": ("int32", (2,)),
        "source_token_ids": ("int32", (0,)),
        "source_grids": ("int32", (0, 2)),
        "resolved_seed": ("int64", (1,)),
        "resolved_size": ("int32", (2,)),
        "deadline_ns": ("int64", (1,)),
        "ar_metadata": ("object", (1,)),
    }
    assert prior["prior_grid"].tolist() == [3, 4]
    assert prior["resolved_size"].tolist() == [70, 128]
    assert prior["resolved_seed"].tolist() == [21]
    assert prior["deadline_ns"].tolist() == [0]
    assert prior["prior_token_ids"].min() >= 0
    assert prior["prior_token_ids"].max() < pipeline.dit.codebook_size


@pytest.mark.parametrize("infer", [grpc_infer, http_binary_infer, http_json_infer])
def test_stages_called_in_turn_equal_the_ensemble(triton: TritonServer, prior: Outputs, infer: Any) -> None:
    whole = infer(triton, {**REQUEST, **DIT_VALUES})
    tokens = infer(triton, REQUEST, "glm_ar")
    for name in ("prior_token_ids", "prior_grid", "resolved_seed", "resolved_size"):
        np.testing.assert_array_equal(tokens[name], prior[name])
    rendered = infer(triton, {"prompt": REQUEST["prompt"], **tokens, **DIT_VALUES}, "glm_dit")
    np.testing.assert_array_equal(rendered["images"], whole["images"])
    reports = [metadata(outputs) for outputs in (rendered, whole)]
    for report in reports:
        del report["seconds"]
    assert reports[0] == reports[1]


def test_dit_requires_only_tokens_and_their_grid(triton: TritonServer, prior: Outputs) -> None:
    """The size is then that of the grid, the seed random and reported."""
    values = {"prompt": REQUEST["prompt"], "prior_grid": prior["prior_grid"], **DIT_VALUES}
    first_row = prior["prior_token_ids"][:1]
    rendered = grpc_infer(triton, {**values, "prior_token_ids": first_row}, "glm_dit")
    found = metadata(rendered)
    assert rendered["images"].shape == (1, 96, 128, 3)
    assert found["tokens"]["image"] == 12
    assert 0 <= found["seeds"][0] < 2**53
    with_seed = {**values, "prior_token_ids": first_row, "resolved_seed": found["seeds"][0]}
    np.testing.assert_array_equal(grpc_infer(triton, with_seed, "glm_dit")["images"], rendered["images"])
    of_the_ensemble = grpc_infer(triton, {**values, "prior_token_ids": first_row, "resolved_seed": 21}, "glm_dit")
    whole = paint(triton, prior)["images"][:1]
    np.testing.assert_array_equal(of_the_ensemble["images"][:, :70], whole)


def test_edited_tokens_give_a_different_image(triton: TritonServer, prior: Outputs) -> None:
    edited = prior["prior_token_ids"].copy()
    edited[1] = edited[1, ::-1]
    before, after = paint(triton, prior)["images"], paint(triton, prior, prior_token_ids=edited)["images"]
    np.testing.assert_array_equal(after[0], before[0])
    assert (after[1] != before[1]).mean() > 0.1


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_the_client_runs_the_stages(triton: TritonServer, prior: Outputs, protocol: Any) -> None:
    url = triton.grpc_url if protocol == "grpc" else triton.http_url
    with GlmImageClient(url, protocol) as client:
        tokens = client.prior_tokens(**REQUEST)
        result = client.paint(REQUEST["prompt"], tokens, **DIT_VALUES)
    for picture, expected in zip(result.arrays, paint(triton, prior)["images"], strict=True):
        np.testing.assert_array_equal(picture, expected)
    assert result.seeds == (21, 22)


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "wrong count": ({"prior_token_ids": np.zeros((1, 11))}, "number of columns is 11; allowed: 12, as prior_grid"),
    "no rows": ({"prior_token_ids": np.zeros((0, 12))}, "number of rows is 0; allowed: 1 to 8"),
    "too many rows": ({"prior_token_ids": np.zeros((9, 12))}, "number of rows is 9; allowed: 1 to 8"),
    "wrong grid": ({"prior_grid": [3, 5]}, r"number of columns is 12; allowed: 15, as prior_grid \(3, 5\)"),
    "no grid": ({"prior_grid": [0, 4]}, r"prior_grid is \(0, 4\); allowed: two sides of 1 to 64"),
    "huge grid": ({"prior_grid": [2**31 - 1, 4]}, r"prior_grid is \(2147483647, 4\); allowed: two sides of 1 to 64"),
    "negative token": ({"prior_token_ids": np.full((1, 12), -1)}, "a tensor with -1; allowed: 0 to"),
    "other size": ({"resolved_size": [64, 128]}, r"resolved_size is \(64, 128\); allowed: a size that rounds up to 96"),
    "no steps": ({"num_inference_steps": 0}, "num_inference_steps is 0; allowed: 1 to 200"),
    "no JSON": ({"ar_metadata": "[1"}, r"ar_metadata is \[1; allowed: a JSON object"),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_the_dit_validates_its_inputs(triton: TritonServer, prior: Outputs, refusal: str) -> None:
    changed, sentence = REFUSALS[refusal]
    with pytest.raises(KServeError, match=sentence) as refused:
        paint(triton, prior, **changed)
    assert refused.value.status == "INVALID_ARGUMENT"


def test_codebook_has_the_size_of_the_checkpoint(triton: TritonServer, prior: Outputs, pipeline: LocalPipeline) -> None:
    size = pipeline.dit.codebook_size
    last = np.full((1, 12), size - 1)
    assert paint(triton, prior, prior_token_ids=last)["images"].shape == (1, 70, 128, 3)
    with pytest.raises(KServeError, match=f"a tensor with {size}; allowed: 0 to {size - 1}"):
        paint(triton, prior, prior_token_ids=np.full((1, 12), size))


def test_a_timeout_holds_for_the_ensemble_and_for_each_stage_alone(triton: TritonServer, prior: Outputs) -> None:
    large = {**REQUEST, "height": 1024, "width": 1024}
    dit_inputs = {"prompt": REQUEST["prompt"], **prior, "num_inference_steps": 200}
    for model, values in (("glm_image", large), ("glm_ar", large), ("glm_dit", dit_inputs)):
        with pytest.raises(KServeError, match="its deadline") as late:
            grpc_infer(triton, values, model, timeout_seconds=0.05)
        assert late.value.status == "UNAVAILABLE"


GENERATE_ENDPOINTS: dict[str, Callable[[TritonServer, Values], object]] = {
    "glm_image": lambda server, values: post(server, "/v2/models/glm_image/generate", values),
    "glm_ar": lambda server, values: post(server, "/v2/models/glm_ar/generate", values),
    "glm_image_stream": lambda server, values: list(http_stream(server, values)),
}


@pytest.mark.parametrize("parameters", [{"timeout": 50_000}, {"timeout": "50000"}, {"parameters": {"timeout": 50_000}}])
@pytest.mark.parametrize("endpoint", GENERATE_ENDPOINTS)
def test_a_timeout_holds_over_the_generate_endpoints(
    triton: TritonServer, endpoint: str, parameters: dict[str, Any]
) -> None:
    """To which it is an ordinary parameter."""
    values = {**REQUEST, "height": 1024, "width": 1024, **parameters}
    with pytest.raises(KServeError, match="its deadline"):
        GENERATE_ENDPOINTS[endpoint](triton, values)
