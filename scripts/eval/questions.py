"""What a model is asked, and who is asked: the engines in this process, or a server."""

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
    """How all pictures are asked for."""

    height: int = 256
    width: int = 256
    steps: int = 20
    guidance: float = 1.5


@dataclass(frozen=True)
class Question:
    """A prompt, and what its picture is to show.

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
        """Returns the picture to be edited, drawn; None = none."""
        return drawn(self.edit.before, request) if self.edit else None


class Painter(Protocol):
    """Paints a question's picture and tells the seconds it took."""

    def __call__(self, question: Question, request: Request) -> tuple[Picture, float]:
        """Returns uint8 [height, width, 3] and seconds."""


def scene_questions(count: int, seed: int) -> list[Question]:
    """Returns captions of scenes kept from training; every ``CHINESE_EVERY``-th is Chinese."""
    rng = Random(seed)
    questions = []
    for index in range(count):
        scene = sample_scene(rng, held_out=True)
        language = LANGUAGES[index % CHINESE_EVERY == CHINESE_EVERY - 1]
        questions.append(Question(caption(scene, rng, language), scene, seed + index))
    return questions


def edit_questions(count: int, seed: int) -> list[Question]:
    """Returns edits that lead to scenes kept from training, each kind as often."""
    rng = Random(seed)
    edits = [sample_edit(rng, held_out=True, kind=KINDS[index % len(KINDS)]) for index in range(count)]
    return [Question(edit.instruction, edit.after, seed + index, edit) for index, edit in enumerate(edits)]


def otherwise(questions: Sequence[Question], seed: int) -> list[Question]:
    """Returns the same questions with prompts in other words, as far as they can be said so."""
    rng = Random(seed)
    return [replace(question, prompt=in_other_words(question.prompt, rng)) for question in questions]


def drawn(scene: Scene, request: Request) -> Picture:
    """Returns the true drawing of a scene, uint8 [height, width, 3]."""
    # The drawer wants what the model generates: multiples of 32.
    picture = draw([scene], -(-request.height // 32) * 32, -(-request.width // 32) * 32)[0].permute(1, 2, 0)
    return picture[: request.height, : request.width].contiguous().numpy()


def png(picture: Picture) -> bytes:
    """Returns the bytes of a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "png")
    return buffer.getvalue()


@contextmanager
def local_painter(
    checkpoint: Path, device: str = "auto", settings: object = None, *, true_codes: bool = False
) -> Iterator[Painter]:
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

        def of_true_codes(asked: GenerationParameters, drawing: bytes) -> Picture:
            sources = asked.images or ()
            seen = pipeline.prior(pipeline.resolve(replace(asked, images=(*sources, drawing))))
            of_sources, own = np.split(seen.source_token_ids, [-seen.source_grids[-1].tokens])
            prior = replace(
                seen, prior_token_ids=own[None], source_token_ids=of_sources, source_grids=seen.source_grids[:-1]
            )
            return pipeline.paint(paint_request(pipeline.resolve(asked), prior, {})).pixels[0]

        def paint(question: Question, request: Request) -> tuple[Picture, float]:
            source = question.source(request)
            asked = GenerationParameters(
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
                pixels = of_true_codes(asked, png(drawn(question.scene, request)))
            else:
                pixels = pipeline.generate(asked).pixels[0]
            return pixels, time.perf_counter() - started

        yield paint


@contextmanager
def served_painter(url: str) -> Iterator[Painter]:
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
