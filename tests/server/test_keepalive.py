"""The pings of gRPC clients: as frequent ones as documented are permitted, more frequent ones are not."""

from __future__ import annotations

import select
import socket
import struct
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial

import pytest
import tritonclient.grpc

from glm_image.supervisor import TritonServer
from glm_image.supervisor.triton_process import MIN_PING_INTERVAL_MS
from glm_image_client import GlmImageClient
from server.kserve import Outputs, Values, grpc_infer, infer_inputs

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS, PING, GOAWAY = 4, 6, 7
ACKNOWLEDGED = 1
ANSWER_SECONDS = 60
PERMITTED_SECONDS = MIN_PING_INTERVAL_MS / 1000 + 0.1

LONG: Values = {
    "prompt": "A fox reading 'NEWS'",
    "height": 1024,
    "width": 1024,
    "num_inference_steps": 200,
    "seed": 3,
    "output_format": "png",
}
LONGER_THAN_SECONDS = 60


class Http2:
    """An HTTP/2 connection without calls; it has the frames that pings need."""

    def __init__(self, url: str) -> None:
        host, _, port = url.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), ANSWER_SECONDS)
        self._file = self._socket.makefile("rb")
        self._socket.sendall(PREFACE)
        self._send(SETTINGS)
        self._send(SETTINGS, ACKNOWLEDGED)
        # What the server sends after a ping would have it count that ping for nothing.
        while self._receive()[:2] != (SETTINGS, ACKNOWLEDGED):
            pass

    def close(self) -> None:
        self._file.close()
        self._socket.close()

    def ping(self) -> bytes | None:
        """Sends a ping; returns None when it is answered, or the reason why the server closes the connection."""
        self._send(PING, payload=bytes(8))
        return self._wait_for(PING)

    def end(self) -> bytes | None:
        """Returns the reason why the server closes the connection."""
        return self._wait_for(GOAWAY)

    def is_silent(self, seconds: float) -> bool:
        """Returns whether the server sends nothing for a while, not even that it closes the connection."""
        return not select.select([self._socket], [], [], seconds)[0]

    def _wait_for(self, expected: int) -> bytes | None:
        while True:
            kind, _, payload = self._receive()
            if kind == GOAWAY:
                return payload[8:]
            if kind == expected:
                return None

    def _send(self, kind: int, flags: int = 0, payload: bytes = b"") -> None:
        self._socket.sendall(struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + bytes(4) + payload)

    def _receive(self) -> tuple[int, int, bytes]:
        header = self._file.read(9)
        assert len(header) == 9, "the server closed the connection without a reason"
        return header[3], header[4], self._file.read(int.from_bytes(header[:3], "big"))


def test_a_ping_in_five_seconds_is_permitted_and_more_are_not(triton: TritonServer) -> None:
    """A server answers each ping, and closes the connection after the third one that comes too early."""
    with closing(Http2(triton.grpc_url)) as connection:
        assert [connection.ping() for _ in range(3)] == [None] * 3  # two came too early
        assert connection.is_silent(PERMITTED_SECONDS)
        assert [connection.ping() for _ in range(2)] == [None] * 2  # and one more
        assert connection.end() == b"too_many_pings"


def with_pings(server: TritonServer, values: Values, model: str, seconds: float) -> Outputs:
    options = tritonclient.grpc.KeepAliveOptions(int(seconds * 1000), http2_max_pings_without_data=0)
    with closing(tritonclient.grpc.InferenceServerClient(server.grpc_url, keepalive_options=options)) as client:
        result = client.infer(model, infer_inputs(tritonclient.grpc, values))
        return {output.name: result.as_numpy(output.name) for output in result.get_response().outputs}


@pytest.mark.full
def test_calls_of_minutes_survive_pings(triton: TritonServer) -> None:
    """Of tritonclient and of the project's client, to the ensemble, a stage and the stream."""
    prior = grpc_infer(triton, LONG, "glm_ar")
    painted = {name: LONG[name] for name in ("prompt", "num_inference_steps", "output_format")} | prior

    def client(method: str) -> bytes:
        with GlmImageClient(triton.grpc_url, keepalive=PERMITTED_SECONDS) as pinging:
            if method == "generate":
                return pinging.generate(**LONG).encoded[0]
            *_, last = pinging.stream(**LONG)
            assert last.result is not None
            return last.result.encoded[0]

    calls: list[Callable[[], object]] = [
        partial(with_pings, triton, LONG, "glm_image", PERMITTED_SECONDS),
        partial(with_pings, triton, painted, "glm_dit", PERMITTED_SECONDS),
        partial(client, "generate"),
        partial(client, "stream"),
    ]
    began = time.monotonic()
    with ThreadPoolExecutor(len(calls)) as pool:
        *by_tritonclient, generated, streamed = pool.map(lambda call: call(), calls)
    assert time.monotonic() - began > LONGER_THAN_SECONDS, "the calls are too short to show anything"
    first, second = (outputs["images_base64"] for outputs in by_tritonclient)
    assert first == second
    assert generated == streamed
