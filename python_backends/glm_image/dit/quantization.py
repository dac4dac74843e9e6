"""8-bit linear layers of the transformer's blocks: half the memory, and matrix products at twice the rate.

Weights have a scale per output channel; activations have one per token, computed at every call. The other layers keep
their dtype:

* the projections in and out: an error there would reach the image directly;
* the modulation layers: they read one row a step, so they cost nothing, and their output scales every token;
* the embeddings of time, size, glyphs and prior tokens: they run once per image.

Together these are an eighth of the weights, and a hundredth of the arithmetic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from glm_image.devices.base import Device
from glm_image.devices.quantization import ALIGNMENT, DTYPES, QuantizedRows, quantize_rows
from glm_image.errors import ConfigurationError


class QuantizedLinear(nn.Module):
    """A linear layer whose matrix product runs in 8 bits.

    It is made from an empty layer on the meta device, receives the layer's weights, and quantizes them right away, so
    that at most one unquantized matrix is in the device's memory.

    Attributes:
        weight: as the checkpoint has it, then 8-bit [n, k].
        scales: fp32 [n, 1]; ``weight * scales`` is the layer's matrix.
        bias: [n].
    """

    weight: nn.Parameter
    bias: nn.Parameter
    scales: Tensor

    def __init__(self, linear: nn.Linear, quantization: str, device: Device) -> None:
        super().__init__()
        if linear.in_features % ALIGNMENT or linear.out_features % ALIGNMENT:
            raise ConfigurationError(
                f"quantization is {quantization!r}, but the transformer has a linear layer of {linear.in_features} to "
                f"{linear.out_features}; allowed: multiples of {ALIGNMENT}"
            )
        self.weight, self.bias = (nn.Parameter(tensor, requires_grad=False) for tensor in (linear.weight, linear.bias))
        self.dtype = DTYPES[quantization]
        self._device = device

    def filled(self) -> None:
        """Quantizes the weights; see ``checkpoint.fill``."""
        values, self.scales = quantize_rows(self.weight, self.dtype)
        self.weight = nn.Parameter(values, requires_grad=False)

    @property
    def rows(self) -> QuantizedRows:
        return QuantizedRows(self.weight, self.scales)

    def forward(self, hidden: Tensor) -> Tensor:
        """Multiplies ``hidden`` [..., k], which is quantized a row at a time."""
        shape = (*hidden.shape[:-1], len(self.bias))
        if not hidden.numel():  # no text, for instance; 8-bit products of empty matrices are not supported
            return hidden.new_empty(shape)
        return self.product(self.quantized(hidden.flatten(0, -2)), hidden.dtype).view(shape)

    def quantized(self, hidden: Tensor) -> QuantizedRows:
        """Quantizes an input [rows, k]; layers of one input and dtype can share the result."""
        return self._device.quantize_rows(hidden, self.dtype)

    def product(self, rows: QuantizedRows, dtype: torch.dtype) -> Tensor:
        """Returns the layer's output, [rows, n] in ``dtype``."""
        return self._device.scaled_product(rows, self.rows, self.bias, dtype)


def block_linears(block: Any) -> list[tuple[nn.Module, str]]:
    """Returns owner and name of the linear layers of diffusers' ``GlmImageTransformerBlock`` that read all tokens."""
    attention, feed_forward = block.attn1, block.ff.net
    projections: list[tuple[nn.Module, str]] = [(attention, name) for name in ("to_q", "to_k", "to_v")]
    return [*projections, (attention.to_out, "0"), (feed_forward[0], "proj"), (feed_forward, "2")]


def quantize_blocks(transformer: Any, quantization: str, device: Device, dtype: torch.dtype) -> None:
    """Replaces the linear layers of the blocks of a transformer on the meta device by ``int8`` or ``fp8`` ones.

    ``dtype`` is that of the other layers.

    Raises:
        ConfigurationError: the device does not support the products, or a layer's sides are not aligned.
    """
    why = device.unsupported_quantization_reason(quantization)
    if why is None and quantization == "fp8" and dtype != torch.bfloat16:
        why = "fp8 goes with dtype bfloat16"
    if why:
        raise ConfigurationError(f"quantization is {quantization!r}, but {why}; allowed: none, int8")
    for block in transformer.transformer_blocks:
        for owner, name in block_linears(block):
            setattr(owner, name, QuantizedLinear(getattr(owner, name), quantization, device))


def weight_bytes(module: nn.Module, dtype: torch.dtype) -> int:
    """Returns the memory that an empty module's weights will take."""
    rounded = [layer for layer in module.modules() if isinstance(layer, QuantizedLinear)]
    saved = sum(
        layer.weight.numel() * (dtype.itemsize - layer.dtype.itemsize) - layer.weight.shape[0] * torch.float32.itemsize
        for layer in rounded
    )
    return sum(weight.numel() for weight in module.parameters()) * dtype.itemsize - saved
