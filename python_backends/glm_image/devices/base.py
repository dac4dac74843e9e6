"""The interface that every kind of device implements, in the terms of ``torch.cuda``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from glm_image.devices import quantization
from glm_image.devices.quantization import QuantizedRows
from glm_image.errors import ConfigurationError
from glm_image.request.geometry import Size


class DeviceEvent(Protocol):
    """A point in a device's stream."""

    def synchronize(self) -> None:
        """Blocks the host until the device has reached the point."""


class Memory(NamedTuple):
    """A device's memory in bytes."""

    free: int
    total: int


class Device(ABC):
    """One device.

    Attributes:
        default_dtype: the dtype of ``dtype: auto``.
        runs_triton: whether the kernels of ``glm_image.kernels`` run on it.
        has_npu_operators: whether the fused operators of torch_npu run on it.
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
    has_npu_operators = False
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
    def memory(self) -> Memory: ...

    @abstractmethod
    def peak_memory(self) -> int:
        """Returns the peak memory of this process in bytes."""

    @abstractmethod
    def _is_failed_allocation(self, error: BaseException) -> bool: ...

    def is_out_of_memory(self, error: BaseException | None) -> bool:
        """Whether ``error`` or a cause of it is a failed allocation: graph captures end with an error of their own."""
        while error is not None and not self._is_failed_allocation(error):
            error = error.__cause__ or error.__context__
        return error is not None

    @abstractmethod
    def release_unused(self) -> None:
        """Frees memory that this process has reserved and holds no tensors in."""

    @abstractmethod
    def record_event(self) -> DeviceEvent:
        """Returns the point after the work that this thread has enqueued so far."""

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
        """Attention that also returns the log-sum-exp of the scores, by which partial results are merged.

        ``query`` is [batch, tokens, heads, head_dim], as the output; ``keys`` and ``values`` are [batch, other tokens,
        heads, head_dim]; the log-sum-exp is fp32 [batch, heads, tokens].

        Raises:
            ConfigurationError: the device has no such attention.
        """
        raise ConfigurationError(f"{self} has no attention with log-sum-exp; allowed for parallel: all but ring")

    @abstractmethod
    def decode_attention(self, query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
        """Attention of one new token per slot over the slot's KV cache; independent between slots.

        ``query`` is [slots, heads, head_dim], as the result; ``keys`` and ``values`` are [slots, kv_heads, positions,
        head_dim], with heads a multiple of kv_heads; ``lengths`` is int64 [slots]: slot i sees positions 0 to
        lengths[i] - 1, at least one.
        """

    def step_rows(self, slots: int) -> int:
        """Returns the rows of the matrix products of a decode step that adds one token to every slot."""
        return slots

    @abstractmethod
    def window_attention(self, query: Tensor, keys: Tensor, values: Tensor, slots: Tensor, lengths: Tensor) -> Tensor:
        """Attention of several new tokens per slot; a row's bits are those of ``decode_attention``.

        As there, but ``query`` and the result are [rows, heads, head_dim], ``slots`` and ``lengths`` int64 [rows]: row
        i sees positions 0 to lengths[i] - 1 of slot slots[i]. Where lengths[i] is 0, its result is finite and else
        undefined.
        """

    def tanh_gelu(self, hidden: Tensor) -> Tensor:
        """Computes GELU in its tanh approximation (Hendrycks and Gimpel, 2016), of any shape."""
        return F.gelu(hidden, approximate="tanh")

    def int8_product(self, hidden: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        """Computes ``hidden @ (weight * scale[:, None]).T``, [..., n] in the activations' dtype.

        ``hidden`` is [..., k], ``weight`` int8 [n, k], ``scale`` fp32 [n].
        """
        return quantization.dequantized_product(hidden, weight, scale)

    @abstractmethod
    def unsupported_quantization_reason(self, quantization: str) -> str | None:
        """Returns why this device cannot multiply ``int8`` or ``fp8`` matrices; None if it can."""

    def quantize_rows(self, matrix: Tensor, dtype: torch.dtype) -> QuantizedRows:
        return quantization.quantize_rows(matrix, dtype)

    def scaled_product(self, rows: QuantizedRows, weight: QuantizedRows, bias: Tensor, dtype: torch.dtype) -> Tensor:
        return quantization.scaled_product(rows, weight, bias, dtype)
