"""The sum over ranks that write into each other's memory, with all ranks on one device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from glm_image.kernels.branch_sums import INBOXES, PeerSum, inbox_shape
from glm_image.kernels.residual_norm import residual_norm

ROWS, WIDTH, SPLIT_K = 3, 40, 2
EPS = 1e-5
SUMS = 2 * INBOXES.value + 1


def empty_inboxes(device: torch.device, ranks: int) -> tuple[Tensor, Tensor]:
    """Returns the ranks' inboxes, one after the other, and their addresses."""
    shape = inbox_shape(torch.empty(SPLIT_K, ROWS, WIDTH), ranks)
    inboxes = torch.full((ranks, *shape), -0.0, device=device)
    return inboxes, torch.tensor([inbox.data_ptr() for inbox in inboxes], device=device)


def branch(device: torch.device, seed: int, ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns random partial sums [ranks, split_k, rows, width], a residual, and the weights of two norms."""
    generator = torch.Generator().manual_seed(seed)
    partials = torch.randn(ranks, SPLIT_K, ROWS, WIDTH, generator=generator)
    partials[..., : WIDTH // 4] = -0.0  # which marks an empty inbox
    residual = torch.randn(ROWS, WIDTH, generator=generator).bfloat16()
    scales = torch.randn(2, WIDTH, generator=generator).bfloat16()
    return partials.to(device), residual.to(device), scales.to(device)


def ended(partials: Tensor, residual: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Returns residual and output of a branch with partial sums [ranks, split_k, rows, width]."""
    out = torch.empty_like(residual)
    residual_norm(partials.sum(1) + 0.0, residual, scales[0], scales[1], out, EPS)
    return residual, out


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Compares bits: 0.0 and -0.0 differ."""
    return torch.equal(left.view(torch.int32), right.view(torch.int32))


@pytest.mark.parametrize(("ranks", "rank"), [(2, 0), (2, 1), (4, 2)])
def test_rank_sends_its_sum_and_adds_all(device: torch.device, ranks: int, rank: int) -> None:
    inboxes, addresses = empty_inboxes(device, ranks)
    empty = inboxes[0, 0, 0].clone()
    others = [other for other in range(ranks) if other != rank]
    own = torch.empty(SPLIT_K, ROWS, WIDTH, device=device)
    peer_sum = PeerSum(own, addresses, rank, memory=inboxes)
    branches = [branch(device, number, ranks) for number in range(SUMS + 1)]

    def send(number: int) -> None:
        for other in others:
            inbox = inboxes[rank, number % INBOXES.value, other]
            assert same_bits(inbox, empty), "another rank may write to it"
            inbox.copy_(branches[number][0][other].sum(0) + 0.0)

    send(0)
    for number, (partials, residual, scales) in enumerate(branches[:-1]):
        send(number + 1)  # the others are ahead by a sum
        want = ended(partials, residual.clone(), scales)
        own.copy_(partials[rank])
        out = torch.empty_like(residual)
        peer_sum.add(residual, scales[0], scales[1], out, EPS)
        assert torch.equal(residual, want[0])
        assert torch.equal(out, want[1])
        turn, sent = number % INBOXES.value, partials[rank].sum(0) + 0.0
        assert all(same_bits(inboxes[other, turn, rank], sent) for other in others)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="ranks that wait for each other must run at the same time")
def test_concurrent_ranks_have_the_same_bits(device: torch.device) -> None:
    ranks = 2
    for rank in range(ranks):  # also loads both kernels: one that waits keeps the other from being loaded
        test_rank_sends_its_sum_and_adds_all(device, ranks, rank)
    inboxes, addresses = empty_inboxes(device, ranks)
    own = [torch.empty(SPLIT_K, ROWS, WIDTH, device=device) for _ in range(ranks)]
    sums = [PeerSum(partials, addresses, rank, memory=inboxes) for rank, partials in enumerate(own)]
    streams = [torch.cuda.Stream() for _ in range(ranks)]
    branches = [branch(device, number, ranks) for number in range(50 * SUMS)]
    got: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(ranks)]
    torch.cuda.synchronize()
    for partials, residual, scales in branches:
        for rank, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                own[rank].copy_(partials[rank])
                mine, out = residual.clone(), torch.empty_like(residual)
                sums[rank].add(mine, scales[0], scales[1], out, EPS)
                got[rank].append((mine, out))
    torch.cuda.synchronize()
    for number, (partials, residual, scales) in enumerate(branches):
        want = ended(partials, residual.clone(), scales)
        for rank in range(ranks):
            assert all(map(torch.equal, got[rank][number], want))
