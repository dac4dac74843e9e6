from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from glm_image.ar.config import ArConfig
from glm_image.ar.sampler import SamplerRows, allowed_ids, sample
from glm_image.checkpoint.checkpoint import Checkpoint
from glm_image.request.parameters import Sampling
from helpers import MakeCheckpoint

CPU = torch.device("cpu")

SAMPLINGS = st.builds(
    Sampling,
    temperature=st.one_of(st.sampled_from([0.01, 0.9, 1.0, 2.0]), st.floats(0.01, 2.0)),
    top_p=st.one_of(st.sampled_from([1e-30, 0.75, 1 - 1e-9, 1.0]), st.floats(0.0, 1.0, exclude_min=True)),
    top_k=st.one_of(st.sampled_from([1, 2, 2**31 - 1]), st.integers(1, 400)),
)


def rows_of(samplings: list[Sampling], vocabulary: int, preview_tokens: int = 0) -> SamplerRows:
    rows = SamplerRows.empty(len(samplings), CPU)
    for slot, sampling in enumerate(samplings):
        rows.set(slot, sampling, preview_tokens, vocabulary)
    return rows


def random_logits(seed: int, rows: int, vocabulary: int, spread: float) -> Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * spread


def noise_of(seeds: range, vocabulary: int) -> Tensor:
    return torch.cat(
        [torch.empty(1, vocabulary).exponential_(generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )


def reference_sample(logits: Tensor, sampling: Sampling, seed: int) -> int:
    """The token that transformers' ``generate`` samples from one row of logits."""
    warpers = LogitsProcessorList()
    if sampling.temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(sampling.temperature))
    warpers.append(TopKLogitsWarper(top_k=sampling.top_k))
    if sampling.top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p=sampling.top_p))
    scores = warpers(torch.zeros(1, 1, dtype=torch.long), logits.clone())
    sampled = torch.multinomial(scores.softmax(dim=-1), 1, generator=torch.Generator().manual_seed(seed))
    return int(sampled)


@given(
    samplings=st.lists(SAMPLINGS, min_size=1, max_size=4),
    vocabulary=st.integers(2, 300),
    spread=st.sampled_from([0.01, 1.0, 8.0, 100.0]),
    seed=st.integers(0, 2**31),
)
def test_samples_match_the_reference(samplings: list[Sampling], vocabulary: int, spread: float, seed: int) -> None:
    logits = random_logits(seed, len(samplings), vocabulary, spread)
    noise = noise_of(range(seed, seed + len(samplings)), vocabulary)
    everything = torch.ones_like(logits, dtype=torch.bool)
    sampled = sample(logits, noise, rows_of(samplings, vocabulary), everything)
    theirs = [reference_sample(logits[row, None], sampling, seed + row) for row, sampling in enumerate(samplings)]
    assert sampled.tolist() == theirs


@given(sampling=SAMPLINGS, level=st.floats(-50, 50, width=32), seed=st.integers(0, 2**31))
def test_equal_logits_match_the_reference(sampling: Sampling, level: float, seed: int) -> None:
    logits = torch.full((1, 40), level)
    sampled = sample(
        logits, noise_of(range(seed, seed + 1), 40), rows_of([sampling], 40), torch.ones_like(logits).bool()
    )
    assert sampled.tolist() == [reference_sample(logits, sampling, seed)]


@pytest.mark.parametrize(("top_p", "kept"), [(1.0, 4), (0.75, 3), (0.7501, 4), (0.5, 2), (0.25, 1), (1e-6, 1)])
def test_ids_that_sum_to_exactly_the_cut_are_dropped(top_p: float, kept: int) -> None:
    logits, sampling = torch.zeros(1, 4), Sampling(1.0, top_p, 4)
    everything = torch.ones(1, 4, dtype=torch.bool)
    sampled = [int(sample(logits, noise_of(range(n, n + 1), 4), rows_of([sampling], 4), everything)) for n in range(64)]
    assert sampled == [reference_sample(logits, sampling, seed) for seed in range(64)]
    assert len(set(sampled)) == kept


@given(samplings=st.lists(SAMPLINGS, min_size=2, max_size=8), seed=st.integers(0, 2**31))
def test_rows_are_independent(samplings: list[Sampling], seed: int) -> None:
    count = len(samplings)
    logits, noise = random_logits(seed, count, 100, 2.0), noise_of(range(seed, seed + count), 100)
    allowed = torch.rand(count, 100, generator=torch.Generator().manual_seed(seed)) < 0.5
    allowed[:, 0] = True
    rows = rows_of(samplings, 100)
    together = sample(logits, noise, rows, allowed)
    for row in range(count):
        at = slice(row, row + 1)
        assert sample(logits[at], noise[at], rows.row(row), allowed[at]).tolist() == together[at].tolist()


@given(sampling=SAMPLINGS, seed=st.integers(0, 2**31), share=st.sampled_from([0.02, 0.5, 0.98]))
def test_disallowed_ids_are_never_sampled(sampling: Sampling, seed: int, share: float) -> None:
    logits, noise = random_logits(seed, 1, 100, 3.0), noise_of(range(seed, seed + 1), 100)
    allowed = torch.rand(1, 100, generator=torch.Generator().manual_seed(seed + 1)) < share
    allowed[0, seed % 100] = True
    (sampled,) = sample(logits, noise, rows_of([sampling], 100), allowed).tolist()
    assert allowed[0, sampled]
    theirs = reference_sample(logits, sampling, seed)
    if allowed[0, theirs]:
        assert sampled == theirs


@pytest.mark.parametrize("best", [300.0, -300.0])
def test_best_allowed_id_wins_if_top_k_leaves_none(best: float) -> None:
    logits = torch.tensor([[500.0, 400.0, -600.0, best, -500.0]])
    allowed = torch.tensor([[False, False, True, True, True]])
    sampled = sample(logits, torch.ones(1, 5), rows_of([Sampling(1.0, 1.0, 2)], 5), allowed)
    assert sampled.tolist() == [3]


def test_previews_allow_all_but_end_ids_and_images_only_codes(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint(weights=False, codebook=20, reserved_ids=3)
    config = ArConfig.read(Checkpoint.open(folder))
    preview, picture = allowed_ids(config, CPU).tolist()
    assert config.end_ids == (21,)
    assert preview == [True] * 21 + [False] + [True] * 3
    assert picture == [True] * 20 + [False] * 5
    several = allowed_ids(replace(config, end_ids=(0, 24)), CPU)[0].tolist()
    assert [index for index, allowed in enumerate(several) if not allowed] == [0, 24]
