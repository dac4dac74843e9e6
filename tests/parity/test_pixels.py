from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from glm_image.pipeline import GeneratedImages, LocalPipeline, paint_request
from glm_image.request import geometry
from glm_image.request.geometry import Size
from glm_image.request.parameters import GenerationParameters
from parity.reference import reference_image, reference_tokens


@dataclass(frozen=True)
class Case:
    prompt: str
    height: int
    width: int
    seed: int
    steps: int
    guidance: float


CASES = [
    Case("a cat", 256, 256, 1, 4, 1.5),
    Case("A red fox reading a newspaper that says 'NEWS'", 128, 64, 42, 3, 4.0),
    Case("two signs, 'a' and \"b\"", 32, 32, 3, 5, 1.0),
    Case("three 'x' “二” 「参」", 64, 256, -7, 2, 0.0),
    Case("x 'a' 'bc' 'def'", 32, 256, 2**32 + 5, 2, 1.5),
    Case("it's Bob's \"shop\" 「店」", 96, 160, 6, 3, 4.0),
    Case("它说“你好”", 256, 32, -(2**63), 1, 1.5),
    Case("''", 160, 160, 2**63 - 1, 2, 1.5),
    Case("an 'unclosed quote", 64, 64, 0, 6, 4.0),
    Case("naïve café, Ω ≈ 3 🦊 '🦊'", 224, 96, 2**40, 2, 1.0),
    Case(" leading, trailing and\nline breaks\t", 128, 128, -(2**40), 3, 0.0),
    Case("rounded up 'cut'", 100, 70, 12, 3, 1.5),
    Case("one pixel more", 33, 65, 13, 2, 4.0),
    Case("x" * 500, 192, 224, 14, 2, 1.5),
]


def generated_size(case: Case) -> Size:
    return geometry.generated_size(Size(case.height, case.width))


