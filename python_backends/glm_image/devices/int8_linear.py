"""Linear layers with int8 weights: half the bytes to read a token, at a rounding error a row."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from glm_image.devices.quantization import quantize_rows

Int8Product = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``Device.int8_product``."""


class Int8Linear(nn.Module):
    """A linear layer whose weights are int8 with one scale a row; activations keep their dtype.

    Args:
        linear: what it is made of.
        product: the device's.

    Attributes:
        weight: int8 [n, k].
        scale: fp32 [n]; ``weight * scale[:, None]`` is the layer's matrix.
        bias: [n] in the activations' dtype, or None.
    """

    weight: nn.Parameter
    scale: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear, product: Int8Product) -> None:
        super().__init__()
        self._product = product
        rounded, scales = quantize_rows(linear.weight, torch.int8)
        self.weight = nn.Parameter(rounded, requires_grad=False)
        self.scale = nn.Parameter(scales.squeeze(1), requires_grad=False)
        self.bias = linear.bias

    def forward(self, hidden: Tensor) -> Tensor:
        """Multiplies ``hidden`` [..., k]; where there are kernels for it, a decode step does not come this way."""
        product = self._product(hidden, self.weight, self.scale)
        return product if self.bias is None else product + self.bias


AnyLinear = nn.Linear | Int8Linear


def quantize_linears(module: nn.Module, product: Int8Product) -> None:
    """Replaces a module's own linear layers by their int8 twins; the old weights are freed one by one."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            setattr(module, name, Int8Linear(child, product))
