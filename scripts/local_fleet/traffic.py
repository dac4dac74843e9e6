"""Clients that send requests to a fleet's gateway while it is disturbed, and check every answer."""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, TypeVar

import httpx

from glm_image_client import GlmImageClient, GlmImageClientError, UnreachableError

T = TypeVar("T")

ANSWER_SECONDS: Final = 300.0
"""A request without an answer after this time is a fault."""
PAUSE_SECONDS: Final = 0.2
"""Between two questions for a job, and before a request whose connection was closed is sent again."""
KINDS: Final = {"request": 4, "job": 3, "kserve": 3}
"""How often each kind of request is sent: to OpenAI's API, as a job there, and by KServe's protocol over gRPC."""


@dataclass(frozen=True)
class Picture:
    """A request."""

    prompt: str
    size: str
    steps: int
    images: int
    seed: int

    @property
    def body(self) -> dict[str, Any]:
        """The body of its request to the gateway."""
        return {
            "prompt": self.prompt,
            "size": self.size,
            "num_inference_steps": self.steps,
            "n": self.images,
            "seed": self.seed,
        }


PICTURES: Final = tuple(
    Picture(prompt, size, steps, images, seed)
    for seed, (prompt, size, steps, images) in enumerate(
        [
            ("a fox", "64x64", 20, 1),
            ("a sign that says 'open'", "96x64", 60, 1),
            ("雪", "70x50", 20, 2),
            ("a long road at night", "256x256", 8, 1),
            ("four foxes", "64x96", 20, 4),
        ]
    )
)


def images_of(grpc_url: str) -> dict[Picture, list[str]]:
    """Returns the base64 of every picture's PNG files, as a server of both stages generates them."""
    with GlmImageClient(grpc_url) as client:
        return {picture: generated(client, picture) for picture in PICTURES}


def generated(client: GlmImageClient, picture: Picture) -> list[str]:
    """Returns the base64 of a picture's PNG files, by KServe's protocol; raises ``GlmImageClientError``."""
    width, height = map(int, picture.size.split("x"))
    result = client.generate(
        picture.prompt,
        width=width,
        height=height,
        num_inference_steps=picture.steps,
        num_images=picture.images,
        seed=picture.seed,
        output_format="png",
        timeout=ANSWER_SECONDS,
    )
    return [file.decode() for file in result.base64_files]


@dataclass
class Sent:
    """A request, however often it was sent.

    Attributes:
        kind: one of ``KINDS``.
        tries: times that it was sent, or its job was added.
        answers: complete answers.
        fault: what was wrong; None = it got its images, once.
    """

    kind: str
    tries: int = 0
    answers: int = 0
    fault: str | None = None


class Traffic:
    """Requests of several clients within a block; each sends one after the other.

    Args:
        url: the gateway's.
        grpc_url: its address of KServe's protocol.
        expected: the files of each picture.
        clients: their number.
        seed: of their choices.
    """

    def __init__(
        self, url: str, grpc_url: str, expected: Mapping[Picture, list[str]], clients: int, seed: int = 0
    ) -> None:
        self._url, self._grpc_url, self._expected = url, grpc_url, expected
        self._finished, self._gateway_is_away = threading.Event(), threading.Event()
        self.sent: list[Sent] = []
        self._threads = [
            threading.Thread(target=self._client, args=(random.Random(f"{seed} {index}"),), name=f"client-{index}")
            for index in range(clients)
        ]

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finished.set()
        for thread in self._threads:
            thread.join()

    def expect_closed_connections(self, expected: bool) -> None:
        """Whether the gateway itself is disturbed, so that clients have to send requests again."""
        if expected:
            self._gateway_is_away.set()
        else:
            self._gateway_is_away.clear()

    @property
    def faults(self) -> list[str]:
        return [sent.fault for sent in self.sent if sent.fault is not None]

    def counts(self) -> dict[str, int]:
        """Returns how many requests of each kind got one answer, and how many were sent again."""
        counts = Counter({f"sent_{kind}": 0 for kind in KINDS})
        counts.update(f"sent_{sent.kind}" for sent in self.sent)
        counts["answered_once"] = sum(sent.answers == 1 and sent.fault is None for sent in self.sent)
        counts["sent_again_by_clients"] = sum(sent.tries > 1 for sent in self.sent)
        return dict(counts)

    def _client(self, rng: random.Random) -> None:
        with httpx.Client(base_url=self._url, timeout=ANSWER_SECONDS) as client:
            send = {"request": self._request, "job": self._job, "kserve": self._kserve}
            while not self._finished.is_set():
                (kind,) = rng.choices(list(KINDS), list(KINDS.values()))
                sent, picture = Sent(kind), rng.choice(PICTURES)
                try:
                    files = send[kind](client, sent, picture)
                    sent.answers += 1
                    if files != self._expected[picture]:
                        sent.fault = f"{kind} {picture}: other images, {len(files)} in number"
                except (httpx.HTTPError, GlmImageClientError, RuntimeError) as error:
                    sent.fault = f"{kind} {picture}: {error!r}"
                self.sent.append(sent)

    def _request(self, client: httpx.Client, sent: Sent, picture: Picture) -> list[str]:
        return files_of(self._send(client, sent, "POST", "/v1/images/generations", picture.body))

    def _kserve(self, _: httpx.Client, sent: Sent, picture: Picture) -> list[str]:
        def send() -> list[str]:
            # A connection of its own: one that is kept waits before it is opened again.
            with GlmImageClient(self._grpc_url) as client:
                return generated(client, picture)

        return self._until_answered(sent, send, UnreachableError)

    def _job(self, client: httpx.Client, sent: Sent, picture: Picture) -> list[str]:
        path = f"/v1/images/jobs/{uuid.uuid4().hex}"
        self._send(client, sent, "PUT", path, picture.body)
        end = time.monotonic() + ANSWER_SECONDS
        while time.monotonic() < end:
            job = self._send(client, Sent("job"), "GET", path)
            if job["status"] == "done":
                return files_of(job["result"])
            if job["status"] not in {"queued", "running"}:
                raise RuntimeError(f"the job is {job['status']}: {job.get('error')}")
            time.sleep(PAUSE_SECONDS)
        raise RuntimeError(f"no result after {ANSWER_SECONDS:g} s")

    def _send(self, client: httpx.Client, sent: Sent, method: str, path: str, body: object = None) -> dict[str, Any]:
        response = self._until_answered(sent, lambda: client.request(method, path, json=body), httpx.TransportError)
        if not response.is_success:
            raise RuntimeError(f"{response.status_code}: {response.text[:300]}")
        answer: dict[str, Any] = response.json()
        return answer

    def _until_answered(self, sent: Sent, send: Callable[[], T], closed: type[Exception]) -> T:
        """Sends a request until it is answered; again only where the gateway closed its connection."""
        end = time.monotonic() + ANSWER_SECONDS
        was_away = False
        while True:
            sent.tries += 1
            was_away |= self._gateway_is_away.is_set()
            try:
                return send()
            except closed:
                was_away |= self._gateway_is_away.is_set()
                if not was_away or time.monotonic() > end:
                    raise
                time.sleep(PAUSE_SECONDS)


def files_of(answer: Mapping[str, Any]) -> list[str]:
    """Returns the base64 of the images of an answer of OpenAI's API."""
    return [item["b64_json"] for item in answer["data"]]
