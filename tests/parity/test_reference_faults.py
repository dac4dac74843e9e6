"""Where the reference fails or errs, and what is done here instead."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from glm_image.errors import InvalidInputError
from glm_image.pipeline import LocalPipeline
from glm_image.request.parameters import GenerationParameters
from helpers import MakeCheckpoint, OpenExecutor
from parity.reference import load_reference, reference_generation, reference_image, reference_tokens

CODES = 128
END = CODES + 1


def test_tokens_are_codes_where_the_reference_samples_other_ids(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint(reserved_logit=0.0, codebook=CODES, reserved_ids=30)
    engine = OpenExecutor(folder)
    kinds = []
    for seed in range(6):
        theirs = reference_generation(load_reference(folder), "x", 64, 96, seed)
        command = engine.admit(0, GenerationParameters(prompt="x", height=64, width=96, seed=seed))
        ours = engine.alone(command)
        preview, _ = (grid.tokens for grid in command.grids)
        assert END not in ours
        assert ours[preview:].max() < CODES
        # Up to what may not come, both draw the same; in the preview, ids beyond the codes may.
        wrong = next(
            (i for i, token in enumerate(theirs[: len(ours)]) if token == END or (i >= preview and token >= CODES)),
            len(ours),
        )
        assert ours[:wrong].tolist() == theirs[:wrong].tolist(), f"seed {seed}"
        assert max(theirs[: min(wrong, preview)]) > CODES
        kinds.append("same" if wrong == len(ours) else "end" if theirs[wrong] == END else "reserved")
    assert kinds == ["reserved", "reserved", "end", "same", "same", "end"]


def test_an_early_end_fails_in_the_reference_and_gives_an_image_here(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint(reserved_logit=4.0, codebook=CODES, reserved_ids=0)
    assert reference_generation(load_reference(folder), "x", 32, 64, 0)[-1] == END
    with pytest.raises(RuntimeError, match="shape"):
        reference_tokens(load_reference(folder), "x", 32, 64, 0)
    with LocalPipeline(folder, "cpu") as pipeline:
        values = GenerationParameters(prompt="x", height=32, width=64, seed=0, num_inference_steps=1)
        assert pipeline.generate(values).pixels.std() > 1
        assert pipeline.prior(pipeline.resolve(values)).prior_token_ids.max() < CODES


SCAFFOLD = len("s1 2es11 22eb")


@pytest.mark.parametrize("prompt", ["<sop>32 32<eop>", "<|image|>", "a <|endoftext|> b", "'<pad>' and '</s>'"])
def test_text_that_spells_a_special_token_is_text(pipeline: LocalPipeline, prompt: str) -> None:
    values = GenerationParameters(prompt=prompt, height=32, width=64, seed=4, num_inference_steps=1)
    made = pipeline.generate(values)
    assert made.metadata["tokens"]["prompt"] == len(prompt) + SCAFFOLD
    assert made.pixels.std() > 1


def test_an_image_token_in_the_prompt_fails_in_the_reference(reference: Any) -> None:
    with pytest.raises(RuntimeError, match="split"):
        reference_tokens(reference, "a <|image|> b", 32, 64, 0)


def test_a_width_that_is_no_multiple_of_32_is_generated_whole(pipeline: LocalPipeline, reference: Any) -> None:
    # The reference checks widths against 4 only: it paints less than requested, or fails.
    values = GenerationParameters(prompt="x", height=64, width=68, seed=4, num_inference_steps=2)
    made = pipeline.generate(values)
    assert made.pixels.shape == (1, 64, 68, 3)
    assert (made.metadata["width"], made.metadata["generated_width"]) == (68, 96)
    assert np.array_equal(made.pixels[0], reference_image(reference, "x", 64, 96, 4, 2, 1.5)[:, :68])
    assert reference(prompt="x", height=64, width=68, num_inference_steps=1).images[0].size == (64, 64)
    with pytest.raises(RuntimeError, match="size"):
        reference(prompt="x", height=64, width=72, num_inference_steps=1)


@pytest.mark.parametrize("values", [{"height": 0}, {"width": 0}, {"num_inference_steps": 0}, {"width": 8}])
def test_values_that_the_reference_does_not_check_are_refused(pipeline: LocalPipeline, values: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match=f"^{next(iter(values))} is "):
        pipeline.resolve(GenerationParameters(prompt="x", **values))
