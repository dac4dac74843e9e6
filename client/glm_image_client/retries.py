"""Retries of requests that a busy server refuses."""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass

from glm_image_client.errors import (
    BadArgumentError,
    BusyError,
    GlmImageClientError,
    TooManyPingsError,
    UnreachableError,
)


@dataclass(frozen=True)
class Retries:
    """Exponential backoff: the first pause is ``first_seconds``, each further one ``factor`` times as long.

    Each pause is shortened by a random share of up to ``jitter``, so that clients refused at the same time do not
    return at the same time. Pauses count towards a request's timeout: a pause that would exceed it is not begun.

    Attributes:
        attempts: the number of retries; 0 = none.
        first_seconds: the first pause.
        factor: ratio of a pause to the previous one.
        longest_seconds: the longest pause.
        jitter: 0 = none, 1 = a pause of any length up to the full length.
        unreachable: whether to retry also if no server answers, as during a restart.

    Raises:
        BadArgumentError: a value is out of its range.
    """

    attempts: int = 5
    first_seconds: float = 0.5
    factor: float = 2.0
    longest_seconds: float = 30.0
    jitter: float = 0.5
    unreachable: bool = False

    def __post_init__(self) -> None:
        lowest = {"attempts": 0, "first_seconds": 0, "factor": 1, "longest_seconds": 0, "jitter": 0}
        for name, low in lowest.items():
            value, high = getattr(self, name), 1 if name == "jitter" else math.inf
            if not isinstance(value, (int, float)) or not (math.isfinite(value) and low <= value <= high):
                raise BadArgumentError(
                    f"{name} is {value!r}; allowed: {low} {'to 1' if name == 'jitter' else 'or more'}"
                )

    def pause(self, index: int) -> float:
        """Returns a random duration of pause ``index``, counted from 0, in seconds."""
        # The exponent is bounded: a float power that overflows raises.
        full = min(self.longest_seconds, self.first_seconds * self.factor ** min(index, 64))
        return full * (1 - self.jitter * random.random())


NO_RETRIES = Retries(attempts=0)


class Attempts:
    """The attempts of one request: the remaining time and the pauses."""

    def __init__(self, retries: Retries, timeout: float | None) -> None:
        self._retries = retries
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._timeout = timeout
        self._failed = 0
        self._is_repeated = False

    @property
    def timeout(self) -> float | None:
        """Seconds that the next attempt may take; None = no limit."""
        if self._deadline is None or not (self._failed or self._is_repeated):
            return self._timeout
        return self._deadline - time.monotonic()

    def repeat_without_pings(self, error: TooManyPingsError) -> None:
        """Allows one more attempt, which is no retry: the server has not refused the request.

        Raises:
            TooManyPingsError: ``error``, if there was such an attempt, or no time is left for one.
        """
        if self._is_repeated or (self._deadline is not None and time.monotonic() >= self._deadline):
            raise error
        self._is_repeated = True

    def pause_after(self, error: GlmImageClientError) -> float:
        """Returns the seconds to wait after a failed attempt.

        Raises:
            GlmImageClientError: ``error``, if there is no further attempt.
        """
        kinds = (BusyError, UnreachableError) if self._retries.unreachable else (BusyError,)
        if not isinstance(error, kinds) or self._failed >= self._retries.attempts:
            raise error
        seconds = self._retries.pause(self._failed)
        if self._deadline is not None and time.monotonic() + seconds >= self._deadline:
            raise error
        self._failed += 1
        return seconds
