"""Tensors of the models, and request fields declared as dataclass fields that are read from a tensor each.

``num_images: int = tensor(1, "INT32", Range(1, "num_images"), "Images to generate.")`` is the whole declaration of a
request field: the models' configuration, the reader of requests, the check against the limits and the documentation are
derived from it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Final, TypeVar

from glm_image.errors import InvalidInputError

if TYPE_CHECKING:
    from glm_image.request.limits import Limits

TENSOR: Final = "tensor"

_INTEGER: Final = re.compile(r"[+-]?[0-9]{1,10}")

T = TypeVar("T")


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a model.

    Attributes:
        name: its name.
        data_type: Triton's name of it, without ``TYPE_``; STRING is KServe's BYTES.
        dims: -1 = any.
        optional: whether an input may be omitted.
        help: Markdown for the documentation.
        is_text: of a STRING, whether its bytes are UTF-8.
        is_parameter: whether the request parameter of its name counts where the input is omitted.
    """

    name: str
    data_type: str
    dims: tuple[int, ...] = (1,)
    optional: bool = False
    help: str = ""
    is_text: bool = True
    is_parameter: bool = False


@dataclass(frozen=True)
class Range:
    """The numbers from ``low``, or above it, to ``high``; a text names a limit. NaN is not in the range."""

    low: float | str
    high: float | str = math.inf
    excludes_low: bool = False

    def allowed(self, limits: Limits) -> str:
        low, high = self._bounds(limits)
        if self.excludes_low:
            return f"above {low:g}, at most {high:g}"
        return f"{low:g} and above" if high == math.inf else f"{low:g} to {high:g}"

    def holds(self, value: Any, limits: Limits) -> bool:
        low, high = self._bounds(limits)
        return bool((low < value if self.excludes_low else low <= value) and value <= high)

    def _bounds(self, limits: Limits) -> tuple[float, float]:
        low, high = (getattr(limits, end) if isinstance(end, str) else end for end in (self.low, self.high))
        return float(low), float(high)


@dataclass(frozen=True)
class Choice:
    """One of several texts."""

    values: tuple[str, ...]

    def allowed(self, _: Limits) -> str:
        return ", ".join(self.values)

    def holds(self, value: Any, _: Limits) -> bool:
        return value in self.values


@dataclass(frozen=True)
class CheckedElsewhere:
    """Values with a check of their own; ``{NAME}`` in the text stands for a limit."""

    text: str

    def allowed(self, limits: Limits) -> str:
        return self.text.format(**asdict(limits))

    def holds(self, _: Any, __: Limits) -> bool:
        return True


Allowed = Range | Choice | CheckedElsewhere


@dataclass(frozen=True)
class RequestField:
    """A field of a request: the name of the dataclass field, its tensor, and its default in the documentation."""

    attribute: str
    spec: TensorSpec
    allowed: Allowed
    default: str


def tensor_metadata(
    data_type: str,
    allowed: Allowed,
    help_text: str,
    *,
    shown: str | None = None,
    name: str | None = None,
    dims: tuple[int, ...] = (1,),
    is_text: bool = True,
    is_parameter: bool = False,
) -> dict[str, Any]:
    """Returns the metadata of a request field.

    Args:
        data_type: as in ``TensorSpec``.
        allowed: a ``Range`` or ``Choice`` that is checked, or a text.
        help_text: Markdown for the documentation.
        shown: the default as the documentation gives it; None = the field's default.
        name: the tensor's name; None = the field's.
        dims: -1 = any.
        is_text: as in ``TensorSpec``.
        is_parameter: as in ``TensorSpec``.
    """
    spec = TensorSpec(
        name or "", data_type, dims, optional=True, help=help_text, is_text=is_text, is_parameter=is_parameter
    )
    return {TENSOR: (spec, allowed, shown)}


def tensor(default: T, *declaration: Any, **options: Any) -> T:
    """Declares a request field with a default; the other arguments are those of ``tensor_metadata``."""
    return field(default=default, metadata=tensor_metadata(*declaration, **options))


def whole_number_of(value: object, digits: re.Pattern[str]) -> int | None:
    """Returns the whole number that JSON states as an integer, as a float, or as text that ``digits`` matches whole."""
    if type(value) is int:  # a bool is an int too
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and digits.fullmatch(value):
        return int(value)
    return None


def parameter_value(spec: TensorSpec, value: object) -> int | str:
    """Returns the value of a request parameter that takes the place of an input, INT32 or STRING.

    Clients and front ends send numbers as integers, as texts, or as floats.

    Raises:
        InvalidInputError: the parameter cannot be a value of the input.
    """
    if spec.data_type == "STRING":
        if not isinstance(value, str):
            raise InvalidInputError.of(spec.name, value, "text")
        return value
    number = whole_number_of(value, _INTEGER)
    if number is None or not -(2**31) <= number < 2**31:
        raise InvalidInputError.of(spec.name, value, "a signed 32-bit integer")
    return number


def request_fields(kind: type) -> Iterator[RequestField]:
    """Yields the request fields of a dataclass in their order."""
    for item in fields(kind):
        if TENSOR in item.metadata:
            spec, allowed, shown = item.metadata[TENSOR]
            default = shown if shown is not None else f"`{item.default}`" if item.default != "" else '""'
            yield RequestField(item.name, replace(spec, name=spec.name or item.name), allowed, default)


def check_fields(request: Any, limits: Limits) -> None:
    """Checks every request field of a dataclass instance that is not None."""
    for declared in request_fields(type(request)):
        value = getattr(request, declared.attribute)
        if value is not None and not declared.allowed.holds(value, limits):
            raise InvalidInputError.of(declared.spec.name, value, declared.allowed.allowed(limits))
