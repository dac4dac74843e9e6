"""Ranks of the DiT with fused blocks, also on a CPU, where Triton interprets the kernels."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

from glm_image.checkpoint.checkpoint import Checkpoint
from glm_image.devices.base import Device
from glm_image.dit import loading
from glm_image.dit.executor import Executor, Follower
from glm_image.dit.select_blocks import select_attention, select_blocks
from glm_image.dit.settings import DitSettings
from glm_image.parallel.process_group import Ranks
from glm_image.parallel.worker import RankExecutor


@dataclass(frozen=True)
class TakeLatents:
    """Return an image's latents, fp32 [1, channels, height, width]."""

    image: int


class _Rank:
    """A rank that can also return latents, since pixels take the interpreter long."""

    def __init__(self, executor: Executor | Follower) -> None:
        self._executor = executor

    def run(self, command: Any, /) -> Any:
        if not isinstance(command, TakeLatents):
            return self._executor.run(command)
        if isinstance(self._executor, Follower):
            return None
        return self._executor._images[command.image].latents.numpy()

    def close(self) -> None:
        self._executor.close()


def load_plain(checkpoint: Checkpoint, settings: DitSettings, device: Device, ranks: Ranks) -> RankExecutor:
    """Loads a rank with the blocks of its device."""
    return _Rank(loading.load_executor(checkpoint, settings, device, ranks))


def load_fused(checkpoint: Checkpoint, settings: DitSettings, device: Device, ranks: Ranks) -> RankExecutor:
    """Loads a rank with the fused blocks."""
    fused = copy.copy(device)
    fused.runs_triton = True
    with (
        patch.object(
            loading, "select_blocks", lambda transformer, _, shared: select_blocks(transformer, fused, shared)
        ),
        patch.object(loading, "select_attention", partial(_attention, fused)),
    ):
        return load_plain(checkpoint, settings, device, ranks)


def _attention(fused: Device, transformer: Any, _: Device) -> Any:
    return select_attention(transformer, fused)
