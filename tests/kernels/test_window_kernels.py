"""The kernels of a speculative step: bits of single rows at every row count, and the references in plain torch."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from glm_image.ar.fused.decoder import weights_of
from glm_image.ar.fused.step import FusedStep
from glm_image.ar.fused.tiles import TileConfigs, default_tiles, window_tiles
from glm_image.ar.fused.window import FusedWindowStep
from glm_image.ar.model import Decoder
from glm_image.ar.sampler import sample
from glm_image.ar.speculation import rows_for
from glm_image.ar.state import DecodeState
from glm_image.ar.window import Window, accept, window_rows, write_layout
from glm_image.checkpoint.checkpoint import RandomTensors
from glm_image.devices.int8_linear import AnyLinear
from glm_image.devices.quantization import dequantized_product
from glm_image.kernels.decode_attention import DecodeAttention
from glm_image.kernels.int8_pairs import Int8Pairs
from glm_image.kernels.sampling import sample_window
from glm_image.kernels.skinny_linear import gate_up, linear_partials, partials_buffer
from glm_image.kernels.window_attention import WindowAttention
from glm_image.kernels.window_rows import WindowRows, WindowSlots, accept_window, embed_window
from glm_image.request.parameters import Sampling
from kernels.sizes import CONFIG

POSITIONS = 640
TOTAL = 200
ROW_COUNTS = (16, 32, 64, 128)

# In matrix products Triton's interpreter treats bf16 as integers.
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="Triton's interpreter multiplies no bf16 matrices")


def filled_state(device: torch.device, slots: int, lengths: tuple[int, ...], seed: int = 3) -> DecodeState:
    """Returns slots in the midst of their sequences, each with a token and sampling parameters of its own."""
    generator = torch.Generator().manual_seed(seed)
    state = DecodeState.idle(CONFIG, slots, POSITIONS, device, torch.bfloat16)
    for tensor in (state.cache.keys, state.cache.values, state.cos, state.sin):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    state.noise.copy_(torch.empty(state.noise.shape).exponential_(generator=generator))
    state.lengths.copy_(torch.tensor(lengths))
    state.active.fill_(1)
    state.sampled.fill_(1)
    tokens = torch.randint(CONFIG.codebook_size, (slots,), generator=generator)
    state.tokens.copy_(tokens)
    state.output[:, 0] = state.tokens
    for slot in range(slots):
        state.sampler.set(slot, Sampling(1.0 + slot / 8, 0.9, 60), 20, CONFIG.vision_vocab_size)
    return state


def window_of(state: DecodeState, widths: dict[int, int], capacity: int) -> Window:
    """Returns a window with ``widths`` rows of each slot, whose first guesses are the last tokens known."""
    window = Window.idle(len(state.tokens), POSITIONS, capacity, state.tokens.device)
    window.total.fill_(TOTAL)
    window.known.fill_(1)
    write_layout(window.slot, window.offset, widths, POSITIONS)
    return window


def window_slots(state: DecodeState, window: Window) -> WindowSlots:
    return WindowSlots(state.sampled, state.lengths, window.total, window.known, window.guess_from, state.output)


def tokens_one_by_one(decoder: Decoder, state: DecodeState, count: int) -> Tensor:
    step = FusedStep(decoder, state)
    for _ in range(count):
        step()
    return state.output[:, : count + 1].clone()


@needs_gpu
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("rows", ROW_COUNTS)
def test_a_row_of_a_linear_has_the_same_bits_at_every_row_count(device: torch.device, rows: int, int8: bool) -> None:
    config = replace(CONFIG, layers=1, hidden_size=1024, intermediate_size=1500, vision_vocab_size=530)
    decoder = Decoder.load(config, RandomTensors(device, torch.bfloat16), int8=dequantized_product if int8 else None)
    layer, start = decoder.layers[0], default_tiles(decoder)
    tiles = window_tiles(decoder, start, rows)
    generator = torch.Generator(device).manual_seed(rows)
    for name in ("qkv", "out", "gate_up", "down", "head"):
        linear = decoder.head if name == "head" else getattr(layer, name)
        width = linear.weight.shape[1]
        x = torch.randn(rows, width, device=device, generator=generator).to(torch.bfloat16)
        got = product_of(linear, x, name, tiles)
        assert torch.isfinite(got).all()
        for first in range(0, rows, 8):
            part = slice(first, first + 8)
            assert torch.equal(got[:, part], product_of(linear, x[part], name, start)), name


def product_of(linear: AnyLinear, x: Tensor, name: str, tiles: TileConfigs) -> Tensor:
    """Returns the partial sums of a linear, or the result of ``gate_up``, [..., rows, n]."""
    n, tile = linear.weight.shape[0], getattr(tiles, name)
    values = Int8Pairs.of(x) if tiles.int8_pairs and name != "out" else x
    with torch.inference_mode():
        if name == "gate_up":
            out = torch.empty(1, len(x), n // 2, device=x.device, dtype=torch.bfloat16)
            gate_up(values, *weights_of(linear), out[0], tile)
        else:
            out = partials_buffer(tile, len(x), n, x.device)
            linear_partials(values, *weights_of(linear), out, tile)
    return out


@needs_gpu
@pytest.mark.parametrize("lengths", [(0, 5, 63, 64), (130, 600, 57, 300)])
@pytest.mark.parametrize("first", range(5))
def test_attention_of_a_row_has_the_bits_of_a_single_row(
    device: torch.device, lengths: tuple[int, ...], first: int
) -> None:
    slots, widths = len(lengths), (7, 1, 16, 8)
    heads, kv_heads, dim = CONFIG.heads, CONFIG.kv_heads, CONFIG.head_dim
    state = filled_state(device, slots, lengths)
    unused = torch.full((first,), -1, device=device)
    slot_of_row = torch.repeat_interleave(torch.arange(slots), torch.tensor(widths)).to(device)
    place = torch.cat([torch.arange(width) for width in widths]).to(device)
    positions = torch.cat([unused, torch.tensor(lengths, device=device)[slot_of_row] + place])
    slot_of_row = torch.cat([torch.zeros_like(unused), slot_of_row])
    partials = torch.randn(2, len(positions), (heads + 2 * kv_heads) * dim, device=device)
    bias = torch.randn(partials.shape[2], device=device, dtype=torch.bfloat16)
    tables, sizes = (state.cos, state.sin), (heads, kv_heads, dim, CONFIG.rotary_dim, device)

    ours = [tensor[0].clone() for tensor in (state.cache.keys, state.cache.values)]
    got = torch.empty(len(positions), heads * dim, device=device, dtype=torch.bfloat16)
    attend = WindowAttention(len(positions), *sizes)
    attend(partials, bias, tables, (ours[0], ours[1]), slot_of_row, positions, got)

    theirs = [tensor[0].clone() for tensor in (state.cache.keys, state.cache.values)]
    single, out = DecodeAttention(slots, *sizes), torch.empty(slots, heads * dim, device=device, dtype=torch.bfloat16)
    for step in range(max(widths)):
        rows = [first + sum(widths[:slot]) + min(step, widths[slot] - 1) for slot in range(slots)]
        single(
            partials[:, rows].contiguous(), bias, tables, (theirs[0], theirs[1]), positions[rows].contiguous(), out
        )  # fmt: skip
        assert torch.equal(got[rows], out)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])


@needs_gpu
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(
    "widths", [{0: 16}, {0: 5, 1: 11}, {0: 8, 1: 8, 2: 8, 3: 8}, {0: 32, 1: 32, 2: 31, 3: 1}, {0: 17, 2: 3}]
)
def test_tokens_equal_those_of_one_by_one_decoding(device: torch.device, widths: dict[int, int], int8: bool) -> None:
    decoder = Decoder.load(CONFIG, RandomTensors(device, torch.bfloat16), int8=dequantized_product if int8 else None)
    lengths = (3, 60, 130, 64)
    capacity = rows_for(sum(widths.values()), ROW_COUNTS)
    with torch.inference_mode():
        want = tokens_one_by_one(decoder, filled_state(device, 4, lengths), 40)
        ours = filled_state(device, 4, lengths)
        window = window_of(ours, widths, capacity)
        # Guesses of which some are right.
        ours.output[:, 1:41] = torch.where(torch.arange(40, device=device) % 5 < 4, want[:, 1:], 7)
        window.known.fill_(41)
        step, steps = FusedWindowStep(decoder, ours, window, capacity), 0
        while int(ours.sampled[list(widths)].min()) <= 40:
            step()
            steps += 1
    for slot in widths:
        assert torch.equal(ours.output[slot, :41], want[slot])
    assert steps <= 41
    if min(widths.values()) > 4:
        assert steps < 20


@pytest.mark.parametrize("seed", range(4))
def test_rows_and_acceptance_match_plain_torch(device: torch.device, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def make() -> tuple[DecodeState, Window]:
        generator.manual_seed(seed)
        state = filled_state(device, 4, (3, 60, 130, 64))
        window = window_of(state, {0: 5, 1: 1, 3: 8}, 16)
        state.output.copy_(torch.randint(3, state.output.shape, generator=generator))
        window.guess_from.copy_(torch.randint(TOTAL, window.guess_from.shape, generator=generator))
        state.sampled.copy_(torch.randint(1, 9, (4,), generator=generator))
        window.known.copy_(state.sampled.cpu() + torch.randint(6, (4,), generator=generator))
        window.total.copy_(torch.tensor([TOTAL, 5, 0, 12]))
        return state, window

    (ours, our_window), (theirs, their_window) = make(), make()
    rows = window_rows(theirs, their_window, 16)
    drawn = torch.randint(3, (16,), generator=generator).to(device)
    width = CONFIG.hidden_size
    residual, normed = torch.empty(2, 16, width, device=device, dtype=torch.bfloat16)
    table = torch.randn(CONFIG.vocab_size, width, device=device, dtype=torch.bfloat16)
    fused = WindowRows.of(our_window.slot, our_window.offset)
    embed_window(fused, window_slots(ours, our_window), table, torch.ones_like(table[0]), residual, normed, 1e-5)
    assert torch.equal(fused.indices >= 0, rows.valid)
    for got, want in ((fused.tokens, rows.token), (fused.positions, rows.position), (fused.indices, rows.index)):
        assert torch.equal(got[rows.valid], want[rows.valid])
    assert torch.equal(residual[rows.valid], table[rows.token[rows.valid]])

    fused.drawn.copy_(drawn)
    accept_window(fused, window_slots(ours, our_window))
    accept(theirs, their_window, rows, drawn)
    assert torch.equal(ours.counters, theirs.counters)
    assert torch.equal(our_window.known, their_window.known)
    assert torch.equal(ours.output[:, :-1], theirs.output[:, :-1])


def test_rows_draw_as_the_sampler_does_for_their_slots(device: torch.device) -> None:
    state = filled_state(device, 4, (3, 60, 130, 64))
    slots = torch.tensor([0, 0, 1, 3, 3, 3, 0], device=device)
    indices = torch.tensor([0, 18, 19, 62, 63, 64, -1], device=device)
    logits = 3 * torch.randn(7, CONFIG.vision_vocab_size, device=device)
    drawn = torch.full_like(slots, -7)
    parameters = {field.name: getattr(state.sampler, field.name) for field in fields(state.sampler)}
    sample_window(logits, state.noise, state.allowed, **parameters, slots=slots, indices=indices, drawn=drawn)
    following = indices + 1
    allowed = state.allowed[(following >= state.sampler.preview_tokens[slots]).long()]
    noise = state.noise[slots, following % state.noise.shape[1]]
    rows = state.sampler.rows(slots)
    want = sample(logits, noise, rows, allowed)
    assert torch.equal(drawn[:-1], want[:-1])
    assert int(drawn[-1]) == -7
