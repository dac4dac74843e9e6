from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import GlmImagePipeline
from hypothesis import given
from hypothesis import strategies as st

from glm_image.request import geometry
from glm_image.request.geometry import Grid, Size

SIDES = st.integers(1, 64)
GRIDS = st.builds(Grid, SIDES, SIDES)


def token_budget(grids: Sequence[Grid]) -> int:
    """The number of tokens that the reference generates for grids: theirs and the end of the image."""
    return sum(grid.tokens for grid in grids) + 1


@pytest.mark.parametrize(
    ("size", "text_to_image", "image_to_image"),
    [
        (Size(512, 512), 513, 257),
        (Size(1024, 1024), 1281, 1025),
        (Size(1024, 1920), 2152, 1921),
        (Size(2048, 2048), 4353, 4097),
    ],
)
def test_token_budgets(size: Size, text_to_image: int, image_to_image: int) -> None:
    target = geometry.target_grid(size)
    assert token_budget(geometry.output_grids(target, image_to_image=False)) == text_to_image
    assert token_budget(geometry.output_grids(target, image_to_image=True)) == image_to_image


def test_grids_and_budget_of_every_size_match_the_reference(reference: Any) -> None:
    processor = reference.processor
    for th in range(1, 65):
        for tw in range(1, 65):
            theirs = processor._get_target_shape(height=32 * th, width=32 * tw)
            target = geometry.target_grid(Size(32 * th, 32 * tw))
            preview, last = geometry.output_grids(target, image_to_image=False)
            assert (*last, *preview) == theirs
            for t2i in (True, False):
                grids = geometry.output_grids(target, image_to_image=not t2i)
                thw = processor._build_target_image_grid_thw(*theirs, is_text_to_image=t2i)
                budget, offset, *shape = GlmImagePipeline._compute_generation_params(thw, t2i)
                assert token_budget(grids) == budget
                assert sum(grid.tokens for grid in grids[:-1]) == offset
                assert grids[-1] == tuple(shape)


@pytest.mark.parametrize(("requested", "made"), [(1, 32), (31, 32), (32, 32), (33, 64), (1024, 1024), (2047, 2048)])
def test_sides_are_rounded_up_to_multiples_of_32(requested: int, made: int) -> None:
    assert geometry.generated_size(Size(requested, 64)) == (made, 64)
    assert geometry.generated_size(Size(64, requested)) == (64, made)


@given(height=st.integers(32, 2048), width=st.integers(32, 2048))
def test_generated_size_covers_the_requested_size(height: int, width: int) -> None:
    made = geometry.generated_size(Size(height, width))
    for side, wanted in zip(made, (height, width), strict=True):
        assert side % 32 == 0
        assert 0 <= side - wanted < 32


def test_preview_grid_has_at_least_one_token_a_side() -> None:
    assert geometry.preview_grid(Grid(1, 300)) == (1, 277)
    assert geometry.preview_grid(Grid(300, 1)) == (277, 1)


@given(target=GRIDS, length=st.integers(1, 300), image_to_image=st.booleans())
def test_positions_match_the_reference(reference: Any, target: Grid, length: int, image_to_image: bool) -> None:
    model = reference.vision_language_encoder.model
    grids = geometry.output_grids(target, image_to_image=image_to_image)
    ids = torch.full((1, length), model.config.image_token_id + 1)
    ids[0, -1] = model.config.image_start_token_id
    try:
        prompt, _ = model.get_rope_index(ids, torch.tensor([(1, *grid) for grid in reversed(grids)]))
        decode = model._cached_decode_position_ids[0]
    finally:
        model.rope_deltas = model._cached_decode_position_ids = model._prefill_len = None
    assert np.array_equal(geometry.text_positions(length), prompt[:, 0].numpy())
    # The reference has one position more, for the end of the image.
    assert np.array_equal(geometry.decode_positions(grids, length), decode[:, :-1].numpy())


@given(grid=GRIDS, seed=st.integers(0, 2**32))
def test_upsampling_matches_the_reference(grid: Grid, seed: int) -> None:
    ids = np.random.default_rng(seed).integers(0, 16384, grid.tokens, dtype=np.int32)
    theirs = GlmImagePipeline._upsample_token_ids(torch.from_numpy(ids).long(), *grid)
    ours = geometry.upsample_tokens(ids, grid)
    assert ours.dtype == np.int32
    assert np.array_equal(ours, theirs[0].numpy())
