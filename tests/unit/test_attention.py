from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from glm_image.devices.attention import masked_decode_attention, ragged_decode_attention

POSITIONS = 40

SHAPES = st.tuples(st.integers(1, 8), st.integers(1, 4), st.integers(1, 3), st.sampled_from([12, 16, 64]))
SEEDS = st.integers(0, 2**31)


def caches(shape: tuple[int, int, int, int], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    slots, kv_heads, queries_a_head, head_dim = shape
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(slots, kv_heads * queries_a_head, head_dim, generator=generator)
    keys, values = torch.randn(2, slots, kv_heads, POSITIONS, head_dim, generator=generator)
    lengths = torch.randint(1, POSITIONS + 1, (slots,), generator=generator)
    return query, keys, values, lengths


def plain_attention(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """The definition, head by head, in fp64."""
    share = query.shape[1] // keys.shape[1]
    out = torch.empty_like(query, dtype=torch.float64)
    for slot, length in enumerate(lengths.tolist()):
        for head in range(query.shape[1]):
            seen = slice(0, length)
            key, value = (cache[slot, head // share, seen].double() for cache in (keys, values))
            scores = key @ query[slot, head].double() / math.sqrt(query.shape[2])
            out[slot, head] = scores.softmax(0) @ value
    return out


@given(shape=SHAPES, seed=SEEDS)
def test_masked_and_ragged_attention_equal_the_definition(shape: tuple[int, int, int, int], seed: int) -> None:
    inputs = caches(shape, seed)
    expected = plain_attention(*inputs)
    for attention in (masked_decode_attention, ragged_decode_attention):
        assert torch.allclose(attention(*inputs).double(), expected, rtol=1e-5, atol=1e-5)


@given(shape=SHAPES, seed=SEEDS, garbage=st.sampled_from([1e4, -1e30]))
def test_positions_beyond_a_slots_length_change_nothing(
    shape: tuple[int, int, int, int], seed: int, garbage: float
) -> None:
    query, keys, values, lengths = caches(shape, seed)
    beyond = (torch.arange(POSITIONS) >= lengths[:, None])[:, None, :, None]
    dirty = (keys.masked_fill(beyond, garbage), values.masked_fill(beyond, garbage))
    for attention in (masked_decode_attention, ragged_decode_attention):
        assert torch.equal(attention(query, *dirty, lengths), attention(query, keys, values, lengths))


@given(shape=SHAPES, seed=SEEDS)
def test_ragged_attention_equals_torchs_for_every_slot_bit_for_bit(shape: tuple[int, int, int, int], seed: int) -> None:
    query, keys, values, lengths = caches(shape, seed)
    lengths[0] = 1
    attended = ragged_decode_attention(query, keys, values, lengths)
    for slot, length in enumerate(lengths.tolist()):
        cache = (tensor[slot : slot + 1, :, :length] for tensor in (keys, values))
        alone = F.scaled_dot_product_attention(query[slot : slot + 1, :, None], *cache, enable_gqa=True)
        assert torch.equal(attended[slot], alone[0, :, 0])


@given(shape=SHAPES, seed=SEEDS)
def test_slots_are_independent(shape: tuple[int, int, int, int], seed: int) -> None:
    query, keys, values, lengths = caches(shape, seed)
    others = caches(shape, seed + 1)
    kept = torch.arange(shape[0]) == shape[0] // 2
    mixed = [
        torch.where(kept.view(-1, *[1] * (mine.dim() - 1)), mine, other)
        for mine, other in zip((query, keys, values, lengths), others, strict=True)
    ]
    for attention in (masked_decode_attention, ragged_decode_attention):
        assert torch.equal(attention(*mixed)[kept], attention(query, keys, values, lengths)[kept])
