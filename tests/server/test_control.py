"""Cancels, status calls and deadlines of requests in every stage, on a real server."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc

from glm_image.dit.settings import DitSettings
from glm_image.supervisor import TritonServer
from glm_image_client import AsyncGlmImageClient, GlmImageClient, RequestCancelled, RequestTimeout
from helpers import WAIT_SECONDS, wait_until
from server.kserve import KServeError, Outputs, Values, grpc_infer, grpc_start, infer_inputs, metadata, post

SMALL: Values = {"prompt": "A fox reading 'NEWS'", "height": 64, "width": 64, "num_inference_steps": 2, "seed": 3}
LONG_DECODE: Values = {**SMALL, "height": 2048, "width": 2048, "num_inference_steps": 1}
LONG_DENOISING: Values = {**SMALL, "height": 512, "width": 512, "num_inference_steps": 200}
SLOTS = 8


class Requests:
    """Sends requests to a server and controls them."""

    def __init__(self, server: TritonServer, pool: ThreadPoolExecutor) -> None:
        self._server, self._pool = server, pool
        self.client = GlmImageClient(server.grpc_url)

    def send(self, values: Values, request_id: str, model: str = "glm_image") -> Future[Outputs]:
        return self._pool.submit(grpc_infer, self._server, values, model, request_id=request_id)

    def status(self, request_id: str) -> dict[str, Any]:
        return self.client.status(request_id)

    def cancel(self, request_id: str) -> dict[str, Any]:
        return self.client.cancel(request_id)

    def wait_until(self, request_id: str, is_there: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Waits until the latest request of an id is as expected."""

        def reply_when_there() -> dict[str, Any] | None:
            reply = self.status(request_id)
            return reply if reply["requests"] and is_there(reply["requests"][-1]) else None

        reply = wait_until(reply_when_there)
        assert reply is not None, self.status(request_id)
        return reply

    def wait_for(self, request_id: str, stage: str) -> dict[str, Any]:
        return self.wait_until(
            request_id, lambda request: request["stage"] == stage and request["state"] != "cancelled"
        )


@pytest.fixture
def requests(triton: TritonServer) -> Iterator[Requests]:
    with ThreadPoolExecutor(16) as pool:
        made = Requests(triton, pool)
        with made.client:
            yield made


def assert_cancelled(answer: Future[Outputs], request_id: str) -> None:
    with pytest.raises(KServeError, match=f"request {request_id} was cancelled") as ended:
        answer.result(WAIT_SECONDS)
    assert ended.value.status == "CANCELLED"


def same_images(first: Outputs, second: Outputs) -> None:
    np.testing.assert_array_equal(first["images"], second["images"])


def test_a_request_is_cancelled_while_it_decodes(requests: Requests) -> None:
    alone = requests.send(SMALL, "peaceful").result(WAIT_SECONDS)
    unwanted = requests.send(LONG_DECODE, "decoding")
    reply = requests.wait_until("decoding", lambda request: request["stage"] == "decode" and request["done"] > 20)
    assert reply["state"] == "running"
    assert reply["requests"][0]["total"] > 4000
    other = requests.send(SMALL, "other")
    assert requests.cancel("decoding") == {
        "request_id": "decoding",
        "action": "cancel",
        "state": "cancelled",
        "cancelled": 1,
        "requests": [{**reply["requests"][0], "done": pytest.approx(0, abs=4096), "seconds": pytest.approx(0, abs=60)}],
    }
    assert_cancelled(unwanted, "decoding")
    same_images(other.result(WAIT_SECONDS), alone)
    assert requests.status("decoding")["state"] == "cancelled"


def test_a_request_that_waits_for_a_slot_is_cancelled_immediately(requests: Requests) -> None:
    running = requests.send({**LONG_DECODE, "num_images": SLOTS}, "slots")
    requests.wait_for("slots", "decode")
    waiting = requests.send(SMALL, "waits")
    assert requests.wait_for("waits", "ar_queue")["state"] == "queued"
    assert requests.cancel("waits")["state"] == "cancelled"
    assert_cancelled(waiting, "waits")
    assert requests.status("slots")["state"] == "running"
    assert requests.cancel("slots")["cancelled"] == 1
    assert_cancelled(running, "slots")


def test_a_request_is_cancelled_while_it_is_denoised_and_while_it_waits_for_the_dit(requests: Requests) -> None:
    alone = requests.send(SMALL, "used twice").result(WAIT_SECONDS)
    denoised = requests.send(LONG_DENOISING, "denoised")
    sigma = requests.wait_for("denoised", "denoise")["requests"][0]["sigma"]
    assert 0 < sigma < 1
    waiting = requests.send(SMALL, "used twice")
    assert requests.wait_for("used twice", "dit_queue")["state"] == "queued"
    assert requests.cancel("used twice")["cancelled"] == 1
    assert requests.status("used twice")["state"] == "cancelled"
    again = requests.send(SMALL, "used twice")  # came after the cancel
    requests.wait_for("used twice", "dit_queue")
    assert requests.cancel("denoised")["cancelled"] == 1
    assert_cancelled(denoised, "denoised")
    assert_cancelled(waiting, "used twice")
    same_images(again.result(WAIT_SECONDS), alone)


