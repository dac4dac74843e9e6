"""The decode step and the prefill on the fused operators of torch_npu: 13 launches a layer.

The products are torch's; norms, rotation, SwiGLU, writes to the cache and attention are one operator each. The static
cache is read under a mask that lies on the device: lengths on the host, which the attention operator takes too, would
need an update of every captured call before each replay.

A head's channels are reordered at load so that its rotated halves are the first channels of the head's halves: the
rotation is then one operator over whole heads, and attention does not depend on the order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glm_image.ar.config import NOISE_BLOCK, ArConfig
from glm_image.ar.fused.layers import layers_and_norms
from glm_image.ar.kv_cache import KvCache
from glm_image.ar.model import Decoder, DecoderLayer, gathered_logits
from glm_image.ar.sampler import SamplerRows
from glm_image.ar.state import DecodeState
from glm_image.ar.window import Rows, Window, accept, round_up, window_rows
from glm_image.devices.int8_linear import Int8Linear

Attention = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Stores a layer's keys and values and attends: from the layer's index, queries [rows, tokens, heads, head_dim], keys
and values [rows, tokens, kv_heads, head_dim] to [rows, ..., head_dim] in the order of the queries."""

CAUSAL = 3
"""The sparse mode of attention in which a query sees keys up to its own position, counted from the end."""

CAUSAL_MASK_SIDE = 2048
"""The operator needs a mask of this size in that mode, whatever the number of tokens."""


def supports(decoder: Decoder) -> bool:
    """Returns whether the operators can run a decoder: the attention needs bf16."""
    return decoder.dtype == torch.bfloat16


class NpuDecoder:
    """A decoder's layers on the fused operators; the reference is ``Decoder``.

    It reorders the decoder's queries and keys, so that the decoder's own methods must not be used afterwards.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder, self.config = decoder, decoder.config
        self._layers, self._norms = layers_and_norms(decoder)
        for layer in self._layers:
            _reorder_heads(layer, self.config)
        for module in decoder.modules():
            if isinstance(module, Int8Linear):  # the product takes them so, and would cast them in every step
                module.scale = nn.Parameter(module.scale.to(decoder.dtype), requires_grad=False)

    @property
    def dtype(self) -> torch.dtype:
        return self._decoder.dtype

    def tables(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Returns tables [rows, tokens, 1, head_dim] of whole heads from those of ``ar.rotary``, [..., rotary_dim].

        The angle of a channel that is not rotated is 0.
        """
        still = (self.config.head_dim - self.config.rotary_dim) // 2
        tables = []
        for table, filling in ((cos, 1.0), (sin, 0.0)):
            halves = F.pad(table.unflatten(-1, (2, -1)), (0, still), value=filling)
            tables.append(halves.flatten(-2).view(len(table), -1, 1, self.config.head_dim))
        return tables[0], tables[1]

    def layers(self, token_ids: Tensor, tables: tuple[Tensor, Tensor], attention: Attention) -> Tensor:
        """Runs all layers on ``token_ids`` [rows, tokens]; returns the normed hidden states [rows * tokens, hidden]."""
        eps = self.config.norm_eps
        rows, tokens = token_ids.shape
        residual = F.embedding(token_ids.flatten(), self._decoder.embedding.weight)
        normed: Tensor = torch.ops.npu.npu_rms_norm(residual, self._norms[0], eps)[0]
        for index, layer in enumerate(self._layers):
            heads = layer.qkv(normed).view(rows, tokens, -1, self.config.head_dim)
            turned = torch.ops.npu.npu_rotary_mul(heads[:, :, : layer.heads + layer.kv_heads], *tables)
            query, keys = turned[:, :, : layer.heads], turned[:, :, layer.heads :]
            attended = attention(index, query, keys, heads[:, :, -layer.kv_heads :])
            branch = layer.group.all_reduce_sum(layer.out(attended.reshape(rows * tokens, -1)))
            branch = torch.ops.npu.npu_rms_norm(branch, layer.after_attention.weight, eps)[0]
            normed, _, residual = torch.ops.npu.npu_add_rms_norm(branch, residual, layer.before_mlp.weight, eps)
            branch = layer.group.all_reduce_sum(layer.down(torch.ops.npu.npu_swiglu(layer.gate_up(normed))))
            branch = torch.ops.npu.npu_rms_norm(branch, layer.after_mlp.weight, eps)[0]
            normed, _, residual = torch.ops.npu.npu_add_rms_norm(branch, residual, self._norms[index + 1], eps)
        return normed

    def logits(self, normed: Tensor) -> Tensor:
        """Returns logits [rows, vision_vocab_size] in the decoder's dtype."""
        logits: Tensor = self._decoder.head(normed)
        return gathered_logits(logits, self._decoder.group, self.config.vision_vocab_size)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, layout: str, mask: Tensor, mode: int = 0) -> Tensor:
        """Attends; ``mask`` is true where a key is hidden."""
        attended: Tensor = torch.ops.npu.npu_fused_infer_attention_score(
            query,
            keys,
            values,
            atten_mask=mask,
            num_heads=self.config.heads,
            num_key_value_heads=self.config.kv_heads,
            scale=self.config.head_dim**-0.5,
            input_layout=layout,
            sparse_mode=mode,
        )[0]
        return attended


