"""CUDA GPUs and Ascend NPUs, over ``torch.cuda`` and ``torch.npu``, which have the same interface."""

from __future__ import annotations

import importlib.util
from abc import abstractmethod
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from glm_image.devices.attention import masked_decode_attention, masked_window_attention
from glm_image.devices.base import Device, DeviceEvent, Memory
from glm_image.devices.quantization import QuantizedRows
from glm_image.request.geometry import Size

WARM_UP_STEPS = 2  # libraries create handles and choose kernels, which must happen outside the capture
FP8_CAPABILITY = (8, 9)  # Ada, Hopper


class _Event:
    def __init__(self, event: Any) -> None:
        self._event = event

    def synchronize(self) -> None:
        self._event.synchronize()


class _Replay:
    """A captured step. The graph holds addresses only, so it keeps the step, and with it the tensors, alive."""

    def __init__(self, graph: Any, step: Callable[[], None]) -> None:
        self._graph, self._step = graph, step

    def __call__(self) -> None:
        self._graph.replay()


class AcceleratorDevice(Device):
    """A device with its own memory and streams."""

    warmup_sizes = (Size(1024, 1024),)

    def __init__(self, torch_device: torch.device, runtime: ModuleType, display_name: str | None = None) -> None:
        super().__init__(torch_device, display_name)
        self._runtime: Any = runtime

    def set_current(self) -> None:
        self._runtime.set_device(self.torch_device)

    def memory(self) -> Memory:
        """Counts memory that this process has reserved without tensors in it as free."""
        free, total = self._runtime.mem_get_info(self.torch_device)
        reserved = self._runtime.memory_reserved(self.torch_device) - self._runtime.memory_allocated(self.torch_device)
        return Memory(free + reserved, total)

    def peak_memory(self) -> int:
        """Counts tensors only."""
        return int(self._runtime.max_memory_allocated(self.torch_device))

    def _is_failed_allocation(self, error: BaseException) -> bool:
        # torch_npu may raise a RuntimeError of its own in place of torch's class.
        return isinstance(error, torch.OutOfMemoryError) or (
            isinstance(error, RuntimeError) and "out of memory" in str(error).lower()
        )

    def release_unused(self) -> None:
        self._runtime.empty_cache()

    def record_event(self) -> DeviceEvent:
        event = self._runtime.Event()
        event.record()
        return _Event(event)

    def graph_pool(self) -> object:
        """Returns a handle; the memory is freed with the last step captured in it."""
        return self._runtime.graph_pool_handle()

    def capture(
        self, step: Callable[[], None], *, warm: bool = False, pool: object | None = None
    ) -> Callable[[], None]:
        """Captures ``step`` in a graph; unless it is warm, runs it on a side stream first."""
        self.set_current()
        if not warm:
            side = self._runtime.Stream()
            side.wait_stream(self._runtime.current_stream())
            with self._runtime.stream(side):
                for _ in range(WARM_UP_STEPS):
                    step()
            self._runtime.current_stream().wait_stream(side)
        graph = self._new_graph()
        with self._recording(graph, pool):
            step()
        return _Replay(graph, step)

    @abstractmethod
    def _new_graph(self) -> Any: ...

    @abstractmethod
    def _recording(self, graph: Any, pool: object | None) -> Any:
        """Returns a context in which this thread's work is captured; other threads may decode or load meanwhile."""

    def decode_attention(self, query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
        return masked_decode_attention(query, keys, values, lengths)

    def window_attention(self, query: Tensor, keys: Tensor, values: Tensor, slots: Tensor, lengths: Tensor) -> Tensor:
        return masked_window_attention(query, keys, values, slots, lengths)


class NpuDevice(AcceleratorDevice):
    """An Ascend NPU through torch_npu; executed on a stand-in for CANN only, never on an NPU."""

    has_npu_operators = True

    def __init__(self, torch_device: torch.device, display_name: str | None = None) -> None:
        import torch_npu  # noqa: F401, PLC0415 - registers torch.npu; needs CANN's libraries

        super().__init__(torch_device, torch.npu, display_name)  # type: ignore[attr-defined]

    def _new_graph(self) -> Any:
        return self._runtime.NPUGraph()

    def _recording(self, graph: Any, pool: object | None) -> Any:
        # Without the dispatch of captured operators, which makes every replay wait for an update of their arguments on
        # the host: a step keeps its lengths on the device, so a replay is one launch.
        return self._runtime.graph(graph, pool=pool, auto_dispatch_capture=False, capture_error_mode="thread_local")

    def tanh_gelu(self, hidden: Tensor) -> Tensor:
        """Uses an operator of torch_npu: torch's ignores ``approximate`` on an NPU."""
        activated: Tensor = torch.ops.npu.npu_gelu(hidden, approximate="tanh")
        return activated

    def int8_product(self, hidden: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        """Casts the weights as they enter the matrix unit."""
        if hidden.dtype == torch.float32:  # not supported by the operator
            return super().int8_product(hidden, weight, scale)
        # A transposed view [k, n] of the stored weights, the layout with which the operator is fastest.
        product: Tensor = torch.ops.npu.npu_weight_quant_batchmatmul(
            hidden.flatten(0, -2), weight.t(), antiquant_scale=scale.to(hidden.dtype)
        )
        return product.view(*hidden.shape[:-1], -1)

    def unsupported_quantization_reason(self, quantization: str) -> str | None:
        return "fp8 products need CUDA" if quantization == "fp8" else None

    def quantize_rows(self, matrix: Tensor, dtype: torch.dtype) -> QuantizedRows:
        import torch_npu  # noqa: PLC0415

        values, scales = torch_npu.npu_dynamic_quant(matrix)
        return QuantizedRows(values, scales.unsqueeze(1))

    def scaled_product(self, rows: QuantizedRows, weight: QuantizedRows, bias: Tensor, dtype: torch.dtype) -> Tensor:
        """Multiplies, scales and adds the bias in one operator."""
        import torch_npu  # noqa: PLC0415

        product: Tensor = torch_npu.npu_quant_matmul(
            rows.values,
            weight.values.T,
            weight.scales.squeeze(1),
            pertoken_scale=rows.scales.squeeze(1),
            bias=bias,
            output_dtype=dtype,
        )
        return product


class CudaDevice(AcceleratorDevice):
    """An NVIDIA GPU."""

    runs_triton = importlib.util.find_spec("triton") is not None
    lse_attention_backend = "_native_cudnn"

    def __init__(self, torch_device: torch.device, display_name: str | None = None) -> None:
        super().__init__(torch_device, torch.cuda, display_name)

    def _new_graph(self) -> Any:
        return self._runtime.CUDAGraph()

    def _recording(self, graph: Any, pool: object | None) -> Any:
        return self._runtime.graph(graph, pool=pool, capture_error_mode="thread_local")

    def unsupported_quantization_reason(self, quantization: str) -> str | None:
        capability = self._runtime.get_device_capability(self.torch_device)
        if quantization == "fp8" and capability < FP8_CAPABILITY:
            return f"{self} has compute capability {capability[0]}.{capability[1]}, and fp8 needs 8.9 or above"
        return None

    def attention_with_lse(self, query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Uses cuDNN, the fastest at the lengths of images."""
        heads_first = (tensor.transpose(1, 2) for tensor in (query, keys, values))
        attended, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(*heads_first, None, True)
        return attended.transpose(1, 2), lse.view(lse.shape[:3]).float()
