"""The fused blocks of the transformer against diffusers' own, in bf16."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from threading import Barrier, Lock
from typing import Any

import pytest
import torch
from diffusers import GlmImageTransformer2DModel
from torch import Tensor

from glm_image.checkpoint.checkpoint import fill
from glm_image.dit.blocks import Rotary, Tokens, eager_blocks
from glm_image.dit.fused import blocks
from glm_image.dit.fused.blocks import ATTENTION, FusedBlocks
from glm_image.dit.parallel_context import ParallelContext
from glm_image.dit.sequence_parallel import Heads, SequenceAttention, SequenceShape
from glm_image.dit.tensor_parallel import ShardedTensors, shard
from glm_image.kernels.head_norm_rotary import head_norm_rotary, scatter_heads
from glm_image.parallel.collectives import ALONE, Group, Transfer
from glm_image.parallel.process_group import Ranks
from kernels.blocks import GRID, HEADS, LargeTensors, arguments, change_error, empty_transformer

TEXT_TOKENS = ((6, 1), (1, 1), (3,), (0,))
BF16_ERROR = 0.03


def build(device: torch.device, ranks: Group = ALONE) -> GlmImageTransformer2DModel:
    transformer = empty_transformer()
    shard(transformer, ranks)
    fill(transformer, ShardedTensors(LargeTensors(device, torch.bfloat16), ranks))
    return transformer


@pytest.mark.parametrize("text_tokens", [(6, 1), (0,)])
def test_blocks_run_in_ranges_give_the_same_bits(device: torch.device, text_tokens: tuple[int, ...]) -> None:
    transformer = build(device)
    sequences, *rest = arguments(transformer, device, text_tokens)
    given = [(image.clone(), text.clone()) for image, text in sequences]
    with torch.inference_mode():
        blocks = FusedBlocks(transformer)
        whole = blocks.run(range(2), sequences, *rest)
        parts = blocks.run(range(1, 2), blocks.run(range(1), sequences, *rest), *rest)
    for left, right in [*zip(parts, whole, strict=True), *zip(sequences, given, strict=True)]:
        assert torch.equal(left[0], right[0])
        assert torch.equal(left[1], right[1])


@pytest.mark.parametrize("text_tokens", TEXT_TOKENS)
def test_blocks_match_diffusers(device: torch.device, text_tokens: tuple[int, ...]) -> None:
    transformer = build(device)
    given = arguments(transformer, device, text_tokens)
    with torch.inference_mode():
        want = eager_blocks(transformer)(*given)
        fused = FusedBlocks(transformer)
        got = fused(*given)
    assert fused.attention_backend in {*ATTENTION.values(), "native"}
    assert change_error(got, want, given[0]) < BF16_ERROR


class Meeting:
    """Exchanges data between ranks that are threads; one computes at a time, as the interpreter needs."""

    def __init__(self, ranks: int) -> None:
        self.turn = Lock()
        self._shown: list[Any] = [None] * ranks
        self._barrier = Barrier(ranks, timeout=60)

    def shown_by_all(self, rank: int, value: Any) -> list[Any]:
        self._shown[rank] = value
        self.turn.release()
        try:
            self._barrier.wait()
            shown_by_all = list(self._shown)
            self._barrier.wait()
        finally:
            self.turn.acquire()
        return shown_by_all


class ThreadGroup(Group):
    """Ranks that are threads of this process."""

    def __init__(self, rank: int, ranks: int, meeting: Meeting) -> None:
        super().__init__(range(ranks), rank)
        self._meeting = meeting

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        # A clone: the first rank to read must not find the sums of the others.
        shown_by_all = self._meeting.shown_by_all(self.rank, tensor.clone())
        return tensor.copy_(torch.stack(shown_by_all).sum(0))

    def all_to_all_async(
        self, sent: Tensor, sent_rows: Sequence[int], received: Tensor, received_rows: Sequence[int]
    ) -> Transfer:
        parts = [rows[self.rank] for rows in self._meeting.shown_by_all(self.rank, sent.split(list(sent_rows)))]
        assert [len(part) for part in parts] == list(received_rows)
        received.copy_(torch.cat(parts))
        return Transfer([], sent)

    def all_gather_async(self, gathered: Tensor, tensor: Tensor) -> Transfer:
        gathered.copy_(torch.cat(self._meeting.shown_by_all(self.rank, tensor)))
        return Transfer([], tensor)


@pytest.mark.parametrize(("heads", "ranks"), [(4, 2), (6, 2), (24, 4), (3, 1)])
@pytest.mark.parametrize("text", [0, 3])
def test_scattered_heads_equal_heads_in_place(device: torch.device, heads: int, ranks: int, text: int) -> None:
    rows, head_dim = text + 10, 32
    generator = torch.Generator().manual_seed(2)
    qkv = torch.randn(rows, 3, heads, head_dim, generator=generator).to(device, torch.bfloat16)
    angles = torch.randn(rows - text, head_dim // 2, generator=generator).repeat(1, 2).to(device)
    rotary = angles.cos(), angles.sin()
    normed = qkv.clone()
    head_norm_rotary(normed, rotary, 1e-5, (text, rows, 0))
    for rank in range(ranks):
        want, got = (
            (qkv.new_zeros(text, 3, heads // ranks, head_dim), qkv.new_zeros(ranks, 10, 3, heads // ranks, head_dim))
            for _ in range(2)
        )
        Heads(normed, text).scatter_heads(rank, *want)
        scatter_heads(qkv, text, rotary, 1e-5, rank, *got)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])


TOKENS = GRID[0] * GRID[1] - 1
"""Three ranks do not divide it."""


def odd_arguments(device: torch.device, text_tokens: tuple[int, ...]) -> tuple[list[Tokens], Tensor, Rotary]:
    sequences, time, rotary = arguments(empty_transformer(), device, text_tokens)
    return [(image[:, :TOKENS], text) for image, text in sequences], time, (rotary[0][:TOKENS], rotary[1][:TOKENS])


@lru_cache
def one_rank(device: torch.device, text_tokens: tuple[int, ...]) -> list[Tensor]:
    """Returns the result of one rank, which does not depend on the number of the others."""
    with torch.inference_mode():
        return FusedBlocks(build(device))(*odd_arguments(device, text_tokens))


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("text_tokens", [(2, 1), (0,)])
def test_blocks_over_ranks_match_one_rank(device: torch.device, ranks: int, text_tokens: tuple[int, ...]) -> None:
    sequences, time, rotary = odd_arguments(device, text_tokens)
    backend = blocks.attention_backend(build(device))
    want = one_rank(device, text_tokens)
    meeting = Meeting(ranks)

    @torch.inference_mode()
    def run(rank: int) -> list[Tensor]:
        ulysses = ThreadGroup(rank, ranks, meeting) if ranks > 1 else ALONE
        parallel = ParallelContext(Ranks(ulysses=ulysses))
        shared = SequenceAttention(ALONE, ulysses, blocks.attention, _no_lse, backend)
        shards = [(parallel.shard(image, dim=1), text) for image, text in sequences]
        tables = parallel.shard_rotary(rotary)
        shape = SequenceShape(TOKENS) if ranks > 1 else None
        with meeting.turn:
            return FusedBlocks(build(device), shared)(shards, time, tables, None, shape)

    with ThreadPoolExecutor(ranks) as threads:
        parts = list(threads.map(run, range(ranks)))
    got = [torch.cat([part[one] for part in parts], dim=1) for one in range(len(want))]
    assert change_error(got, want, sequences) < BF16_ERROR


def test_tensor_parallel_blocks_match_one_rank(device: torch.device) -> None:
    given = arguments(build(device), device, (1,))
    with torch.inference_mode():
        want = FusedBlocks(build(device))(*given)
    meeting = Meeting(HEADS)

    @torch.inference_mode()
    def run(rank: int) -> list[Tensor]:
        with meeting.turn:
            return FusedBlocks(build(device, ThreadGroup(rank, HEADS, meeting)))(*given)

    with ThreadPoolExecutor(HEADS) as threads:
        for parts in threads.map(run, range(HEADS)):
            assert change_error(parts, want, given[0]) < BF16_ERROR


def _no_lse(*_: Tensor) -> tuple[Tensor, Tensor]:
    raise AssertionError("no keys go around")
