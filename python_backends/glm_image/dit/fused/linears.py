"""The linear layers of the fused blocks: bf16 layers, and 8-bit layers whose inputs stay in 8 bits between kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from glm_image.devices.quantization import QuantizedRows, int8_sums, scaled_product
from glm_image.dit.quantization import QuantizedLinear
from glm_image.kernels.rows import empty_rows, quantize_rowwise, sums_in_8_bits, sums_to_bf16

AnyLinear = nn.Linear | QuantizedLinear


class Linears:
    """Runs the bf16 linear layers of the blocks, on inputs [rows, width]."""

    def empty_input(self, residual: Tensor) -> Any:
        """Allocates a layer's input, to which norms write."""
        return torch.empty_like(residual)

    def to_input(self, hidden: Tensor) -> Any:
        """Converts bf16 values to a layer's input."""
        return hidden

    def linear(self, layer: Any, hidden: Any) -> Tensor:
        """Returns the layer's output, bf16 [rows, n]."""
        # Calls the layer's forward, as that of a layer whose channels are split among ranks also adds up their outputs.
        result: Tensor = layer(hidden)
        return result

    def linear_gelu(self, layer: Any, hidden: Any) -> Any:
        """Returns the GELU of the layer's output, approximated by tanh, as the next layer's input."""
        return torch._addmm_activation(layer.bias, hidden, layer.weight.T, use_gelu=True)  # in the GEMM's epilogue


class QuantizedLinears(Linears):
    """Runs 8-bit layers, whose inputs are ``QuantizedRows``."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def empty_input(self, residual: Tensor) -> QuantizedRows:
        return empty_rows(residual, self._dtype)

    def to_input(self, hidden: Tensor) -> QuantizedRows:
        return quantize_rowwise(hidden, self._dtype)

    def linear(self, layer: QuantizedLinear, hidden: QuantizedRows) -> Tensor:
        if self._dtype == torch.int8:
            return sums_to_bf16(int8_sums(hidden.values, layer.weight), hidden, layer.rows, layer.bias)
        return scaled_product(hidden, layer.rows, layer.bias, torch.bfloat16)

    def linear_gelu(self, layer: QuantizedLinear, hidden: QuantizedRows) -> QuantizedRows:
        if self._dtype == torch.int8:
            return sums_in_8_bits(int8_sums(hidden.values, layer.weight), hidden, layer.rows, layer.bias)
        return quantize_rowwise(scaled_product(hidden, layer.rows, layer.bias, torch.bfloat16), self._dtype, gelu=True)


def linears_for(layer: AnyLinear) -> Linears:
    """Returns an object that runs layers of this kind."""
    return QuantizedLinears(layer.dtype) if isinstance(layer, QuantizedLinear) else Linears()


def concatenate(layers: list[Any]) -> Any:
    """Concatenates layers with the same input into the first one, which is returned; the others lose their weights."""
    first = layers[0]
    first.weight = nn.Parameter(torch.cat([layer.weight for layer in layers]), requires_grad=False)
    first.bias = nn.Parameter(torch.cat([layer.bias for layer in layers]), requires_grad=False)
    if isinstance(first, QuantizedLinear):
        first.scales = torch.cat([layer.scales for layer in layers])
    for layer in layers[1:]:
        layer.weight = layer.bias = None
    return first
