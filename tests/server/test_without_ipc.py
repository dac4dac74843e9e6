"""A Triton without a run directory, so without IPC: it serves requests, and reports what it cannot do."""

from __future__ import annotations

import pytest

from glm_image.supervisor import TritonServer
from glm_image_client import GlmImageClient, GlmImageClientError
from server.kserve import Values, grpc_infer
from server.streaming import grpc_stream, texts

REQUEST: Values = {
    "prompt": "A fox reading 'NEWS'",
    "height": 64,
    "width": 96,
    "num_inference_steps": 30,
    "seed": 3,
    "output_format": "png",
}


def test_stream_has_only_its_first_event_and_the_image(bare_triton: TritonServer) -> None:
    *events, last = grpc_stream(bare_triton, {**REQUEST, "preview_every": 2}, request_id="mine")
    assert [(response.event["event"], response.event["request_id"]) for response in events] == [("queued", "mine")]
    assert last.event["event"] == "image"
    assert texts(last, "images_base64") == list(grpc_infer(bare_triton, REQUEST, request_id="mine")["images_base64"])


@pytest.mark.parametrize("action", ["status", "cancel"])
def test_control_names_the_missing_variable(bare_triton: TritonServer, action: str) -> None:
    with (
        GlmImageClient(f"grpc://{bare_triton.grpc_url}") as client,
        pytest.raises(GlmImageClientError, match=r"was started without GLM_IMAGE_RUN_DIRECTORY, .*start it with serve"),
    ):
        getattr(client, action)("mine")
