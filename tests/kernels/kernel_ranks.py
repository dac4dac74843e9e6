"""Ranks that run kernels: the DiT with fused blocks, also on a CPU, where Triton interprets them, and branch sums."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from glm_image.checkpoint.checkpoint import Checkpoint
from glm_image.devices.base import Device
from glm_image.dit import loading
from glm_image.dit.executor import Executor, Follower
from glm_image.dit.select_blocks import select_attention, select_blocks
from glm_image.dit.settings import DitSettings
from glm_image.kernels.branch_sums import branch_sum
from glm_image.kernels.residual_norm import residual_norm
from glm_image.parallel.process_group import Ranks
from glm_image.parallel.worker import RankExecutor


@dataclass(frozen=True)
class TakeLatents:
    """Return an image's latents, fp32 [1, channels, height, width]."""

    image: int


class _Rank:
    """A rank that can also return latents, since pixels take the interpreter long."""

    def __init__(self, executor: Executor | Follower) -> None:
        self._executor = executor

    def run(self, command: Any, /) -> Any:
        if not isinstance(command, TakeLatents):
            return self._executor.run(command)
        if isinstance(self._executor, Follower):
            return None
        return self._executor._images[command.image].latents.float().cpu().numpy()

    def close(self) -> None:
        self._executor.close()


def load_plain(checkpoint: Checkpoint, settings: DitSettings, device: Device, ranks: Ranks) -> RankExecutor:
    """Loads a rank with the blocks of its device."""
    return _Rank(loading.load_executor(checkpoint, settings, device, ranks))


def load_fused(checkpoint: Checkpoint, settings: DitSettings, device: Device, ranks: Ranks) -> RankExecutor:
    """Loads a rank with the fused blocks."""
    fused = copy.copy(device)
    fused.runs_triton = True
    with (
        patch.object(
            loading, "select_blocks", lambda transformer, _, shared: select_blocks(transformer, fused, shared)
        ),
        patch.object(loading, "select_attention", partial(_attention, fused)),
    ):
        return load_plain(checkpoint, settings, device, ranks)


def _attention(fused: Device, transformer: Any, _: Device) -> Any:
    return select_attention(transformer, fused)


ROWS, WIDTH, SPLIT_K = 8, 512, 2
EPS = 1e-5


@dataclass(frozen=True)
class AddBranches:
    """End some branches with random partial sums, one after the other; returns ``Sums`` on rank 0."""

    count: int


@dataclass(frozen=True)
class Sums:
    """How the ranks' residuals and outputs compare.

    Attributes:
        kind: the class that added.
        same_bits: for each rank, whether it has the bits of rank 0.
        matches_one_rank: whether rank 0 has the bits of a sum of the same numbers on one device.
    """

    kind: str
    same_bits: list[bool]
    matches_one_rank: bool


class _SumRank:
    def __init__(self, peer_memory: bool, device: Device, ranks: Ranks) -> None:
        self._group = ranks.tp if peer_memory else ranks.tp.without_peer_memory()
        self._device = device.torch_device
        self._sum = branch_sum(torch.empty(SPLIT_K, ROWS, WIDTH, device=self._device), self._group)

    def run(self, command: AddBranches, /) -> Sums:
        got, want = (torch.cat([end(seed) for seed in range(command.count)]) for end in (self._ended, self._expected))
        gathered = self._group.all_gather(got)
        same = [torch.equal(part, gathered[0]) for part in gathered]
        return Sums(type(self._sum).__name__, same, torch.equal(got, want))

    def close(self) -> None:
        pass

    def _ended(self, seed: int) -> torch.Tensor:
        partials, residual, scales = self._branch(seed)
        self._sum.partials.copy_(partials[self._group.rank])
        out = torch.empty_like(residual)
        self._sum.add(residual, scales[0], scales[1], out, EPS)
        return torch.stack([residual, out])

    def _expected(self, seed: int) -> torch.Tensor:
        partials, residual, scales = self._branch(seed)
        # Peers exchange the sum of each rank; otherwise every partial sum is added.
        added = partials.sum(1) if type(self._sum).__name__ == "PeerSum" else partials.flatten(0, 1)
        out = torch.empty_like(residual)
        residual_norm(added.contiguous(), residual, scales[0], scales[1], out, EPS)
        return torch.stack([residual, out])

    def _branch(self, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns partial sums [ranks, split_k, rows, width], a residual, and the weights of two norms."""
        generator = torch.Generator().manual_seed(seed)
        partials = torch.randn(self._group.size, SPLIT_K, ROWS, WIDTH, generator=generator)
        residual = torch.randn(ROWS, WIDTH, generator=generator).bfloat16()
        scales = torch.randn(2, WIDTH, generator=generator).bfloat16()
        return partials.to(self._device), residual.to(self._device), scales.to(self._device)


def load_sums(peer_memory: bool, device: Device, ranks: Ranks) -> RankExecutor:
    """Loads a rank that adds branches."""
    return _SumRank(peer_memory, device, ranks)
