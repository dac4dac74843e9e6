"""The CPU: the exact device, synchronous and with fp32 by default."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from glm_image.devices.attention import ragged_decode_attention, ragged_window_attention
from glm_image.devices.base import Device, DeviceEvent, Memory

KIBIBYTE = 1024

ROWS = 8
"""Rows of a product from which on its bits do not depend on their number, if it is a multiple."""


class _CompletedEvent:
    def synchronize(self) -> None:
        """Calls are synchronous."""


class CpuDevice(Device):
    """The host's own cores."""

    lse_attention_backend = "_native_flash"
    default_dtype = torch.float32
    hang_seconds = 600.0
    is_host = True

    def set_current(self) -> None:
        pass

    def memory(self) -> Memory:
        """Counts the page cache as free."""
        lines = (line.split() for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        sizes = {name: int(size) * KIBIBYTE for name, size, *_ in lines}
        return Memory(sizes["MemAvailable:"], sizes["MemTotal:"])

    def peak_memory(self) -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIBIBYTE

    def _is_failed_allocation(self, error: BaseException) -> bool:
        # torch has no error class for this on the CPU.
        return isinstance(error, MemoryError) or (
            isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
        )

    def release_unused(self) -> None:
        """There is no caching allocator."""

    def record_event(self) -> DeviceEvent:
        return _CompletedEvent()

    def capture(
        self, step: Callable[[], None], *, warm: bool = False, pool: object | None = None
    ) -> Callable[[], None]:
        """Returns ``step`` itself: a CPU has no launches to save."""
        return step

    def attention_with_lse(self, query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        heads_first = (tensor.transpose(1, 2) for tensor in (query, keys, values))
        attended, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads_first)
        return attended.transpose(1, 2), lse

    def decode_attention(self, query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
        return ragged_decode_attention(query, keys, values, lengths)

    def window_attention(self, query: Tensor, keys: Tensor, values: Tensor, slots: Tensor, lengths: Tensor) -> Tensor:
        return ragged_window_attention(query, keys, values, slots, lengths)

    def step_rows(self, slots: int) -> int:
        """Rounds up: products of fewer rows have another order of sums, and so other bits."""
        return -(-slots // ROWS) * ROWS

    def unsupported_quantization_reason(self, quantization: str) -> str | None:
        return "a CPU has no fast fp8 products" if quantization == "fp8" else None
