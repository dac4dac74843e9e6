"""The requests that an instance works on, and for a while those that ended: found by id to be cancelled or watched."""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import Enum
from functools import partial
from threading import Lock
from typing import Final

from glm_image.errors import CancelledError
from glm_image.ipc.protocol import Event, Publish, key_of
from glm_image.lifecycle.context import NANOSECONDS, Progress, RequestContext, RequestObserver
from glm_image.lifecycle.lru import LatestEntries

MAX_REMEMBERED: Final = 4096
MAX_PER_ID: Final = 16
REMEMBERED_SECONDS: Final = 3600
"""Longer than a request may wait between two stages."""


class RequestState(str, Enum):
    """The state of a request at one instance; a forwarded one goes on in the next stage."""

    RUNNING = "running"
    FORWARDED = "forwarded"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"


class RequestRegistry(RequestObserver):
    """Observes the requests of one instance, and remembers for a while how each of them ended.

    Several requests may share an id, and an id may be reused. So a cancel carries the time at which it was requested
    and applies to the requests that reached the server before. A cancel that comes while a request is between two
    stages is remembered for the second.

    Args:
        outcome: the state of a request that ended without an error: ``FORWARDED`` or ``FINISHED``.
        publish: publishes an event of a request.
    """

    def __init__(self, outcome: RequestState, publish: Publish) -> None:
        self._outcome, self._publish = outcome, publish
        self._lock = Lock()
        self._watched: set[bytes] = set()
        self._requests: dict[bytes, list[RequestContext]] = {}
        self._linked: dict[bytes, list[RequestContext]] = {}
        self._ended: LatestEntries[bytes, list[Event]] = LatestEntries(MAX_REMEMBERED, REMEMBERED_SECONDS)
        self._cancels: LatestEntries[bytes, int] = LatestEntries(MAX_REMEMBERED, REMEMBERED_SECONDS)
        self._progress_publisher = _ProgressPublisher(publish)

    def started(self, context: RequestContext) -> None:
        """Adds a request; cancels it if its id was cancelled while it was on its way here."""
        key = key_of(context.id)
        with self._lock:
            self._requests.setdefault(key, []).append(context)
            if key in self._watched:
                context.add_observer(self._progress_publisher)
            is_cancelled = self._is_cancelled(key, context.arrived_ns)
        if is_cancelled:
            context.cancel()

    def finished(self, context: RequestContext, error: BaseException | None) -> None:
        """Removes a request; one that never started leaves no trace."""
        key = key_of(context.id)
        state = self._outcome
        if error is not None:
            state = RequestState.CANCELLED if isinstance(error, CancelledError) else RequestState.FAILED
        with self._lock:
            if context not in self._requests.get(key, ()):
                return
            _remove(self._requests, key, context)
            context.remove_observer(self._progress_publisher)
            event = {**describe(context), "state": state}
            self._ended.put(key, [*(self._ended.get(key) or ()), event][-MAX_PER_ID:])
        self._publish(key, lambda: event)

    def cancel(self, request_id: str, requested_ns: int) -> list[Event]:
        """Cancels the requests of an id that reached the server before the cancel was requested.

        Returns their ``status`` as it was before; ``cancelled_now`` is true for those that this call cancels.
        """
        key = key_of(request_id)
        with self._lock:
            running = [context for context in self._requests.get(key, ()) if context.arrived_ns <= requested_ns]
            linked = [context for context in self._linked.get(key, ()) if context.arrived_ns <= requested_ns]
            events = [describe(context) for context in running] + self._ended_of(key)
            self._cancels.put(key, max(requested_ns, self._cancels.get(key) or 0))
        for context in running + linked:  # without the lock: this may call ``finished``
            context.cancel()
        cancellable = {RequestState.RUNNING, RequestState.FORWARDED}
        return [{**event, "cancelled_now": event["state"] in cancellable} for event in events]

    def link(self, context: RequestContext) -> Callable[[], None]:
        """Has a cancel of its id cancel an auxiliary request too, which ``status`` does not list.

        Returns a function that undoes this; to be called when the auxiliary request ends.
        """
        key = key_of(context.id)
        with self._lock:
            self._linked.setdefault(key, []).append(context)

        def unlink() -> None:
            with self._lock:
                _remove(self._linked, key, context)

        return unlink

    def status(self, request_id: str) -> list[Event]:
        """Returns the event that describes each request of an id, ended ones included."""
        key = key_of(request_id)
        with self._lock:
            return [describe(context) for context in self._requests.get(key, ())] + self._ended_of(key)

    def watch(self, key: bytes) -> None:
        """Publishes the state of the requests of an id, and their progress until ``unwatch``."""
        with self._lock:
            contexts = list(self._requests.get(key, ()))
            if key not in self._watched:
                self._watched.add(key)
                for context in contexts:
                    context.add_observer(self._progress_publisher)
        for context in contexts:
            self._publish(key, partial(describe, context))

    def unwatch(self, key: bytes) -> None:
        with self._lock:
            self._watched.discard(key)
            for context in self._requests.get(key, ()):
                context.remove_observer(self._progress_publisher)

    def publish_details(self, context: RequestContext, details: Callable[[], Event]) -> None:
        """Publishes a request's description and further details, which are made only if there is a subscriber."""
        self._publish(key_of(context.id), lambda: {**describe(context), **details()})

    def cancel_abandoned(self) -> None:
        with self._lock:
            contexts = [context for contexts in self._requests.values() for context in contexts]
        for context in contexts:
            if not context.cancelled and context.is_abandoned():
                context.cancel()

    def _is_cancelled(self, key: bytes, arrived_ns: int) -> bool:
        cancelled_ns = self._cancels.get(key)
        return cancelled_ns is not None and arrived_ns <= cancelled_ns

    def _ended_of(self, key: bytes) -> list[Event]:
        events = [dict(event) for event in self._ended.get(key) or ()]
        for event in events:
            if event["state"] == RequestState.FORWARDED and self._is_cancelled(key, event["arrived_ns"]):
                event["state"] = RequestState.CANCELLED
        return events


class _ProgressPublisher(RequestObserver):
    """Observes the watched requests: an engine skips progress that no observer receives."""

    def __init__(self, publish: Publish) -> None:
        self._publish = publish

    def progressed(self, context: RequestContext, progress: Progress) -> None:
        self._publish(key_of(context.id), partial(describe, context, progress))


def describe(context: RequestContext, progress: Progress | None = None) -> Event:
    """Returns the event that describes a running request."""
    progress = progress or context.progress()
    event = {
        "arrived_ns": context.arrived_ns,
        "state": RequestState.CANCELLED if context.cancelled else RequestState.RUNNING,
        "stage": progress.stage,
        "done": progress.done,
        "total": progress.total,
        "seconds": round((time.monotonic_ns() - context.arrived_ns) / NANOSECONDS, 3),
    }
    optional = {"sigma": progress.sigma, "seconds_left": progress.seconds_left}
    return event | {name: value for name, value in optional.items() if value is not None}


def _remove(contexts: dict[bytes, list[RequestContext]], key: bytes, context: RequestContext) -> None:
    contexts[key].remove(context)
    if not contexts[key]:
        del contexts[key]
