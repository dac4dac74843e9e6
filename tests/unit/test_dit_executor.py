from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

from glm_image.dit.executor import FEWEST_STEPS_TO_CAPTURE, Drop, Prepare, Step
from glm_image.geometry import Grid
from glm_image.pipeline import LocalPipeline

GRID = Grid(1, 2)


@pytest.mark.parametrize("steps_taken", [0, 1, 3])
def test_a_dropped_picture_is_gone_at_once(pipeline: LocalPipeline, steps_taken: int) -> None:
    """A captured step that waits for the garbage collector may be freed in the middle of another's capture."""
    executor = pipeline.dit.executor
    tokens = np.zeros(GRID.tokens, dtype=np.int32)
    executor.run(Prepare(-5, "a", "", tokens, GRID, FEWEST_STEPS_TO_CAPTURE + 1, 1.5, seed=0))
    for _ in range(steps_taken):
        executor.run(Step(-5))
    latents = weakref.ref(executor._pictures[-5].latents)
    gc.disable()
    try:
        executor.run(Drop(-5))
        assert latents() is None
    finally:
        gc.enable()
