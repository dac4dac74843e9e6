"""Parallel layouts: groups of ranks, and the shards of each rank."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm_image.errors import ConfigurationError
from glm_image.parallel.collectives import Group
from glm_image.parallel.layout import MEMBERS, ParallelLayout, check_heads

WAYS = st.integers(1, 4)


@given(st.integers(0, 5000), st.integers(1, 9))
def test_shards_are_contiguous_and_even(count: int, size: int) -> None:
    shards = [Group(range(size), rank).shard_range(count) for rank in range(size)]
    assert [row for shard in shards for row in shard] == list(range(count))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@given(st.integers(1, 2), WAYS, WAYS, WAYS)
def test_groups_of_each_kind_partition_the_ranks(cfg: int, tp: int, ring: int, ulysses: int) -> None:
    layout = ParallelLayout(cfg, tp, ring, ulysses)
    for name in MEMBERS:
        groups = layout.members(name)
        assert sorted(rank for group in groups for rank in group) == list(range(layout.size))
        assert {len(group) for group in groups} == {getattr(layout, name)}


@given(st.integers(1, 2), WAYS, WAYS, WAYS)
def test_groups_of_two_kinds_share_at_most_one_rank(cfg: int, tp: int, ring: int, ulysses: int) -> None:
    layout = ParallelLayout(cfg, tp, ring, ulysses)
    for name in MEMBERS:
        for other in MEMBERS:
            if name != other:
                assert all(len(set(a) & set(b)) <= 1 for a in layout.members(name) for b in layout.members(other))


@given(st.integers(1, 2), WAYS, WAYS, WAYS)
def test_layout_is_parsed_from_its_text(cfg: int, tp: int, ring: int, ulysses: int) -> None:
    layout = ParallelLayout(cfg, tp, ring, ulysses)
    text = f"cfg={cfg}, tp={tp},ring={ring},ulysses = {ulysses}"
    assert ParallelLayout.parse(text, layout.size) == layout


@pytest.mark.parametrize("devices", range(1, 9))
def test_auto_uses_all_devices(devices: int) -> None:
    assert ParallelLayout.parse("auto", devices).size == devices


@pytest.mark.parametrize(
    ("text", "devices"),
    [
        ("cfg=2", 1),
        ("cfg=2", 4),
        ("cfg=3", 3),
        ("cfg=2,cfg=2", 4),
        ("ulysses", 2),
        ("ulysses=0", 1),
        ("ulysses=-2", 2),
        ("pipeline=2", 2),
        ("none", 2),
        ("cfg=2;ulysses=2", 4),
    ],
)
def test_invalid_layout_is_refused_with_its_value(text: str, devices: int) -> None:
    with pytest.raises(ConfigurationError, match=r"parallel is .*; allowed: none, auto") as refusal:
        ParallelLayout.parse(text, devices)
    assert repr(text) in str(refusal.value)


def test_heads_must_be_divisible() -> None:
    check_heads(64, tp=2, ulysses=4)
    with pytest.raises(ConfigurationError, match=r"tp=3 and ulysses=1.*64 heads"):
        check_heads(64, tp=3, ulysses=1)
