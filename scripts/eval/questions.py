"""The questions of an evaluation, and the model under test: the engines in this process, or a server."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from train_tiny.world.caption import LANGUAGES, caption
from train_tiny.world.draw import draw
from train_tiny.world.edits import KINDS, Edit, sample_edit
from train_tiny.world.paraphrase import in_other_words
from train_tiny.world.scene import Scene, sample_scene

Picture = NDArray[np.uint8]
CHINESE_EVERY = 4


@dataclass(frozen=True)
class Request:
    """The settings of all requests."""

    height: int = 256
    width: int = 256
    steps: int = 20
    guidance: float = 1.5


@dataclass(frozen=True)
class Question:
    """A prompt and the scene that its image should show.

    Attributes:
        prompt: a caption, or an edit's instruction.
        scene: what is to come out.
        seed: of the picture.
        edit: None = text-to-image.
    """

    prompt: str
    scene: Scene
    seed: int
    edit: Edit | None = None

    def source(self, request: Request) -> Picture | None:
        """Returns the rendered source image of an edit, or None."""
        return rendered(self.edit.before, request) if self.edit else None


class ImageGenerator(Protocol):
    """Generates a question's image and measures the time."""

    def __call__(self, question: Question, request: Request) -> tuple[Picture, float]:
        """Returns uint8 [height, width, 3] and seconds."""


def scene_questions(count: int, seed: int) -> list[Question]:
    """Returns captions of held-out scenes; every ``CHINESE_EVERY``-th is Chinese."""
    rng = Random(seed)
    questions = []
    for index in range(count):
        scene = sample_scene(rng, held_out=True)
        language = LANGUAGES[index % CHINESE_EVERY == CHINESE_EVERY - 1]
        questions.append(Question(caption(scene, rng, language), scene, seed + index))
    return questions


def edit_questions(count: int, seed: int) -> list[Question]:
    """Returns edits that lead to held-out scenes, with equal shares of all kinds."""
    rng = Random(seed)
    edits = [sample_edit(rng, held_out=True, kind=KINDS[index % len(KINDS)]) for index in range(count)]
    return [Question(edit.instruction, edit.after, seed + index, edit) for index, edit in enumerate(edits)]


def otherwise(questions: Sequence[Question], seed: int) -> list[Question]:
    """Returns the questions with paraphrased prompts, where a paraphrase is known."""
    rng = Random(seed)
    return [replace(question, prompt=in_other_words(question.prompt, rng)) for question in questions]


def rendered(scene: Scene, request: Request) -> Picture:
    """Renders a scene, uint8 [height, width, 3]."""
    # Rendered at the size that the model generates: multiples of 32.
    picture = draw([scene], -(-request.height // 32) * 32, -(-request.width // 32) * 32)[0].permute(1, 2, 0)
    return picture[: request.height, : request.width].contiguous().numpy()


def png(picture: Picture) -> bytes:
    """Returns the bytes of a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "png")
    return buffer.getvalue()


@contextmanager
def local_generator(
    checkpoint: Path, device: str = "auto", settings: object = None, *, true_codes: bool = False
) -> Iterator[ImageGenerator]:
    """Opens the engines.

    Args:
        checkpoint: a folder with ``model_index.json``.
        device: as ``LocalPipeline`` takes it.
        settings: ``LocalSettings``; None = the defaults.
        true_codes: the second stage is given what the vision tower sees in the true drawing, not what the first wrote.
    """
    from glm_image.pipeline import LocalPipeline, paint_request  # noqa: PLC0415 - a served model needs no engine here
    from glm_image.request.parameters import GenerationParameters  # noqa: PLC0415

    with LocalPipeline(checkpoint, device, settings) as pipeline:  # type: ignore[arg-type]

        def from_true_codes(parameters: GenerationParameters, rendering: bytes) -> Picture:
            sources = parameters.images or ()
            seen = pipeline.prior(pipeline.resolve(replace(parameters, images=(*sources, rendering))))
            of_sources, own = np.split(seen.source_token_ids, [-seen.source_grids[-1].tokens])
            prior = replace(
                seen, prior_token_ids=own[None], source_token_ids=of_sources, source_grids=seen.source_grids[:-1]
            )
            return pipeline.paint(paint_request(pipeline.resolve(parameters), prior, {})).pixels[0]

        def paint(question: Question, request: Request) -> tuple[Picture, float]:
            source = question.source(request)
            parameters = GenerationParameters(
                prompt=question.prompt,
                height=request.height,
                width=request.width,
                num_inference_steps=request.steps,
                guidance_scale=request.guidance,
                seed=question.seed,
                images=None if source is None else (png(source),),
            )
            started = time.perf_counter()
            if true_codes:
                pixels = from_true_codes(parameters, png(rendered(question.scene, request)))
            else:
                pixels = pipeline.generate(parameters).pixels[0]
            return pixels, time.perf_counter() - started

        yield paint


@contextmanager
def served_generator(url: str) -> Iterator[ImageGenerator]:
    """Connects to a server at ``[SCHEME://]HOST:PORT``."""
    from glm_image_client import GlmImageClient  # noqa: PLC0415 - the engines need no client

    with GlmImageClient(url) as client:

        def paint(question: Question, request: Request) -> tuple[Picture, float]:
            source = question.source(request)
            started = time.perf_counter()
            result = client.generate(
                question.prompt,
                height=request.height,
                width=request.width,
                num_inference_steps=request.steps,
                guidance_scale=request.guidance,
                seed=question.seed,
                images=None if source is None else [png(source)],
                output_format="raw",
            )
            assert result.pixels is not None
            return result.pixels[0], time.perf_counter() - started

        yield paint
