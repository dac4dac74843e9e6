"""Requests to ``glm_image_stream`` over both protocols, apart from the project's own client."""

from __future__ import annotations

import json
import queue
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import tritonclient.grpc

from glm_image.supervisor import TritonServer
from glm_image_client import GlmImageClient
from helpers import wait_until
from server.kserve import ANSWER_SECONDS, KServeError, Outputs, Values, infer_inputs

STREAM = "glm_image_stream"


@dataclass
class Response:
    """One response: its event, and every tensor."""

    event: dict[str, Any]
    outputs: Outputs


def grpc_stream(
    server: TritonServer, values: Values, *, request_id: str = "", timeout_seconds: float = 0
) -> Iterator[Response]:
    """Yields responses; a generator that is closed closes the stream."""
    answers: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
    with closing(tritonclient.grpc.InferenceServerClient(server.grpc_url)) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        client.async_stream_infer(
            STREAM,
            infer_inputs(tritonclient.grpc, values),
            request_id=request_id,
            enable_empty_final_response=True,
            timeout=int(timeout_seconds * 1e6) or None,
        )
        is_last = False
        try:
            while not is_last:
                result, error = answers.get(timeout=ANSWER_SECONDS)
                if error is not None:
                    raise KServeError(str(error.status()).removeprefix("StatusCode."), error.message())
                outputs = {output.name: result.as_numpy(output.name) for output in result.get_response().outputs}
                is_last = result.get_response().parameters["triton_final_response"].bool_param
                if outputs:
                    yield Response(json.loads(outputs["event"][0]), outputs)
        finally:
            client.stop_stream(cancel_requests=not is_last)


def http_stream(server: TritonServer, values: Values) -> Iterator[Response]:
    """Yields the responses of Server-Sent Events."""
    path = f"http://{server.http_url}/v2/models/{STREAM}/generate_stream"
    request = urllib.request.Request(path, json.dumps(dict(values)).encode())
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
            for line in answer:
                if line.startswith(b"data:"):
                    data = json.loads(line.removeprefix(b"data:"))
                    if "error" in data:
                        raise KServeError("200", data["error"])
                    yield Response(json.loads(data["event"]), data)
    except urllib.error.HTTPError as error:
        data = json.loads(error.read().removeprefix(b"data:"))  # an event too
        raise KServeError(str(error.code), data["error"]) from error


def final_state(client: GlmImageClient, request_id: str) -> str:
    """Waits for the end of a request; returns the state in which it ended."""
    return wait_until(lambda: ended_state(client.status(request_id)))


def ended_state(status: dict[str, Any]) -> str:
    """The state of a request that has ended, else ""."""
    return "" if status["state"] in {"running", "queued"} else str(status["state"])


def texts(response: Response, name: str) -> list[bytes]:
    """The strings of a BYTES output; over HTTP one alone is no list."""
    value = response.outputs[name]
    if isinstance(value, np.ndarray):
        return list(value)
    return [text.encode() for text in ([value] if isinstance(value, str) else value)]
