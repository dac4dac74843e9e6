"""Reads declared request fields from the inputs of a request."""

from __future__ import annotations

from typing import Any

from glm_image.request.tensors import TensorSpec, request_fields
from glm_image.serving.tensors import Inputs


def read_fields(inputs: Inputs, kind: type) -> dict[str, Any]:
    """Returns the arguments of a dataclass of request fields, not yet validated.

    Omitted inputs are left to the dataclass's defaults. A missing ``prompt``, which has none, is "": its check refuses
    it.

    Raises:
        InvalidInputError: a text is not UTF-8.
    """
    values = {declared.attribute: _value(inputs, declared.spec) for declared in request_fields(kind)}
    if "prompt" in values:
        values["prompt"] = values["prompt"] or ""
    return inputs.given(**values)


def _value(inputs: Inputs, spec: TensorSpec) -> int | float | str | tuple[bytes, ...] | None:
    if spec.data_type == "STRING":
        return inputs.text(spec.name) if spec.dims == (1,) else inputs.files(spec.name)
    return inputs.real(spec.name) if spec.data_type == "FP32" else inputs.integer(spec.name)
