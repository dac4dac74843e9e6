from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from socketserver import BaseServer
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from transformers import GlmImageProcessor

from glm_image.ar.commands import Admit, ArCommand, Release, Step
from glm_image.ar.config import ArConfig
from glm_image.ar.executor import Executor
from glm_image.ar.model import Decoder
from glm_image.checkpoint.checkpoint import Checkpoint
from glm_image.devices.base import Device
from glm_image.devices.open import open_device
from glm_image.parallel.commands import R
from glm_image.request.limits import Limits
from glm_image.request.parameters import GenerationParameters
from glm_image.request.prompts import PromptTokenizer

T = TypeVar("T")
MakeCheckpoint = Callable[..., Path]
"""The ``make_checkpoint`` fixture: sizes of ``TinyConfig``, and ``weights``, by name."""

POLL_SECONDS = 0.02
"""The interval at which a condition that reports no event is checked."""

WAIT_SECONDS = 120
"""The longest that a test waits for a condition: far longer than a slow, loaded machine takes."""


def wait_until(condition: Callable[[], T], seconds: float = WAIT_SECONDS) -> T:
    """Checks a condition of another process until it is truthy; returns its value, after ``seconds`` the last one."""
    end = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < end:
        time.sleep(POLL_SECONDS)
    return value


@contextmanager
def serving(server: BaseServer) -> Iterator[None]:
    """Runs a server of the standard library in a thread of its own."""
    thread = threading.Thread(target=server.serve_forever, args=(POLL_SECONDS,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()


class OpenExecutor:
    """A real AR executor that a test drives command by command."""

    def __init__(
        self,
        folder: Path,
        slots: int = 8,
        positions: int = 640,
        device: Device | None = None,
        row_counts: tuple[int, ...] = (),
        int8: bool = False,
    ) -> None:
        checkpoint, device = Checkpoint.open(folder), device or open_device("cpu")
        self.config = ArConfig.read(checkpoint)
        self.tokenizer = PromptTokenizer(GlmImageProcessor.from_pretrained(checkpoint.path("processor")))
        source = checkpoint.tensors("vision_language_encoder", device.torch_device, device.default_dtype)
        decoder = Decoder.load(self.config, source, int8=device.int8_product if int8 else None)
        self.executor = Executor(decoder, device, slots, positions, capture=True, row_counts=row_counts)

    def run(self, command: ArCommand[R]) -> R:
        return self.executor.run(command)

    def admit(self, slot: int, parameters: GenerationParameters) -> Admit:
        """Returns the command that admits a request to a slot."""
        resolved = parameters.resolve(Limits(), self.config.sampling)
        preview, target = resolved.grids
        ids = self.tokenizer.text_to_image(parameters.prompt, target, preview)
        return Admit(slot, tuple(ids), resolved.grids, resolved.sampling, resolved.seeds[0])

    def release(self, slot: int) -> NDArray[np.int32]:
        return self.run(Release(slot))

    def alone(self, command: Admit) -> NDArray[np.int32]:
        """Runs one sequence from its first to its last token, without any other."""
        self.run(command)
        self.run(Step(command.tokens - 1))
        return self.release(command.slot)


class FaultyExecutor:
    """Runs commands, and fails after running the next one of a kind.

    Attributes:
        fail_at: that kind; None = no failure.
    """

    def __init__(self, opened: OpenExecutor, fail_at: type[ArCommand[Any]] | None = None) -> None:
        self._opened, self.fail_at = opened, fail_at

    def run(self, command: ArCommand[R]) -> R:
        result = self._opened.run(command)
        if self.fail_at is not None and isinstance(command, self.fail_at):
            self.fail_at = None
            raise RuntimeError(f"{type(command).__name__} failed")
        return result
