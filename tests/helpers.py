from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from socketserver import BaseServer

import numpy as np
from numpy.typing import NDArray
from transformers import GlmImageProcessor

from glm_image.ar.commands import Admit, Command, Release, Step
from glm_image.ar.config import ArConfig
from glm_image.ar.executor import Executor
from glm_image.ar.model import Decoder
from glm_image.checkpoint.checkpoint import Checkpoint
from glm_image.devices.base import Device
from glm_image.devices.open import open_device
from glm_image.request.limits import Limits
from glm_image.request.parameters import GenerationParameters
from glm_image.request.prompts import PromptTokenizer

MakeCheckpoint = Callable[..., Path]
"""The ``make_checkpoint`` fixture: sizes of ``TinyConfig``, and ``weights``, by name."""

POLL_SECONDS = 0.02
"""Within which a server of a test notices that it is to end."""


@contextmanager
def serving(server: BaseServer) -> Iterator[None]:
    """Has a server of the standard library answer in a thread of its own."""
    thread = threading.Thread(target=server.serve_forever, args=(POLL_SECONDS,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()


class OpenExecutor:
    """A real executor of the first stage, to be driven command by command."""

    def __init__(self, folder: Path, slots: int = 8, positions: int = 640, device: Device | None = None) -> None:
        checkpoint, device = Checkpoint.open(folder), device or open_device("cpu")
        self.config = ArConfig.read(checkpoint)
        self.tokenizer = PromptTokenizer(GlmImageProcessor.from_pretrained(checkpoint.path("processor")))
        source = checkpoint.tensors("vision_language_encoder", device.torch_device, device.default_dtype)
        self.executor = Executor(Decoder.load(self.config, source), device, slots, positions, capture=True)

    def run(self, command: Command) -> NDArray[np.int32] | None:
        return self.executor.run(command)

    def admit(self, slot: int, asked: GenerationParameters) -> Admit:
        """Returns the command that puts a request into a slot."""
        resolved = asked.resolve(Limits(), self.config.sampling)
        preview, target = resolved.grids
        ids = self.tokenizer.text_to_image(asked.prompt, target, preview)
        return Admit(slot, tuple(ids), resolved.grids, resolved.sampling, resolved.seeds[0])

    def release(self, slot: int) -> NDArray[np.int32]:
        tokens = self.run(Release(slot))
        assert tokens is not None
        return tokens

    def alone(self, command: Admit) -> NDArray[np.int32]:
        """Runs one sequence from its first to its last token, with nothing beside it."""
        self.run(command)
        self.run(Step(sequence_length(command) - 1))
        return self.release(command.slot)


def sequence_length(command: Admit) -> int:
    return sum(grid.tokens for grid in command.grids)
