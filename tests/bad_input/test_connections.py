"""Connections that end early, send malformed bytes or only wait: the server keeps working."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2

from bad_input.wire import INFER, json_body
from bench.soak import processes
from glm_image.supervisor import TritonServer
from server.kserve import Values, at_once, grpc_infer, http_binary_infer

PICTURE: Values = {"prompt": "a fox", "height": 40, "width": 64, "num_inference_steps": 2, "seed": 3}
SECONDS = 30
HEAD = f"POST {INFER} HTTP/1.1\r\nHost: x\r\n".encode()
BODY = json_body()
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"

INCOMPLETE = {
    "nothing": b"",
    "half a word": b"PO",
    "no body": HEAD + b"Content-Length: 1000000000\r\n\r\n",
    "half a body": HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY[: len(BODY) // 2],
    "before the answer": HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY,
    "half a chunk": CHUNKED + b"5\r\nab",
    "half an HTTP/2 preface": b"PRI * HTTP/2.0\r\n",
}
MALFORMED = {
    "negative length": HEAD + b"Content-Length: -5\r\n\r\n",
    "length of words": HEAD + b"Content-Length: abc\r\n\r\n",
    "length beyond 64 bits": HEAD + b"Content-Length: 1" + b"0" * 30 + b"\r\n\r\n",
    "no HTTP": b"\x00\xff" * 1000 + b"\r\n\r\n",
    "no chunk": CHUNKED + b"zz\r\nab",
    "200,000 chunks of one byte": CHUNKED + b"1\r\n[\r\n" * 200_000 + b"0\r\n\r\n",
    "header of 1 MB": HEAD + b"A: " + b"a" * 1_000_000 + b"\r\n\r\n",
    "path of 1 MB": b"GET /" + b"a" * 1_000_000 + b" HTTP/1.1\r\n\r\n",
    "frames of no meaning": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 1000,
}


def connect(url: str) -> socket.socket:
    host, port = url.split(":")
    return socket.create_connection((host, int(port)), timeout=SECONDS)


@pytest.fixture(scope="module")
def picture(triton: TritonServer) -> Iterator[NDArray[np.uint8]]:
    """The image of ``PICTURE``, which is the same after all tests as before them."""
    picture = grpc_infer(triton, PICTURE)["images"]
    yield picture
    assert_same(picture, triton, PICTURE, "glm_image")


@pytest.fixture(scope="module")
def tokens(triton: TritonServer) -> Values:
    """A request to ``glm_dit`` for the same image, without the time of decoding."""
    prior = grpc_infer(triton, PICTURE, "glm_ar")
    return {"prompt": PICTURE["prompt"], "num_inference_steps": PICTURE["num_inference_steps"], **prior}


def assert_same(picture: NDArray[np.uint8], triton: TritonServer, values: Values, model: str) -> None:
    """Both protocols, concurrently, give the image."""
    calls = [partial(infer, triton, values, model) for infer in (grpc_infer, http_binary_infer)]
    for outputs in at_once(calls).outputs:
        np.testing.assert_array_equal(outputs["images"], picture)


@pytest.fixture(autouse=True)
def unharmed(triton: TritonServer, picture: NDArray[np.uint8], tokens: Values) -> Iterator[None]:
    """After each test the same processes give the same image over both protocols."""
    pids = processes(triton)
    yield
    assert processes(triton) == pids
    assert_same(picture, triton, tokens, "glm_dit")


def urls(triton: TritonServer) -> list[str]:
    return [triton.http_url, triton.grpc_url]


@pytest.mark.parametrize("name", INCOMPLETE)
@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_client_disconnects(triton: TritonServer, name: str, reset: bool) -> None:
    for url in urls(triton) * 3:
        with connect(url) as connection:
            connection.sendall(INCOMPLETE[name])
            if reset:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_bytes_get_a_response_or_a_closed_connection(triton: TritonServer, name: str) -> None:
    for url in urls(triton):
        with connect(url) as connection:
            try:
                connection.sendall(MALFORMED[name])
                # Nothing more comes, for which a server could wait.
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(1 << 16):
                    pass
            except TimeoutError:
                raise
            except OSError as error:  # hung up, sooner or later
                assert error.errno in {errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN}  # noqa: PT017


def test_hundreds_of_idle_connections(triton: TritonServer, picture: NDArray[np.uint8]) -> None:
    with ExitStack() as stack:
        for _ in range(150):
            for url in urls(triton):
                stack.enter_context(connect(url))
        np.testing.assert_array_equal(grpc_infer(triton, PICTURE)["images"], picture)


def test_calls_are_cancelled_at_any_time(triton: TritonServer) -> None:
    """In every stage of their handling."""
    request = service_pb2.ModelInferRequest(model_name="glm_image")
    request.inputs.add(name="prompt", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"a fox")
    # So many steps that none is done within the longest of these times.
    for name, value in (("height", 64), ("width", 64), ("num_inference_steps", 200)):
        request.inputs.add(name=name, datatype="INT32", shape=[1]).contents.int_contents.append(value)
    with grpc.insecure_channel(triton.grpc_url) as channel:
        infer = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer", request_serializer=lambda message: message.SerializeToString()
        )
        for milliseconds in (1, 5, 20, 80, 150, 300):
            with pytest.raises(grpc.RpcError) as ended:
                infer(request, timeout=milliseconds / 1000)
            assert ended.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED


@pytest.mark.parametrize("message", [b"\xff" * 10, b"\x0a\xff\xff\xff\xff\x0f", b"\x2a\x80\x80\x80\x80\x08"])
def test_malformed_grpc_messages_are_refused(triton: TritonServer, message: bytes) -> None:
    with grpc.insecure_channel(triton.grpc_url) as channel:
        infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        with pytest.raises(grpc.RpcError) as refused:
            infer(message, timeout=SECONDS)
    assert refused.value.code() in {grpc.StatusCode.INTERNAL, grpc.StatusCode.INVALID_ARGUMENT}
