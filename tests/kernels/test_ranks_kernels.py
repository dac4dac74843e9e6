"""An instance over several devices paints what one does, with the blocks that a GPU runs."""

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
from glm_image.dit.commands import Prepare, ReadSources, Step
from glm_image.dit.settings import DitSettings
from glm_image.parallel.layout import ParallelLayout
from glm_image.parallel.rank_group import WorkerConfig, start_ranks
from glm_image.parallel.worker import Load
from glm_image.request.geometry import Grid
from glm_image.request.source_images import SourcePicture
from kernels.kernel_ranks import TakeLatents, load_fused, load_plain

TRAINED = Path(__file__).parents[2] / "checkpoints" / "tiny"
"""With random weights what a block adds is lost in roundings."""
GRID = Grid(1, 2)
CODES = 2048
# Of the way from noise to picture, where a sum left out is more than half of it. The interpreter cuts bf16 off.
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
"""How the ranks share a step; ``auto`` is one alone."""


def painted(load: Load, parallel: str = "auto", ranks: int = 1) -> NDArray[np.float32]:
    """An edit's latents after its only step, on the CPU or over so many processes."""
    rng = np.random.default_rng(0)
    ids, source_ids = (rng.integers(CODES, size=GRID.tokens, dtype=np.int32) for _ in range(2))
    pixels = rng.integers(256, size=(32 * GRID.height, 32 * GRID.width, 3), dtype=np.uint8)
    settings = DitSettings(dtype=torch.bfloat16, parallel=parallel)
    layout = ParallelLayout.parse(parallel, ranks)
    arguments = (Checkpoint.open(TRAINED), settings)
    running = start_ranks(load, arguments, open_device("cpu"), layout, WorkerConfig(("cpu",) * (ranks - 1)))
    try:
        running.run(ReadSources(0, (SourcePicture(pixels, source_ids, GRID),)))
        running.run(Prepare(0, "a red star with a sign 'FOX'", "", ids, GRID, 1, 1.5, seed=1, sources_of=0))
        running.run(Step(0))
        latents: NDArray[np.float32] = running.run(TakeLatents(0))
        return latents
    finally:
        running.close()


@pytest.fixture(scope="module")
def plain() -> NDArray[np.float32]:
    return painted(load_plain)


def way_error(got: NDArray[np.float32], want: NDArray[np.float32]) -> float:
    """How far latents are from those wanted, as a share of the way from noise to these."""
    noise = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=torch.bfloat16).float().numpy()
    return float(np.linalg.norm(got - want) / np.linalg.norm(want - noise))


@pytest.mark.full
@pytest.mark.parametrize("parallel", MODES)
def test_edits_are_those_of_plain_blocks_on_one_device(plain: NDArray[np.float32], parallel: str) -> None:
    ranks = math.prod(int(ways) for ways in re.findall(r"\d", parallel))
    assert way_error(painted(load_fused, parallel, ranks), plain) < MOST_ERROR
