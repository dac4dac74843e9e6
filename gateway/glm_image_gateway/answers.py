"""Answers with images. Their base64 is inserted into the JSON as the server sent it, without another copy as text."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from glm_image_gateway.generation import Generated
from glm_image_gateway.translation import ImageRequest


def json_bytes(value: Any, files: Sequence[bytes] = ()) -> bytes:
    """Returns a value as JSON in which ``slot(i)`` is the base64 ``files[i]``."""
    return b"".join(_json_pieces(value, files))


def _json_pieces(value: Any, files: Sequence[bytes]) -> list[bytes]:
    """Returns the JSON in pieces, the files as they are.

    No other text of an answer has the control characters of a slot: a client's text is not repeated in answers.
    """
    text = json.dumps(value, separators=(",", ":")).encode("ascii")
    pieces: list[bytes] = []
    for index, file in enumerate(files):
        before, found, text = text.partition(slot(index).encode("ascii").replace(b"\0", b"\\u0000"))
        if not found:
            raise ValueError(f"the answer has no place for image {index}")
        pieces += [before, file]
    return [*pieces, text]


def slot(index: int) -> str:
    """Returns the text that stands for image ``index``."""
    return f"\0{index}\0"


def json_response(value: Any, files: Sequence[bytes] = (), status: int = 200) -> Response:
    """Returns a response of ``json_bytes``."""
    return _JsonResponse(_json_pieces(value, files), status)


class _JsonResponse(Response):
    """Sends JSON in pieces: a copy of several megabytes costs milliseconds."""

    media_type = "application/json"

    def __init__(self, pieces: Sequence[bytes], status: int) -> None:
        super().__init__(status_code=status, headers={"content-length": str(sum(map(len, pieces)))})
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for piece in self._pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def usage(generated: Generated) -> dict[str, Any]:
    """Returns the tokens of a request: previews count as output, since they are generated too."""
    tokens = generated.metadata["tokens"]
    text, source = tokens.get("prompt", 0), tokens.get("source", 0)
    output = len(generated.files) * (tokens.get("preview", 0) + tokens.get("image", 0))
    return {
        "input_tokens": text + source,
        "input_tokens_details": {"image_tokens": source, "text_tokens": text},
        "output_tokens": output,
        "output_tokens_details": {"image_tokens": output, "text_tokens": 0},
        "total_tokens": text + source + output,
    }


def chat_usage(generated: Generated) -> dict[str, Any]:
    """Returns ``usage`` by the names of chat completions."""
    counted = usage(generated)
    return {
        "prompt_tokens": counted["input_tokens"],
        "completion_tokens": counted["output_tokens"],
        "total_tokens": counted["total_tokens"],
    }


def images_answer(request: ImageRequest, generated: Generated, data: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the answer of generations and edits; ``data`` has one object for each image."""
    answer = {
        "created": int(time.time()),
        "data": data,
        **request.echoed,
        "output_format": request.output_format,
        "size": generated.size,
        "usage": usage(generated),
        "seeds": generated.seeds,
        "metadata": generated.metadata,
    }
    return {**answer, "warnings": list(request.warnings)} if request.warnings else answer


def slots(generated: Generated) -> list[dict[str, str]]:
    """Returns the ``data`` of an answer whose images are in it."""
    return [{"b64_json": slot(index)} for index in range(len(generated.files))]
