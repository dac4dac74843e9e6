"""The events of a stream, as Python objects."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

from PIL import Image

from glm_image_client.errors import ServerFailure
from glm_image_client.result import GenerationResult, base64_files, decoded_files, decoded_images, json_output
from glm_image_client.transport import Outputs

RENAMED: Final = {"tokens": "decode"}
"""Kinds and stages by the names that servers of version 0.1.0 send; accepted for one more version."""


@dataclass(frozen=True, eq=False)
class StreamEvent:
    """One event of ``stream()``.

    Attributes:
        kind: ``queued``, ``prefill``, ``decode``, ``preview``, ``preview_skipped``, ``denoise`` or ``image``, which is
            the last one.
        request_id: the id for ``cancel`` and ``status``.
        stage: the request's stage, as in ``status``.
        done: prompts prefilled, tokens sampled or steps taken, of ``total``.
        total: the number of them.
        seconds: time since the server accepted the request.
        eta: estimated seconds left; None = unknown.
        base64_files: ``files`` in base64, as the server sent them.
        reason: why an intermediate image is not made, in ``preview_skipped``: ``busy``, ``deadline``, ``memory``,
            ``content`` or ``error``.
        message: that reason as a sentence.
        result: the images, in the last event.
    """

    kind: str
    request_id: str
    stage: str
    done: int
    total: int
    seconds: float
    eta: float | None = None
    base64_files: list[bytes] = field(default_factory=list, repr=False)
    reason: str | None = None
    message: str | None = None
    result: GenerationResult | None = field(default=None, repr=False)

    @cached_property
    def files(self) -> list[bytes]:
        """PNG files of intermediate images: a ``preview``, or the latents at 1/8 of the size."""
        return decoded_files(self.base64_files)

    @cached_property
    def images(self) -> list[Image.Image]:
        """The images of the event, RGB."""
        if self.result is not None:
            return self.result.images
        return decoded_images(self.files)

    @classmethod
    def from_outputs(cls, outputs: Outputs) -> StreamEvent:
        """Returns the event in the outputs of a response.

        Raises:
            ServerFailure: an output or a field of the event is missing or malformed.
        """
        event = json_output(outputs, "event")
        try:
            result = GenerationResult.from_outputs(outputs) if event["event"] == "image" else None
            return cls(
                kind=RENAMED.get(event["event"], event["event"]),
                stage=RENAMED.get(event["stage"], event["stage"]),
                reason=event.get("reason"),
                message=event.get("message"),
                base64_files=[] if result else base64_files(outputs),
                result=result,
                **{name: event[name] for name in ("request_id", "done", "total", "seconds", "eta")},
            )
        except TypeError as error:
            raise ServerFailure("the server's event has a field of a wrong type") from error
        except KeyError as error:
            raise ServerFailure(f"the server's response has no {error.args[0]!r}") from error
