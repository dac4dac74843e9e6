"""The requests of ``chaos.py``: every kind over both protocols, and what each may be answered.

Each request ends in exactly one of ``ENDINGS``, or it has not been answered in time, which is always wrong.
"""

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

ANSWER_SECONDS = 60.0
"""After that long without an answer or an end of its connection a request counts as met by silence."""

ENDINGS = ("picture", "refused", "late", "cancelled", "failed", "closed", "silence")
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
class Ending:
    """How a request ended: one of ``ENDINGS``, the files of a picture or the words of an error."""

    kind: str
    files: tuple[bytes, ...] = ()
    words: str = ""


@dataclass(frozen=True)
class Asked:
    """A request and what became of it; times by the monotonic clock."""

    kind: str
    protocol: str
    values: Values
    began: float
    ended: float
    ending: Ending


class Server:
    """The addresses of a server, and one request over each protocol."""

    def __init__(self, http_url: str, grpc_url: str) -> None:
        self.http_url, self.grpc_url = http_url, grpc_url

    def ask(self, protocol: str, values: Values, *, timeout_us: int = 0, leave_after: float | None = None) -> Ending:
        """Asks for a picture over ``grpc`` or ``http``, and goes away after ``leave_after`` seconds."""
        ask = self._ask_grpc if protocol == "grpc" else self._ask_http
        return ask(values, timeout_us, leave_after)

    def _ask_grpc(self, values: Values, timeout_us: int, leave_after: float | None) -> Ending:
        request = service_pb2.ModelInferRequest(model_name="glm_image")
        for name, value in values.items():
            data_type, array = _array(name, value)
            request.inputs.add(name=name, datatype=data_type, shape=[1])
            request.raw_input_contents.append(array)
        if timeout_us:
            request.parameters["timeout"].int64_param = timeout_us
        answers: list[Any] = []
        done = threading.Event()

        def answered(call: Any) -> None:
            answers.append(call)
            done.set()

        # Its own connection: one that other channels share waits before it tries a server that is back.
        with grpc.insecure_channel(self.grpc_url, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            call = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer.future(request)
            call.add_done_callback(answered)
            if leave_after is not None and not done.wait(leave_after):
                call.cancel()
            if not done.wait(ANSWER_SECONDS):
                return Ending("silence")
            error = None if call.cancelled() else call.exception()
        assert len(answers) == 1
        if call.cancelled():
            return Ending("cancelled")
        if error is not None:
            return _failure(error.code().name, error.details())
        answer = call.result()
        index = [output.name for output in answer.outputs].index("images_base64")
        return Ending("picture", tuple(_strings(answer.raw_output_contents[index])))

    def _ask_http(self, values: Values, timeout_us: int, leave_after: float | None) -> Ending:
        inputs = [
            {"name": name, "datatype": _type(name, value)[0], "shape": [1], "data": [value]}
            for name, value in values.items()
        ]
        body: dict[str, Any] = {"inputs": inputs, "outputs": [{"name": "images_base64"}]}
        if timeout_us:
            body["parameters"] = {"timeout": timeout_us}
        patience = ANSWER_SECONDS if leave_after is None else leave_after
        with contextlib.closing(http.client.HTTPConnection(self.http_url, timeout=patience)) as connection:
            try:
                connection.request("POST", "/v2/models/glm_image/infer", json.dumps(body))
                response = connection.getresponse()
                told = json.loads(response.read())
            except TimeoutError:
                return Ending("silence" if leave_after is None else "cancelled")
            except (OSError, http.client.HTTPException) as error:
                return Ending("closed", words=repr(error))
        if response.status != http.client.OK:
            return _failure(HTTP_STATUS.get(response.status, str(response.status)), told.get("error", ""))
        return Ending("picture", tuple(text.encode() for text in told["outputs"][0]["data"]))

    def stream(self, protocol: str, values: Values, *, leave_after: float | None = None) -> Ending:
        """Follows a request over ``glm_image_stream`` to its picture, or for ``leave_after`` seconds."""
        url = f"{protocol}://{self.grpc_url if protocol == 'grpc' else self.http_url}"
        began = time.monotonic()
        try:
            with GlmImageClient(url, timeout=ANSWER_SECONDS) as client:
                for event in client.stream(**values):
                    if event.result is not None:
                        return Ending("picture", tuple(base64.b64encode(file) for file in event.result.encoded))
                    if leave_after is not None and time.monotonic() - began > leave_after:
                        return Ending("cancelled")
        except RequestTimeout as error:
            return Ending("silence", words=str(error))
        except UnreachableError as error:
            return Ending("closed", words=str(error))
        except GlmImageClientError as error:
            return Ending("failed", words=str(error))
        raise AssertionError("a stream ends with a picture or an error")


def _failure(status: str, words: str | None) -> Ending:
    words = f"{status}: {words}"
    if "deadline" in words or "timeout" in words.lower():
        return Ending("late", words=words)
    if status == "INVALID_ARGUMENT":
        return Ending("refused", words=words)
    is_cut = status == "UNAVAILABLE" and any(sign in words for sign in ("ocket", "onnect", "Stream removed", "GOAWAY"))
    return Ending("closed" if is_cut else "failed", words=words)


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


def _good(server: Server, protocol: str, dice: random.Random) -> tuple[Values, Ending]:
    values = dice.choice(GOOD)
    return values, server.ask(protocol, values)


def _bad(server: Server, protocol: str, dice: random.Random) -> tuple[Values, Ending]:
    values = dice.choice(BAD)
    return values, server.ask(protocol, values)


def _late(server: Server, protocol: str, dice: random.Random) -> tuple[Values, Ending]:
    values = dice.choice(GOOD)
    return values, server.ask(protocol, values, timeout_us=int(10 ** dice.uniform(2, 6)))


def _cancelled(server: Server, protocol: str, dice: random.Random) -> tuple[Values, Ending]:
    values = dice.choice(GOOD)
    return values, server.ask(protocol, values, leave_after=dice.uniform(0.01, 0.5))


def _streamed(server: Server, protocol: str, dice: random.Random) -> tuple[Values, Ending]:
    values = dice.choice(GOOD)
    return values, server.stream(protocol, {**values, "preview_steps": 1, "preview_every": 1})


def _left(server: Server, protocol: str, dice: random.Random) -> tuple[Values, Ending]:
    values = dice.choice(GOOD)
    return values, server.stream(protocol, values, leave_after=dice.uniform(0.01, 0.5))


@dataclass(frozen=True)
class Kind:
    """A kind of request: how it is made, how often, and how it may end while nothing is broken."""

    make: Callable[[Server, str, random.Random], tuple[Values, Ending]]
    weight: int
    may_end: frozenset[str]


KINDS: dict[str, Kind] = {
    "good": Kind(_good, 6, frozenset({"picture"})),
    "bad": Kind(_bad, 2, frozenset({"refused"})),
    "late": Kind(_late, 1, frozenset({"picture", "late"})),
    "cancelled": Kind(_cancelled, 1, frozenset({"picture", "cancelled"})),
    "streamed": Kind(_streamed, 2, frozenset({"picture"})),
    "left": Kind(_left, 1, frozenset({"picture", "cancelled"})),
}


def ask_any(server: Server, dice: random.Random) -> Asked:
    """Sends a request of a random kind over a random protocol."""
    (kind,) = dice.choices(list(KINDS), [one.weight for one in KINDS.values()])
    protocol = dice.choice(("grpc", "http"))
    began = time.monotonic()
    values, ending = KINDS[kind].make(server, protocol, dice)
    return Asked(kind, protocol, values, began, time.monotonic(), ending)


def fault_of(asked: Asked, expected: Mapping[str, tuple[bytes, ...]], was_broken: bool) -> str | None:
    """Judges how a request ended.

    Args:
        asked: the request.
        expected: the files of each picture, by its prompt.
        was_broken: whether the server was broken or starting at some time between the question and the answer.

    Returns:
        What is wrong, or None.
    """
    ending = asked.ending
    told = f"{asked.kind} over {asked.protocol} {dict(asked.values)}: {ending.kind} {ending.words}"
    if ending.kind == "silence":
        return f"no answer: {told}"
    if ending.kind == "picture" and ending.files != expected.get(asked.values["prompt"]):
        return f"another picture: {told}"
    may_end = KINDS[asked.kind].may_end | ({"failed", "closed"} if was_broken else set())
    return None if ending.kind in may_end else f"not to be: {told}"