def test_seeds_with_the_same_low_32_bits_give_the_same_image_on_the_cpu(
    pipeline: LocalPipeline, reference: Any
) -> None:
    """In the reference too: torch's generator on the CPU reads no other bits."""

    def pixels(seed: int) -> NDArray[np.uint8]:
        return pipeline.generate(
            GenerationParameters(prompt="a fox", height=32, width=64, seed=seed, num_inference_steps=1)
        ).pixels[0]

    expected = reference_image(reference, "a fox", 32, 64, 7, 1, 1.5)
    for seed in (7, 2**40 + 7, 7 - 2**32, 2**64 - 2**32 + 7):
        assert np.array_equal(pixels(seed), expected)
    assert np.array_equal(reference_image(reference, "a fox", 32, 64, 2**40 + 7, 1, 1.5), expected)
    assert not np.array_equal(pixels(8), expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tokens_and_pixels_equal_the_references(pipeline: LocalPipeline, reference: Any, case: Case) -> None:
    size = generated_size(case)
    parameters = GenerationParameters(
        prompt=case.prompt,
        height=case.height,
        width=case.width,
        seed=case.seed,
        num_inference_steps=case.steps,
        guidance_scale=case.guidance,
    )
    resolved = pipeline.resolve(parameters)
    prior = pipeline.prior(resolved)
    their_tokens = reference_tokens(reference, case.prompt, *size, case.seed)
    assert prior.prior_token_ids.tolist() == [their_tokens.tolist()], f"tokens differ: {case}"
    image = pipeline.paint(paint_request(resolved, prior, {}))
    theirs = reference_image(reference, case.prompt, *size, case.seed, case.steps, case.guidance, their_tokens)
    assert_same(image, theirs[: case.height, : case.width], case)


def assert_same(ours: GeneratedImages, theirs: NDArray[np.uint8], case: object) -> None:
    (pixels,) = ours.pixels
    assert pixels.shape == theirs.shape, f"sizes differ: {case}"
    worst = int(np.abs(pixels.astype(int) - theirs).max())
    assert worst == 0, f"pixels differ by up to {worst} of 255: {case}"
    assert pixels.std() > 1, f"a uniform image: {case}"


@pytest.mark.parametrize("negative", ["no 'blur', no \"text\"", "plain", "'</s'"])
def test_quoted_text_of_the_negative_prompt_conditions_the_unconditional_branch(
    pipeline: LocalPipeline, reference: Any, negative: str
) -> None:
    parameters = GenerationParameters(
        prompt="a 'fox'",
        negative_prompt=negative,
        height=64,
        width=96,
        seed=8,
        num_inference_steps=3,
        guidance_scale=3.0,
    )
    resolved = pipeline.resolve(parameters)
    prior = pipeline.prior(resolved)
    upsampled = geometry.upsample_tokens(prior.prior_token_ids[0], resolved.target)
    with torch.no_grad():
        their_embedding = reference._get_glyph_embeds(negative)
        theirs = reference(
            prompt=parameters.prompt,
            negative_prompt_embeds=their_embedding,
            prior_token_ids=torch.from_numpy(upsampled).long()[None],
            height=64,
            width=96,
            num_inference_steps=3,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(8),
        ).images[0]
    image = pipeline.paint(paint_request(resolved, prior, {}))
    assert_same(image, np.asarray(theirs), negative)


def test_negative_prompt_needs_guidance_and_quotes(pipeline: LocalPipeline) -> None:
    def paint(negative: str, guidance: float) -> NDArray[np.uint8]:
        parameters = GenerationParameters(
            prompt="a 'fox'", height=32, width=32, seed=8, num_inference_steps=2,
            negative_prompt=negative, guidance_scale=guidance,
        )  # fmt: skip
        return pipeline.generate(parameters).pixels

    assert np.array_equal(paint("", 3.0), paint("blur", 3.0))
    assert not np.array_equal(paint("", 3.0), paint("'blur'", 3.0))
    assert np.array_equal(paint("", 1.0), paint("'blur'", 1.0))


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.5},
        {"temperature": 2.0, "top_p": 1.0},
        {"temperature": 1.0, "top_p": 0.3, "top_k": 40},
        {"temperature": 0.01, "top_p": 0.01},
        {"top_k": 3, "top_p": 0.999},
        {"top_k": 1},
    ],
    ids=str,
)
def test_sampling_overrides_equal_the_references(
    pipeline: LocalPipeline, reference: Any, sampling: dict[str, Any]
) -> None:
    parameters = GenerationParameters(prompt="a 'fox'", height=96, width=128, seed=21, **sampling)
    ours = pipeline.prior(pipeline.resolve(parameters)).prior_token_ids[0]
    theirs = reference_tokens(reference, "a 'fox'", 96, 128, 21, **sampling)
    assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize("first", [5, 2**63 - 2])
def test_image_i_equals_the_single_image_of_seed_plus_i(pipeline: LocalPipeline, first: int) -> None:
    def parameters(seed: int, count: int) -> GenerationParameters:
        return GenerationParameters(
            prompt="a 'fox'", height=64, width=40, seed=seed, num_images=count, num_inference_steps=2
        )

    together = pipeline.generate(parameters(first, 3))
    assert together.pixels.shape == (3, 64, 40, 3)
    seeds = together.metadata["seeds"]
    assert seeds == [first, first + 1, (first + 2 + 2**63) % 2**64 - 2**63]
    for index, seed in enumerate(seeds):
        alone = pipeline.generate(parameters(seed, 1)).pixels[0]
        assert np.array_equal(together.pixels[index], alone), f"image {index}, seed {seed}"
    assert not np.array_equal(together.pixels[0], together.pixels[1])


def test_reported_seed_reproduces_the_image(pipeline: LocalPipeline) -> None:
    parameters: dict[str, Any] = {"prompt": "a fox", "height": 32, "width": 64, "num_inference_steps": 2}
    one = pipeline.generate(GenerationParameters(**parameters))
    again = pipeline.generate(GenerationParameters(**parameters, seed=one.metadata["seeds"][0]))
    assert np.array_equal(one.pixels, again.pixels)
    assert not np.array_equal(one.pixels, pipeline.generate(GenerationParameters(**parameters)).pixels)
