"""Runs the steps of Jacobi decoding, and learns a step late how many tokens each slot has accepted."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glm_image.ar.commands import Admit, Advanced
from glm_image.ar.first_guesses import first_guesses
from glm_image.ar.slot_sequence import SlotSequence
from glm_image.ar.speculation import rows_for
from glm_image.ar.state import DecodeState
from glm_image.ar.window import Window, round_up, write_layout
from glm_image.devices.base import Device, DeviceEvent


@dataclass(frozen=True)
class _Enqueued:
    """A step under way.

    Attributes:
        event: its end.
        counts: int64 [slots], on the host: the number of tokens of every slot after it.
        widths: of the slots that take part.
        sequences: those in the slots.
    """

    event: DeviceEvent
    counts: Tensor
    widths: Mapping[int, int]
    sequences: Mapping[int, SlotSequence]

    def result(self) -> list[tuple[Advanced, SlotSequence]]:
        """Waits for the step, updates its sequences, and returns what it did for those that were not done before."""
        self.event.synchronize()
        counts, advanced = self.counts.tolist(), []
        for slot, sequence in self.sequences.items():
            accepted = counts[slot] - sequence.sampled
            if accepted:
                sequence.sampled = counts[slot]
                advanced.append((Advanced(slot, self.widths[slot], accepted), sequence))
        return advanced


class JacobiSteps:
    """The steps of all row counts, over one state.

    Where the host computes, a step has ended when it returns. Elsewhere one is under way while the next is enqueued, so
    the device never waits for the host.

    Attributes:
        window: the tensors that all of them read.
    """

    def __init__(
        self,
        make: Callable[[Window, int], Callable[[], None]],
        state: DecodeState,
        device: Device,
        row_counts: Sequence[int],
        *,
        capture: bool,
    ) -> None:
        self._state, self._device, self._row_counts = state, device, tuple(sorted(row_counts))
        slots, positions = state.output.shape
        capacity = round_up(self._row_counts[-1], device.step_rows(slots))
        self.window = Window.idle(slots, positions, capacity, device.torch_device)
        with torch.inference_mode():
            self._steps = self._make_steps(make, capture=capture)
        self._under_way: deque[_Enqueued] = deque()
        self._most_under_way = 0 if device.is_host else 1
        # A step that reads or writes a buffer has ended before the host writes the buffer again.
        buffers = self._most_under_way + 2
        self._layouts = deque(_host_buffer((2, capacity), device) for _ in range(buffers))
        self._counts = deque(_host_buffer((slots,), device) for _ in range(buffers))
        self._widths: Mapping[int, int] | None = None

    def _make_steps(
        self, make: Callable[[Window, int], Callable[[], None]], *, capture: bool
    ) -> dict[int, Callable[[], None]]:
        """Makes the steps of all row counts; captured, they share memory, of which the largest takes most."""
        pool, steps = self._device.graph_pool(), dict[int, Callable[[], None]]()
        for rows in reversed(self._row_counts):
            step = make(self.window, rows)
            steps[rows] = self._device.capture(step, pool=pool) if capture else step
        return steps

    def begin(self, command: Admit) -> None:
        """Prepares a slot whose first token is sampled."""
        slot, window, output = command.slot, self.window, self._state.output[command.slot]
        sources, tokens = first_guesses(command)
        window.guess_from[slot, : len(sources)].copy_(_on_host(sources, self._device), non_blocking=True)
        output[1 : len(tokens)].copy_(_on_host(tokens, self._device)[1:], non_blocking=True)
        window.known[slot].fill_(1)
        window.total[slot].fill_(command.tokens)

    def end(self, slot: int) -> None:
        """Makes a slot idle after the steps under way."""
        self.window.total[slot].fill_(0)
        self.window.known[slot].fill_(0)

    def step(
        self, widths: Mapping[int, int], sequences: Mapping[int, SlotSequence]
    ) -> list[tuple[Advanced, SlotSequence]]:
        """Enqueues a step in which the sequences have windows of ``widths``, both by slot.

        Returns what steps have done that have ended since the last call.
        """
        for slot, sequence in sequences.items():
            sequence.draw_noise(self._state.noise[slot], self._reach(slot, sequence) + widths[slot])
        self._write_layout(widths)
        self._steps[rows_for(sum(widths.values()), self._row_counts)]()
        self._counts.rotate(-1)
        self._counts[0].copy_(self._state.sampled, non_blocking=True)
        self._under_way.append(_Enqueued(self._device.record_event(), self._counts[0], widths, sequences))
        advanced: list[tuple[Advanced, SlotSequence]] = []
        while len(self._under_way) > self._most_under_way:
            advanced += self._under_way.popleft().result()
        return advanced

    def _reach(self, slot: int, sequence: SlotSequence) -> int:
        """Returns the most tokens that the sequence may have after the steps under way."""
        steps = [step for step in self._under_way if step.sequences.get(slot) is sequence]
        return sequence.sampled + sum(step.widths[slot] for step in steps)

    def _write_layout(self, widths: Mapping[int, int]) -> None:
        if widths == self._widths:
            return
        self._layouts.rotate(-1)
        slots, offsets = self._layouts[0]
        write_layout(slots, offsets, widths, self._state.output.shape[1])
        self.window.slot.copy_(slots, non_blocking=True)
        self.window.offset.copy_(offsets, non_blocking=True)
        self._widths = widths


def _host_buffer(shape: tuple[int, ...], device: Device) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64, pin_memory=device.torch_device.type != "cpu")


def _on_host(values: Tensor, device: Device) -> Tensor:
    return values if device.torch_device.type == "cpu" else values.pin_memory()
