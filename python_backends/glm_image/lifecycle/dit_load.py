"""The load of the DiT: the images that ``glm_ar`` forwarded and ``glm_dit`` has not denoised, as both stages know it.

An ensemble gives its first step no feedback on the tokens. So each DiT instance publishes its requests and
their remaining images whenever they change. A statement is complete: a subscriber that missed one, or comes later, is
up to date after the next.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from glm_image.ipc.protocol import KEY_BYTES, Event, Publish
from glm_image.ipc.subscriber import Subscriber
from glm_image.lifecycle.context import RequestContext, RequestObserver
from glm_image.lifecycle.durations import DurationStats
from glm_image.request.stages import Stage

TOPIC: Final = b"dit_load".ljust(KEY_BYTES)
"""The topic of statements: as long as the keys of requests, and different from all of them, as those are digests."""

INSTANCES: Final = "glm_dit_"
"""The prefix of the names of DiT instances."""

HANDOVER_SECONDS: Final = 1.0
"""Longer than a request takes from ``glm_ar`` to a DiT instance that waits for it."""


class DitLoadReporter(RequestObserver):
    """Publishes the load of the DiT instance ``name`` whenever its requests change it."""

    def __init__(self, name: str, publish: Publish) -> None:
        self._name, self._publish = name, publish
        self._lock = threading.Lock()
        self._on_change: Callable[[], None] = lambda: None
        self._images_left: dict[RequestContext, int] = {}
        self._durations = DurationStats()

    def started(self, context: RequestContext) -> None:
        with self._lock:
            self._images_left[context] = context.num_images
        self.publish_load()

    def stage_finished(self, context: RequestContext, stage: Stage, seconds: float) -> None:
        if stage != Stage.DENOISE:  # once per image
            return
        self._durations.add(seconds)
        with self._lock:
            if self._images_left.get(context):
                self._images_left[context] -= 1
        self.publish_load()

    def finished(self, context: RequestContext, error: BaseException | None) -> None:
        with self._lock:
            self._images_left.pop(context, None)
        self.publish_load()

    def when_changed(self, callback: Callable[[], None]) -> None:
        """Sets the callback to run after each change, in the thread that caused it."""
        self._on_change = callback

    def images_left(self) -> list[int]:
        """Returns how many images of each request are not denoised; 0 for one that is decoded or encoded."""
        with self._lock:
            return list(self._images_left.values())

    def publish_load(self) -> None:
        self._publish(TOPIC, self._statement)
        self._on_change()

    def _statement(self) -> Event:
        with self._lock:
            requests = [(context.arrived_ns, left) for context, left in self._images_left.items()]
        return {"instance": self._name, "requests": requests, "seconds_per_image": self._durations.mean}


class _InstanceLoad(NamedTuple):
    """The last statement of an instance, and the time since which it is idle."""

    images: int
    seconds_per_image: float
    idle_since: float


class _Forwarded(NamedTuple):
    images: int
    size: int
    at: float


class DitLoad:
    """The load of all DiT instances, as ``glm_ar`` knows it; requests are identified by their time of arrival.

    Forwarded tokens may never reach an instance: their request was cancelled, its caller disconnected, or the queue in
    between refused it. As that queue keeps the order, a request forwarded well before one that has come out of it is
    lost; and while an instance is idle, nothing waits in the queue.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._forwarded: dict[int, _Forwarded] = {}
        self._instances: dict[str, _InstanceLoad] = {}
        self._on_change: Callable[[], None] = lambda: None

    def when_changed(self, callback: Callable[[], None]) -> None:
        """Sets the callback to run after each statement, in the thread that received it."""
        self._on_change = callback

    def forwarded(self, arrived_ns: int, images: int, size: int = 0) -> None:
        """Adds a request whose tokens are about to be sent to the DiT; its inputs have ``size`` bytes."""
        with self._lock:
            self._forwarded[arrived_ns] = _Forwarded(images, size, self._clock())
            self._forget_lost()

    def update(self, statement: Event) -> None:
        requests: list[tuple[int, int]] = statement["requests"]
        images, idle_since = sum(left for _, left in requests), math.inf if requests else self._clock()
        with self._lock:
            self._instances[statement["instance"]] = _InstanceLoad(images, statement["seconds_per_image"], idle_since)
            received = [self._forwarded.pop(arrived_ns, None) for arrived_ns, _ in requests]
            # Requests that were decoded together are forwarded together, and may come out in any order.
            passed = max((request.at for request in received if request), default=-math.inf) - HANDOVER_SECONDS
            self._keep(lambda request: request.at >= passed)
        self._on_change()

    def images(self) -> int | None:
        """Returns how many images are forwarded and not denoised; None until an instance has published its load."""
        with self._lock:
            if not self._instances:
                return None
            self._forget_lost()
            at_instances = sum(instance.images for instance in self._instances.values())
            return at_instances + sum(request.images for request in self._forwarded.values())

    def bytes(self) -> int:
        """Returns how many bytes of inputs are forwarded and not received: they wait in Triton."""
        with self._lock:
            self._forget_lost()
            return sum(request.size for request in self._forwarded.values())

    def next_loss(self) -> float:
        """Returns when the next forwarded request will count as lost, unless an instance reports it; inf = never."""
        with self._lock:
            return min(map(self._lost_at, self._forwarded.values()), default=math.inf)

    @property
    def seconds_per_image(self) -> float:
        """The mean time that all instances together take per image; 0 while it is unknown."""
        with self._lock:
            rates = [1 / load.seconds_per_image for load in self._instances.values() if load.seconds_per_image > 0]
        return 1 / sum(rates) if rates else 0.0

    def _lost_at(self, request: _Forwarded) -> float:
        # Without an instance, as where only the AR is served, nothing waits either.
        idle_since = min((instance.idle_since for instance in self._instances.values()), default=-math.inf)
        return max(request.at, idle_since) + HANDOVER_SECONDS

    def _forget_lost(self) -> None:
        now = self._clock()
        self._keep(lambda request: self._lost_at(request) > now)

    def _keep(self, is_there: Callable[[_Forwarded], bool]) -> None:
        self._forwarded = {arrived_ns: request for arrived_ns, request in self._forwarded.items() if is_there(request)}


class DitLoadFeed(RequestObserver):
    """Keeps its ``load`` up to date: by the statements of DiT instances, and by the AR requests that it observes."""

    def __init__(self, folder: Path) -> None:
        self.load = DitLoad()
        self._subscriber = Subscriber(folder, INSTANCES, TOPIC, self.load.update)

    def started(self, context: RequestContext) -> None:
        self._subscriber.discover()

    def finished(self, context: RequestContext, error: BaseException | None) -> None:
        if error is None:
            self.load.forwarded(context.arrived_ns, context.num_images, context.input_bytes)

    def close(self) -> None:
        self._subscriber.close()
