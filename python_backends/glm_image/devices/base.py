"""The interface every kind of device has."""

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
    """A point in a device's queue of work."""

    def synchronize(self) -> None:
        """Blocks the host until the device has passed the point."""


def error_chain(error: BaseException | None) -> Iterator[BaseException]:
    """Gives an error and what it was raised in dealing with: a capture that runs out of memory ends with another."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


class Memory(NamedTuple):
    """A device's memory in bytes."""

    free: int
    total: int


class Device(ABC):
    """One device and what the engines ask of it.

    Attributes:
        torch_device: where tensors are placed.
        default_dtype: what ``dtype: auto`` stands for.
        runs_triton: whether the kernels of ``glm_image.kernels`` run here.
        attention_backend: diffusers' name of the attention to use here; None where torch's own choice is right.
        lse_attention_backend: diffusers' name of what ``attention_with_lse`` is; "" where there is none.
        warmup_sizes: pictures painted and sources read at load, because libraries load and choose kernels at first use.
        hang_seconds: what one command of an engine never takes here; a first one may compile kernels.
        is_host: whether the host's own cores compute. There it is one thread that should: OpenMP keeps threads for each
            that ever has, and once they are more than the cores they no longer wait for work awake, which makes
            steps over small matrices take twice as long.
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
        """Returns a generator on this device, seeded with any signed or unsigned 64-bit integer."""
        return torch.Generator(self.torch_device).manual_seed(seed)

    @abstractmethod
    def set_current(self) -> None:
        """Makes this the calling thread's current device."""

    @abstractmethod
    def memory(self) -> Memory:
        """Returns the free and total memory."""

    @abstractmethod
    def peak_memory(self) -> int:
        """Returns the most memory in bytes that this process has held here."""

    @abstractmethod
    def is_out_of_memory(self, error: BaseException) -> bool:
        """Tells whether an allocation here failed, be it while another error was dealt with."""

    @abstractmethod
    def release_unused(self) -> None:
        """Gives memory back that this process holds and has no tensors in."""

    @abstractmethod
    def record_event(self) -> DeviceEvent:
        """Marks the end of the work enqueued so far by this thread."""

    def graph_pool(self) -> object | None:
        """Returns memory for several captured steps; None where a step needs none of its own."""
        return None

    @abstractmethod
    def capture(
        self, step: Callable[[], None], *, warm: bool = False, pool: object | None = None
    ) -> Callable[[], None]:
        """Returns a callable that does what ``step`` does, with as few launches as the device can.

        Args:
            step: reads and writes only tensors that stay where they are, and never waits for the device.
            warm: whether ``step`` has run before; otherwise it may be run here, more than once.
            pool: from ``graph_pool``: what is captured with the same one works in the same memory, so it never runs at
                the same time and hands nothing on but in tensors made before; None = memory of its own.
        """

    def attention_with_lse(self, query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Attends, and tells what partial results are merged by.

        Args:
            query: [batch, tokens, heads, head_dim].
            keys: [batch, other tokens, heads, head_dim].
            values: as ``keys``.

        Returns:
            As ``query``, and the logarithm of the sum of the exponentiated scores, fp32 [batch, heads, tokens].

        Raises:
            ConfigurationError: the device cannot.
        """
        raise ConfigurationError(f"{self} has no attention that tells its sums; allowed for parallel: all but ring")

    @abstractmethod
    def decode_attention(self, query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
        """Attends from one new token a slot to the slot's cache.

        What a slot gets depends on nothing in the others.

        Args:
            query: [slots, heads, head_dim].
            keys: [slots, kv_heads, positions, head_dim]; heads are a multiple of kv_heads.
            values: as ``keys``.
            lengths: int64 [slots]; slot i sees positions 0 to lengths[i] - 1, at least one.

        Returns:
            [slots, heads, head_dim].
        """

    def int8_product(self, hidden: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        """Multiplies activations by ``weight * scale[:, None]``.

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
        """Returns why this device can't multiply ``int8`` or ``fp8`` matrices; None when it can."""

    def quantize_rows(self, matrix: Tensor, dtype: torch.dtype) -> QuantizedRows:
        """See ``quantized.quantize_rows``."""
        return quantization.quantize_rows(matrix, dtype)

    def scaled_product(self, rows: QuantizedRows, weight: QuantizedRows, bias: Tensor, dtype: torch.dtype) -> Tensor:
        """See ``quantized.scaled_product``."""
        return quantization.scaled_product(rows, weight, bias, dtype)