class NpuPrefill:
    """``Decoder.prefill`` on the fused operators."""

    def __init__(self, decoder: NpuDecoder, device: torch.device) -> None:
        self._decoder = decoder
        self._mask = torch.ones(CAUSAL_MASK_SIDE, CAUSAL_MASK_SIDE, device=device, dtype=torch.bool).triu(1)

    @torch.inference_mode()
    def __call__(self, token_ids: Tensor, cos: Tensor, sin: Tensor, cache: KvCache, slot: int) -> Tensor:
        decoder = self._decoder

        def attention(layer: int, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            cache.write_prompt(layer, slot, keys[0].transpose(0, 1), values[0].transpose(0, 1))
            return decoder.attend(query, keys, values, "BSND", self._mask, CAUSAL)

        normed = decoder.layers(token_ids[None], decoder.tables(cos[None], sin[None]), attention)
        return decoder.logits(normed[-1:]).float()


class NpuStep:
    """Feeds every slot its last token and samples the next; the reference is ``ar.step.TorchStep``."""

    def __init__(self, decoder: NpuDecoder, state: DecodeState) -> None:
        self._decoder, self._state = decoder, state
        device = state.tokens.device
        self._rows = torch.arange(len(state.tokens), device=device)
        self._positions = torch.arange(state.cache.keys.shape[3], device=device)
        self._race = _Race(decoder.config.vision_vocab_size, device)

    def __call__(self) -> None:
        state, rows, cache = self._state, self._rows, self._state.cache
        cos, sin = (table[rows, state.lengths] for table in (state.cos, state.sin))
        hidden = self._positions > state.lengths[:, None]

        def attention(layer: int, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            for whole, new in ((cache.keys[layer], keys), (cache.values[layer], values)):
                torch.ops.npu.scatter_update_(whole, state.lengths, new.transpose(1, 2), 2)
            heads = query.transpose(1, 2)
            return self._decoder.attend(heads, cache.keys[layer], cache.values[layer], "BNSD", hidden[:, None, None])

        normed = self._decoder.layers(state.tokens[:, None], self._decoder.tables(cos, sin), attention)
        noise = state.noise[rows, state.sampled % NOISE_BLOCK]
        in_grid = (state.sampled >= state.sampler.preview_tokens)[:, None]
        order, winner = self._race(self._decoder.logits(normed), state.sampler, noise, in_grid, state.allowed)
        torch.gather(order, 1, winner, out=state.tokens[:, None])
        state.advance(rows)


class NpuWindowStep:
    """The step of Jacobi decoding; the reference is ``ar.window_step.TorchWindowStep``.

    It runs as many rows at a time as ``NpuStep``, by the same products, since an operator may choose its order of sums
    by the number of rows. A row attends to a copy of its slot's cache: the attention takes one query an entry.
    """

    def __init__(self, decoder: NpuDecoder, state: DecodeState, window: Window, rows: int) -> None:
        self._decoder, self._state, self._window = decoder, state, window
        device, self._block = state.tokens.device, len(state.tokens)
        self._rows = round_up(rows, self._block)
        self._positions = torch.arange(state.cache.keys.shape[3], device=device)
        self._race = _Race(decoder.config.vision_vocab_size, device)

    def __call__(self) -> None:
        rows = window_rows(self._state, self._window, self._rows)
        drawn = torch.cat([self._draw(block) for block in rows.blocks(self._block)])
        accept(self._state, self._window, rows, drawn)

    def _draw(self, rows: Rows) -> Tensor:
        state, cache, slot = self._state, self._state.cache, rows.slot
        cos, sin = (table[slot, rows.position] for table in (state.cos, state.sin))
        hidden = self._positions > rows.position[:, None]

        def attention(layer: int, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            whole = cache.append(layer, slot, rows.position, keys[:, 0], values[:, 0])
            own_keys, own_values = (part[slot] for part in whole)
            return self._decoder.attend(query.transpose(1, 2), own_keys, own_values, "BNSD", hidden[:, None, None])

        normed = self._decoder.layers(rows.token[:, None], self._decoder.tables(cos, sin), attention)
        following, sampler = rows.index + 1, state.sampler.rows(slot)
        in_grid = (following >= sampler.preview_tokens)[:, None]
        noise = state.noise[slot, following % NOISE_BLOCK]
        order, winner = self._race(self._decoder.logits(normed), sampler, noise, in_grid, state.allowed)
        return order.gather(1, winner)[:, 0]


class _Race:
    """The race of ``ar.sampler.sample``, run in the order of the logits.

    What is left after top-p is not normalized again, which changes no winner except by rounding.
    """

    def __init__(self, vocabulary: int, device: torch.device) -> None:
        # Behind any winner of the race, in the order of the logits.
        self._behind = torch.arange(vocabulary, device=device, dtype=torch.float32) - vocabulary
        self._never = torch.full((), -torch.inf, device=device)

    def __call__(
        self, logits: Tensor, sampler: SamplerRows, noise: Tensor, in_grid: Tensor, allowed_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns the ids in the order of the logits, [rows, vocabulary], and where the winners are, [rows, 1].

        ``in_grid`` is bool [rows, 1]: whether the tokens are of the image's own grid.
        """
        ascending, order = (logits / sampler.temperature).sort(dim=-1)
        ascending = ascending.masked_fill(ascending < ascending.gather(1, sampler.kth), -torch.inf)
        weights = ascending.softmax(dim=-1)
        kept = weights.cumsum(dim=-1) > sampler.cut
        race = torch.where(kept, weights / noise.gather(1, order), self._behind)
        allowed = torch.where(in_grid, allowed_ids[1], allowed_ids[0]).gather(1, order)
        return order, torch.where(allowed, race, self._never).argmax(dim=-1, keepdim=True)


def _reorder_heads(layer: DecoderLayer, config: ArConfig) -> None:
    """Moves the rotated halves of queries and keys to the front of their heads' halves, in place."""
    rotated, half = config.rotary_dim // 2, config.head_dim // 2
    still = list(range(config.rotary_dim, config.head_dim))
    first, second = list(range(rotated)), list(range(rotated, 2 * rotated))
    channels = torch.tensor(first + still[: half - rotated] + second + still[half - rotated :])
    heads = layer.heads + layer.kv_heads
    order = (torch.arange(heads)[:, None] * config.head_dim + channels).flatten().to(layer.qkv.weight.device)
    with torch.inference_mode():
        for tensor in (layer.qkv.weight, getattr(layer.qkv, "scale", None), layer.qkv.bias):
            if tensor is not None:
                tensor[: len(order)] = tensor[order]
