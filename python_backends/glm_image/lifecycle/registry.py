"""The requests an instance has taken and not yet answered: to be cancelled, asked about and watched by their id."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import TypeVar

from glm_image.errors import CancelledError
from glm_image.ipc.protocol import Event, Publish, key_of, publish_nothing
from glm_image.lifecycle.context import NANOSECONDS, Progress, RequestContext

MAX_REMEMBERED = 4096
MAX_OF_AN_ID = 16
REMEMBERED_SECONDS = 3600
"""Longer than a request may wait between two stages."""


Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


@dataclass(eq=False)
class _Entry:
    context: RequestContext
    key: bytes
    is_gone: Callable[[], bool]


class _Memory(OrderedDict[Key, tuple[float, Value]]):
    """The latest entries, each with the time it was made; bounded in number and in time."""

    def note(self, key: Key, value: Value) -> None:
        now = time.monotonic()
        self[key] = (now, value)
        self.move_to_end(key)
        while len(self) > MAX_REMEMBERED or next(iter(self.values()))[0] < now - REMEMBERED_SECONDS:
            self.popitem(last=False)


class RequestRegistry:
    """The jobs of one instance, and for a while what became of those that ended.

    Ids may be shared by several requests, and used again. So a cancel carries the time at which it was asked for, and
    hits the requests that had arrived at the server before; one that comes between two stages is remembered for the
    second.

    Args:
        first_stage: what a job is at before it reports any progress.
        outcome: what has become of a job that ended without an error: ``handed_on`` or ``finished``.
    """

    def __init__(self, first_stage: str, outcome: str) -> None:
        self.publish: Publish = publish_nothing
        self._first_stage = first_stage
        self._outcome = outcome
        self._lock = Lock()
        self._watched: set[bytes] = set()
        self._beside: dict[bytes, list[RequestContext]] = {}
        self._entries: dict[bytes, list[_Entry]] = {}
        self._ended: _Memory[bytes, list[Event]] = _Memory()
        self._cancels: _Memory[bytes, int] = _Memory()

    def begin(self, context: RequestContext, is_gone: Callable[[], bool] = bool) -> None:
        """Takes a job, and tells of its progress whenever its id is watched.

        Args:
            context: the job; ``end`` must be called with it whatever happens.
            is_gone: asked now and then whether the caller has gone away.

        Raises:
            CancelledError: the request was cancelled before it came here.
        """
        entry = _Entry(context, key_of(context.id), is_gone)
        with self._lock:
            self._entries.setdefault(entry.key, []).append(entry)
            is_late = self._is_cancelled(entry.key, context.arrived_ns)
            self._watch(entry)
        context.report(self._first_stage, 0, 1)
        if is_late:
            context.cancel()
            context.check()

    def end(self, context: RequestContext, error: BaseException | None) -> None:
        """Lets go of a job; of one that never began nothing is noted."""
        key = key_of(context.id)
        outcome = self._outcome if error is None else "cancelled" if isinstance(error, CancelledError) else "failed"
        with self._lock:
            entries = self._entries.get(key, [])
            entry = next((entry for entry in entries if entry.context is context), None)
            if entry is None:
                return
            entries.remove(entry)
            if not entries:
                del self._entries[key]
            context.on_progress = None
            told = {**_told(entry), "state": outcome}
            self._ended.note(key, [*self._ended.get(key, (0.0, []))[1], told][-MAX_OF_AN_ID:])
        self.publish(key, lambda: told)

    def cancel(self, request_id: str, asked_ns: int) -> list[Event]:
        """Cancels the requests of an id that arrived before the cancel was asked for.

        Returns:
            What is told of each request of that id, ended ones included, as it was; ``cancelled_now`` is true of those
            that this call cancels.
        """
        key = key_of(request_id)
        with self._lock:
            entries = [entry for entry in self._entries.get(key, []) if entry.context.arrived_ns <= asked_ns]
            told = [_told(entry) for entry in entries] + self._ended_of(key)
            beside = [context for context in self._beside.get(key, []) if context.arrived_ns <= asked_ns]
            self._cancels.note(key, max(asked_ns, self._cancels.get(key, (0.0, 0))[1]))
        for context in [entry.context for entry in entries] + beside:  # outside the lock: ``end`` may be called here
            context.cancel()
        return [{**one, "cancelled_now": one["state"] in {"running", "handed_on"}} for one in told]

    def beside(self, context: RequestContext) -> Callable[[], None]:
        """Has a job cancelled with the requests of its id, for which it does something; nothing is told of it.

        Returns:
            What lets go of it, to be called when it is over.
        """
        key = key_of(context.id)
        with self._lock:
            self._beside.setdefault(key, []).append(context)

        def let_go() -> None:
            with self._lock:
                self._beside[key].remove(context)
                if not self._beside[key]:
                    del self._beside[key]

        return let_go

    def status(self, request_id: str) -> list[Event]:
        """Returns what is told of each request of an id, ended ones included."""
        key = key_of(request_id)
        with self._lock:
            return [_told(entry) for entry in self._entries.get(key, [])] + self._ended_of(key)

    def watch(self, key: bytes) -> None:
        """Publishes where the requests of an id are now, and their progress until ``unwatch``."""
        with self._lock:
            self._watched.add(key)
            entries = list(self._entries.get(key, []))
            for entry in entries:
                self._watch(entry)
        for entry in entries:
            self.publish(key, partial(_told, entry))

    def unwatch(self, key: bytes) -> None:
        """Lets the requests of an id go on without a word: nobody listens."""
        with self._lock:
            self._watched.discard(key)
            for entry in self._entries.get(key, []):
                self._watch(entry)

    def tell(self, context: RequestContext, more: Callable[[], Event]) -> None:
        """Publishes more of a job than its progress, if anybody listens."""
        key = key_of(context.id)
        with self._lock:
            entry = next((entry for entry in self._entries.get(key, []) if entry.context is context), None)
        if entry is not None:
            told = entry
            self.publish(key, lambda: {**_told(told), **more()})

    def cancel_gone(self) -> None:
        """Cancels the requests whose callers have gone away."""
        with self._lock:
            entries = [entry for entries in self._entries.values() for entry in entries]
        for entry in entries:
            if not entry.context.cancelled and entry.is_gone():
                entry.context.cancel()

    def _watch(self, entry: _Entry) -> None:
        # An engine reports at every step: where nobody watches, that must cost it a look at this attribute at most.
        entry.context.on_progress = partial(self._publish_progress, entry) if entry.key in self._watched else None

    def _publish_progress(self, entry: _Entry, progress: Progress) -> None:
        self.publish(entry.key, lambda: _told(entry, progress))

    def _is_cancelled(self, key: bytes, arrived_ns: int) -> bool:
        return arrived_ns <= self._cancels.get(key, (0.0, -1))[1]

    def _ended_of(self, key: bytes) -> list[Event]:
        ended = [dict(told) for told in self._ended.get(key, (0.0, []))[1]]
        for told in ended:
            if told["state"] == "handed_on" and self._is_cancelled(key, told["arrived_ns"]):
                told["state"] = "cancelled"
        return ended


def _told(entry: _Entry, progress: Progress | None = None) -> Event:
    context, progress = entry.context, progress or entry.context.progress()
    told = {
        "arrived_ns": context.arrived_ns,
        "state": "cancelled" if context.cancelled else "running",
        "stage": progress.stage,
        "done": progress.done,
        "total": progress.total,
        "seconds": round((time.monotonic_ns() - context.arrived_ns) / NANOSECONDS, 3),
    }
    return told if progress.sigma is None else {**told, "sigma": progress.sigma}
