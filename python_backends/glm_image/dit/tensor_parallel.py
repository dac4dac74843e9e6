"""Tensor parallelism of diffusers' transformer: each rank has some heads and some of the MLP's channels."""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glm_image.checkpoint.checkpoint import TensorSource
from glm_image.parallel.collectives import Group

BY_ROWS = re.compile(r"attn1\.to_[qkv]\.(weight|bias)|ff\.net\.0\.proj\.(weight|bias)")
BY_COLUMNS = re.compile(r"(attn1\.to_out\.0|ff\.net\.2)\.weight")


class SummedLinear(nn.Linear):
    """A linear layer whose input channels are split among ranks (Shoeybi et al., 2019)."""

    def __init__(self, channels: int, linear: nn.Linear, group: Group) -> None:
        super().__init__(channels, linear.out_features, device="meta")
        self._group = group

    def forward(self, input: Tensor) -> Tensor:
        """Multiplies this rank's channels, [..., channels], and adds the products of all ranks."""
        return self._group.all_reduce_sum(F.linear(input, self.weight)) + self.bias


def shard(transformer: Any, group: Group) -> None:
    """Narrows the blocks of a transformer on the meta device to this rank's shard."""
    if group.size == 1:
        return
    for block in transformer.transformer_blocks:
        attention, mlp = block.attn1, block.ff.net
        attention.heads //= group.size
        for name in ("to_q", "to_k", "to_v"):
            setattr(attention, name, _narrow(getattr(attention, name), group))
        attention.to_out[0] = SummedLinear(attention.to_q.out_features, attention.to_out[0], group)
        mlp[0].proj = _narrow(mlp[0].proj, group)
        mlp[2] = SummedLinear(mlp[0].proj.out_features, mlp[2], group)


def _narrow(linear: nn.Linear, group: Group) -> nn.Linear:
    return nn.Linear(linear.in_features, linear.out_features // group.size, bias=linear.bias is not None, device="meta")


class ShardedTensors:
    """A ``TensorSource`` of a transformer that narrows the blocks' tensors to this rank's shard."""

    def __init__(self, source: TensorSource, group: Group) -> None:
        self._source, self._group = source, group

    def has(self, name: str) -> bool:
        return self._source.has(name)

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Reads this rank's shard, which has ``shape``."""
        dim = 0 if BY_ROWS.search(name) else 1 if BY_COLUMNS.search(name) else None
        if dim is None or self._group.size == 1:
            return self._source.read(name, shape)
        tensor = self._source.read(
            name, tuple(n * self._group.size if axis == dim else n for axis, n in enumerate(shape))
        )
        rows = self._group.shard_range(tensor.shape[dim])
        return torch.narrow_copy(tensor, dim, rows.start, len(rows))
