"""Messages over the bus about previews: ``glm_image_stream`` wants them, ``glm_dit`` paints them."""

from __future__ import annotations

import base64
import random
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from glm_image.ipc.client import call_one
from glm_image.ipc.protocol import Message, instance_sockets
from glm_image.lifecycle.context import NANOSECONDS, RequestContext
from glm_image.request.geometry import Grid, painted_size
from glm_image.request.parameters import PaintRequest

PREVIEW: Final = "preview"
PAINTER: Final = "glm_dit"
WORTH_SECONDS: Final = 5.0
"""A preview that has not been begun by then is no longer of use."""


@dataclass(frozen=True)
class PreviewTokens:
    """What the first stage hands out of a picture whose preview it has written.

    Attributes:
        grid: the preview's.
        token_ids: int32 [grid.tokens].
        seed: of the picture.
    """

    grid: Grid
    token_ids: NDArray[np.int32]
    seed: int

    @classmethod
    def read(cls, told: Mapping[str, Any]) -> PreviewTokens:
        """Reads them from an event."""
        return cls(Grid(*told["grid"]), np.array(told["tokens"], dtype=np.int32), told["seed"])


def ask_preview(
    directory: Path,
    request_id: str,
    tokens: PreviewTokens,
    prompts: tuple[str, str],
    guidance_scale: float,
    steps: int,
) -> NDArray[np.uint8] | None:
    """Has a preview painted by any instance of the second stage; may be called from any thread.

    Args:
        directory: the bus's folder.
        request_id: whose preview it is.
        tokens: what is painted.
        prompts: the prompt and the negative prompt.
        guidance_scale: as for the picture.
        steps: how many.

    Returns:
        uint8 [height, width, 3]; None where nobody has the time for it.
    """
    fields = {
        "action": PREVIEW,
        "request_id": request_id,
        "deadline_ns": time.monotonic_ns() + int(WORTH_SECONDS * NANOSECONDS),
        "prompt": prompts[0],
        "negative_prompt": prompts[1],
        "guidance_scale": guidance_scale,
        "steps": steps,
        "grid": list(tokens.grid),
        "seed": tokens.seed,
    }
    question = Message(fields, [tokens.token_ids.tobytes()])
    painters = [name for name in instance_sockets(directory) if name.startswith(PAINTER)]
    for name in random.sample(painters, len(painters)):
        answer = call_one(directory, name, question, WORTH_SECONDS)
        if answer is not None and "error" not in answer.fields:
            pixels = np.frombuffer(answer.parts[0], dtype=np.uint8)
            return pixels.reshape(answer.fields["height"], answer.fields["width"], 3)
    return None


def read_preview(question: Message) -> tuple[RequestContext, PaintRequest]:
    """Reads what ``ask_preview`` asks."""
    asked = question.fields
    grid = Grid(*asked["grid"])
    request = PaintRequest(
        prompt=asked["prompt"],
        negative_prompt=asked["negative_prompt"],
        prior_token_ids=np.frombuffer(question.parts[0], dtype=np.int32).reshape(1, -1),
        grid=grid,
        requested=painted_size(grid),
        seeds=(asked["seed"],),
        num_inference_steps=asked["steps"],
        guidance_scale=asked["guidance_scale"],
    )
    return RequestContext(id=asked["request_id"], deadline_ns=asked["deadline_ns"]), request


def answer_preview(answer: Future[Message], done: Future[NDArray[np.uint8]]) -> None:
    """Answers with a picture, or with why there is none."""
    error = done.exception()
    if error is not None:
        answer.set_result(Message({"error": str(error)}))
        return
    height, width, _ = done.result().shape
    answer.set_result(Message({"height": height, "width": width}, [done.result().tobytes()]))


def packed_picture(pixels: NDArray[np.uint8]) -> dict[str, Any]:
    """Returns a small picture uint8 [height, width, 3] for an event, which is JSON."""
    height, width, _ = pixels.shape
    return {"height": height, "width": width, "pixels": base64.b64encode(pixels.tobytes()).decode()}


def unpacked_picture(told: Mapping[str, Any]) -> NDArray[np.uint8]:
    """Reads what ``packed_picture`` gave."""
    pixels = np.frombuffer(base64.b64decode(told["pixels"]), dtype=np.uint8)
    return pixels.reshape(told["height"], told["width"], 3)
