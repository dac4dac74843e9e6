"""Compilation on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

Forward = Callable[..., Any]


def compiled(module: Forward, device: torch.device, *, dynamic: bool = True) -> Forward:
    """Returns ``module`` compiled on a GPU, where launches and memory traffic dominate; unchanged elsewhere.

    ``dynamic`` compiles once for all sizes.
    """
    if device.type != "cuda":
        return module
    # Each kind of call is compiled separately: with and without a source or gradients.
    torch._dynamo.config.recompile_limit = 64
    # Otherwise a batch size that equals a layer's width at first is treated as always equal to it.
    torch.fx.experimental._config.use_duck_shape = False
    return torch.compile(module, dynamic=dynamic)


def compile_blocks(blocks: Iterable[nn.Module], device: torch.device) -> None:
    """Compiles the blocks' forward methods; blocks of one kind share the compiled code."""
    for block in blocks:
        block.forward = compiled(block.forward, device)  # type: ignore[method-assign]
