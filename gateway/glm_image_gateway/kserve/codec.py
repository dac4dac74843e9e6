"""Tensors of KServe's protocol, version 2: from bytes, and from the values of JSON and of gRPC's typed contents."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from glm_image_client.errors import RefusedError
from glm_image_client.options import OPTIONS
from glm_image_client.transport import Tensor, object_array
from glm_image_gateway.errors import shown

DTYPES: Final[Mapping[str, Any]] = {
    "BOOL": np.bool_,
    "UINT8": np.uint8,
    "INT8": np.int8,
    "UINT16": np.uint16,
    "INT16": np.int16,
    "UINT32": np.uint32,
    "INT32": np.int32,
    "UINT64": np.uint64,
    "INT64": np.int64,
    "FP32": np.float32,
    "FP64": np.float64,
}
"""All types of the protocol with an equivalent in numpy; ``BYTES`` is an array of objects."""
DATATYPES: Final = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
MAX_DIMENSIONS: Final = 8
LENGTH: Final = struct.Struct("<I")
"""Before each text of a BYTES tensor."""
TIMEOUT: Final = "timeout"
MAX_TIMEOUT_US: Final = 2**63


def shape_of(name: str, sides: Sequence[Any]) -> tuple[int, ...]:
    """Returns a tensor's shape; raises ``RefusedError`` if it is none."""
    if len(sides) > MAX_DIMENSIONS or not all(type(side) is int and side >= 0 for side in sides):
        raise RefusedError(f"the shape of {shown(name)} is {shown(list(sides))}; allowed: up to 8 integers from 0")
    return tuple(sides)


def from_bytes(name: str, datatype: str, sides: Sequence[Any], content: bytes) -> Tensor:
    """Returns a tensor of its bytes in the protocol's binary form; raises ``RefusedError`` if they do not fit."""
    shape = shape_of(name, sides)
    if datatype == "BYTES":
        return _shaped(name, datatype, shape, object_array(_texts(name, content)))
    dtype = np.dtype(_dtype(name, datatype)).newbyteorder("<")
    if len(content) != math.prod(shape) * dtype.itemsize:
        raise RefusedError(f"{shown(name)} has {len(content)} bytes; allowed: those of {datatype} {list(shape)}")
    return Tensor(name, datatype, np.frombuffer(content, dtype).reshape(shape))


def from_values(name: str, datatype: str, sides: Sequence[Any], values: Any) -> Tensor:
    """Returns a tensor of values, nested as its shape or flat; raises ``RefusedError`` if they do not fit."""
    shape = shape_of(name, sides)
    if datatype == "BYTES":
        flat = list(_flat(values))
        if not all(isinstance(value, (str, bytes)) for value in flat):
            raise RefusedError(f"{shown(name)} has values that are no texts; allowed: texts, as its type is BYTES")
        texts = [value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value for value in flat]
        return _shaped(name, datatype, shape, object_array(texts))
    try:
        array = np.array(list(_flat(values)), dtype=_dtype(name, datatype))
    except (TypeError, ValueError, OverflowError) as error:
        raise RefusedError(f"{shown(name)} has values that are none of {datatype}; allowed: numbers of it") from error
    return _shaped(name, datatype, shape, array)


def to_bytes(array: NDArray[Any]) -> bytes:
    """Returns a tensor in the protocol's binary form."""
    if array.dtype == object:
        return b"".join(LENGTH.pack(len(text)) + text for text in map(_as_bytes, array.ravel()))
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()


def datatype_of(array: NDArray[Any]) -> str:
    """Returns the protocol's name of an array's type."""
    return "BYTES" if array.dtype == object else DATATYPES[array.dtype]


def to_values(array: NDArray[Any]) -> list[Any]:
    """Returns a tensor as a flat list for JSON."""
    if array.dtype == object:
        return [_as_bytes(text).decode("utf-8", "replace") for text in array.ravel()]
    return list(array.ravel().tolist())


def with_parameters(tensors: Sequence[Tensor], parameters: Mapping[str, Any]) -> list[Tensor]:
    """Returns tensors and, for request parameters that name an input that is missing, tensors of them."""
    given = {tensor.name for tensor in tensors}
    own = [
        from_values(name, OPTIONS[name].input.datatype, [1], [value])
        for name, value in parameters.items()
        if name in OPTIONS and name not in given
    ]
    return [*tensors, *own]


def seconds_of(parameters: Mapping[str, Any]) -> float | None:
    """Returns the timeout that parameters state; None = none.

    Raises:
        RefusedError: it is not a whole number of microseconds.
    """
    given = parameters.get(TIMEOUT, 0)
    if type(given) is not int or not 0 <= given < MAX_TIMEOUT_US:
        raise RefusedError(f"timeout is {shown(given)}; allowed: a whole number of microseconds from 0 to 2^63 - 1")
    return given / 1e6 if given else None


def _as_bytes(text: Any) -> bytes:
    return text if isinstance(text, bytes) else str(text).encode("utf-8", "surrogatepass")


def _shaped(name: str, datatype: str, shape: tuple[int, ...], array: NDArray[Any]) -> Tensor:
    if array.size != math.prod(shape):
        raise RefusedError(f"{shown(name)} has {array.size} values; allowed: those of the shape {list(shape)}")
    return Tensor(name, datatype, array.reshape(shape))


def _dtype(name: str, datatype: str) -> Any:
    if datatype not in DTYPES:
        raise RefusedError(f"the type of {shown(name)} is {shown(datatype)}; allowed: BYTES, {', '.join(DTYPES)}")
    return DTYPES[datatype]


def _flat(values: Any) -> list[Any]:
    if not isinstance(values, (list, tuple)):
        return [values]
    flat: list[Any] = []
    pending = [iter(values)]
    while pending:  # without recursion, as JSON may be nested deeply
        for value in pending[-1]:
            if isinstance(value, (list, tuple)):
                pending.append(iter(value))
                break
            flat.append(value)
        else:
            pending.pop()
    return flat


def _texts(name: str, content: bytes) -> list[bytes]:
    texts, at = [], 0
    while at < len(content):
        if at + LENGTH.size > len(content):
            break
        (length,) = LENGTH.unpack_from(content, at)
        at += LENGTH.size
        texts.append(content[at : at + length])
        at += length
    if at != len(content):
        raise RefusedError(f"the bytes of {shown(name)} end within a text; allowed: texts after their lengths")
    return texts
