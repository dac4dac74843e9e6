"""The bytes of the requests that a stage holds: bounded, whatever their number."""

from __future__ import annotations

import threading
from collections.abc import Callable

from glm_image.errors import InvalidInputError, QueueFullError
from glm_image.lifecycle.context import RequestContext, RequestObserver

MEGABYTE = 1e6


class ByteBudget(RequestObserver):
    """Counts the bytes of requests from ``hold`` to their end, and refuses what would exceed ``max_bytes``.

    Args:
        stage: the stage's name in errors.
        max_bytes: the value of ``max_queue_bytes``.
        elsewhere: returns the bytes of requests that have left the stage and occupy the server's memory nevertheless.
    """

    def __init__(self, stage: str, max_bytes: int, elsewhere: Callable[[], int] = lambda: 0) -> None:
        self._stage, self._max_bytes, self._elsewhere = stage, max_bytes, elsewhere
        self._lock = threading.Lock()
        self._held: dict[RequestContext, int] = {}

    def hold(self, context: RequestContext, name: str, size: int) -> None:
        """Adds bytes to those of a request; ``name`` is the input that has most of them.

        Raises:
            InvalidInputError: the request alone exceeds the budget.
            QueueFullError: it would with the others.
        """
        with self._lock:
            own = self._held.get(context, 0) + size
            if own > self._max_bytes:
                raise InvalidInputError.of(name, f"{own} bytes in all", f"at most {self._max_bytes} (max_queue_bytes)")
            others = sum(self._held.values()) - self._held.get(context, 0) + self._elsewhere()
            if others + own > self._max_bytes:
                raise QueueFullError(
                    f"{self._stage} holds {others / MEGABYTE:.0f} MB of requests, and this one of "
                    f"{own / MEGABYTE:.0f} MB would exceed the {self._max_bytes / MEGABYTE:.0f} MB of max_queue_bytes; "
                    "try again later"
                )
            self._held[context] = own

    @property
    def held(self) -> int:
        """The bytes of all requests that the stage holds."""
        with self._lock:
            return sum(self._held.values())

    def finished(self, context: RequestContext, error: BaseException | None) -> None:
        with self._lock:
            self._held.pop(context, None)
