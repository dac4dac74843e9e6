"""Jacobi decoding on the host: how many tokens each slot guesses. Touches no tensors.

Widths of windows and row counts change only how soon tokens come, never which.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from glm_image.ar.commands import Advanced

MIN_WINDOW: Final = 2
MAX_WINDOW: Final = 32
"""The windows of the step under way and of the next need noise; ``ar.config.NOISE_BLOCK`` has that of both."""

MAX_ROWS: Final = 128
INT8_MAX_ROWS: Final = 64
"""Rows up to which more of them are worth their time on accelerators. On an H200 a step of 128 rows takes 1.4 times as
long as one of 8; with int8 weights 2.6 times, since int8 pairs are twice as many columns."""

CAPTURED_ROWS: Final = (16, 32, 64, 128)
"""Row counts that are captured, where ``graph_capture_sizes`` names none."""

HOST_ROWS: Final = 8
"""On the CPU, which captures nothing, any multiple is a row count."""

ROW_COST: Final = 0.003
HOST_ROW_COST: Final = 1.0
"""The part of the time of a step of one row that another row adds: 0.003 on an H200, nearly all on the CPU."""

WORTH: Final = 0.02
"""The least probability to be right of a guess that takes a row; the first guess of a slot needs none."""

FORGETTING: Final = 0.9
"""The weight of a slot's acceptance so far when a step is added to it: a mean over about ten steps."""

FIRST_RIGHT, FIRST_WRONG = 4.0, 1.0
"""What a slot begins with, as if so many guesses had been right and wrong."""


def row_counts(
    slots: int, window: int, *, is_host: bool, captured: Sequence[int] = (), most: int = MAX_ROWS
) -> tuple[int, ...]:
    """Returns the numbers of rows that steps may have, ascending, up to ``most`` or a row of every slot.

    ``captured`` replaces the usual ones.
    """
    if captured:
        return tuple(sorted(captured))
    most = max(slots, min(slots * window, most))
    if is_host:
        block = -(-slots // HOST_ROWS) * HOST_ROWS  # a step computes a multiple of the rows of ``none``
        return tuple(range(block, most + block, block))
    larger = [count for count in CAPTURED_ROWS if count >= most]
    return (*(count for count in CAPTURED_ROWS if count < most), larger[0] if larger else most)


def rows_for(needed: int, counts: Sequence[int]) -> int:
    """Returns the least row count, of ascending ones, that has ``needed`` rows."""
    return next(count for count in counts if count >= needed)


@dataclass
class _Acceptance:
    """How many of a slot's guesses were right and wrong, older steps counting less."""

    right: float = FIRST_RIGHT
    wrong: float = FIRST_WRONG

    @property
    def share(self) -> float:
        """The expected probability that a guess is right, if those before it are."""
        return self.right / (self.right + self.wrong)

    def add(self, width: int, accepted: int) -> None:
        if width > 1:  # else nothing was guessed
            self.right = self.right * FORGETTING + accepted - 1
            self.wrong = self.wrong * FORGETTING + (accepted < width)


class WindowPolicy:
    """Divides a step's rows among the slots: a row goes where its guess is most probably right.

    A slot whose guesses are wrong gets few rows, but more than one while there are enough, so that it can recover. The
    number of rows is that with the most tokens expected for its time.

    Args:
        window: the most rows of a slot.
        row_counts: ascending; at least one row for every slot.
        row_cost: ``ROW_COST`` or ``HOST_ROW_COST``.
    """

    def __init__(self, window: int, row_counts: Sequence[int], row_cost: float) -> None:
        self._window, self._row_counts, self._row_cost = window, tuple(row_counts), row_cost
        self._acceptance: dict[int, _Acceptance] = {}

    def begin(self, slot: int) -> None:
        """Forgets what a slot accepted before it was given another sequence."""
        self._acceptance[slot] = _Acceptance()

    def observe(self, step: Advanced) -> None:
        self._acceptance[step.slot].add(step.width, step.accepted)

    def widths(self, left: Mapping[int, int]) -> dict[int, int]:
        """Returns the rows of each slot in the next step, 1 up to ``left``, the tokens that it has left."""
        most = {slot: min(self._window, tokens) for slot, tokens in left.items()}
        shares = {slot: self._acceptance[slot].share for slot in left}
        order = self._in_order_of_value(most, shares)
        best, best_rate = 0, 0.0
        for count in (count for count in self._row_counts if count >= len(left)):
            taken = min(len(order), count - len(left))
            tokens = len(left) + sum(value for value, _ in order[:taken])
            rate = tokens / (1 + self._row_cost * count)
            if rate > best_rate:
                best, best_rate = taken, rate
            if taken == len(order):
                break
        widths = dict.fromkeys(left, 1)
        for _, slot in order[:best]:
            widths[slot] += 1
        return widths

    @staticmethod
    def _in_order_of_value(most: Mapping[int, int], shares: Mapping[int, float]) -> list[tuple[float, int]]:
        """Returns the rows beyond each slot's first that are worth it: probability to be right and slot, best first."""
        heap = [(-shares[slot], slot, 2) for slot, rows in most.items() if rows > 1]
        heapq.heapify(heap)
        order = []
        while heap:
            value, slot, rows = heapq.heappop(heap)
            order.append((-value, slot))
            if rows < most[slot] and -value * shares[slot] >= WORTH:
                heapq.heappush(heap, (value * shares[slot], slot, rows + 1))
        return order
