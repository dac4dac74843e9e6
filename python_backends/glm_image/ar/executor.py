"""The device's side of the first stage: does what it is told, decides nothing.

Every rank that runs the same commands has the same tokens, so commands are plain data that can be sent to others.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from glm_image.ar.commands import Admit, Command, Encode, Peek, Release
from glm_image.ar.model import Decoder
from glm_image.ar.rotary import rotary_tables
from glm_image.ar.sampler import NOISE_BLOCK, draw
from glm_image.ar.select_step import select_decode_step, select_prefill
from glm_image.ar.state import DecodeState
from glm_image.ar.vision import Vision
from glm_image.devices.base import Device, DeviceEvent
from glm_image.devices.oom import OomReport, run_or_oom
from glm_image.errors import UnavailableError
from glm_image.request import geometry
from glm_image.request.geometry import PIXELS_PER_TOKEN

STEPS_AHEAD = 2
"""Steps that may wait in the device's queue: enough to keep it busy, few enough to join and leave within three."""


def _never() -> None:
    raise UnavailableError("the decoder is closed")


@dataclass
class _Sequence:
    generator: torch.Generator
    drawn: int
    total: int


class Executor:
    """Slots of a fixed batch that decode together.

    All state of a step lives in tensors that stay where they are, and a step waits for nothing, so it can be captured.
    What a slot computes depends on nothing in the others.

    Args:
        decoder: the model, on ``device``.
        device: where to run.
        slots: sequences at once.
        positions: prompt and image tokens a slot can hold.
        capture: whether steps are captured.
        vision: what turns source images into tokens; None where there are none.
    """

    def __init__(
        self,
        decoder: Decoder,
        device: Device,
        slots: int,
        positions: int,
        *,
        capture: bool,
        vision: Vision | None = None,
    ) -> None:
        self._decoder = decoder
        self._vision = vision
        self._device = device
        self._dtype = decoder.dtype
        self._state = DecodeState.idle(decoder.config, slots, positions, device.torch_device, self._dtype)
        self._sequences: dict[int, _Sequence] = {}
        self._queue: deque[DeviceEvent] = deque()
        step = select_decode_step(decoder, self._state, device)
        with torch.inference_mode():
            self._step_once = device.capture(step) if capture else step
        self._prefill = select_prefill(decoder, device)

    def run(self, command: Command) -> NDArray[np.int32] | None:
        """Runs one command; ``Encode``, ``Peek`` and a wanted ``Release`` return tokens, int32 [tokens].

        Raises:
            DeviceMemoryError: out of memory; what the command had allocated is freed.
        """
        self._device.set_current()
        return run_or_oom(self._device, lambda: self._obey(command), lambda: self._oom_report(command))

    @torch.inference_mode()
    def _obey(self, command: Command) -> NDArray[np.int32] | None:
        if isinstance(command, Release):
            return self._release(command)
        if isinstance(command, Peek):
            return self._tokens(command.slot, command.count)
        if isinstance(command, Encode):
            assert self._vision is not None
            return self._vision.encode(command.patches, command.grids)
        if isinstance(command, Admit):
            self._admit(command)
        else:
            self._step(command.count)
        return None

    def _oom_report(self, command: Command) -> OomReport:
        in_use = f"{len(self._sequences)} of {len(self._state.tokens)} slots in use"
        settings = "max_num_seqs or max_sequence_tokens"
        if isinstance(command, Encode):
            sides = [(grid.width * PIXELS_PER_TOKEN, grid.height * PIXELS_PER_TOKEN) for grid in command.grids]
            sizes = ", ".join(f"{width} x {height}" for width, height in sides)
            return OomReport(
                f"the encoding of source images of {sizes} pixels", in_use, f"their number or size, or {settings}"
            )
        if isinstance(command, Admit):
            tokens = len(command.prompt_ids)
            return OomReport(
                f"the prefill of {tokens} tokens", in_use, f"its length, source images included, or {settings}"
            )
        return OomReport("a decode step", in_use, settings)

    def close(self) -> None:
        """Waits for what is under way and forgets the captured step: a communicator in it cannot be ended before."""
        try:
            self._device.set_current()
            self._device.record_event().synchronize()
        finally:
            self._step_once = _never

    def _admit(self, command: Admit) -> None:
        config, place, state = self._decoder.config, self._device.torch_device, self._state
        slot, length = command.slot, len(command.prompt_ids)
        total = sum(grid.tokens for grid in command.grids)
        prompt_positions = geometry.prompt_positions(length, command.sources)
        cos, sin = rotary_tables(config, prompt_positions, place, self._dtype)
        positions = geometry.decode_positions(command.grids, int(prompt_positions[0, -1]) + 1)
        own = slice(length, length + total)
        state.cos[slot, own], state.sin[slot, own] = rotary_tables(config, positions, place, self._dtype)
        state.sampler.set(slot, command.sampling, total - command.grids[-1].tokens, config.vision_vocab_size)
        sequence = _Sequence(self._device.generator(command.seed), drawn=0, total=total)
        self._sequences[slot] = sequence
        self._refill_noise(slot, sequence)
        token_ids = torch.tensor(command.prompt_ids, device=place)
        logits = self._prefill(token_ids, cos, sin, state.cache, slot)
        row = state.sampler.row(slot)
        token = draw(logits, state.noise[slot, :1], row, state.allowed[(row.preview_tokens <= 0).long()])
        state.tokens[slot] = state.output[slot, 0] = token[0]
        state.set(slot, length, drawn=1, active=True)
        sequence.drawn = 1
        self._device.record_event().synchronize()

    def _step(self, count: int) -> None:
        for _ in range(count):
            for slot, sequence in self._sequences.items():
                if sequence.drawn % NOISE_BLOCK == 0:
                    self._refill_noise(slot, sequence)
                sequence.drawn += 1
            self._step_once()
        self._queue.append(self._device.record_event())
        while len(self._queue) > STEPS_AHEAD:
            self._queue.popleft().synchronize()

    def _release(self, command: Release) -> NDArray[np.int32] | None:
        slot, state = command.slot, self._state
        drawn = self._sequences.pop(slot).drawn if slot in self._sequences else 0
        state.set(slot, 0, drawn=0, active=False)
        return self._tokens(slot, drawn) if command.wanted else None

    def _tokens(self, slot: int, count: int) -> NDArray[np.int32]:
        tokens: NDArray[np.int32] = self._state.output[slot, :count].to("cpu", torch.int32).numpy()
        return tokens.copy()

    def _refill_noise(self, slot: int, sequence: _Sequence) -> None:
        # Row by row, as the reference draws it: on CUDA one larger draw would give other numbers.
        for row in range(min(NOISE_BLOCK, sequence.total - sequence.drawn)):
            self._state.noise[slot, row].exponential_(generator=sequence.generator)
