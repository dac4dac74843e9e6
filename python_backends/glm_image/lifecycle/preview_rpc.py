"""Intermediate images over IPC: previews that ``glm_dit`` renders for ``glm_image_stream``, and published estimates."""

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
from glm_image.lifecycle.context import NANOSECONDS, RequestContext, RequestObserver
from glm_image.lifecycle.registry import RequestRegistry
from glm_image.request.geometry import Grid, rendered_size
from glm_image.request.parameters import PaintRequest

PREVIEW: Final = "preview"
"""The action of the call."""
DIT_MODEL: Final = "glm_dit"
START_SECONDS: Final = 5.0
"""A preview that has not been started by then is of no more use."""


@dataclass(frozen=True)
class PreviewTokens:
    """The tokens of a preview, as ``glm_ar`` publishes them.

    Attributes:
        grid: the grid that they fill.
        token_ids: int32 [grid.tokens].
        seed: the seed of the image.
    """

    grid: Grid
    token_ids: NDArray[np.int32]
    seed: int

    @classmethod
    def unpack(cls, fields: Mapping[str, Any]) -> PreviewTokens:
        """Reads them from an event."""
        return cls(Grid(*fields["grid"]), np.array(fields["tokens"], dtype=np.int32), fields["seed"])

    def pack(self) -> dict[str, Any]:
        """Returns them for an event, which is JSON."""
        return {"grid": list(self.grid), "tokens": self.token_ids.tolist(), "seed": self.seed}


class PreviewPublisher(RequestObserver):
    """Publishes the tokens of a request's preview.

    Args:
        registry: publishes the event.
        grid: the preview's grid.
        seed: the seed of the image.
    """

    def __init__(self, registry: RequestRegistry, grid: Grid, seed: int) -> None:
        self._registry, self._grid, self._seed = registry, grid, seed

    def preview_sampled(self, context: RequestContext, tokens: NDArray[np.int32]) -> None:
        preview = PreviewTokens(self._grid, tokens, self._seed)
        self._registry.publish_details(context, lambda: {"preview": preview.pack()})


class EstimatePublisher(RequestObserver):
    """Publishes the estimates of the requests of a registry."""

    def __init__(self, registry: RequestRegistry) -> None:
        self._registry = registry

    def estimate_rendered(self, context: RequestContext, pixels: NDArray[np.uint8]) -> None:
        self._registry.publish_details(context, lambda: {"estimate": pack_image(pixels)})


def request_preview(
    directory: Path,
    request_id: str,
    tokens: PreviewTokens,
    prompts: tuple[str, str],
    guidance_scale: float,
    steps: int,
) -> NDArray[np.uint8] | None:
    """Has any instance of ``glm_dit`` render a preview; callable from any thread.

    Args:
        directory: the folder of IPC sockets.
        request_id: the id of the streamed request.
        tokens: the preview's tokens.
        prompts: the prompt and the negative prompt.
        guidance_scale: that of the request.
        steps: denoising steps of the preview.

    Returns:
        uint8 [height, width, 3]; None if every instance is too busy.
    """
    fields = {
        "action": PREVIEW,
        "request_id": request_id,
        "deadline_ns": time.monotonic_ns() + int(START_SECONDS * NANOSECONDS),
        "prompt": prompts[0],
        "negative_prompt": prompts[1],
        "guidance_scale": guidance_scale,
        "steps": steps,
        "grid": list(tokens.grid),
        "seed": tokens.seed,
    }
    message = Message(fields, [tokens.token_ids.tobytes()])
    instances = [name for name in instance_sockets(directory) if name.startswith(DIT_MODEL)]
    for name in random.sample(instances, len(instances)):
        reply = call_one(directory, name, message, START_SECONDS)
        if reply is not None and "error" not in reply.fields:
            pixels = np.frombuffer(reply.parts[0], dtype=np.uint8)
            return pixels.reshape(reply.fields["height"], reply.fields["width"], 3)
    return None


def read_preview_request(message: Message) -> tuple[RequestContext, PaintRequest]:
    """Reads the message of ``request_preview``."""
    fields = message.fields
    grid = Grid(*fields["grid"])
    request = PaintRequest(
        prompt=fields["prompt"],
        negative_prompt=fields["negative_prompt"],
        prior_token_ids=np.frombuffer(message.parts[0], dtype=np.int32).reshape(1, -1),
        grid=grid,
        requested=rendered_size(grid),
        seeds=(fields["seed"],),
        num_inference_steps=fields["steps"],
        guidance_scale=fields["guidance_scale"],
    )
    return RequestContext(id=fields["request_id"], deadline_ns=fields["deadline_ns"]), request


def reply_with_preview(reply: Future[Message], preview: Future[NDArray[np.uint8]]) -> None:
    """Resolves the reply with the finished preview, or with the reason why there is none."""
    error = preview.exception()
    if error is not None:
        reply.set_result(Message({"error": str(error)}))
        return
    height, width, _ = preview.result().shape
    reply.set_result(Message({"height": height, "width": width}, [preview.result().tobytes()]))


def pack_image(pixels: NDArray[np.uint8]) -> dict[str, Any]:
    """Returns a small image, uint8 [height, width, 3], for an event, which is JSON."""
    height, width, _ = pixels.shape
    return {"height": height, "width": width, "pixels": base64.b64encode(pixels.tobytes()).decode()}


def unpack_image(fields: Mapping[str, Any]) -> NDArray[np.uint8]:
    """Reads the output of ``pack_image``."""
    pixels = np.frombuffer(base64.b64decode(fields["pixels"]), dtype=np.uint8)
    return pixels.reshape(fields["height"], fields["width"], 3)
