"""The gateway over pools: a real Triton that serves the stages as a member of both pools, and a server of both stages
with the same checkpoint, whose answers are the reference."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http

from glm_image.supervisor import ServerSettings, TritonServer
from glm_image_client import (
    AsyncGlmImageClient,
    GlmImageClient,
    RefusedError,
    RequestCancelled,
    RequestTimeout,
    StreamEvent,
)
from helpers import wait_until
from running_gateway import RunningGateway, error_of, events_of, running_gateway
from server.kserve import infer_inputs

PROMPT = "A fox reading 'NEWS'"
SMALL: dict[str, Any] = {"height": 64, "width": 96, "num_inference_steps": 3, "seed": 3}
LONG: dict[str, Any] = {"height": 512, "width": 512, "num_inference_steps": 200, "seed": 3}


@pytest.fixture(scope="module")
def member(tiny_checkpoint: Path, same_threads: None) -> Iterator[TritonServer]:
    """A server that is a member of both pools."""
    settings = ServerSettings(tiny_checkpoint, models=("glm_ar", "glm_dit"), drain_seconds=5)
    with TritonServer(settings) as server:
        yield server


@pytest.fixture(scope="module")
def pools(member: TritonServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    url = (f"grpc://{member.grpc_url}",)
    with running_gateway("", tmp_path_factory.mktemp("store"), ar=url, dit=url, grpc_port=0) as gateway:
        assert wait_until(lambda: gateway.client.get("/ready").status_code == 200)
        yield gateway


@pytest.fixture(scope="module")
def client(pools: RunningGateway) -> Iterator[GlmImageClient]:
    """The client at the gateway's own port of KServe's protocol."""
    with GlmImageClient(f"127.0.0.1:{pools.grpc_port}") as made:
        yield made


@pytest.fixture(scope="module")
def reference(triton: TritonServer) -> Iterator[GlmImageClient]:
    with GlmImageClient(triton.grpc_url) as made:
        yield made


def test_images_are_those_of_a_server_of_both_stages(
    pools: RunningGateway, client: GlmImageClient, reference: GlmImageClient
) -> None:
    expected = reference.generate(PROMPT, num_images=2, **SMALL)
    found = client.generate(PROMPT, num_images=2, **SMALL)
    assert found.encoded == expected.encoded
    assert found.seeds == (3, 4)
    assert set(found.metadata.seconds) == set(expected.metadata.seconds)
    body = {"prompt": PROMPT, "n": 2, "size": "96x64", "num_inference_steps": 3, "seed": 3}
    answer = pools.post("/v1/images/generations", body).json()
    assert [base64.b64decode(item["b64_json"]) for item in answer["data"]] == expected.encoded
    source = expected.encoded[0]
    assert (
        client.generate("Snow", image=source, **SMALL).encoded
        == reference.generate("Snow", image=source, **SMALL).encoded
    )


@pytest.mark.full
def test_streams_have_the_events_of_a_server_of_both_stages(client: GlmImageClient, reference: GlmImageClient) -> None:
    options = {**SMALL, "height": 736, "width": 736, "num_inference_steps": 2, "preview_every": 1, "preview_steps": 1}
    found, expected = (list(at.stream(PROMPT, **options)) for at in (client, reference))
    assert found[-1].result is not None
    assert expected[-1].result is not None
    assert found[-1].result.encoded == expected[-1].result.encoded
    kinds = {"queued", "decode", "preview", "denoise", "image"}
    assert kinds <= {event.kind for event in found}
    assert {event.stage for event in found} <= {event.stage for event in expected} | {"dit_queue", "prefill"}
    for kind in ("preview", "denoise"):
        assert _pictures(found, kind) == _pictures(expected, kind)
    seconds = [event.seconds for event in found]
    assert seconds == sorted(seconds)


def _pictures(events: list[StreamEvent], kind: str) -> list[bytes]:
    return [file for event in events if event.kind == kind for file in event.files]


@pytest.mark.full
def test_the_openai_stream_has_intermediate_images(pools: RunningGateway) -> None:
    body = {"prompt": PROMPT, "size": "96x64", "num_inference_steps": 20, "stream": True, "partial_images": 1, "n": 2}
    with pools.client.stream("POST", "/v1/images/generations", json=body) as response:
        names = [name for name, _ in events_of(response) if name]
    assert names[-2:] == ["image_generation.completed"] * 2


def test_a_request_is_found_and_cancelled_by_its_id(client: GlmImageClient) -> None:
    with ThreadPoolExecutor(1) as threads:
        unwanted = threads.submit(client.generate, PROMPT, request_id="unwanted", **LONG)
        assert wait_until(
            lambda: (
                client.status("unwanted")["requests"]
                and client.status("unwanted")["requests"][-1]["stage"] == "denoise"
            )
        )
        reply = client.cancel("unwanted")
        assert (reply["state"], reply["cancelled"]) == ("cancelled", 1)
        with pytest.raises(RequestCancelled, match="request unwanted was cancelled"):
            unwanted.result()
    assert client.status("unwanted")["state"] == "cancelled"
    assert client.cancel("unwanted")["state"] == "already_cancelled"
    assert client.status("never sent")["state"] == "unknown"
    assert set(client.defaults()) >= {"width", "height", "num_inference_steps"}


def test_a_closed_connection_cancels_the_request_at_the_member(pools: RunningGateway, member: TritonServer) -> None:
    async def leave() -> None:
        async with AsyncGlmImageClient(f"127.0.0.1:{pools.grpc_port}") as leaving:
            call = asyncio.ensure_future(leaving.generate(PROMPT, request_id="left", **LONG))
            with GlmImageClient(member.grpc_url) as control:
                while not any(request["stage"] == "denoise" for request in control.status("left")["requests"]):
                    await asyncio.sleep(0.05)
                call.cancel()
                await asyncio.gather(call, return_exceptions=True)
                assert wait_until(
                    lambda: "cancelled" in {request["state"] for request in control.status("left")["requests"]}
                )

    asyncio.run(leave())


def test_the_deadline_of_a_request_holds_over_both_stages(client: GlmImageClient) -> None:
    with pytest.raises(RequestTimeout):
        client.generate(PROMPT, timeout=1.0, **LONG)


def test_what_is_refused_names_the_input(pools: RunningGateway, client: GlmImageClient) -> None:
    with pytest.raises(RefusedError, match=r"^num_inference_steps is 999; allowed: 1 to 200$"):
        client.generate(PROMPT, num_inference_steps=999)
    with pytest.raises(RefusedError, match=r"^preview_steps is 99; allowed: 0 to 50$"):
        list(client.stream(PROMPT, preview_steps=99, **SMALL))
    refused = pools.post("/v1/images/generations", {"prompt": PROMPT, "size": "9999x64"})
    assert refused.status_code == 400
    assert error_of(refused)["param"] == "size"


def test_a_request_may_name_its_revision(pools: RunningGateway, client: GlmImageClient, member: TritonServer) -> None:
    revision = client.generate(PROMPT, **SMALL).metadata.model["revision"]
    assert client.generate(PROMPT, revision=revision, **SMALL).metadata.model["revision"] == revision
    allowed = f"^revision is other; allowed: {revision}$"
    with pytest.raises(RefusedError, match=allowed):
        client.generate(PROMPT, revision="other", **SMALL)
    with GlmImageClient(member.grpc_url) as direct, pytest.raises(RefusedError, match=allowed):
        direct.prior_tokens(PROMPT, revision="other")
    body = {"prompt": PROMPT, "size": "64x64", "num_inference_steps": 1, "revision": "other"}
    assert error_of(pools.post("/v1/images/generations", body))["param"] == "revision"


def test_the_dit_refuses_tokens_of_another_checkpoint(client: GlmImageClient) -> None:
    prior = client.prior_tokens(PROMPT, height=64, width=64, seed=3)
    rendered = client.paint(PROMPT, prior, num_inference_steps=1)
    fingerprint = prior.ar_metadata["fingerprint"]
    foreign = type(prior)(**{**vars(prior), "ar_metadata": {**prior.ar_metadata, "fingerprint": "0123456789ab"}})
    with pytest.raises(RefusedError, match=f"^ar_metadata's fingerprint is 0123456789ab; allowed: {fingerprint}, "):
        client.paint(PROMPT, foreign, num_inference_steps=1)
    unnamed = {name: value for name, value in prior.ar_metadata.items() if name != "fingerprint"}
    kept = type(prior)(**{**vars(prior), "ar_metadata": unnamed})
    assert client.paint(PROMPT, kept, num_inference_steps=1).encoded == rendered.encoded


def test_tritonclient_calls_the_pools_over_grpc_and_http(pools: RunningGateway, reference: GlmImageClient) -> None:
    expected = reference.generate(PROMPT, output_format="raw", **SMALL).pixels
    values = {"prompt": PROMPT, "output_format": "raw", **SMALL}
    for kind, url in (
        (tritonclient.grpc, f"127.0.0.1:{pools.grpc_port}"),
        (tritonclient.http, pools.url.removeprefix("http://").rstrip("/")),
    ):
        with kind.InferenceServerClient(url) as server:
            assert server.is_server_live()
            assert server.is_server_ready()
            assert server.is_model_ready("glm_image")
            assert not server.is_model_ready("glm_other")
            result = server.infer("glm_image", infer_inputs(kind, values), request_id="fox")
            np.testing.assert_array_equal(result.as_numpy("images"), expected)
            metadata = json.loads(result.as_numpy("metadata")[0])
            assert metadata["seeds"] == [3]
    body = {
        "inputs": [{"name": "prompt", "datatype": "BYTES", "shape": [1], "data": [PROMPT]}],
        "parameters": {"output_format": "png", "width": 64, "height": 64},
        "outputs": [{"name": "images_base64"}],
    }
    (output,) = pools.post("/v2/models/glm_image/infer", body).json()["outputs"]
    assert base64.b64decode(output["data"][0]).startswith(b"\x89PNG")
    names = {tensor["name"] for tensor in pools.client.get("/v2/models/glm_image").json()["inputs"]}
    assert {"prompt", "image", "seed", "revision"} <= names
    wrong = pools.post("/v2/models/glm_image/infer", {"inputs": [{"name": "prompt"}]})
    assert (wrong.status_code, "datatype of a tensor" in wrong.json()["error"]) == (400, True)


def test_metrics_report_the_pools(pools: RunningGateway, client: GlmImageClient) -> None:
    client.generate(PROMPT, **SMALL)
    for stage in ("glm_ar", "glm_dit"):
        assert pools.metric("glm_image_gateway_members", stage=stage, state="ready") == 1
        assert pools.metric("glm_image_gateway_queued_seconds", stage=stage) == 0
        assert pools.metric("glm_image_gateway_outstanding_seconds", stage=stage) == 0
