"""The events of a stream as Python objects."""

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
        request_id: what ``cancel`` and ``status`` know the request by.
        stage: where it is, as ``status`` says it.
        done: prompts read, tokens drawn or steps taken of ``total``.
        total: how many there will be.
        seconds: since the server took the request.
        eta: about how many seconds are left; None = not known.
        files: PNG files of a picture on the way: a ``preview``, or what is being denoised in 1/8 of its size.
        result: the pictures, at the end.
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
        """The pictures that the event brings, RGB."""
        if self.result is not None:
            return self.result.images
        return [Image.open(io.BytesIO(file)).convert("RGB") for file in self.files]

    @classmethod
    def from_outputs(cls, outputs: Mapping[str, NDArray[Any]]) -> StreamEvent:
        """Reads the output tensors of one response.

        Raises:
            ServerFailure: an output is missing or is not what it should be.
        """
        try:
            told = json_object(outputs["event"][0], "event")
            result = GenerationResult.from_outputs(outputs) if told["event"] == "image" else None
            files = [] if result else [base64.b64decode(one, validate=True) for one in outputs["images_base64"].ravel()]
            return cls(
                kind=RENAMED.get(told["event"], told["event"]),
                request_id=told["request_id"],
                stage=RENAMED.get(told["stage"], told["stage"]),
                done=told["done"],
                total=told["total"],
                seconds=told["seconds"],
                eta=told["eta"],
                files=files,
                result=result,
            )
        except (KeyError, IndexError) as error:
            raise ServerFailure(f"the server's response has no {error.args[0]!r}") from error
        except binascii.Error as error:
            raise ServerFailure("the server's images_base64 is not base64") from error


def check_whole(last: StreamEvent | None) -> None:
    """Refuses a stream that has ended without the picture.

    Raises:
        ServerFailure: it has.
    """
    if last is None or last.result is None:
        raise ServerFailure("the server ended the stream before the picture came")


def outputs_of_json(told: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """Returns the outputs of a Server-Sent Event; a list there has lost its shape, and one element is no list."""
    texts = {name: _texts(told.get(name, [])) for name in ("event", "images_base64", "metadata")}
    return {**texts, "images": np.zeros((0, 0, 0, 3), dtype=np.uint8)}


def _texts(value: str | list[str]) -> NDArray[Any]:
    return np.array([text.encode() for text in ([value] if isinstance(value, str) else value)], dtype=object)
