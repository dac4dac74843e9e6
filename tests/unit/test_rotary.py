from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glm_image.ar.config import ArConfig
from glm_image.ar.rotary import rotary_tables, rotate
from glm_image.checkpoint.checkpoint import Checkpoint
from glm_image.request import geometry
from glm_image.request.geometry import Grid
from helpers import MakeCheckpoint
from parity.reference import load_reference

CPU = torch.device("cpu")


@pytest.fixture(
    scope="module",
    params=[{}, {"ar_head_dim": 12, "ar_rope_theta": 500.0}, {"ar_hidden": 128, "ar_heads": 2, "ar_head_dim": 128}],
    ids=["tiny", "narrow", "wide"],
)
def model(request: pytest.FixtureRequest, make_checkpoint: MakeCheckpoint) -> tuple[ArConfig, Any]:
    folder = make_checkpoint(**request.param)
    theirs = load_reference(folder).vision_language_encoder.model.language_model.rotary_emb
    return ArConfig.read(Checkpoint.open(folder)), theirs


@given(
    th=st.integers(1, 64),
    tw=st.integers(1, 64),
    length=st.integers(1, 8192),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_tables_match_the_reference(
    model: tuple[ArConfig, Any], th: int, tw: int, length: int, dtype: torch.dtype
) -> None:
    config, theirs = model
    positions = geometry.decode_positions([Grid(th, tw)], length)
    cos, sin = rotary_tables(config, positions, CPU, dtype)
    their_cos, their_sin = theirs(torch.empty(0, dtype=dtype), torch.from_numpy(positions)[:, None])
    assert cos.dtype == sin.dtype == dtype
    assert torch.equal(cos, their_cos[0])
    assert torch.equal(sin, their_sin[0])


def test_rotation_rotates_pairs_and_passes_the_other_channels() -> None:
    heads = torch.randn(2, 3, 10, generator=torch.Generator().manual_seed(0))
    angle = torch.tensor([0.3, 2.0])
    cos, sin = (torch.cat([values, values]).expand(3, 4) for values in (angle.cos(), angle.sin()))
    rotated = rotate(heads, cos, sin)
    assert torch.equal(rotated[..., 4:], heads[..., 4:])
    pairs = torch.complex(heads[..., :2], heads[..., 2:4]) * torch.polar(torch.ones(2), angle)
    assert torch.allclose(rotated[..., :4], torch.cat([pairs.real, pairs.imag], dim=-1), atol=1e-6)
