"""The requests of ``chaos.py``: every kind over both protocols, and the outcomes that each may have."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from glm_image_client import GlmImageClient, GlmImageClientError, RequestTimeout, UnreachableError

REPLY_SECONDS = 60.0
"""A request without a reply or an end of its connection after this time is ``unanswered``, which is always a fault."""

OUTCOMES = ("image", "refused", "late", "cancelled", "failed", "closed", "unanswered")
TYPES = {"guidance_scale": ("FP32", np.float32), "seed": ("INT64", np.int64)}
HTTP_STATUS = {400: "INVALID_ARGUMENT", 404: "NOT_FOUND", 503: "UNAVAILABLE"}

Values = Mapping[str, Any]

GOOD: tuple[Values, ...] = tuple(
    {
        "prompt": prompt,
        "height": height,
        "width": width,
        "num_inference_steps": steps,
        "seed": seed,
        "output_format": output_format,
        "num_images": images,
    }
    for seed, (prompt, height, width, steps, output_format, images) in enumerate(
        [
            ("a fox", 64, 64, 2, "png", 1),
            ("a sign that says 'open'", 96, 64, 3, "webp", 1),
            ("雪", 50, 70, 2, "jpeg", 2),
            ("a long road at night", 256, 256, 2, "png", 1),
            ("two words \"a\" and 'b'", 320, 192, 4, "png", 1),
            ("eight foxes", 32, 64, 1, "png", 4),
        ]
    )
)
BAD: tuple[Values, ...] = (
    {"prompt": "a fox", "height": 0},
    {"prompt": " "},
    {"prompt": "a fox", "num_inference_steps": 100_000},
    {"prompt": "a fox", "output_format": "bmp"},
    {"prompt": "a fox", "image": "bm90IGFuIGltYWdl"},
    {"prompt": "\0", "guidance_scale": -1.0},
)


@dataclass(frozen=True)
class Outcome:
    """How a request ended: one of ``OUTCOMES``, and the files of its images or the message of its error."""

    kind: str
    files: tuple[bytes, ...] = ()
    message: str = ""


@dataclass(frozen=True)
class RequestRecord:
    """A request and its outcome; times on the monotonic clock."""

    kind: str
    protocol: str
    values: Values
    began: float
    ended: float
    outcome: Outcome


class Server:
    """The addresses of a server, and one request over each protocol."""

    def __init__(self, http_url: str, grpc_url: str) -> None:
        self.http_url, self.grpc_url = http_url, grpc_url

    def send(self, protocol: str, values: Values, *, timeout_us: int = 0, leave_after: float | None = None) -> Outcome:
        """Sends a request over ``grpc`` or ``http``, and abandons it after ``leave_after`` seconds."""
        send = self._send_grpc if protocol == "grpc" else self._send_http
        return send(values, timeout_us, leave_after)

    def _send_grpc(self, values: Values, timeout_us: int, leave_after: float | None) -> Outcome:
        request = service_pb2.ModelInferRequest(model_name="glm_image")
        for name, value in values.items():
            data_type, array = _array(name, value)
            request.inputs.add(name=name, datatype=data_type, shape=[1])
            request.raw_input_contents.append(array)
        if timeout_us:
            request.parameters["timeout"].int64_param = timeout_us
        replies: list[Any] = []
        done = threading.Event()

        def on_reply(call: Any) -> None:
            replies.append(call)
            done.set()

        # A connection of its own: a shared one waits before it reconnects to a restarted server.
        with grpc.insecure_channel(self.grpc_url, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            call = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer.future(request)
            call.add_done_callback(on_reply)
            if leave_after is not None and not done.wait(leave_after):
                call.cancel()
            if not done.wait(REPLY_SECONDS):
                return Outcome("unanswered")
            error = None if call.cancelled() else call.exception()
        assert len(replies) == 1
        if call.cancelled():
            return Outcome("cancelled")
        if error is not None:
            return _failure(error.code().name, error.details())
        reply = call.result()
        index = [output.name for output in reply.outputs].index("images_base64")
        return Outcome("image", tuple(_strings(reply.raw_output_contents[index])))

    def _send_http(self, values: Values, timeout_us: int, leave_after: float | None) -> Outcome:
        inputs = [
            {"name": name, "datatype": _type(name, value)[0], "shape": [1], "data": [value]}
            for name, value in values.items()
        ]
        body: dict[str, Any] = {"inputs": inputs, "outputs": [{"name": "images_base64"}]}
        if timeout_us:
            body["parameters"] = {"timeout": timeout_us}
        timeout = REPLY_SECONDS if leave_after is None else leave_after
        with contextlib.closing(http.client.HTTPConnection(self.http_url, timeout=timeout)) as connection:
            try:
                connection.request("POST", "/v2/models/glm_image/infer", json.dumps(body))
                response = connection.getresponse()
                reply = json.loads(response.read())
            except TimeoutError:
                return Outcome("unanswered" if leave_after is None else "cancelled")
            except (OSError, http.client.HTTPException) as error:
                return Outcome("closed", message=repr(error))
        if response.status != http.client.OK:
            return _failure(HTTP_STATUS.get(response.status, str(response.status)), reply.get("error", ""))
        return Outcome("image", tuple(text.encode() for text in reply["outputs"][0]["data"]))

    def stream(self, protocol: str, values: Values, *, leave_after: float | None = None) -> Outcome:
        """Streams a request through ``glm_image_stream`` until its image, or for ``leave_after`` seconds."""
        url = f"{protocol}://{self.grpc_url if protocol == 'grpc' else self.http_url}"
        began = time.monotonic()
        try:
            with GlmImageClient(url, timeout=REPLY_SECONDS) as client:
                for event in client.stream(**values):
                    if event.result is not None:
                        return Outcome("image", tuple(base64.b64encode(file) for file in event.result.encoded))
                    if leave_after is not None and time.monotonic() - began > leave_after:
                        return Outcome("cancelled")
        except RequestTimeout as error:
            return Outcome("unanswered", message=str(error))
        except UnreachableError as error:
            return Outcome("closed", message=str(error))
        except GlmImageClientError as error:
            return Outcome("failed", message=str(error))
        raise AssertionError("the stream ended without an image or an error")


def _failure(status: str, message: str | None) -> Outcome:
    text = f"{status}: {message}"
    if "deadline" in text or "timeout" in text.lower():
        return Outcome("late", message=text)
    if status == "INVALID_ARGUMENT":
        return Outcome("refused", message=text)
    is_cut = status == "UNAVAILABLE" and any(sign in text for sign in ("ocket", "onnect", "Stream removed", "GOAWAY"))
    return Outcome("closed" if is_cut else "failed", message=text)


def _type(name: str, value: Any) -> tuple[str, Any]:
    return ("BYTES", object) if isinstance(value, str) else TYPES.get(name, ("INT32", np.int32))


def _array(name: str, value: Any) -> tuple[str, bytes]:
    data_type, numpy_type = _type(name, value)
    if data_type == "BYTES":
        text = value.encode()
        return data_type, len(text).to_bytes(4, "little") + text
    return data_type, np.array([value], dtype=numpy_type).tobytes()


def _strings(raw: bytes) -> Iterator[bytes]:
    begin = 0
    while begin < len(raw):
        end = begin + 4 + int.from_bytes(raw[begin : begin + 4], "little")
        yield raw[begin + 4 : end]
        begin = end


def _good(server: Server, protocol: str, rng: random.Random) -> tuple[Values, Outcome]:
    values = rng.choice(GOOD)
    return values, server.send(protocol, values)


def _bad(server: Server, protocol: str, rng: random.Random) -> tuple[Values, Outcome]:
    values = rng.choice(BAD)
    return values, server.send(protocol, values)


def _late(server: Server, protocol: str, rng: random.Random) -> tuple[Values, Outcome]:
    values = rng.choice(GOOD)
    return values, server.send(protocol, values, timeout_us=int(10 ** rng.uniform(2, 6)))


def _cancelled(server: Server, protocol: str, rng: random.Random) -> tuple[Values, Outcome]:
    values = rng.choice(GOOD)
    return values, server.send(protocol, values, leave_after=rng.uniform(0.01, 0.5))


def _streamed(server: Server, protocol: str, rng: random.Random) -> tuple[Values, Outcome]:
    values = rng.choice(GOOD)
    return values, server.stream(protocol, {**values, "preview_steps": 1, "preview_every": 1})


def _left(server: Server, protocol: str, rng: random.Random) -> tuple[Values, Outcome]:
    values = rng.choice(GOOD)
    return values, server.stream(protocol, values, leave_after=rng.uniform(0.01, 0.5))


@dataclass(frozen=True)
class Kind:
    """A kind of request: how to send it, how often, and its allowed outcomes while the server works."""

    send: Callable[[Server, str, random.Random], tuple[Values, Outcome]]
    weight: int
    allowed: frozenset[str]


KINDS: dict[str, Kind] = {
    "good": Kind(_good, 6, frozenset({"image"})),
    "bad": Kind(_bad, 2, frozenset({"refused"})),
    "late": Kind(_late, 1, frozenset({"image", "late"})),
    "cancelled": Kind(_cancelled, 1, frozenset({"image", "cancelled"})),
    "streamed": Kind(_streamed, 2, frozenset({"image"})),
    "left": Kind(_left, 1, frozenset({"image", "cancelled"})),
}


def send_any(server: Server, rng: random.Random) -> RequestRecord:
    """Sends a request of a random kind over a random protocol."""
    (kind,) = rng.choices(list(KINDS), [kind.weight for kind in KINDS.values()])
    protocol = rng.choice(("grpc", "http"))
    began = time.monotonic()
    values, outcome = KINDS[kind].send(server, protocol, rng)
    return RequestRecord(kind, protocol, values, began, time.monotonic(), outcome)


def fault_of(request: RequestRecord, expected: Mapping[str, tuple[bytes, ...]], was_broken: bool) -> str | None:
    """Checks the outcome of a request.

    Args:
        request: the request.
        expected: the files of each request's images, by its prompt.
        was_broken: whether the server was broken or starting at some time during the request.

    Returns:
        What is wrong, or None.
    """
    outcome = request.outcome
    description = f"{request.kind} over {request.protocol} {dict(request.values)}: {outcome.kind} {outcome.message}"
    if outcome.kind == "unanswered":
        return f"no reply: {description}"
    if outcome.kind == "image" and outcome.files != expected.get(request.values["prompt"]):
        return f"another image: {description}"
    allowed = KINDS[request.kind].allowed | ({"failed", "closed"} if was_broken else set())
    return None if outcome.kind in allowed else f"unexpected outcome: {description}"
