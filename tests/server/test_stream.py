"""``glm_image_stream`` on a real server: its events, its intermediate images, and the ensemble's images at its end."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest

from glm_image.request.stages import STAGE_ORDER
from glm_image.supervisor import TritonServer
from glm_image_client import GlmImageClient
from helpers import wait_until
from server.kserve import KServeError, Values, at_once, decoded, grpc_infer, metadata, post
from server.streaming import Response, final_state, grpc_stream, http_stream, texts
from server.test_metrics import page_when

# The first size whose preview, of 16 x 16 tokens, is less than half of it.
SIDE = 736
REQUEST: Values = {
    "prompt": "A fox reading 'NEWS'",
    "height": SIDE,
    "width": SIDE,
    "num_inference_steps": 4,
    "seed": 3,
    "output_format": "png",
}
SMALL: Values = {**REQUEST, "height": 64, "width": 96}
PROTOCOLS: dict[str, Callable[[TritonServer, Values], Iterator[Response]]] = {"grpc": grpc_stream, "sse": http_stream}
REPRODUCIBLE = ("version", "seeds", "width", "height", "steps", "tokens", "model")


def files(response: Response) -> list[bytes]:
    return [base64.b64decode(text, validate=True) for text in texts(response, "images_base64")]


@pytest.mark.parametrize("protocol", ["grpc", pytest.param("sse", marks=pytest.mark.full)])
def test_the_stream_reports_progress_and_ends_with_the_ensembles_image(triton: TritonServer, protocol: str) -> None:
    plain = grpc_infer(triton, REQUEST)
    previews_before = page_when(triton, lambda _: True)["dit_previews_total"]
    *events, last = PROTOCOLS[protocol](triton, {**REQUEST, "preview_steps": 2, "preview_every": 2})
    assert texts(last, "images_base64") == list(plain["images_base64"])
    ours, theirs = json.loads(texts(last, "metadata")[0]), metadata(plain)
    assert {name: ours[name] for name in REPRODUCIBLE} == {name: theirs[name] for name in REPRODUCIBLE}

    kinds = [response.event["event"] for response in events]
    assert kinds[0] == "queued"
    assert {"decode", "preview", "denoise"} <= set(kinds)
    assert last.event["event"] == "image"
    progress = [
        response.event
        for response in events
        if response.event["event"] != "preview" and not texts(response, "images_base64")
    ]
    places = [(STAGE_ORDER.index(event["stage"]), event["done"]) for event in progress]
    assert places == sorted(places)
    assert len({response.event["request_id"] for response in events}) == 1
    seconds = [response.event["seconds"] for response in (*events, last)]
    assert seconds == sorted(seconds)

    (preview,) = [response for response in events if response.event["event"] == "preview"]
    assert decoded(files(preview)[0]).shape == (512, 512, 3)
    page = page_when(triton, lambda page: page["dit_previews_total"] > previews_before)
    assert page["dit_previews_total"] == previews_before + 1
    estimates = [
        response for response in events if response.event["event"] == "denoise" and texts(response, "images_base64")
    ]
    assert [estimate.event["done"] for estimate in estimates] == [2]
    assert decoded(files(estimates[0])[0]).shape == (SIDE // 8, SIDE // 8, 3)


@pytest.mark.parametrize(
    "values",
    [
        pytest.param({**REQUEST, "preview_steps": 0}, id="off", marks=pytest.mark.full),
        pytest.param(SMALL, id="small picture"),
    ],
)
def test_no_preview_if_disabled_or_the_image_is_small(triton: TritonServer, values: Values) -> None:
    assert "preview" not in [response.event["event"] for response in grpc_stream(triton, values)]


@pytest.mark.full
def test_raw_pixels_and_several_images(triton: TritonServer) -> None:
    values = {**SMALL, "output_format": "raw", "num_images": 3}
    plain = grpc_infer(triton, values)
    *_, last = grpc_stream(triton, values)
    np.testing.assert_array_equal(last.outputs["images"], plain["images"])
    assert last.outputs["images"].shape == (3, 64, 96, 3)


BAD: dict[str, tuple[Values, str]] = {
    "height": ({**SMALL, "height": 0}, "height is 0; allowed: 32 to 2048"),
    "prompt": ({**SMALL, "prompt": " "}, "prompt is  ; allowed: text with something other than white space"),
    "preview_steps": ({**SMALL, "preview_steps": -1}, "preview_steps is -1; allowed: 0 to 50"),
    "preview_every": ({**SMALL, "preview_every": 201}, "preview_every is 201; allowed: 0 to 200"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("protocol", [pytest.param("grpc", marks=pytest.mark.full), "sse"])
def test_bad_input_is_refused_in_the_stream(triton: TritonServer, protocol: str, name: str) -> None:
    values, message = BAD[name]
    with pytest.raises(KServeError) as refused:
        list(PROTOCOLS[protocol](triton, values))
    assert message in refused.value.message
    grpc_infer(triton, {**SMALL, "num_inference_steps": 1})


def test_generate_answers_with_the_endpoint_that_streams_need(triton: TritonServer) -> None:
    """Triton does not tell a model by which endpoint it is called, and refuses only when all responses are there."""
    answer = post(triton, "/v2/models/glm_image_stream/generate", {**SMALL, "num_inference_steps": 1})
    assert answer == {
        "error": "generate expects model to produce exactly 1 response, "
        "use generate stream for model that generates various number of responses"
    }


@pytest.mark.parametrize("stage", ["decode", pytest.param("denoise", marks=pytest.mark.full)])
def test_closed_stream_frees_the_device(triton: TritonServer, stage: str) -> None:
    values = {**REQUEST, "num_inference_steps": 200, "preview_steps": 0}
    responses = grpc_stream(triton, values, request_id=f"gone-{stage}")
    for response in responses:
        if response.event["stage"] == stage:
            break
    responses.close()
    with GlmImageClient(triton.grpc_url) as client:
        assert final_state(client, f"gone-{stage}") == "cancelled"
    grpc_infer(triton, {**SMALL, "num_inference_steps": 1})


def test_stream_cancelled_by_id_ends_with_that_error(triton: TritonServer) -> None:
    responses = grpc_stream(triton, {**REQUEST, "num_inference_steps": 200}, request_id="called off")
    next(responses)
    with GlmImageClient(triton.grpc_url) as client:
        assert wait_until(lambda: client.cancel("called off")["state"] != "unknown")
    with pytest.raises(KServeError, match="was cancelled"):
        list(responses)


def test_a_timeout_holds_over_both_stages(triton: TritonServer) -> None:
    with pytest.raises(KServeError, match=r"deadline|[Tt]imeout"):
        list(grpc_stream(triton, {**REQUEST, "num_inference_steps": 200}, timeout_seconds=0.5))


@pytest.mark.full
def test_concurrent_streams_of_one_id_are_not_mixed(triton: TritonServer) -> None:
    """Each reports its own progress."""
    values = [{**SMALL, "seed": seed, "num_inference_steps": 20} for seed in range(3)]
    alone = [grpc_infer(triton, request)["images_base64"][0] for request in values]

    def last(request: Values) -> Any:
        *_, response = grpc_stream(triton, request, request_id="shared")
        return response.outputs

    assert [
        outputs["images_base64"][0] for outputs in at_once([partial(last, request) for request in values]).outputs
    ] == alone
