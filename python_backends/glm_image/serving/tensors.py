"""Conversion between Triton's tensors and plain values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from glm_image.config.schema import CONTROL_OUTPUTS, STAGE_TENSORS, STREAM_OUTPUTS
from glm_image.errors import InvalidInputError
from glm_image.request.request_id import undecodable
from glm_image.request.tensors import TensorSpec, parameter_value, request_fields
from glm_image.serving.bytes_tensors import MAX_STRINGS

NUMPY_TYPES = {"INT32": np.int32, "INT64": np.int64, "UINT8": np.uint8, "STRING": np.object_}


class Inputs:
    """The inputs of a request; each getter returns None for an input that is missing.

    Triton has checked types and shapes against the configuration.

    Args:
        request: Triton's request.
        parameters: of the request; some count where the input of their name is missing.
    """

    def __init__(self, request: Any, parameters: Mapping[str, Any] | None = None) -> None:
        self._request, self._parameters = request, parameters or {}

    def array(self, name: str) -> NDArray[Any] | None:
        tensor = pb_utils.get_input_tensor_by_name(self._request, name)
        return None if tensor is None else tensor.as_numpy()

    def integer(self, name: str) -> int | None:
        array = self.array(name)
        return None if array is None else int(array[0])

    def text(self, name: str) -> str | None:
        """Returns a BYTES [1] that must be UTF-8."""
        array = self.array(name)
        return None if array is None else _decoded(name, array[0])

    def fields(self, kind: type) -> dict[str, Any]:
        """Returns the arguments of a dataclass of request fields, not yet validated.

        Missing inputs are left to the dataclass's defaults. A missing ``prompt``, which has none, is "": its check
        refuses it.

        Raises:
            InvalidInputError: a text is not UTF-8.
        """
        values = {field.attribute: self._value(field.spec) for field in request_fields(kind)}
        if "prompt" in values:
            values["prompt"] = values["prompt"] or ""
        return self.given(**values)

    def array_or_parameter(self, spec: TensorSpec) -> NDArray[Any] | None:
        """Returns an input, or the request parameter that takes its place, as an array."""
        array = self.array(spec.name)
        value = self._parameter(spec) if array is None else None
        if value is None:
            return array
        return text_array(value) if isinstance(value, str) else np.array([value], NUMPY_TYPES[spec.data_type])

    def _value(self, spec: TensorSpec) -> int | float | str | tuple[bytes, ...] | tuple[str, ...] | None:
        array = self.array(spec.name)
        if array is None:
            return self._parameter(spec)
        if spec.data_type == "STRING":
            if not spec.is_text:
                return tuple(map(bytes, array))
            if len(array) > MAX_STRINGS:  # before a loop over millions
                raise InvalidInputError.of(spec.name, f"{len(array)} strings", f"at most {MAX_STRINGS}, or fewer")
            texts = tuple(_decoded(spec.name, text) for text in array)
            return texts[0] if spec.dims == (1,) else texts
        # Of an FP32, the shortest decimal: 0.9, not 0.8999999762.
        return float(str(np.float32(array[0]))) if spec.data_type == "FP32" else int(array[0])

    def _parameter(self, spec: TensorSpec) -> int | str | None:
        if not spec.is_parameter:
            return None
        value = self._parameters.get(spec.name)
        return None if value is None else parameter_value(spec, value)

    @staticmethod
    def given(**values: Any) -> dict[str, Any]:
        """Returns the values that are not None, so that defaults apply to the others."""
        return {name: value for name, value in values.items() if value is not None}


def _decoded(name: str, text: bytes) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise undecodable(name, error) from None


def text_array(*texts: str) -> NDArray[np.object_]:
    """Returns strings as the array of a BYTES tensor."""
    return np.array([text.encode("utf-8") for text in texts], dtype=np.object_)


def response(values: Mapping[str, NDArray[Any]]) -> Any:
    """Returns an ``InferenceResponse`` with outputs converted to their declared types."""
    types = {spec.name: NUMPY_TYPES[spec.data_type] for spec in (*STAGE_TENSORS, *STREAM_OUTPUTS, *CONTROL_OUTPUTS)}
    return pb_utils.InferenceResponse(
        output_tensors=[pb_utils.Tensor(name, value.astype(types[name], copy=False)) for name, value in values.items()]
    )
