"""The interface that every kind of device implements, in the terms of ``torch.cuda``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from glm_image.devices import quantization
from glm_image.devices.quantization import QuantizedRows
from glm_image.errors import ConfigurationError
from glm_image.request.geometry import Size


class DeviceEvent(Protocol):
    """A point in a device's stream."""

    def synchronize(self) -> None:
        """Blocks the host until the device has reached the point."""


def error_chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error and its causes: a graph capture that runs out of memory ends with another error."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


class Memory(NamedTuple):
    """A device's memory in bytes."""

    free: int
    total: int


class Device(ABC):
    """One device.

    Attributes:
        torch_device: the device of tensors.
        default_dtype: the dtype of ``dtype: auto``.
        runs_triton: whether the kernels of ``glm_image.kernels`` run on it.
        attention_backend: diffusers' name of the attention to use; None for torch's default.
        lse_attention_backend: diffusers' name of the backend of ``attention_with_lse``; "" if there is none.
        warmup_sizes: sizes of the images denoised and read at load, as libraries load and choose kernels at first use.
        hang_seconds: the longest time for one command of an engine; the first may compile kernels.
        is_host: whether the host's cores compute. If so, run all compute on one thread: OpenMP keeps a thread pool per
            calling thread, and once the pools exceed the cores, workers stop spinning and small steps take twice as
            long.
    """

    default_dtype = torch.bfloat16
    runs_triton = False
    attention_backend: str | None = None
    lse_attention_backend = ""
    warmup_sizes: tuple[Size, ...] = ()
    hang_seconds = 60.0
    is_host = False

    def __init__(self, torch_device: torch.device, display_name: str | None = None) -> None:
        self.torch_device = torch_device
        self._display_name = display_name or str(torch_device)

    def __str__(self) -> str:
        return self._display_name

    def generator(self, seed: int) -> torch.Generator:
        """Returns a generator on this device; ``seed`` is any signed or unsigned 64-bit integer."""
        return torch.Generator(self.torch_device).manual_seed(seed)

    @abstractmethod
    def set_current(self) -> None:
        """Makes this the calling thread's current device."""

    @abstractmethod
    def memory(self) -> Memory:
        """Returns the free and the total memory."""

    @abstractmethod
    def peak_memory(self) -> int:
        """Returns this process's peak memory in bytes."""

    @abstractmethod
    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether ``error``, or a cause of it, is a failed allocation on this device."""

    @abstractmethod
    def release_unused(self) -> None:
        """Frees memory that this process has reserved and holds no tensors in."""

    @abstractmethod
    def record_event(self) -> DeviceEvent:
        """Records an event after the work that this thread has enqueued so far."""

    def graph_pool(self) -> object | None:
        """Returns a memory pool for several captured steps; None where captures need none."""
        return None

    @abstractmethod
    def capture(
        self, step: Callable[[], None], *, warm: bool = False, pool: object | None = None
    ) -> Callable[[], None]:
        """Returns a callable equivalent to ``step``, with as few launches as possible.

        Args:
            step: reads and writes only tensors at fixed addresses, and never waits for the device.
            warm: whether ``step`` has run before; if not, it may be run here more than once.
            pool: from ``graph_pool``. Steps captured with one pool share memory: they must not run concurrently, and
                may pass data on only in tensors allocated before. None = a pool of its own.
        """

    def attention_with_lse(self, query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Attention that also returns the log-sum-exp, by which partial results are merged.

        Args:
            query: [batch, tokens, heads, head_dim].
            keys: [batch, other tokens, heads, head_dim].
            values: as ``keys``.

        Returns:
            The output, shaped like ``query``, and the log-sum-exp of the scores, fp32 [batch, heads, tokens].

        Raises:
            ConfigurationError: the device has no such attention.
        """
        raise ConfigurationError(f"{self} has no attention with log-sum-exp; allowed for parallel: all but ring")

    @abstractmethod
    def decode_attention(self, query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
        """Attention of one new token per slot over the slot's KV cache; independent between slots.

        Args:
            query: [slots, heads, head_dim].
            keys: [slots, kv_heads, positions, head_dim]; heads are a multiple of kv_heads.
            values: as ``keys``.
            lengths: int64 [slots]; slot i sees positions 0 to lengths[i] - 1, at least one.

        Returns:
            [slots, heads, head_dim].
        """

    def int8_product(self, hidden: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        """Computes ``hidden @ (weight * scale[:, None]).T``.

        Args:
            hidden: [..., k].
            weight: int8 [n, k].
            scale: fp32 [n].

        Returns:
            [..., n] in the activations' dtype.
        """
        return quantization.dequantized_product(hidden, weight, scale)

    @abstractmethod
    def unsupported_quantization_reason(self, quantization: str) -> str | None:
        """Returns why this device cannot multiply ``int8`` or ``fp8`` matrices; None if it can."""

    def quantize_rows(self, matrix: Tensor, dtype: torch.dtype) -> QuantizedRows:
        """See ``quantization.quantize_rows``."""
        return quantization.quantize_rows(matrix, dtype)

    def scaled_product(self, rows: QuantizedRows, weight: QuantizedRows, bias: Tensor, dtype: torch.dtype) -> Tensor:
        """See ``quantization.scaled_product``."""
        return quantization.scaled_product(rows, weight, bias, dtype)
