"""The CPU: the exact one, where everything is fp32 and runs at once."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

from glm_image.devices.attention import ragged_decode_attention
from glm_image.devices.base import Device, Mark, Memory


class _Passed:
    def wait(self) -> None:
        """Work on a CPU is done when the call returns."""


class CpuDevice(Device):
    """The host's own cores."""

    default_dtype = torch.float32

    def bind(self) -> None:
        """Nothing to choose."""

    def memory(self) -> Memory:
        """Returns the host's memory."""
        page = os.sysconf("SC_PAGE_SIZE")
        return Memory(os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page)

    def mark(self) -> Mark:
        """Returns a mark already passed."""
        return _Passed()

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """Returns ``step`` itself: there are no launches to save."""
        return step

    def decode_attention(self, query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
        """See ``ragged_decode_attention``."""
        return ragged_decode_attention(query, keys, values, lengths)
