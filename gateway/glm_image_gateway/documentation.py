"""The OpenAPI document's parts that FastAPI cannot derive: bodies are read by ``bodies``, not by FastAPI."""

from __future__ import annotations

from typing import Any, Final

from pydantic import BaseModel

from glm_image_gateway.schemas import ErrorAnswer

_CODES: Final = {
    400: "The request is not allowed",
    401: "The API key is missing or unknown",
    404: "There is no such model, job or file",
    413: "The body is too large",
    429: "The queue is full, or a limit of the API key is reached",
    500: "The server failed",
    503: "The server is not ready",
    504: "The time limit has passed",
}
ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    code: {"model": ErrorAnswer, "description": text} for code, text in _CODES.items()
}


def body_of(kind: type[BaseModel], *, is_form: bool = False) -> dict[str, Any]:
    """Returns the declaration of a route's body."""
    schema = kind.model_json_schema()
    content = {"application/json": {"schema": schema}}
    if is_form:
        mask = schema["properties"]["mask"]
        form = {**schema, "properties": {**schema["properties"], "image": _FILES, "mask": {**mask, **_FILE}}}
        content["multipart/form-data"] = {"schema": {name: value for name, value in form.items() if name != "example"}}
    return {"requestBody": {"required": True, "content": content}}


_FILE: Final = {"type": "string", "format": "binary"}
_FILES: Final = {"type": "array", "items": _FILE, "description": "1 to 4 files, as `image` or `image[]`"}
