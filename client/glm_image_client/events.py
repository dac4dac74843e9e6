"""The events of a stream, as Python objects."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from glm_image_client.errors import ServerFailure
from glm_image_client.result import GenerationResult, json_object

RENAMED: Final = {"tokens": "decode"}
"""Kinds and stages by the names that servers of version 0.1.0 send; accepted for one more version."""


@dataclass(frozen=True, eq=False)
class StreamEvent:
    """One event of ``stream()``.

    Attributes:
        kind: ``queued``, ``prefill``, ``decode``, ``preview``, ``denoise`` or ``image``, which is the last one.
        request_id: the id for ``cancel`` and ``status``.
        stage: the request's stage, as in ``status``.
        done: prompts prefilled, tokens sampled or steps taken, of ``total``.
        total: the number of them.
        seconds: time since the server accepted the request.
        eta: estimated seconds left; None = unknown.
        files: PNG files of intermediate images: a ``preview``, or the latents at 1/8 of the size.
        result: the images, in the last event.
    """

    kind: str
    request_id: str
    stage: str
    done: int
    total: int
    seconds: float
    eta: float | None = None
    files: list[bytes] = field(default_factory=list, repr=False)
    result: GenerationResult | None = field(default=None, repr=False)

    @cached_property
    def images(self) -> list[Image.Image]:
        """The images of the event, RGB."""
        if self.result is not None:
            return self.result.images
        return [Image.open(io.BytesIO(file)).convert("RGB") for file in self.files]

    @classmethod
    def from_outputs(cls, outputs: Mapping[str, NDArray[Any]]) -> StreamEvent:
        """Reads the output tensors of one response.

        Raises:
            ServerFailure: an output is missing or malformed.
        """
        try:
            event = json_object(outputs["event"][0], "event")
            result = GenerationResult.from_outputs(outputs) if event["event"] == "image" else None
            files = (
                [] if result else [base64.b64decode(file, validate=True) for file in outputs["images_base64"].ravel()]
            )
            return cls(
                kind=RENAMED.get(event["event"], event["event"]),
                request_id=event["request_id"],
                stage=RENAMED.get(event["stage"], event["stage"]),
                done=event["done"],
                total=event["total"],
                seconds=event["seconds"],
                eta=event["eta"],
                files=files,
                result=result,
            )
        except (KeyError, IndexError) as error:
            raise ServerFailure(f"the server's response has no {error.args[0]!r}") from error
        except binascii.Error as error:
            raise ServerFailure("images_base64 of the server's response is not base64") from error


def check_complete(last: StreamEvent | None) -> None:
    """Checks the last event of a stream.

    Raises:
        ServerFailure: the stream ended without the images.
    """
    if last is None or last.result is None:
        raise ServerFailure("the server ended the stream before it sent the images")


def outputs_of_json(event: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """Returns the outputs of a Server-Sent Event, in which tensors have no shape and one element is not a list."""
    texts = {name: _texts(event.get(name, [])) for name in ("event", "images_base64", "metadata")}
    return {**texts, "images": np.zeros((0, 0, 0, 3), dtype=np.uint8)}


def _texts(value: str | list[str]) -> NDArray[Any]:
    return np.array([text.encode() for text in ([value] if isinstance(value, str) else value)], dtype=object)
