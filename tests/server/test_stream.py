"""``glm_image_stream`` on a real server: what it tells, what it shows, and that its pictures are the ensemble's."""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glm_image.request.stages import STAGE_ORDER
from glm_image.supervisor import ServerSettings, TritonServer
from glm_image_client import GlmImageClient
from server.kserve import KServeError, Values, at_once, decoded, grpc_infer, metadata
from server.streaming import Response, grpc_stream, http_stream, texts
from server.test_metrics import page_when

# The first size whose preview, of 16 x 16 tokens, is less than half of it.
SIDE = 736
ASKED: Values = {
    "prompt": "A fox reading 'NEWS'",
    "height": SIDE,
    "width": SIDE,
    "num_inference_steps": 4,
    "seed": 3,
    "output_format": "png",
}
SMALL: Values = {**ASKED, "height": 64, "width": 96}
WAYS: dict[str, Callable[[TritonServer, Values], Iterator[Response]]] = {"grpc": grpc_stream, "sse": http_stream}
SAME_OF_TIMES = ("version", "seeds", "width", "height", "steps", "tokens", "model")


def files(response: Response) -> list[bytes]:
    return [base64.b64decode(text, validate=True) for text in texts(response, "images_base64")]


@pytest.mark.parametrize("way", ["grpc", pytest.param("sse", marks=pytest.mark.full)])
def test_the_stream_tells_shows_and_ends_with_the_ensembles_picture(triton: TritonServer, way: str) -> None:
    plain = grpc_infer(triton, ASKED)
    painted = page_when(triton, lambda _: True)["dit_previews_total"]
    *told, last = WAYS[way](triton, {**ASKED, "preview_steps": 2, "preview_every": 2})
    assert texts(last, "images_base64") == list(plain["images_base64"])
    ours, theirs = json.loads(texts(last, "metadata")[0]), metadata(plain)
    assert {name: ours[name] for name in SAME_OF_TIMES} == {name: theirs[name] for name in SAME_OF_TIMES}

    kinds = [response.event["event"] for response in told]
    assert kinds[0] == "queued"
    assert {"decode", "preview", "denoise"} <= set(kinds)
    assert last.event["event"] == "image"
    progress = [one.event for one in told if one.event["event"] != "preview" and not texts(one, "images_base64")]
    places = [(STAGE_ORDER.index(event["stage"]), event["done"]) for event in progress]
    assert places == sorted(places)
    assert len({response.event["request_id"] for response in told}) == 1
    seconds = [response.event["seconds"] for response in (*told, last)]
    assert seconds == sorted(seconds)

    (preview,) = [response for response in told if response.event["event"] == "preview"]
    assert decoded(files(preview)[0]).shape == (512, 512, 3)
    page = page_when(triton, lambda page: page["dit_previews_total"] > painted)
    assert page["dit_previews_total"] == painted + 1
    sketches = [one for one in told if one.event["event"] == "denoise" and texts(one, "images_base64")]
    assert [sketch.event["done"] for sketch in sketches] == [2]
    assert decoded(files(sketches[0])[0]).shape == (SIDE // 8, SIDE // 8, 3)


@pytest.mark.parametrize(
    "asked",
    [
        pytest.param({**ASKED, "preview_steps": 0}, id="not wanted", marks=pytest.mark.full),
        pytest.param(SMALL, id="small picture"),
    ],
)
def test_no_preview_where_none_is_wanted_or_worth_it(triton: TritonServer, asked: Values) -> None:
    assert "preview" not in [response.event["event"] for response in grpc_stream(triton, asked)]


@pytest.mark.full
def test_raw_pixels_and_several_pictures(triton: TritonServer) -> None:
    asked = {**SMALL, "output_format": "raw", "num_images": 3}
    plain = grpc_infer(triton, asked)
    *_, last = grpc_stream(triton, asked)
    np.testing.assert_array_equal(last.outputs["images"], plain["images"])
    assert last.outputs["images"].shape == (3, 64, 96, 3)


BAD: dict[str, tuple[Values, str]] = {
    "height": ({**SMALL, "height": 0}, "height is 0; allowed: 32 to 2048"),
    "prompt": ({**SMALL, "prompt": " "}, "prompt is  ; allowed: text with something other than white space"),
    "preview_steps": ({**SMALL, "preview_steps": -1}, "preview_steps is -1; allowed: 0 to 50"),
    "preview_every": ({**SMALL, "preview_every": 201}, "preview_every is 201; allowed: 0 to 200"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("way", [pytest.param("grpc", marks=pytest.mark.full), "sse"])
def test_bad_input_is_refused_in_the_stream(triton: TritonServer, way: str, name: str) -> None:
    asked, words = BAD[name]
    with pytest.raises(KServeError) as refused:
        list(WAYS[way](triton, asked))
    assert words in refused.value.message
    grpc_infer(triton, {**SMALL, "num_inference_steps": 1})


def seen(server: TritonServer, request_id: str, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Asks where a request is until it is where it is wanted."""
    with GlmImageClient(server.grpc_url) as client:
        while not wanted(told := client.status(request_id)):
            pass
    return told


@pytest.mark.parametrize("stage", ["decode", pytest.param("denoise", marks=pytest.mark.full)])
def test_a_closed_stream_frees_the_device(triton: TritonServer, stage: str) -> None:
    asked = {**ASKED, "num_inference_steps": 200, "preview_steps": 0}
    responses = grpc_stream(triton, asked, request_id=f"gone-{stage}")
    for response in responses:
        if response.event["stage"] == stage:
            break
    began = time.monotonic()
    responses.close()
    told = seen(triton, f"gone-{stage}", lambda told: told["state"] not in {"running", "queued"})
    assert told["state"] == "cancelled"
    assert time.monotonic() - began < 10
    grpc_infer(triton, {**SMALL, "num_inference_steps": 1})


def test_a_stream_is_cancelled_by_its_id_and_told_so(triton: TritonServer) -> None:
    responses = grpc_stream(triton, {**ASKED, "num_inference_steps": 200}, request_id="called off")
    next(responses)
    with GlmImageClient(triton.grpc_url) as client:
        while client.cancel("called off")["state"] == "unknown":
            pass
    with pytest.raises(KServeError, match="was cancelled"):
        list(responses)


def test_a_timeout_holds_over_both_stages(triton: TritonServer) -> None:
    with pytest.raises(KServeError, match=r"deadline|[Tt]imeout"):
        list(grpc_stream(triton, {**ASKED, "num_inference_steps": 200}, timeout_seconds=0.5))


@pytest.mark.full
def test_streams_beside_each_other_are_not_mixed(triton: TritonServer) -> None:
    """They share an id, and each tells of itself."""
    asked = [{**SMALL, "seed": seed, "num_inference_steps": 20} for seed in range(3)]
    alone = [grpc_infer(triton, one)["images_base64"][0] for one in asked]

    def last(one: Values) -> Any:
        *_, response = grpc_stream(triton, one, request_id="shared")
        return response.outputs

    assert [outputs["images_base64"][0] for outputs in at_once([partial(last, one) for one in asked]).outputs] == alone


def test_a_drained_server_finishes_its_streams(tiny_checkpoint: Path, same_threads: None) -> None:
    """And ends by itself, with nothing of them left."""
    with TritonServer(ServerSettings(tiny_checkpoint, drain_seconds=30)) as server:
        with GlmImageClient(f"grpc://{server.grpc_url}") as client:
            asked = {**SMALL, "num_inference_steps": 30}
            over_sse, by_client = http_stream(server, asked), client.stream(**asked)
            assert [next(over_sse).event["event"], next(by_client).kind] == ["queued", "queued"]
            server.request_stop()
            (*_, last), (*_, end) = at_once([partial(list, over_sse), partial(list, by_client)]).outputs
            assert texts(last, "images_base64")
            assert end.result is not None
        assert server.wait() == 0
        _, _, stopping = server.log_tail.partition("Signal (15) received")
        assert re.findall(r"Found (\d+) live models", stopping) == ["0"], (
            "Triton is asked when nothing is left to unload"
        )
