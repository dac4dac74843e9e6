"""Image-to-image: tokens and pixels equal the reference's, whatever else is in flight."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from glm_image.ar.settings import ArSettings
from glm_image.errors import InvalidInputError
from glm_image.pipeline import GeneratedImages, LocalPipeline, LocalSettings, paint_request
from glm_image.request.parameters import GenerationParameters
from helpers import MakeCheckpoint
from parity.reference import load_reference, reference_image, reference_source_tokens, reference_tokens
from pictures import encoded, picture

STEPS = 3


@dataclass(frozen=True)
class Case:
    prompt: str
    sources: tuple[tuple[int, int], ...]
    """Width and height of each."""
    height: int
    width: int
    seed: int
    guidance: float
    negative: str = ""


CASES = {
    "one source, output of its size": Case("make it blue", ((96, 64),), 64, 96, 1, 1.5),
    "one source, output of another size": Case("wider", ((96, 128),), 64, 160, 2, 1.5),
    "two sources of different sizes": Case("the first like the second", ((96, 64), (128, 160)), 64, 96, 3, 1.5),
    "three sources": Case("all of them", ((64, 64), (160, 96), (64, 96)), 96, 64, 4, 3.0),
    "four sources, the same twice": Case("x", ((64, 64), (64, 64), (96, 64), (64, 128)), 64, 64, 5, 1.5),
    "sides of no multiple of 32": Case("sharper", ((110, 75),), 64, 96, 6, 1.5),
    "sides of no multiple of 32 or of 16": Case("sharper", ((143, 97), (65, 111)), 128, 96, 7, 1.5),
    "sides one below the next grid": Case("softer", ((79, 79 + 32),), 96, 96, 8, 2.0),
    "glyphs": Case("a sign that says 'OPEN'", ((96, 96),), 96, 96, 9, 1.5),
    "two strings of glyphs, no guidance": Case("'a' and \"b\" 「参」", ((64, 96),), 64, 96, 10, 1.0),
    "no guidance": Case("plain", ((128, 64),), 64, 128, 11, 1.0),
    "guidance 0, two sources": Case("plain", ((64, 64), (96, 96)), 64, 64, 12, 0.0),
    "strong guidance": Case("它说“你好”", ((96, 64),), 64, 64, 13, 6.0),
    "an aspect of 4": Case("long", ((256, 64),), 64, 256, -14, 1.5),
}


def made(case: Case) -> list[Image.Image]:
    """The sources of a case; sources of the same size are equal."""
    return [picture(*size, seed=sum(size)) for size in case.sources]


def parameters(case: Case, **changed: Any) -> GenerationParameters:
    values = {
        "prompt": case.prompt,
        "height": case.height,
        "width": case.width,
        "seed": case.seed,
        "num_inference_steps": STEPS,
        "guidance_scale": case.guidance,
        "images": tuple(encoded(image) for image in made(case)),
    }
    return GenerationParameters(**(values | changed))


@pytest.fixture(scope="module")
def folder(make_checkpoint: MakeCheckpoint) -> Path:
    """A checkpoint with a smaller least side, so that small sources are not enlarged and tests are fast."""
    return make_checkpoint(source_min_pixels=64 * 64)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return load_reference(folder)


@pytest.fixture(scope="module")
def ours(folder: Path) -> Iterator[LocalPipeline]:
    with LocalPipeline(folder, "cpu", LocalSettings(ar=ArSettings(max_sequence_tokens=2048))) as opened:
        yield opened


def assert_same(got: GeneratedImages, expected: NDArray[np.uint8]) -> None:
    (pixels,) = got.pixels
    assert pixels.shape == expected.shape
    assert int(np.abs(pixels.astype(int) - expected).max()) == 0
    assert pixels.std() > 1


@pytest.mark.parametrize("name", CASES)
def test_tokens_and_pixels_equal_the_references(ours: LocalPipeline, theirs: Any, name: str) -> None:
    case = CASES[name]
    images = made(case)
    resolved = ours.resolve(parameters(case))
    prior = ours.prior(resolved)
    source_tokens, grids = reference_source_tokens(theirs, images)
    assert prior.source_token_ids.tolist() == source_tokens.tolist()
    assert list(map(tuple, prior.source_grids)) == grids
    assert len(set(source_tokens.tolist())) > len(source_tokens) // 4
    tokens = reference_tokens(theirs, case.prompt, case.height, case.width, case.seed, images)
    assert prior.prior_token_ids.tolist() == [tokens.tolist()]
    expected = reference_image(
        theirs, case.prompt, case.height, case.width, case.seed, STEPS, case.guidance, images=images
    )
    assert_same(ours.paint(paint_request(resolved, prior, {})), expected)


def test_sources_are_scaled_as_by_the_published_processor(pipeline: LocalPipeline, reference: Any) -> None:
    """With its own least side of 512 pixels: a source of 520 x 512 is cut to its grid, one of 100 x 80 is enlarged."""
    image = picture(520, 512)
    values = {"prompt": "a 'fox'", "height": 64, "width": 64, "seed": 3}
    got = pipeline.generate(GenerationParameters(**values, num_inference_steps=1, images=(encoded(image),)))
    assert got.metadata["tokens"]["source"] == 256
    assert_same(got, reference_image(reference, "a 'fox'", 64, 64, 3, 1, 1.5, images=[image]))
    small = GenerationParameters(**values, images=(encoded(picture(100, 80)),))
    tokens = reference_tokens(reference, "a 'fox'", 64, 64, 3, [picture(100, 80)])
    assert pipeline.prior(pipeline.resolve(small)).prior_token_ids.tolist() == [tokens.tolist()]


def test_default_size_is_that_of_the_first_source(ours: LocalPipeline, theirs: Any) -> None:
    case = CASES["sides of no multiple of 32 or of 16"]
    assert ours.resolve(parameters(case, height=None, width=None)).requested == (96, 128)
    assert ours.resolve(parameters(case, width=None)).requested == (128, 128)
    got = ours.generate(parameters(case, height=None, width=None))
    images = made(case)
    assert_same(got, reference_image(theirs, case.prompt, 96, 128, case.seed, STEPS, case.guidance, images=images))


def test_size_that_is_no_multiple_of_32_is_cropped_from_the_next_one(ours: LocalPipeline) -> None:
    case = CASES["two sources of different sizes"]
    whole = ours.generate(parameters(case, height=64, width=96)).pixels
    assert np.array_equal(ours.generate(parameters(case, height=50, width=70)).pixels, whole[:, :50, :70])


@pytest.mark.parametrize("size", [(120, 90), (95, 64), (17, 33), (9, 12), (5, 5), (1, 1), (2100, 600)])
def test_source_sizes_at_which_the_reference_fails_are_rendered(
    ours: LocalPipeline, theirs: Any, size: tuple[int, int]
) -> None:
    image = picture(*size)
    with pytest.raises((RuntimeError, ValueError)):
        reference_image(theirs, "x", 64, 64, 1, 1, 1.5, images=[image])
    got = ours.generate(
        parameters(CASES["no guidance"], images=(encoded(image),), height=64, width=64, guidance_scale=1.5)
    )
    assert got.pixels.std() > 1
    assert got.metadata["tokens"]["source"] > 0


@pytest.mark.parametrize("count", [1, 2, 3])
def test_image_i_equals_the_single_image_of_seed_plus_i(ours: LocalPipeline, count: int) -> None:
    case = CASES["two sources of different sizes"]
    together = ours.generate(parameters(case, num_images=count))
    assert together.metadata["seeds"] == [case.seed + index for index in range(count)]
    for index, seed in enumerate(together.metadata["seeds"]):
        alone = ours.generate(parameters(case, seed=seed)).pixels[0]
        assert np.array_equal(together.pixels[index], alone), f"image {index}"


def test_sources_are_encoded_and_read_once_for_all_images(ours: LocalPipeline) -> None:
    encodings, readings = [], list[int]()
    ar, dit = ours.ar.executor, ours.dit.executor
    vision, read = ar._vision, dit._read_source

    class Counting:
        def encode(self, *given: Any) -> Any:
            encodings.append(given)
            return vision.encode(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ar, "_vision", Counting())
        patch.setattr(dit, "_read_source", lambda sources, index: (readings.append(index), read(sources, index))[1])
        ours.generate(parameters(CASES["three sources"], num_images=3))
    assert len(encodings) == 1
    assert readings == [0, 1, 2]
    assert not dit._sources


def test_concurrent_requests_get_the_images_of_each_alone(ours: LocalPipeline) -> None:
    """Text-to-image and image-to-image of different lengths, in flight together."""
    requests = [parameters(case) for case in CASES.values()]
    requests += [
        GenerationParameters(prompt=prompt, height=height, width=64, seed=seed, num_inference_steps=2)
        for prompt, height, seed in [("a fox", 64, 3), ("an 'owl'", 96, 4), ("x" * 80, 32, 5)]
    ]
    alone = [ours.generate(request).pixels for request in requests]
    start = Barrier(len(requests))

    def generate(request: GenerationParameters) -> NDArray[np.uint8]:
        start.wait()
        return ours.generate(request).pixels

    with ThreadPoolExecutor(len(requests)) as pool:
        together = list(pool.map(generate, requests))
    for index, (one, other) in enumerate(zip(together, alone, strict=True)):
        assert np.array_equal(one, other), f"request {index}"


def test_every_source_and_their_order_matter(ours: LocalPipeline) -> None:
    case = CASES["two sources of different sizes"]
    first, second = (encoded(image) for image in made(case))
    other = encoded(picture(*case.sources[1], seed=99))
    rendered = [
        ours.generate(parameters(case, images=images)).pixels
        for images in [(first, second), (second, first), (first,), (first, other), None]
    ]
    for index, pixels in enumerate(rendered):
        assert not any(np.array_equal(pixels, earlier) for earlier in rendered[:index])


def test_transformer_reads_the_pixels_and_not_only_their_tokens(ours: LocalPipeline) -> None:
    case = CASES["two sources of different sizes"]
    resolved = ours.resolve(parameters(case))
    prior = ours.prior(resolved)
    others = tuple(encoded(picture(*size, seed=77)) for size in case.sources)
    other_pixels = ours.resolve(parameters(case, images=others))
    rendered = [ours.paint(paint_request(request, prior, {})).pixels for request in (resolved, other_pixels)]
    assert not np.array_equal(*rendered)


def test_sources_too_large_for_the_device_are_refused_and_dropped(
    ours: LocalPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES["one source, output of its size"]
    before = ours.generate(parameters(case)).pixels
    device = ours.dit.executor._device
    monkeypatch.setattr(device, "memory", lambda: device.__class__.memory(device)._replace(free=1000))
    with pytest.raises(InvalidInputError, match=r"^image is 0\.0 megapixels in all, which take .* free on cpu$"):
        ours.generate(parameters(case))
    monkeypatch.undo()
    assert not ours.dit.executor._sources
    assert np.array_equal(ours.generate(parameters(case)).pixels, before)
