"""Bodies of requests as typed objects: JSON or multipart forms, nested and flat fields, and unknown ones."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from glm_image_gateway.errors import ApiError, not_allowed, shown

MAX_FIELDS: Final = 256
MAX_NAMED: Final = 8
"""Unknown fields that a message names."""
IMAGE_FIELDS: Final = frozenset({"image", "images", "mask", "url"})
NESTED: Final = "extra_body"

_BRACKETS: Final = re.compile(r"([^\[\]]+)\[([^\[\]]*)\]")

Body = TypeVar("Body", bound=BaseModel)


class Read(NamedTuple):
    """The fields of a request: those of ``extra_body`` are among the others, and ``nested`` names them."""

    fields: dict[str, Any]
    nested: frozenset[str]


async def read_fields(request: Request, max_bytes: int) -> Read:
    """Returns the fields of a JSON object or a form; those that are null, or empty in a form, count as absent.

    Raises:
        ApiError: the body is neither.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        fields = await _form_fields(request, max_bytes)
    else:
        fields = await _json_fields(request)  # whatever its type: curl names another one unless it is asked not to
    if len(fields) > MAX_FIELDS:
        raise ApiError(400, f"the body has {len(fields)} fields; allowed: at most {MAX_FIELDS}", "too_many_fields")
    nested = fields.pop(NESTED, None)
    if nested is None:
        return Read(_present(fields), frozenset())
    if not isinstance(nested, dict):
        raise not_allowed(NESTED, nested, "an object")
    nested = _present(nested)
    return Read({**nested, **_present(fields)}, frozenset(nested))


def _present(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


async def _json_fields(request: Request) -> dict[str, Any]:
    try:
        fields = from_json(await request.body(), allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {shown(str(error))}", "invalid_json") from None
    except ClientDisconnect:
        raise ApiError(400, "the body ended before it was complete", "incomplete_body") from None
    if not isinstance(fields, dict):
        raise ApiError(400, f"the body is {shown(fields)}; allowed: a JSON object", "invalid_json")
    return fields


async def _form_fields(request: Request, max_bytes: int) -> dict[str, Any]:
    try:
        form = await request.form(max_files=16, max_fields=MAX_FIELDS, max_part_size=max_bytes)
    except HTTPException as error:
        raise ApiError(400, f"the form cannot be read: {error.detail}", "invalid_form") from None
    except ClientDisconnect:
        raise ApiError(400, "the body ended before it was complete", "incomplete_body") from None
    fields: dict[str, Any] = {}
    for name, value in form.multi_items():
        content: bytes | str = await value.read() if isinstance(value, UploadFile) else value
        if content == "":
            continue
        _add(fields, name, content)
    return fields


def _add(fields: dict[str, Any], name: str, value: bytes | str) -> None:
    """Adds a field of a form: ``a[b]`` is field b of the object a; ``image[]`` and repeated images are a list."""
    found = _BRACKETS.fullmatch(name)
    base, key = (found[1], found[2]) if found else (name, "")
    if base in {"image", "images"}:
        fields.setdefault(base, []).append(value)
    elif key:
        nested = fields.setdefault(base, {})
        if not isinstance(nested, dict):
            raise ApiError(400, f"{base} is given as a value and as an object", "invalid_form", param=base)
        nested[key] = value
    elif base in fields and base not in IMAGE_FIELDS:
        raise ApiError(400, f"{base} is given twice; allowed: once", "invalid_form", param=base)
    else:
        fields[base] = value


def validated(kind: type[Body], fields: Mapping[str, Any]) -> Body:
    """Returns fields as a body.

    Raises:
        ApiError: a field is missing or its value is not allowed.
    """
    for name, value in fields.items():
        if isinstance(value, bytes) and name not in IMAGE_FIELDS:
            raise ApiError(400, f"{shown(name)} is a file; allowed: text", "invalid_value", param=shown(name))
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _refusal(kind, error) from None


def _refusal(kind: type[BaseModel], error: ValidationError) -> ApiError:
    fault = error.errors(include_url=False, include_context=False)[0]
    field = str(fault["loc"][0]) if fault["loc"] else "the body"
    if fault["type"] == "missing":
        return ApiError(400, f"{field} is missing; allowed: {_allowed(kind, field, fault)}", "missing", param=field)
    value = fault["input"]
    return not_allowed(field, value, _allowed(kind, field, fault))


def _allowed(kind: type[BaseModel], field: str, fault: Mapping[str, Any]) -> str:
    declared = kind.model_fields.get(field)
    extra = declared.json_schema_extra if declared is not None else None
    if isinstance(extra, dict) and "allowed" in extra:
        return str(extra["allowed"])
    if fault["type"] == "literal_error" and declared is not None:
        return ", ".join(getattr(declared.annotation, "__args__", ()))
    return "text" if "string" in fault["type"] or fault["type"] == "missing" else str(fault["msg"]).lower()


def unknown_fields(body: BaseModel, ignored: frozenset[str], *, strict: bool) -> tuple[str, ...]:
    """Returns a warning that names the fields of a body that are not known, if there are any.

    Raises:
        ApiError: there are some, and ``strict`` refuses them.
    """
    names = [name for name in body.model_extra or () if name not in ignored]
    if not names:
        return ()
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    listed = ", ".join(shown(name) for name in names[:MAX_NAMED]) + more
    if strict:
        raise ApiError(400, f"unknown fields: {listed}", "unknown_field", param=shown(names[0]))
    return (f"unknown fields were ignored: {listed}",)
