"""Products with int8 weights, where a device has no operator for them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def widened_product(hidden: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Widens the weights to the activations' dtype, which holds them exactly. Shapes as ``Device.int8_product``."""
    return F.linear(hidden, weight.to(hidden.dtype)) * scale.to(hidden.dtype)
