"""The kernels of a decode step against their references in plain torch, in bf16."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from glm_image.ar.fused.decoder import FusedDecoder, weights_of
from glm_image.ar.fused.step import sample_tokens
from glm_image.ar.fused.tiles import INT8_TILES, TileConfigs
from glm_image.ar.model import Decoder
from glm_image.ar.sampler import sample
from glm_image.ar.state import DecodeState
from glm_image.checkpoint.checkpoint import RandomTensors
from glm_image.devices.attention import masked_decode_attention
from glm_image.devices.int8_linear import Int8Product, quantize_linears
from glm_image.devices.quantization import dequantized_product
from glm_image.kernels.skinny_linear import TileConfig, gate_up, linear_partials
from glm_image.request.parameters import Sampling
from kernels.sizes import BF16_ERROR, CONFIG, relative_error

LENGTHS = (0, 1, 5, 63, 64, 65, 130, 17)
POSITIONS = 160

# In matrix products Triton's interpreter treats bf16 as integers.
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="Triton's interpreter multiplies no bf16 matrices")


def random_state(device: torch.device) -> DecodeState:
    generator = torch.Generator().manual_seed(3)

    def like(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator).to(device, tensor.dtype)

    state = DecodeState.idle(CONFIG, len(LENGTHS), POSITIONS, device, torch.bfloat16)
    for tensor in (state.cache.keys, state.cache.values, state.cos, state.sin):
        tensor.copy_(like(tensor))
    state.lengths.copy_(torch.tensor(LENGTHS))
    state.tokens.copy_(torch.arange(len(LENGTHS)) * 7)
    return state


def torch_logits(decoder: Decoder, state: DecodeState) -> Tensor:
    rows = torch.arange(len(LENGTHS), device=state.tokens.device)
    cos, sin = state.cos[rows, state.lengths], state.sin[rows, state.lengths]

    def attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return masked_decode_attention(query, keys, values, state.lengths + 1)

    return decoder.decode(state.tokens, rows, state.lengths, cos, sin, state.cache, attention)


@needs_gpu
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tiles", [TileConfigs(), INT8_TILES])
def test_decode_step_matches_plain_torch(device: torch.device, bias: bool, tiles: TileConfigs) -> None:
    config = replace(CONFIG, attention_bias=bias)
    product = None if tiles == TileConfigs() else dequantized_product
    decoder = Decoder.load(config, RandomTensors(device, torch.bfloat16), int8=product)
    ours, theirs = random_state(device), random_state(device)
    with torch.inference_mode():
        want = torch_logits(decoder, theirs)
        fused = FusedDecoder(decoder, len(LENGTHS), tiles)
        got = fused.decode(ours.tokens, ours.lengths, (ours.cos, ours.sin), ours.cache)
    assert torch.isfinite(got).all()
    assert relative_error(got, want) < BF16_ERROR
    assert relative_error(ours.cache.keys, theirs.cache.keys) < BF16_ERROR
    assert relative_error(ours.cache.values, theirs.cache.values) < BF16_ERROR


@needs_gpu
@pytest.mark.parametrize("product", [None, dequantized_product])
def test_logits_of_a_slot_are_independent_of_other_slots(device: torch.device, product: Int8Product | None) -> None:
    decoder = Decoder.load(CONFIG, RandomTensors(device, torch.bfloat16), int8=product)
    one, other = random_state(device), random_state(device)
    other.tokens[1:] += 1
    other.lengths[1:] = 3
    other.cache.keys[:, 1:] *= 2
    with torch.inference_mode():
        logits = [
            FusedDecoder(decoder, len(LENGTHS)).decode(s.tokens, s.lengths, (s.cos, s.sin), s.cache).clone()
            for s in (one, other)
        ]
    assert torch.equal(logits[0][0], logits[1][0])
    assert not torch.equal(logits[0][1], logits[1][1])


@needs_gpu
@pytest.mark.parametrize("split_k", [1, 2, 3])
@pytest.mark.parametrize(("n", "k"), [(96, 64), (100, 200), (33, 97)])
def test_partial_sums_add_up_to_the_product(device: torch.device, n: int, k: int, split_k: int) -> None:
    linear = torch.nn.Linear(k, n, bias=False, device=device, dtype=torch.bfloat16)
    x = torch.randn(5, k, device=device, dtype=torch.bfloat16)
    out = torch.full((split_k, 5, n), torch.nan, device=device)
    tiles = TileConfig(block_n=32, block_k=32, split_k=split_k, warps=4, stages=2, fetch=16)
    with torch.inference_mode():
        linear_partials(x, linear.weight, None, out, tiles)
        assert relative_error(out.sum(0), x.float() @ linear.weight.float().T) < 1e-3


@needs_gpu
@pytest.mark.parametrize("int8", [False, True])
def test_gate_up_matches_plain_torch(device: torch.device, int8: bool) -> None:
    layer = torch.nn.Module()
    layer.linear = torch.nn.Linear(96, 2 * 40, bias=False, device=device, dtype=torch.bfloat16)
    if int8:
        quantize_linears(layer, dequantized_product)
    x = torch.randn(8, 96, device=device, dtype=torch.bfloat16)
    out = torch.full((8, 40), torch.nan, device=device, dtype=torch.bfloat16)
    with torch.inference_mode():
        tiles = TileConfig(block_n=16, block_k=32, split_k=1, warps=4, stages=2, fetch=16)
        gate_up(x, *weights_of(layer.linear), out, tiles)
        gate, up = layer.linear(x).chunk(2, dim=-1)
        assert relative_error(out, up * torch.nn.functional.silu(gate)) < BF16_ERROR


SAMPLINGS = (
    Sampling(0.9, 0.75, 75),
    Sampling(0.5, 0.9, 20),
    Sampling(2.0, 1.0, 75),
    Sampling(1.0, 0.1, 60),
    Sampling(1.0, 0.5, 1),
    Sampling(1.3, 0.99, 10**6),
    Sampling(0.01, 0.75, 75),
    Sampling(0.9, 0.75, 75),
)


@pytest.mark.parametrize("seed", range(6))
def test_sampled_tokens_match_the_sampler_with_a_sort(device: torch.device, seed: int) -> None:
    state = random_state(device)
    generator = torch.Generator().manual_seed(seed)
    vocabulary = CONFIG.vision_vocab_size
    logits = (3 * torch.randn(len(LENGTHS), vocabulary, generator=generator)).to(device)
    if seed == 5:  # in one row top-p drops every allowed id
        logits[0, : CONFIG.codebook_size] -= 50.0
    state.noise.copy_(torch.empty(state.noise.shape).exponential_(generator=generator))
    state.sampled.fill_(seed)
    state.active.fill_(1)
    for slot, sampling in enumerate(SAMPLINGS):
        state.sampler.set(slot, sampling, 4 if slot == 7 else 0, vocabulary)
    rows = torch.arange(len(LENGTHS), device=device)
    allowed = state.allowed[(state.sampled >= state.sampler.preview_tokens).long()]
    want = sample(logits, state.noise[rows, state.sampled], state.sampler, allowed)
    lengths = state.lengths.clone()
    sample_tokens(logits, state)
    assert torch.equal(state.tokens, want)
    assert torch.equal(state.output[rows, torch.full_like(rows, seed)], want)
    assert torch.equal(state.lengths, lengths + 1)
    assert torch.equal(state.sampled, torch.full_like(rows, seed + 1))
