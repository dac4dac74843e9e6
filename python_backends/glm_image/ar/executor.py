"""The device's side of the AR: runs commands, decides nothing.

Every rank that runs the same commands has the same tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glm_image.ar.commands import Admit, Advance, Advanced, ArCommand, Discard, Encode, Peek, Release, Step
from glm_image.ar.config import NOISE_BLOCK
from glm_image.ar.jacobi import JacobiSteps
from glm_image.ar.model import Decoder
from glm_image.ar.rotary import rotary_tables
from glm_image.ar.sampler import sample
from glm_image.ar.slot_sequence import SlotSequence
from glm_image.ar.state import DecodeState
from glm_image.ar.step import select_steps
from glm_image.ar.vision import Vision
from glm_image.devices.base import Device, DeviceEvent
from glm_image.devices.oom import OomReport, run_or_oom
from glm_image.errors import UnavailableError
from glm_image.parallel.commands import R
from glm_image.request import geometry

STEPS_AHEAD = 2
"""Steps that may wait in the device's queue: enough to keep it busy, few enough to join and leave within three."""


class Executor:
    """Slots of a fixed batch that decode together.

    All state of a step is in tensors at fixed addresses, and a step waits for nothing, so it can be captured. The
    result of a slot does not depend on the other slots.

    Args:
        positions: prompt and image tokens a slot can hold.
        capture: whether the decode step is captured.
        row_counts: the numbers of rows of steps of Jacobi decoding, which then replace the others; () = without it.
        vision: encodes source images; without it ``Encode`` is refused.

    Attributes:
        state: the tensors of the slots.
        jacobi: the steps with speculation; None without, or when closed.
    """

    def __init__(
        self,
        decoder: Decoder,
        device: Device,
        slots: int,
        positions: int,
        *,
        capture: bool,
        row_counts: Sequence[int] = (),
        vision: Vision | None = None,
    ) -> None:
        self._decoder = decoder
        self._vision = vision
        self._device = device
        self._dtype = decoder.dtype
        self.state = DecodeState.idle(decoder.config, slots, positions, device.torch_device, self._dtype)
        self._sequences: dict[int, SlotSequence] = {}
        self._enqueued: deque[DeviceEvent] = deque()
        self._decode_step: Callable[[], None] | None = None
        self.jacobi: JacobiSteps | None = None
        steps = select_steps(decoder, self.state, device)
        self._prefill = steps.prefill
        if row_counts:
            self.jacobi = JacobiSteps(steps.windows, self.state, device, row_counts, capture=capture)
            return
        with torch.inference_mode():
            step = steps.plain()
            self._decode_step = device.capture(step) if capture else step

    def run(self, command: ArCommand[R]) -> R:
        """Runs a command and returns its result.

        Raises:
            DeviceMemoryError: an allocation failed; what the command had allocated is released.
            UnavailableError: the executor is closed.
        """
        self._device.set_current()
        result: R = run_or_oom(self._device, partial(self._dispatch, command), partial(self._oom_report, command))
        return result

    @torch.inference_mode()
    def _dispatch(self, command: ArCommand[Any]) -> Any:
        match command:
            case Step(count):
                return self._step(count)
            case Advance(widths):
                return self._advance(dict(widths))
            case Admit():
                return self._admit(command)
            case Encode(patches, grids):
                return self._encode(patches, grids)
            case _:
                return self._read_slot(command)

    def _read_slot(self, command: ArCommand[Any]) -> NDArray[np.int32] | None:
        match command:
            case Peek(slot, count):
                return self._tokens(slot, count)
            case Release(slot):
                return self._tokens(slot, self._make_idle(slot))
            case Discard(slot):
                self._make_idle(slot)
                return None
            case _:
                raise TypeError(f"{type(command).__name__} is no command of the AR")

    def _oom_report(self, command: ArCommand[Any]) -> OomReport:
        slots = f"{len(self._sequences)} of {len(self.state.tokens)} slots in use"
        return OomReport(command.operation, slots, command.setting)

    def close(self) -> None:
        """Waits for the work under way and drops the captured step: a communicator in it cannot be ended before."""
        try:
            self._device.set_current()
            self._device.record_event().synchronize()
        finally:
            self._decode_step = self.jacobi = None

    def _encode(self, patches: NDArray[np.float32], grids: tuple[geometry.Grid, ...]) -> NDArray[np.int32]:
        if self._vision is None:
            raise UnavailableError("no vision tower is loaded")
        return self._vision.encode(patches, grids)

    def _admit(self, command: Admit) -> None:
        slot, length = command.slot, len(command.prompt_ids)
        sequence = SlotSequence(self._device.generator(command.seed), total=command.tokens)
        self._sequences[slot] = sequence
        sequence.draw_noise(self.state.noise[slot], NOISE_BLOCK)
        preview_tokens = command.tokens - command.grids[-1].tokens
        self.state.sampler.set(slot, command.sampling, preview_tokens, self._decoder.config.vision_vocab_size)
        self._sample_first(slot, self._prefill_slot(command))
        self.state.set(slot, length, sampled=1, active=True)
        if self.jacobi is not None:
            self.jacobi.begin(command)
        sequence.sampled = 1
        self._device.record_event().synchronize()

    def _prefill_slot(self, command: Admit) -> Tensor:
        """Fills a slot's rotary tables and its cache; returns the logits of its first token, [1, vision_vocab_size]."""
        slot, length, state = command.slot, len(command.prompt_ids), self.state
        prompt_positions = geometry.prompt_positions(length, command.sources)
        decode_positions = geometry.decode_positions(command.grids, int(prompt_positions[0, -1]) + 1)
        cos, sin = self._rotary_tables(prompt_positions)
        generated = slice(length, length + command.tokens)
        state.cos[slot, generated], state.sin[slot, generated] = self._rotary_tables(decode_positions)
        token_ids = torch.tensor(command.prompt_ids, device=self._device.torch_device)
        return self._prefill(token_ids, cos, sin, state.cache, slot)

    def _rotary_tables(self, positions: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        return rotary_tables(self._decoder.config, positions, self._device.torch_device, self._dtype)

    def _sample_first(self, slot: int, logits: Tensor) -> None:
        state = self.state
        row = state.sampler.row(slot)
        allowed = state.allowed[(row.preview_tokens <= 0).long()]
        token = sample(logits, state.noise[slot, :1], row, allowed)
        state.tokens[slot] = state.output[slot, 0] = token[0]

    def _step(self, count: int) -> None:
        if self._decode_step is None:
            raise UnavailableError("the decoder is closed")
        for _ in range(count):
            for slot, sequence in self._sequences.items():
                if sequence.sampled % NOISE_BLOCK == 0:
                    sequence.draw_noise(self.state.noise[slot], sequence.sampled + NOISE_BLOCK)
                sequence.sampled += 1
            self._decode_step()
        self._enqueued.append(self._device.record_event())
        while len(self._enqueued) > STEPS_AHEAD:
            self._enqueued.popleft().synchronize()

    def _advance(self, widths: dict[int, int]) -> tuple[Advanced, ...]:
        if self.jacobi is None:
            raise UnavailableError("the decoder is closed")
        sequences = {slot: self._sequences[slot] for slot in widths}
        advanced = self.jacobi.step(widths, sequences)
        return tuple(found for found, sequence in advanced if self._sequences.get(found.slot) is sequence)

    def _make_idle(self, slot: int) -> int:
        """Returns how many tokens are known to be sampled in the slot."""
        self.state.set(slot, 0, sampled=0, active=False)
        if self.jacobi is not None:
            self.jacobi.end(slot)
        return self._sequences.pop(slot).sampled if slot in self._sequences else 0

    def _tokens(self, slot: int, count: int) -> NDArray[np.int32]:
        tokens: NDArray[np.int32] = self.state.output[slot, :count].to("cpu", torch.int32).numpy()
        return tokens.copy()
