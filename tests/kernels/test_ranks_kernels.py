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
from glm_image.parallel.layout import ParallelLayout
from glm_image.parallel.rank_group import WorkerConfig, start_ranks
from glm_image.parallel.worker import Load
from glm_image.request.geometry import Grid
from glm_image.request.source_images import SourcePicture
from kernels.kernel_ranks import TakeLatents, load_fused, load_plain

TRAINED = Path(__file__).parents[2] / "checkpoints" / "tiny"
"""Trained, since random weights' blocks add less than a rounding."""
GRID = Grid(1, 2)
CODES = 2048
# Relative to the distance from noise to image; a missing sum makes more than 0.5. The interpreter truncates to bf16.
MOST_ERROR = 0.1
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the ranks compute on the CPU, where kernels need Triton's interpreter"
)

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


def denoised(load: Load, parallel: str = "auto", ranks: int = 1) -> NDArray[np.float32]:
    """Returns an edit's latents after its only step, on the CPU, over ``ranks`` processes."""
    rng = np.random.default_rng(0)
    ids, source_ids = (rng.integers(CODES, size=GRID.tokens, dtype=np.int32) for _ in range(2))
    pixels = rng.integers(256, size=(32 * GRID.height, 32 * GRID.width, 3), dtype=np.uint8)
    settings = DitSettings(dtype="bfloat16", parallel=parallel)
    layout = ParallelLayout.parse(parallel, ranks)
    arguments = (Checkpoint.open(TRAINED), settings)
    running = start_ranks(load, arguments, open_device("cpu"), layout, WorkerConfig(("cpu",) * (ranks - 1)))
    try:
        for command in (ReserveSources(0, (GRID,)), *source_commands(0, [SourcePicture(pixels, source_ids, GRID)])):
            running.run(command)
        running.run(Prepare(0, "a red star with a sign 'FOX'", "", ids, GRID, 1, 1.5, seed=1, sources_of=0))
        running.run(Step(0))
        latents: NDArray[np.float32] = running.run(TakeLatents(0))
        return latents
    finally:
        running.close()


@pytest.fixture(scope="module")
def plain() -> NDArray[np.float32]:
    return denoised(load_plain)


def way_error(got: NDArray[np.float32], want: NDArray[np.float32]) -> float:
    """Returns the error of latents relative to the distance from the noise to ``want``."""
    noise = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=torch.bfloat16).float().numpy()
    return float(np.linalg.norm(got - want) / np.linalg.norm(want - noise))


@pytest.mark.full
@pytest.mark.parametrize("parallel", MODES)
def test_ranks_with_fused_blocks_match_one_rank_with_plain_blocks(plain: NDArray[np.float32], parallel: str) -> None:
    ranks = math.prod(int(ways) for ways in re.findall(r"\d", parallel))
    assert way_error(denoised(load_fused, parallel, ranks), plain) < MOST_ERROR
