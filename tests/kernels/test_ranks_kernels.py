"""An instance over several ranks denoises as one rank does, with the fused blocks of a GPU."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from glm_image.checkpoint.checkpoint import Checkpoint
from glm_image.devices.open import open_device
from glm_image.dit.commands import Prepare, ReserveSources, Step, source_commands
from glm_image.dit.settings import DitSettings
from glm_image.kernels.branch_sums import GatheredSum, PeerSum
from glm_image.parallel.layout import ParallelLayout
from glm_image.parallel.rank_group import WorkerConfig, start_ranks
from glm_image.parallel.worker import Load
from glm_image.request.geometry import Grid
from glm_image.request.source_images import SourcePicture
from kernels.kernel_ranks import AddBranches, TakeLatents, load_fused, load_plain, load_sums
from rank_devices import rank_devices, require_gpus

TRAINED = Path(__file__).parents[2] / "checkpoints" / "tiny"
"""Trained, since random weights' blocks add less than a rounding."""
GRID = Grid(1, 2)
CODES = 2048
# Relative to the distance from noise to image; a missing sum makes more than 0.5. The interpreter truncates to bf16.
MOST_ERROR = 0.1

MODES = [
    "auto",
    "tp=2",
    "cfg=2",
    "ulysses=2",
    "ring=2",
    "cfg=2,tp=2",
    "tp=2,ulysses=2",
    "ring=2,tp=2",
    "cfg=2,ulysses=2",
]
"""How the ranks share a step; ``auto`` is a single rank."""


def denoised(load: Load, devices: tuple[str, ...], parallel: str = "auto") -> NDArray[np.float32]:
    """Returns an edit's latents after its only step, with a rank on each device."""
    rng = np.random.default_rng(0)
    ids, source_ids = (rng.integers(CODES, size=GRID.tokens, dtype=np.int32) for _ in range(2))
    pixels = rng.integers(256, size=(32 * GRID.height, 32 * GRID.width, 3), dtype=np.uint8)
    settings = DitSettings(dtype="bfloat16", parallel=parallel)
    layout = ParallelLayout.parse(parallel, len(devices))
    arguments = (Checkpoint.open(TRAINED), settings)
    first = open_device(devices[0])
    first.set_current()
    running = start_ranks(load, arguments, first, layout, WorkerConfig(devices[1:]))
    try:
        for command in (ReserveSources(0, (GRID,)), *source_commands(0, [SourcePicture(pixels, source_ids, GRID)])):
            running.run(command)
        running.run(Prepare(0, ("FOX",), (), ids, GRID, 1, 1.5, seed=1, sources_of=0))
        running.run(Step(0))
        latents: NDArray[np.float32] = running.run(TakeLatents(0))
        return latents
    finally:
        running.close()


@pytest.fixture(scope="module")
def plain() -> NDArray[np.float32]:
    return denoised(load_plain, ("cpu",))


def way_error(got: NDArray[np.float32], want: NDArray[np.float32]) -> float:
    """Returns the error of latents relative to the distance from the noise to ``want``."""
    noise = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=torch.bfloat16).float().numpy()
    return float(np.linalg.norm(got - want) / np.linalg.norm(want - noise))


@pytest.mark.full
@pytest.mark.parametrize("parallel", MODES)
def test_ranks_with_fused_blocks_match_one_rank_with_plain_blocks(plain: NDArray[np.float32], parallel: str) -> None:
    ranks = math.prod(int(ways) for ways in re.findall(r"\d", parallel))
    assert way_error(denoised(load_fused, rank_devices(ranks), parallel), plain) < MOST_ERROR


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("peer_memory", [True, False])
def test_branch_sums_have_the_same_bits_on_every_rank(ranks: int, peer_memory: bool) -> None:
    require_gpus(ranks)
    devices = rank_devices(ranks)
    first = open_device(devices[0])
    first.set_current()
    layout, workers = ParallelLayout(tp=ranks), WorkerConfig(devices[1:])
    running = start_ranks(load_sums, (peer_memory,), first, layout, workers)
    try:
        sums = running.run(AddBranches(50))
    finally:
        running.close()
    assert sums.kind == (PeerSum if peer_memory else GatheredSum).__name__
    assert sums.same_bits == [True] * ranks
    assert sums.matches_one_rank
