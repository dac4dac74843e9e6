"""The trained tiny checkpoint paints what it is told; a minute on two cores."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval.adherence import baselines, judge_question, measure, shares
from eval.questions import Request, local_painter, scene_questions

TRAINED = Path(__file__).parents[2] / "checkpoints" / "tiny"
REQUEST = Request(256, 256, steps=10)
LEAST = {"colour": 0.75, "shape": 0.65, "position": 0.65, "background": 0.75}
"""Below the shares of many prompts by what a few may differ by chance."""


@pytest.mark.skipif(not TRAINED.is_dir(), reason=f"no trained checkpoint in {TRAINED.name}/")
def test_the_trained_checkpoint_paints_what_it_is_told() -> None:
    questions = scene_questions(16, seed=0)
    with local_painter(TRAINED, "cpu") as painter:
        _, seen, _ = measure(painter, questions, REQUEST)
    right = shares(judge_question(one, question) for one, question in zip(seen, questions, strict=True))
    by_chance = baselines(questions, seen, REQUEST, seed=0)["shuffled"]
    for name, least in LEAST.items():
        assert right[name] >= least, right
        assert by_chance[name] < least, by_chance
