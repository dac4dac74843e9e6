"""The kernels of the prefill against their references in plain torch, in bf16."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from glm_image.ar.fused.prefill import FusedPrefill
from glm_image.ar.kv_cache import KvCache
from glm_image.ar.model import Decoder
from glm_image.ar.rotary import rotate
from glm_image.checkpoint.checkpoint import RandomTensors
from glm_image.devices.quantization import dequantized_product
from glm_image.kernels.prefill import rotate_and_store, silu_product
from kernels.sizes import BF16_ERROR, CONFIG, relative_error

POSITIONS = 48


def random(device: torch.device, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + shape[0])).to(device, torch.bfloat16)


@pytest.mark.parametrize("tokens", [1, 7, POSITIONS])
def test_rotated_heads_match_plain_torch(device: torch.device, tokens: int) -> None:
    heads, kv_heads, dim = 6, 2, 32
    qkv, (cos, sin) = random(device, tokens, (heads + 2 * kv_heads) * dim), random(device, 2, tokens, 16)
    keys, values = torch.full((2, kv_heads, POSITIONS, dim), 5.0, device=device, dtype=torch.bfloat16)
    query = rotate_and_store(qkv, cos, sin, (keys, values))
    qk, value = qkv.unflatten(-1, (-1, dim)).tensor_split([heads + kv_heads], dim=1)
    want_query, want_key = rotate(qk, cos[:, None], sin[:, None]).tensor_split([heads], dim=1)
    assert relative_error(query, want_query) < BF16_ERROR
    assert relative_error(keys[:, :tokens], want_key.transpose(0, 1)) < BF16_ERROR
    assert torch.equal(values[:, :tokens], value.transpose(0, 1))
    assert (keys[:, tokens:] == 5).all()
    assert (values[:, tokens:] == 5).all()


@pytest.mark.parametrize("width", [40, 1024, 1500])
def test_silu_product_matches_plain_torch(device: torch.device, width: int) -> None:
    gate_up = random(device, 3, 2 * width)
    gate, up = gate_up.chunk(2, dim=-1)
    assert relative_error(silu_product(gate_up), up * F.silu(gate)) < BF16_ERROR


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("tokens", [1, 19])
def test_a_prompt_is_read_as_in_plain_torch(device: torch.device, tokens: int, int8: bool) -> None:
    decoder = Decoder.load(CONFIG, RandomTensors(device, torch.bfloat16), int8=dequantized_product if int8 else None)
    ids = torch.arange(tokens, device=device) * 5
    cos, sin = random(device, 2, tokens, CONFIG.rotary_dim)
    ours, theirs = (KvCache(CONFIG, 3, POSITIONS, device, torch.bfloat16) for _ in range(2))
    want = decoder.prefill(ids, cos, sin, theirs, slot=1)
    got = FusedPrefill(decoder)(ids, cos, sin, ours, 1)
    exact_cache = KvCache(CONFIG, 3, POSITIONS, device, torch.float32)
    exact = decoder.float().prefill(ids, cos.float(), sin.float(), exact_cache, slot=1)
    assert got.dtype == torch.float32
    assert got.shape == want.shape
    assert relative_error(got, exact) < max(BF16_ERROR, 1.2 * relative_error(want, exact))
    assert relative_error(ours.keys, theirs.keys) < BF16_ERROR
    assert relative_error(ours.values, theirs.values) < BF16_ERROR
    assert not ours.keys[:, [0, 2]].any()
