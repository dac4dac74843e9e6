"""The linear layers of the fused blocks: bf16 ones, and those whose rows are in 8 bits between the kernels."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from glm_image.devices.quantization import QuantizedRows, int8_sums, scaled_product
from glm_image.dit.quantization import QuantizedLinear
from glm_image.kernels.rows import empty_rows, quantize_rowwise, sums_in_8_bits, sums_to_bf16

AnyLinear = nn.Linear | QuantizedLinear


class Linears(Protocol):
    """What the blocks ask of their linear layers; shapes [rows, width] hold for ``QuantizedRows`` too."""

    def room(self, residual: Tensor) -> Any:
        """Makes the matrix to which norms write what a layer reads."""

    def read(self, hidden: Tensor) -> Any:
        """Makes of bf16 values what a layer reads."""

    def linear(self, layer: Any, hidden: Any) -> Tensor:
        """Returns bf16 [rows, n]."""

    def linear_gelu(self, layer: Any, hidden: Any) -> Any:
        """Returns what the next layer reads: the GELU, approximated by tanh, of what this one gives."""


class Bf16Linears:
    """Layers as they are."""

    def room(self, residual: Tensor) -> Tensor:
        """See ``Linears``."""
        return torch.empty_like(residual)

    def read(self, hidden: Tensor) -> Tensor:
        """See ``Linears``."""
        return hidden

    def linear(self, layer: nn.Linear, hidden: Tensor) -> Tensor:
        """See ``Linears``."""
        # By its own forward: a layer whose channels ranks share also adds up what theirs give.
        result: Tensor = layer(hidden)
        return result

    def linear_gelu(self, layer: nn.Linear, hidden: Tensor) -> Tensor:
        """See ``Linears``."""
        # The GELU of the GEMM's epilogue is the approximation by tanh, as the model's.
        return torch._addmm_activation(layer.bias, hidden, layer.weight.T, use_gelu=True)


class QuantizedLinears:
    """Layers whose products are of 8 bits."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def room(self, residual: Tensor) -> QuantizedRows:
        """See ``Linears``."""
        return empty_rows(residual, self._dtype)

    def read(self, hidden: Tensor) -> QuantizedRows:
        """See ``Linears``."""
        return quantize_rowwise(hidden, self._dtype)

    def linear(self, layer: QuantizedLinear, hidden: QuantizedRows) -> Tensor:
        """See ``Linears``."""
        if self._dtype == torch.int8:
            return sums_to_bf16(int8_sums(hidden.values, layer.weight), hidden, layer.rows, layer.bias)
        return scaled_product(hidden, layer.rows, layer.bias, torch.bfloat16)

    def linear_gelu(self, layer: QuantizedLinear, hidden: QuantizedRows) -> QuantizedRows:
        """See ``Linears``."""
        if self._dtype == torch.int8:
            return sums_in_8_bits(int8_sums(hidden.values, layer.weight), hidden, layer.rows, layer.bias)
        return quantize_rowwise(scaled_product(hidden, layer.rows, layer.bias, torch.bfloat16), self._dtype, gelu=True)


def linears_of(layer: AnyLinear) -> Linears:
    """Returns what runs a layer of this kind."""
    return QuantizedLinears(layer.dtype) if isinstance(layer, QuantizedLinear) else Bf16Linears()


def joined(layers: list[Any]) -> Any:
    """Makes the first of several layers with the same input all of them; the others are left without weights."""
    first = layers[0]
    first.weight = nn.Parameter(torch.cat([layer.weight for layer in layers]), requires_grad=False)
    first.bias = nn.Parameter(torch.cat([layer.bias for layer in layers]), requires_grad=False)
    if isinstance(first, QuantizedLinear):
        first.scales = torch.cat([layer.scales for layer in layers])
    for layer in layers[1:]:
        layer.weight = layer.bias = None
    return first
