"""Runs the steps of Jacobi decoding, and learns a step late how far each slot is."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glm_image.ar.model import Decoder
from glm_image.ar.speculation import rows_for
from glm_image.ar.state import DecodeState
from glm_image.ar.window import Window
from glm_image.ar.window_step import select_window_steps
from glm_image.devices.base import Device, DeviceEvent


@dataclass(frozen=True)
class _Enqueued:
    """A step under way: ``counts`` has the tokens of every slot when ``event`` is reached."""

    event: DeviceEvent
    counts: Tensor


class JacobiSteps:
    """The steps of all row counts, over one state.

    Attributes:
        window: their tensors.
        lag: steps that may be under way when ``step`` returns.
    """

    def __init__(
        self, decoder: Decoder, state: DecodeState, device: Device, row_counts: Sequence[int], *, capture: bool
    ) -> None:
        self._state, self._device, self._row_counts = state, device, tuple(row_counts)
        slots, positions = state.output.shape
        block = device.step_rows(slots)
        capacity = -(-max(row_counts) // block) * block
        self.window = Window.idle(slots, positions, capacity, device.torch_device)
        self.lag = 0 if device.is_host else 1
        make, pool = select_window_steps(decoder, state, self.window, device), device.graph_pool()
        self._steps = {}
        for rows in sorted(row_counts, reverse=True):
            step = make(rows)
            self._steps[rows] = device.capture(step, pool=pool) if capture else step
        # A buffer is written again when the step that read it, or wrote it, has ended.
        buffers = self.lag + 2
        self._layouts = deque(_host_buffer((2, capacity), device) for _ in range(buffers))
        self._counts = deque(_host_buffer((slots,), device) for _ in range(buffers))
        self._under_way: deque[_Enqueued] = deque()
        self._widths: dict[int, int] | None = None

    def set(self, slot: int, total: int, known: int) -> None:
        """Sets the counters of a slot that has, or will have, ``total`` tokens; see ``DecodeState.set``."""
        self.window.total[slot].fill_(total)
        self.window.known[slot].fill_(known)

    def step(self, widths: Mapping[int, int]) -> list[int] | None:
        """Enqueues a step in which each slot of ``widths`` has that many rows.

        Returns the number of tokens of every slot after the last step that is known to have ended; None at first.
        """
        self._write_layout(dict(sorted(widths.items())))
        self._steps[rows_for(sum(widths.values()), self._row_counts)]()
        self._counts.rotate(-1)
        self._counts[0].copy_(self._state.sampled, non_blocking=True)
        self._under_way.append(_Enqueued(self._device.record_event(), self._counts[0]))
        return self._known()

    def _known(self) -> list[int] | None:
        counts = None
        while len(self._under_way) > self.lag:
            enqueued = self._under_way.popleft()
            enqueued.event.synchronize()
            counts = enqueued.counts.tolist()
        return counts

    def _write_layout(self, widths: dict[int, int]) -> None:
        if widths == self._widths:
            return
        self._widths = widths
        self._layouts.rotate(-1)
        layout, row = self._layouts[0], 0
        layout[0].zero_()
        layout[1].fill_(self._state.output.shape[1])
        for slot, width in widths.items():
            layout[0, row : row + width] = slot
            layout[1, row : row + width] = torch.arange(width)
            row += width
        self.window.slot.copy_(layout[0], non_blocking=True)
        self.window.offset.copy_(layout[1], non_blocking=True)


def _host_buffer(shape: tuple[int, ...], device: Device) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64, pin_memory=not device.is_host)
