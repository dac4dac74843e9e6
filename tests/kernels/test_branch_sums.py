"""The sum over ranks that write into each other's memory; ranks are played here on one device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from glm_image.kernels.branch_sums import TURNS, PeerSum, inbox_shape
from glm_image.kernels.residual_norm import residual_norm

ROWS, WIDTH, SPLITS = 3, 40, 2
EPS = 1e-5
SUMS = 2 * TURNS.value + 1


def empty_inboxes(device: torch.device, ranks: int) -> tuple[Tensor, Tensor]:
    """Returns the ranks' inboxes, one after the other, and their addresses."""
    shape = inbox_shape(torch.empty(SPLITS, ROWS, WIDTH), ranks)
    inboxes = torch.full((ranks, *shape), -0.0, device=device)
    return inboxes, torch.tensor([inbox.data_ptr() for inbox in inboxes], device=device)


def branch(device: torch.device, seed: int, ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draws the ranks' parts [ranks, splits, rows, width], a residual, and two norms' scales."""
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randn(ranks, SPLITS, ROWS, WIDTH, generator=generator)
    parts[..., : WIDTH // 4] = -0.0  # what nothing that arrives may be
    residual = torch.randn(ROWS, WIDTH, generator=generator).bfloat16()
    scales = torch.randn(2, WIDTH, generator=generator).bfloat16()
    return parts.to(device), residual.to(device), scales.to(device)


def ended(parts: Tensor, residual: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """What becomes of a branch whose ranks' parts [ranks, splits, rows, width] are all here."""
    out = torch.empty_like(residual)
    residual_norm(parts.sum(1) + 0.0, residual, scales[0], scales[1], out, EPS)
    return residual, out


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Tells 0.0 from -0.0."""
    return torch.equal(left.view(torch.int32), right.view(torch.int32))


@pytest.mark.parametrize(("ranks", "rank"), [(2, 0), (2, 1), (4, 2)])
def test_a_rank_adds_up_what_it_is_sent_and_sends_its_own(device: torch.device, ranks: int, rank: int) -> None:
    inboxes, addresses = empty_inboxes(device, ranks)
    empty = inboxes[0, 0, 0].clone()
    others = [other for other in range(ranks) if other != rank]
    own = torch.empty(SPLITS, ROWS, WIDTH, device=device)
    peer_sum = PeerSum(own, addresses, rank, kept=inboxes)
    drawn = [branch(device, number, ranks) for number in range(SUMS + 1)]

    def send(number: int) -> None:
        for other in others:
            inbox = inboxes[rank, number % TURNS.value, other]
            assert same_bits(inbox, empty), "another may write to it"
            inbox.copy_(drawn[number][0][other].sum(0) + 0.0)

    send(0)
    for number, (parts, residual, scales) in enumerate(drawn[:-1]):
        send(number + 1)  # the others are ahead by a sum
        want = ended(parts, residual.clone(), scales)
        own.copy_(parts[rank])
        out = torch.empty_like(residual)
        peer_sum.add(residual, scales[0], scales[1], out, EPS)
        assert torch.equal(residual, want[0])
        assert torch.equal(out, want[1])
        turn, sent = number % TURNS.value, parts[rank].sum(0) + 0.0
        assert all(same_bits(inboxes[other, turn, rank], sent) for other in others)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="ranks that wait for each other run at the same time")
def test_ranks_that_wait_for_each_other_have_the_same_bits(device: torch.device) -> None:
    ranks = 2
    for rank in range(ranks):  # which also loads both kernels: one that waits keeps the other from being loaded
        test_a_rank_adds_up_what_it_is_sent_and_sends_its_own(device, ranks, rank)
    inboxes, addresses = empty_inboxes(device, ranks)
    own = [torch.empty(SPLITS, ROWS, WIDTH, device=device) for _ in range(ranks)]
    sums = [PeerSum(parts, addresses, rank, kept=inboxes) for rank, parts in enumerate(own)]
    streams = [torch.cuda.Stream() for _ in range(ranks)]
    drawn = [branch(device, number, ranks) for number in range(50 * SUMS)]
    got: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(ranks)]
    torch.cuda.synchronize()
    for parts, residual, scales in drawn:
        for rank, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                own[rank].copy_(parts[rank])
                mine, out = residual.clone(), torch.empty_like(residual)
                sums[rank].add(mine, scales[0], scales[1], out, EPS)
                got[rank].append((mine, out))
    torch.cuda.synchronize()
    for number, (parts, residual, scales) in enumerate(drawn):
        want = ended(parts, residual.clone(), scales)
        for rank in range(ranks):
            assert all(map(torch.equal, got[rank][number], want))