def test_a_small_request_does_not_wait_for_all_images_of_a_large_one(triton: TritonServer, requests: Requests) -> None:
    """Images of different requests take turns; the small one gets the same bytes as alone."""
    tokens = grpc_infer(triton, SMALL, "glm_ar")
    small = {"prompt": SMALL["prompt"], "num_inference_steps": 2, "resolved_seed": [9]}
    small |= {name: tokens[name] for name in ("prior_token_ids", "prior_grid")}
    alone = requests.send(small, "alone", "glm_dit").result(WAIT_SECONDS)
    large = requests.send({**LONG_DENOISING, "height": 128, "width": 128, "num_images": SLOTS}, "large")
    requests.wait_for("large", "denoise")
    same_images(requests.send(small, "small", "glm_dit").result(WAIT_SECONDS), alone)
    (running,) = requests.cancel("large")["requests"]
    assert (running["state"], running["stage"]) == ("running", "denoise")
    assert running["done"] < running["total"] / 2
    assert_cancelled(large, "large")


def test_all_requests_of_an_id_are_cancelled_and_no_other(requests: Requests) -> None:
    shared = [requests.send({**LONG_DECODE, "seed": seed}, "shared") for seed in range(2)]
    shared.append(requests.send(LONG_DENOISING, "shared"))
    other = requests.send(SMALL, "share")
    assert wait_until(lambda: len(requests.status("shared")["requests"]) == len(shared))
    requests.wait_until("shared", lambda request: request["stage"] in {"decode", "denoise"})
    reply = requests.cancel("shared")
    assert (reply["state"], reply["cancelled"], len(reply["requests"])) == ("cancelled", 3, 3)
    for answer in shared:
        assert_cancelled(answer, "shared")
    assert other.result(WAIT_SECONDS)["images"].shape == (1, 64, 64, 3)


def test_cancel_reports_requests_that_it_cannot_cancel(requests: Requests) -> None:
    nothing = {"state": "unknown", "requests": []}
    assert requests.status("unused") == {"request_id": "unused", "action": "status", **nothing}
    assert requests.cancel("unused") == {"request_id": "unused", "action": "cancel", "cancelled": 0, **nothing}
    requests.send(SMALL, "done").result(WAIT_SECONDS)
    assert (requests.status("done")["state"], requests.cancel("done")["state"]) == ("finished", "finished")
    with pytest.raises(KServeError, match="height is 0"):
        requests.send({**SMALL, "height": 0}, "refused").result(WAIT_SECONDS)
    assert requests.status("refused")["state"] == "failed"
    unwanted = requests.send(LONG_DECODE, "twice")
    requests.wait_for("twice", "decode")
    assert requests.cancel("twice")["state"] == "cancelled"
    assert_cancelled(unwanted, "twice")
    assert (requests.cancel("twice")["state"], requests.cancel("twice")["cancelled"]) == ("already_cancelled", 0)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"request_id": "x", "action": "stop"}, "action is stop; allowed: cancel, status"),
        ({"request_id": "", "action": "cancel"}, "request_id is ; allowed: the id"),
    ],
)
def test_invalid_inputs_are_refused(triton: TritonServer, values: Values, sentence: str) -> None:
    with pytest.raises(KServeError, match=sentence) as refused:
        grpc_infer(triton, values, "glm_control")
    assert refused.value.status == "INVALID_ARGUMENT"


def test_a_request_without_an_id_gets_one(triton: TritonServer) -> None:
    made = json.loads(grpc_infer(triton, SMALL, "glm_ar")["ar_metadata"][0])["request_id"]
    answer = post(triton, "/v2/models/glm_control/generate", {"request_id": made, "action": "status"})
    assert json.loads(answer["result"])["requests"][0]["stage"] == "dit_queue"


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_client_that_stops_waiting_cancels(triton: TritonServer, requests: Requests, protocol: Any) -> None:
    url = triton.grpc_url if protocol == "grpc" else triton.http_url
    options = {name: value for name, value in LONG_DECODE.items() if name != "seed"}
    given_up, cancelled, late = (f"{protocol}-{what}" for what in ("given-up", "cancelled", "late"))

    async def give_up() -> None:
        async with AsyncGlmImageClient(url, protocol) as client:
            task = asyncio.create_task(client.generate(**options, request_id=given_up))
            await asyncio.to_thread(requests.wait_for, given_up, "decode")
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (await client.status(given_up))["state"] == "cancelled"

    asyncio.run(give_up())
    with GlmImageClient(url, protocol) as client:
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(client.generate, **options, request_id=cancelled)
            requests.wait_for(cancelled, "decode")
            assert client.cancel(cancelled)["cancelled"] == 1
            with pytest.raises(RequestCancelled, match=f"^request {cancelled} was cancelled$"):
                answer.result(WAIT_SECONDS)
        with pytest.raises(RequestTimeout):
            client.generate(**options, request_id=late, timeout=0.3)
    assert requests.status(late)["state"] in {"cancelled", "failed"}


