"""Requests of Triton's ``generate_stream`` and the Server-Sent Events of their answers."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from glm_image_client.errors import BadArgumentError, ServerFailure, answered
from glm_image_client.events import outputs_of_json
from glm_image_client.transport import Tensor, microseconds

DATA = b"data:"
MAY_SUCCEED_LATER = re.compile(r"deadline|try again later|is stopping|maximum queue size|memory")


def path_of(model: str) -> str:
    """Returns the path of a model's ``generate_stream``."""
    return f"/v2/models/{model}/generate_stream"


def body_of(inputs: Sequence[Tensor], request_id: str, timeout: float | None) -> bytes:
    """Returns the JSON of a request.

    Raises:
        BadArgumentError: ``output_format`` is raw, which Triton would send as text.
    """
    values: dict[str, Any] = {"id": request_id}
    for name, datatype, data in inputs:
        listed = [_text(name, value) for value in data.ravel()] if datatype == "BYTES" else data.ravel().tolist()
        values[name] = listed[0] if len(listed) == 1 else listed
    if values.get("output_format") == "raw":
        raise BadArgumentError("output_format is raw; allowed in a stream over HTTP: png, jpeg, webp")
    if (limit := microseconds(timeout)) is not None:
        values["timeout"] = limit
    return json.dumps(values).encode()


def outputs_of_line(line: bytes) -> dict[str, NDArray[Any]] | None:
    """Returns the outputs in a line of the answer; None for a line without an event.

    Raises:
        RefusedError: the event is a refusal.
        ServerFailure: the event is another error, or is not JSON.
    """
    if not line.startswith(DATA):
        return None
    try:
        event = json.loads(line.removeprefix(DATA))
    except ValueError as error:
        raise ServerFailure("the server's event is not JSON") from error
    if "error" in event:
        raise answered(None, event["error"])
    return outputs_of_json(event)


def failure_of(status: int, body: bytes) -> Exception:
    """Returns the error for an answer without a stream."""
    try:
        message = json.loads(body.removeprefix(DATA))["error"]
    except (ValueError, KeyError, TypeError):
        message = ""
    # Triton answers 400 for every error code.
    return answered("UNAVAILABLE" if MAY_SUCCEED_LATER.search(message) else str(status), message)


def _text(name: str, value: bytes) -> str:
    return base64.b64encode(value).decode() if name == "image" else value.decode()
