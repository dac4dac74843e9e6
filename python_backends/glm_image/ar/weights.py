"""The decoder's tensors: their names in a checkpoint, and the part of each that belongs to a rank."""

from __future__ import annotations

import torch
from torch import Tensor

from glm_image.ar.config import ArConfig
from glm_image.checkpoint.checkpoint import TensorSource
from glm_image.parallel.collectives import ALONE, Group

CHECKPOINT_NAMES = {
    "out.weight": "self_attn.o_proj.weight",
    "gate_up.weight": "mlp.gate_up_proj.weight",
    "down.weight": "mlp.down_proj.weight",
    "before_attention.weight": "input_layernorm.weight",
    "after_attention.weight": "post_self_attn_layernorm.weight",
    "before_mlp.weight": "post_attention_layernorm.weight",
    "after_mlp.weight": "post_mlp_layernorm.weight",
    "embedding.weight": "model.language_model.embed_tokens.weight",
    "norm.weight": "model.language_model.norm.weight",
    "head.weight": "lm_head.weight",
}


class CheckpointNames:
    """A tensor source for ``Decoder`` that translates names to a checkpoint's and reads a rank's part."""

    def __init__(self, source: TensorSource, config: ArConfig, group: Group = ALONE) -> None:
        self._source = source
        self._config = config
        self._group = group

    def has(self, name: str) -> bool:
        return True  # every tensor of the decoder is in the checkpoint

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Reads this rank's part of a parameter; the checkpoint has q, k and v as three tensors."""
        config, group, prefix, part = self._config, self._group, "", name
        if name.startswith("layers."):
            _, index, part = name.split(".", maxsplit=2)
            prefix = f"model.language_model.layers.{index}."
        if part.startswith("qkv."):
            return self._qkv(prefix, part.removeprefix("qkv."), shape[1:])
        full = prefix + CHECKPOINT_NAMES[part]
        if part == "head.weight":
            rows = group.shard_range(config.vision_vocab_size)
            return self._rows(full, (config.vision_vocab_size, *shape[1:]), rows)
        if part == "gate_up.weight" and group.size > 1:
            width = config.intermediate_size
            own = _slice(group.shard_range(width))
            gate_up = self._source.read(full, (2 * width, *shape[1:]))
            return torch.cat([half[own] for half in torch.split(gate_up, width)])
        if part in {"out.weight", "down.weight"}:
            columns = shape[1] * group.size
            whole = self._source.read(full, (shape[0], columns))
            return _copy(whole[:, _slice(group.shard_range(columns))], whole)
        return self._source.read(full, shape)

    def _rows(self, full: str, shape: tuple[int, ...], rows: range) -> Tensor:
        whole = self._source.read(full, shape)
        return _copy(whole[_slice(rows)], whole)

    def _qkv(self, prefix: str, kind: str, rest: tuple[int, ...]) -> Tensor:
        config, dim, kv_heads = self._config, self._config.head_dim, self._config.kv_heads
        queries = self._group.shard_range(config.heads)
        # A rank has the key and value heads of its query heads: its share, or one that other ranks have too.
        grouped = config.heads // kv_heads
        keys = range(queries.start // grouped, (queries.stop - 1) // grouped + 1)
        parts = []
        for letter, heads, own in (("q", config.heads, queries), ("k", kv_heads, keys), ("v", kv_heads, keys)):
            rows = range(own.start * dim, own.stop * dim)
            parts.append(self._rows(f"{prefix}self_attn.{letter}_proj.{kind}", (heads * dim, *rest), rows))
        return torch.cat(parts)


def _slice(own: range) -> slice:
    return slice(own.start, own.stop)


def _copy(part: Tensor, whole: Tensor) -> Tensor:
    # A view would keep the whole tensor in memory.
    return part if part.shape == whole.shape else part.clone()
