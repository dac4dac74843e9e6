"""Intermediate images over IPC: previews that ``glm_dit`` renders for ``glm_image_stream``, and latent previews."""

from __future__ import annotations

import base64
import random
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from glm_image.errors import GlmImageError
from glm_image.ipc.client import call
from glm_image.ipc.protocol import Event, Message, instance_sockets
from glm_image.lifecycle.context import NANOSECONDS, RequestContext, RequestObserver
from glm_image.lifecycle.registry import RequestRegistry
from glm_image.request.geometry import Grid, rendered_size
from glm_image.request.parameters import PaintRequest

PREVIEW: Final = "preview"
LATENT_PREVIEW_SKIPPED: Final = "latent_preview_skipped"
DIT_MODEL: Final = "glm_dit"
START_SECONDS: Final = 5.0
"""A preview that has not been started by then is of no more use."""


REASONS: Final = {"queue_full": "busy", "deadline": "deadline", "memory": "memory", "content": "content"}
"""Why there is no preview, by the ``reason`` of the error; any other is ``error``."""


class IntermediateImage(NamedTuple):
    """An intermediate image, uint8 [height, width, 3], and its AIGC label as JSON; "" = none."""

    pixels: NDArray[np.uint8]
    label: str = ""


Delivery: TypeAlias = IntermediateImage | Exception
"""An intermediate image, or why there is none."""


class Finish(Protocol):
    """Checks and labels an intermediate image, then passes it on, perhaps from another thread."""

    def __call__(
        self, pixels: NDArray[np.uint8], deliver: Callable[[Delivery], None], *, is_blurred: bool = False
    ) -> None: ...


class PreviewSkippedError(Exception):
    """A preview is not rendered.

    Attributes:
        reason: ``busy``, ``deadline``, ``memory``, ``content`` or ``error``.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    @classmethod
    def of(cls, error: BaseException) -> PreviewSkippedError:
        if isinstance(error, PreviewSkippedError):
            return error
        reason = error.reason if isinstance(error, GlmImageError) else ""
        return cls(REASONS.get(reason, "error"), str(error) or type(error).__name__)

    def fields(self) -> dict[str, str]:
        """Returns its reason and message, as events have them."""
        return {"reason": self.reason, "message": str(self)}


class PreviewPublisher(RequestObserver):
    """Publishes the tokens of a request's preview with their grid and the seed of the image."""

    def __init__(self, registry: RequestRegistry, grid: Grid, seed: int) -> None:
        self._registry, self._grid, self._seed = registry, grid, seed

    def preview_sampled(self, context: RequestContext, tokens: NDArray[np.int32]) -> None:
        self._registry.publish_details(
            context, lambda: {"preview": {"grid": list(self._grid), "tokens": tokens.tolist(), "seed": self._seed}}
        )


class LatentPreviewPublisher(RequestObserver):
    """Publishes the latent previews of the requests of a registry, and why one is not rendered."""

    def __init__(self, registry: RequestRegistry, finish: Finish) -> None:
        self._registry, self._finish = registry, finish

    def latent_preview_rendered(self, context: RequestContext, pixels: NDArray[np.uint8]) -> None:
        def deliver(made: Delivery) -> None:
            if isinstance(made, Exception):
                self.latent_preview_skipped(context, made)
            else:
                self._registry.publish_details(context, lambda: {"latent_preview": pack_image(made)})

        self._finish(pixels, deliver, is_blurred=context.is_blurred)

    def latent_preview_skipped(self, context: RequestContext, error: Exception) -> None:
        skipped = PreviewSkippedError.of(error).fields()
        self._registry.publish_details(context, lambda: {LATENT_PREVIEW_SKIPPED: skipped})


def request_preview(
    directory: Path, request_id: str, preview: Event, parameters: Mapping[str, Any]
) -> IntermediateImage:
    """Has any instance of ``glm_dit`` render a preview; callable from any thread.

    Args:
        directory: the folder of IPC sockets.
        request_id: the id of the streamed request.
        preview: what ``PreviewPublisher`` published.
        parameters: further fields of ``PaintRequest``.

    Raises:
        PreviewSkippedError: no instance renders it.
    """
    fields = {
        "action": PREVIEW,
        "request_id": request_id,
        "deadline_ns": time.monotonic_ns() + int(START_SECONDS * NANOSECONDS),
        "preview": preview,
        "parameters": parameters,
    }
    sockets = instance_sockets(directory, DIT_MODEL)
    skipped = PreviewSkippedError("error", f"no instance of {DIT_MODEL} is running")
    for name in random.sample(list(sockets), len(sockets)):
        reply = call({name: sockets[name]}, Message(fields), START_SECONDS).replies.get(name)
        if reply is None:
            skipped = PreviewSkippedError("deadline", f"{name} did not render the preview within {START_SECONDS:g} s")
        elif "error" in reply.fields:
            skipped = PreviewSkippedError(reply.fields.get("reason", "error"), reply.fields["error"])
        else:
            return _image(reply.fields, reply.parts[0])
    raise skipped


def read_preview_request(message: Message) -> tuple[RequestContext, PaintRequest]:
    """Reads the message of ``request_preview``."""
    fields = message.fields
    preview = fields["preview"]
    grid = Grid(*preview["grid"])
    request = PaintRequest(
        prior_token_ids=np.array([preview["tokens"]], dtype=np.int32),
        grid=grid,
        requested=rendered_size(grid),
        seeds=(preview["seed"],),
        **fields["parameters"],
    )
    return RequestContext(id=fields["request_id"], deadline_ns=fields["deadline_ns"]), request


def reply_with_preview(reply: Future[Message], preview: Future[IntermediateImage]) -> None:
    """Resolves the reply with the finished preview, or with the reason why there is none."""
    error = preview.exception()
    if error is not None:
        reply.set_result(error_reply(error))
        return
    image = preview.result()
    reply.set_result(Message(_head(image), [image.pixels.tobytes()]))


def error_reply(error: BaseException) -> Message:
    """Returns the reply for a preview that is not rendered."""
    skipped = PreviewSkippedError.of(error)
    return Message({"error": str(skipped), "reason": skipped.reason})


def pack_image(image: IntermediateImage) -> dict[str, Any]:
    """Returns an image as plain data for JSON."""
    return {**_head(image), "pixels": base64.b64encode(image.pixels.tobytes()).decode()}


def unpack_image(fields: Mapping[str, Any]) -> IntermediateImage:
    """Reads the output of ``pack_image``."""
    return _image(fields, base64.b64decode(fields["pixels"]))


def _head(image: IntermediateImage) -> dict[str, Any]:
    height, width, _ = image.pixels.shape
    return {"height": height, "width": width, "label": image.label}


def _image(fields: Mapping[str, Any], data: bytes) -> IntermediateImage:
    pixels = np.frombuffer(data, dtype=np.uint8).reshape(fields["height"], fields["width"], 3)
    return IntermediateImage(pixels, fields["label"])
