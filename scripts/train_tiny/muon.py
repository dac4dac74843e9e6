"""Muon, for the inner matrices of a network: momentum with singular values orthogonalized to about one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

MOMENTUM, WEIGHT_DECAY = 0.95, 0.01
COEFFICIENTS = 3.4445, -4.7750, 2.0315
ITERATIONS = 5
ADAM_RMS = 0.2
"""The usual RMS of AdamW's updates, in learning rates (Liu et al., 2025)."""


class Muon(torch.optim.Optimizer):
    """Jordan et al., 2024, with Nesterov's momentum and updates as large as AdamW's.

    Like ``torch.optim.Muon`` with ``adjust_lr_fn="match_rms_adamw"``, but batched over matrices of one shape, as
    launching many small products takes longer than computing them.

    Args:
        matrices: [a, b] each.
        learning_rate: as for AdamW, a scalar on the matrices' device.
    """

    def __init__(self, matrices: Iterable[nn.Parameter], learning_rate: Tensor) -> None:
        by_shape = defaultdict(list)
        for matrix in matrices:
            by_shape[matrix.shape].append(matrix)
        super().__init__([{"params": same} for same in by_shape.values()], {"lr": learning_rate})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Takes a step; every matrix must have a gradient."""
        for group in self.param_groups:
            matrices, rate = group["params"], group["lr"]
            gradients = [matrix.grad for matrix in matrices]
            momenta = [self._momentum(matrix) for matrix in matrices]
            torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
            ahead = torch.stack(torch._foreach_lerp(gradients, momenta, MOMENTUM))
            updates = orthogonalised(ahead).to(ahead.dtype) * (rate * ADAM_RMS * max(matrices[0].shape) ** 0.5)
            torch._foreach_mul_(matrices, 1 - rate * WEIGHT_DECAY)
            torch._foreach_sub_(matrices, updates.unbind())

    def _momentum(self, matrix: Tensor) -> Tensor:
        state = self.state[matrix]
        if not state:
            state["momentum"] = torch.zeros_like(matrix)
        momentum: Tensor = state["momentum"]
        return momentum


def orthogonalised(matrices: Tensor) -> Tensor:
    """Returns matrices [n, a, b] with singular values near one, bf16, by Newton-Schulz iteration."""
    first, second, third = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    matrix = (matrices.mT if tall else matrices).bfloat16()
    matrix = matrix / matrix.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = matrix @ matrix.mT
        matrix = torch.baddbmm(matrix, torch.baddbmm(gram, gram, gram, beta=second, alpha=third), matrix, beta=first)
    return matrix.mT if tall else matrix
