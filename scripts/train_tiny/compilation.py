"""What a GPU compiles."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

Forward = Callable[..., Any]


def compiled(module: Forward, device: torch.device, *, dynamic: bool = True) -> Forward:
    """``module`` with its elementwise work fused, on a GPU: the parts are so small that launches and memory decide.

    ``dynamic`` compiles once for all sizes.
    """
    if device.type != "cuda":
        return module
    # Each kind of call compiles anew: with and without a source or gradients.
    torch._dynamo.config.recompile_limit = 64
    # Otherwise a first batch of as many samples as a layer is wide is taken to be always so large.
    torch.fx.experimental._config.use_duck_shape = False
    return torch.compile(module, dynamic=dynamic)


def compile_blocks(blocks: Iterable[nn.Module], device: torch.device) -> None:
    """Makes calls of each of ``blocks`` compiled ones; blocks of one kind share what is compiled."""
    for block in blocks:
        block.forward = compiled(block.forward, device)  # type: ignore[method-assign]
