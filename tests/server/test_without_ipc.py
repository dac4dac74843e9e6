"""A Triton whose models find no run directory, so no bus: it serves as ever, and says what it cannot do."""

from __future__ import annotations

import pytest

from glm_image.supervisor import TritonServer
from glm_image_client import GlmImageClient, GlmImageClientError
from server.kserve import Values, grpc_infer
from server.streaming import grpc_stream, texts

ASKED: Values = {
    "prompt": "A fox reading 'NEWS'",
    "height": 64,
    "width": 96,
    "num_inference_steps": 30,
    "seed": 3,
    "output_format": "png",
}


def test_a_stream_ends_with_the_ensembles_picture_and_tells_nothing_on_the_way(bare_triton: TritonServer) -> None:
    *told, last = grpc_stream(bare_triton, {**ASKED, "preview_every": 2}, request_id="mine")
    assert [(one.event["event"], one.event["request_id"]) for one in told] == [("queued", "mine")]
    assert last.event["event"] == "image"
    assert texts(last, "images_base64") == list(grpc_infer(bare_triton, ASKED, request_id="mine")["images_base64"])


@pytest.mark.parametrize("action", ["status", "cancel"])
def test_control_says_what_is_missing(bare_triton: TritonServer, action: str) -> None:
    with (
        GlmImageClient(f"grpc://{bare_triton.grpc_url}") as client,
        pytest.raises(GlmImageClientError, match=r"was started without GLM_IMAGE_RUN_DIRECTORY, .*start it with serve"),
    ):
        getattr(client, action)("mine")
