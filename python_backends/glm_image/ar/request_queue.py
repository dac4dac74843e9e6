"""The requests that wait for a slot. Threads add and cancel requests while the scheduler's thread takes them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from glm_image.ar.sequence import Request
from glm_image.errors import QueueFullError, UnavailableError


class RequestQueue:
    """A bounded first-in, first-out queue of requests, each of which is taken image by image."""

    def __init__(self, max_queue: int) -> None:
        self._max_queue = max_queue
        self._requests: deque[Request] = deque()
        self._lock = threading.Lock()
        self.is_closed = False

    def close(self) -> None:
        """Refuses requests from now on; those that wait stay."""
        with self._lock:
            self.is_closed = True

    def add(
        self, request: Request, needed_seconds: float, expected_wait: Callable[[tuple[Request, ...]], float]
    ) -> None:
        """Appends a request that takes at least ``needed_seconds``.

        ``expected_wait`` estimates, for the error, the seconds that a request behind the given ones waits.

        Raises:
            UnavailableError: the queue is closed.
            QueueFullError: it holds as many requests as it may.
            CancelledError: the request was cancelled.
            DeadlineExceededError: its deadline comes before it can be done.
        """
        with self._lock:
            if self.is_closed:
                raise UnavailableError("glm_ar is stopping; no new requests are taken")
            if len(self._requests) >= self._max_queue:
                raise QueueFullError(
                    f"glm_ar has {len(self._requests)} requests waiting, as many as max_queue allows; "
                    f"one more would wait about {expected_wait(tuple(self._requests)):.0f} s; try again later"
                )
            request.context.check(needed_seconds)
            self._requests.append(request)

    def requests(self) -> tuple[Request, ...]:
        """Returns the requests that have images without a slot, the first one first."""
        with self._lock:
            return tuple(self._requests)

    def take(self, request: Request) -> int | None:
        """Takes the next image of a request; returns its index, None if the request has left the queue."""
        with self._lock:
            if request not in self._requests:
                return None
            index = request.waiting.popleft()
            if not request.waiting:
                self._requests.remove(request)
            return index

    def remove(self, request: Request) -> None:
        with self._lock:
            if request in self._requests:
                self._requests.remove(request)

    def remove_unbegun(self, request: Request) -> bool:
        """Removes a request of which no image has been taken; returns whether it was there."""
        with self._lock:
            if request not in self._requests or request.has_begun:
                return False
            self._requests.remove(request)
            return True