def test_the_command_cancels_when_it_is_interrupted(triton: TritonServer, requests: Requests) -> None:
    command = [sys.executable, "-c", "from glm_image_client.cli import main; main()"]
    where = ["--url", triton.grpc_url]
    generating = subprocess.Popen(
        [*command, "generate", "a fox", "--size", "2048x2048", "--request-id", "interrupted", "--json", *where],
        env=os.environ,
    )
    requests.wait_for("interrupted", "decode")
    generating.send_signal(signal.SIGINT)
    assert generating.wait(WAIT_SECONDS) == 130
    reply = subprocess.run([*command, "status", "interrupted", *where], capture_output=True, text=True, check=True)
    assert json.loads(reply.stdout)["state"] == "cancelled"
    unknown = subprocess.run([*command, "cancel", "unused", *where], capture_output=True, text=True, check=False)
    assert (unknown.returncode, json.loads(unknown.stdout)["state"]) == (2, "unknown")


def test_a_direct_call_that_is_broken_off_is_cancelled(triton: TritonServer, requests: Requests) -> None:
    """Triton knows the callers of a model itself, not those of an ensemble."""
    with tritonclient.grpc.InferenceServerClient(triton.grpc_url) as client:
        call = grpc_start(client, LONG_DECODE, "glm_ar", request_id="broken off")
        requests.wait_for("broken off", "decode")
        call.cancel()
        requests.wait_until("broken off", lambda request: request["state"] == "cancelled")


def test_a_direct_call_is_cancelled_while_it_waits_in_tritons_queue(triton: TritonServer, requests: Requests) -> None:
    """Triton takes the requests of one stream in order: when it has the second, the first is in its queue."""
    prior = grpc_infer(triton, SMALL, "glm_ar")
    tokens = {name: prior[name] for name in ("prior_token_ids", "prior_grid")}
    quick = {"prompt": SMALL["prompt"], "num_inference_steps": 2, **tokens}
    large = grpc_infer(triton, LONG_DENOISING, "glm_ar")
    slow = {**quick, "num_inference_steps": 200, **{name: large[name] for name in tokens}}
    answers: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
    most = DitSettings().max_num_requests
    denoised = [requests.send(slow, "holds the DiT", "glm_dit") for _ in range(most)]
    wait_until(lambda: len(requests.status("holds the DiT")["requests"]) == most)
    with tritonclient.grpc.InferenceServerClient(triton.grpc_url) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        client.async_stream_infer("glm_dit", infer_inputs(tritonclient.grpc, quick), request_id="in the queue")
        client.async_stream_infer("glm_ar", infer_inputs(tritonclient.grpc, SMALL), request_id="behind")
        requests.wait_until("behind", lambda request: True)
        assert requests.status("in the queue")["state"] == "unknown"  # the DiT does not know it yet
        assert requests.cancel("in the queue")["state"] == "unknown"
        assert not any(answer.done() for answer in denoised)
        requests.cancel("holds the DiT")
        for answer in denoised:
            assert_cancelled(answer, "holds the DiT")
        (behind,), (error,) = (
            [value for value in values if value is not None]
            for values in zip(*(answers.get(timeout=WAIT_SECONDS) for _ in range(2)), strict=True)
        )
    assert "request in the queue was cancelled" in str(error)
    np.testing.assert_array_equal(behind.as_numpy("prior_token_ids"), prior["prior_token_ids"])


def test_a_deadline_that_cannot_be_met_names_the_missing_time(triton: TritonServer, requests: Requests) -> None:
    """The request needs far longer than the time it has, which is longer than a slow machine takes to refuse it."""
    prior = grpc_infer(triton, {**SMALL, "height": 256, "width": 256}, "glm_ar")
    decode = json.loads(prior["ar_metadata"][0])["seconds"]["decode"]
    dit_inputs = {"prompt": SMALL["prompt"]} | {
        name: prior[name] for name in ("prior_token_ids", "prior_grid", "resolved_seed")
    }
    painted = grpc_infer(triton, {**dit_inputs, "num_inference_steps": 20}, "glm_dit")
    denoise = metadata(painted)["seconds"]["denoise"]
    longer: dict[str, Values] = {"glm_ar": LONG_DECODE, "glm_dit": {**dit_inputs, "num_inference_steps": 200}}
    for model, seconds in (("glm_ar", decode), ("glm_dit", denoise)):
        with pytest.raises(KServeError, match=r"its deadline, \S+ s after its arrival: .* s too few") as late:
            grpc_infer(triton, longer[model], model, timeout_seconds=2 * seconds)
        assert late.value.status == "UNAVAILABLE"


def test_a_request_id_cannot_steer_the_terminal_that_shows_the_log(triton: TritonServer) -> None:
    hostile = "id\x9b31m\u202e\u2028end"
    with pytest.raises(KServeError):
        grpc_infer(triton, {**SMALL, "height": 1}, request_id=hostile)
    assert wait_until(lambda: r'"id": "id\u009b31m\u202e\u2028end"' in triton.log_tail), triton.log_tail
    assert not set("\x9b\u202e\u2028") & set(triton.log_tail)
