"""Linear layers with int8 weights, which halve the bytes that a decode step reads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from glm_image.devices.quantization import quantize_rows

Int8Product = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``Device.int8_product``."""


class Int8Linear(nn.Module):
    """A linear layer with int8 weights and one scale per row; activations keep their dtype.

    Attributes:
        weight: int8 [n, k].
        scale: fp32 [n]; the layer's matrix is ``weight * scale[:, None]``.
        bias: [n] in the activations' dtype, or None.
    """

    weight: nn.Parameter
    scale: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear, product: Int8Product) -> None:
        super().__init__()
        self._product = product
        values, scales = quantize_rows(linear.weight, torch.int8)
        self.weight = nn.Parameter(values, requires_grad=False)
        self.scale = nn.Parameter(scales.squeeze(1), requires_grad=False)
        self.bias = linear.bias

    def forward(self, hidden: Tensor) -> Tensor:
        # Fused decode steps use kernels in place of this.
        product = self._product(hidden, self.weight, self.scale)
        return product if self.bias is None else product + self.bias


AnyLinear = nn.Linear | Int8Linear


def quantize_linears(module: nn.Module, product: Int8Product) -> None:
    """Replaces a module's direct linear layers by int8 ones; frees the original weights one by one."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            setattr(module, name, Int8Linear(child, product))
