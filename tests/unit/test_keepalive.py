"""A server that permits fewer pings than the client sends: the request is cancelled there and sent again, without."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import serialize_byte_tensor

from glm_image_client import AsyncGlmImageClient, BadArgumentError, GlmImageClient

KEEPALIVE_SECONDS = 0.05  # gRPC sends at most one a second
ANSWER_SECONDS = 60
STRICT = [("grpc.http2.max_ping_strikes", 1)]
"""As Triton without flags, gRPC permits a ping in five minutes; this one closes a connection one ping earlier."""


class StrictServer(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Answers requests except the first of an id, which it holds until its connection is closed."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self._seen: Counter[str] = Counter()

    def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC's name
        if request.model_name == "glm_control":
            self.calls.append(("cancel", request.raw_input_contents[0][4:].decode()))
            return answer(result=b'{"state": "cancelled"}')
        self.calls.append(("infer", request.id))
        self._hold_first(request.id, context)
        return answer(metadata=b'{"seeds": [1]}', images_base64=b"")

    def ModelStreamInfer(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:  # noqa: N802
        request = next(requests)
        self.calls.append(("stream", request.id))
        event = {"event": "image", "stage": "done", "request_id": "", "done": 1, "total": 1, "seconds": 1, "eta": 0}
        self._hold_first(request.id, context)
        last = answer(metadata=b'{"seeds": [1]}', images_base64=b"", event=json.dumps(event).encode())
        last.parameters["triton_final_response"].bool_param = True
        yield service_pb2.ModelStreamInferResponse(infer_response=last)

    def ServerLive(self, request: Any, context: Any) -> Any:  # noqa: N802
        return service_pb2.ServerLiveResponse(live=True)

    def _hold_first(self, request_id: str, context: Any) -> None:
        self._seen[request_id] += 1
        closed = threading.Event()
        if self._seen[request_id] == 1 and context.add_callback(closed.set):
            assert closed.wait(ANSWER_SECONDS)


def answer(**texts: bytes) -> Any:
    response = service_pb2.ModelInferResponse()
    for name, text in texts.items():
        response.outputs.add(name=name, datatype="BYTES", shape=[1])
        response.raw_output_contents.append(serialize_byte_tensor(np.array([text], dtype=object)).item())
    return response


@pytest.fixture
def strict_server() -> Iterator[tuple[StrictServer, str]]:
    servicer = StrictServer()
    server = grpc.server(ThreadPoolExecutor(8), options=STRICT)
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield servicer, f"127.0.0.1:{port}"
    server.stop(None).wait()


def generate(url: str) -> tuple[int, ...]:
    with GlmImageClient(url, timeout=ANSWER_SECONDS, keepalive=KEEPALIVE_SECONDS) as client:
        return client.generate("a fox", request_id="blocking").metadata.seeds


def generate_async(url: str) -> tuple[int, ...]:
    async def call() -> tuple[int, ...]:
        async with AsyncGlmImageClient(url, timeout=ANSWER_SECONDS, keepalive=KEEPALIVE_SECONDS) as client:
            return (await client.generate("a fox", request_id="asyncio")).metadata.seeds

    return asyncio.run(call())


def stream(url: str) -> tuple[int, ...]:
    with GlmImageClient(url, timeout=ANSWER_SECONDS, keepalive=KEEPALIVE_SECONDS) as client:
        *_, last = client.stream("a fox", request_id="streamed")
        assert last.result is not None
        return last.result.metadata.seeds


def stream_async(url: str) -> tuple[int, ...]:
    async def call() -> tuple[int, ...]:
        async with AsyncGlmImageClient(url, timeout=ANSWER_SECONDS, keepalive=KEEPALIVE_SECONDS) as client:
            last = [event async for event in client.stream("a fox", request_id="asyncio stream")][-1]
            assert last.result is not None
            return last.result.metadata.seeds

    return asyncio.run(call())


def test_a_request_cut_off_for_its_pings_is_sent_again_without(strict_server: tuple[StrictServer, str]) -> None:
    servicer, url = strict_server
    calls: list[Callable[[str], tuple[int, ...]]] = [generate, generate_async, stream, stream_async]
    with ThreadPoolExecutor(len(calls)) as pool:
        assert list(pool.map(lambda call: call(url), calls)) == [(1,)] * len(calls)

    def of(request_id: str) -> list[str]:
        return [kind for kind, called in servicer.calls if called == request_id]

    # Triton notices itself that the caller of a stream has gone.
    assert of("blocking") == of("asyncio") == ["infer", "cancel", "infer"]
    assert of("streamed") == of("asyncio stream") == ["stream", "stream"]


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_keepalive_must_be_a_positive_number(seconds: float) -> None:
    with pytest.raises(BadArgumentError, match=r"^keepalive is .*; allowed: seconds above 0, or None$"):
        GlmImageClient("127.0.0.1:1", keepalive=seconds)
