"""Configuration parameters declared as dataclass fields: a field's metadata says how its text is read and written.

``max_queue: int = whole(64, "Requests that may wait.", low=1)`` is the whole declaration of a parameter: a default, its
meaning in Markdown for the documentation (links are relative to ``docs/``), and what is allowed. ``read`` and ``write``
convert between the dataclass and the strings of ``config.pbtxt``; ``glm_image.config.docs`` renders the documentation.
Other fields of the dataclass are no parameters.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any, Final, TypeVar

from glm_image.errors import ConfigurationError

C = TypeVar("C")
N = TypeVar("N", int, float)
T = TypeVar("T")

MAX_NUMBER: Final = 1e6
"""Seconds below it fit the heartbeat file's nanoseconds."""

DECLARED: Final = "declared"


@dataclass(frozen=True)
class Parameter:
    """How a parameter is written, and what it means.

    Attributes:
        help: what it means.
        allowed: the allowed values as error messages list them.
        words: texts with a value of their own, such as ``none``.
        parse: reads any other text, raising ValueError; None = only ``words`` are allowed.
        write: the inverse of ``parse``.
        unit: of a number.
        declined: values that other servers have, and why they are not allowed here.
    """

    help: str
    allowed: str
    words: Mapping[str, Any] = field(default_factory=dict)
    parse: Callable[[str], Any] | None = None
    write: Callable[[Any], str] = str
    unit: str = ""
    declined: Mapping[str, str] = field(default_factory=dict)

    def read(self, name: str, text: str) -> Any:
        if text in self.words:
            return self.words[text]
        try:
            if self.parse is not None:
                return self.parse(text)
        except ValueError:
            pass
        reason = f"; {self.declined[text]}" if text in self.declined else ""
        raise ConfigurationError(f"{name} is {text!r}; allowed: {self.allowed}{reason}")

    def text(self, value: Any) -> str:
        for word, meaning in self.words.items():
            if type(meaning) is type(value) and meaning == value:
                return word
        return self.write(value)


@dataclass(frozen=True)
class Group:
    """A dataclass of parameters that is a field of another one.

    Attributes:
        kind: the dataclass.
        prefix: begins the names of its parameters.
        switch: the parameter that turns the group on, named as the field; off, the field is None. Its parameters are
            checked in either case.
    """

    kind: type
    prefix: str = ""
    switch: Parameter | None = None


def group(kind: type[C], prefix: str = "") -> C:
    """Declares a dataclass of parameters as a field."""
    return field(default_factory=kind, metadata={DECLARED: Group(kind, prefix)})


def switched_group(kind: type[C], prefix: str, help_text: str, *, on: str) -> C | None:
    """Declares an optional dataclass of parameters, switched by a parameter whose values are ``none`` and ``on``."""
    switch = Parameter(help_text, f"none, {on}", {"none": False, on: True})
    return field(default=None, metadata={DECLARED: Group(kind, prefix, switch)})


def declare(default: T, parameter: Parameter) -> T:
    """Declares a parameter as a field; the functions below do so for the usual kinds."""
    return field(default=default, metadata={DECLARED: parameter})


def text(default: str, help_text: str, *, allowed: str) -> str:
    """Declares a text that is checked elsewhere; ``allowed`` is for the documentation."""
    return declare(default, Parameter(help_text, allowed, parse=str))


def optional(help_text: str, *, allowed: str, pattern: str = ".+") -> str:
    """Declares a text that matches ``pattern``, or ``none``, the default, which is ""."""

    def parse(given: str) -> str:
        if not re.fullmatch(pattern, given):
            raise ValueError
        return given

    return declare("", Parameter(help_text, f"none, or {allowed}", {"none": ""}, parse))


def choice(default: str, values: Sequence[str], help_text: str, declined: Mapping[str, str] | None = None) -> str:
    """Declares one of several texts."""
    words = {value: value for value in values}
    return declare(default, Parameter(help_text, ", ".join(values), words, declined=declined or {}))


def switch(default: bool, help_text: str) -> bool:
    """Declares ``false`` or ``true``."""
    return declare(default, Parameter(help_text, "false, true", {"false": False, "true": True}))


def whole(
    default: T,
    help_text: str,
    *,
    low: int,
    high: int | None = None,
    none: bool = False,
    unlimited: bool = False,
    unit: str = "",
) -> T:
    """Declares a whole number of at least ``low``; ``none`` allows that word for None, ``unlimited`` allows -1."""
    words = {"none": None} if none else {"-1": -1} if unlimited else {}
    allowed = f"{'none, or ' * none}a whole number {_range(low, high)}{', or -1 (no limit)' * unlimited}"
    return declare(default, Parameter(help_text, allowed, words, lambda number: _whole(number, low, high), unit=unit))


def whole_numbers(default: tuple[int, ...], help_text: str) -> tuple[int, ...]:
    """Declares a list of whole numbers such as ``8`` or ``[1, 8]``, as a tuple."""
    allowed = "empty, or whole numbers with commas between"
    return declare(
        default, Parameter(help_text, allowed, parse=_whole_numbers, write=lambda numbers: ",".join(map(str, numbers)))
    )


def number(default: T, help_text: str, *, auto: bool = False, unit: str = "") -> T:
    """Declares a number of at least 0 and below a million; with ``auto`` that word is allowed too, for None."""
    parse = _parser(float, lambda value: 0 <= value < MAX_NUMBER)
    allowed = f"{'auto, or ' * auto}a number of at least 0"
    return declare(default, Parameter(help_text, allowed, {"auto": None} if auto else {}, parse, "{:g}".format, unit))


def positive(default: N, help_text: str, *, unit: str = "") -> N:
    """Declares a number above 0 of the default's type."""
    kind = type(default)
    parse = _parser(kind, lambda value: 0 < value < math.inf)
    write = "{:g}".format if kind is float else str
    return declare(default, Parameter(help_text, "a number above 0", parse=parse, write=write, unit=unit))


def share(default: float, help_text: str) -> float:
    """Declares a number above 0 and at most 1."""
    parse = _parser(float, lambda value: 0 < value <= 1)
    return declare(default, Parameter(help_text, "above 0, at most 1", parse=parse, write="{:g}".format))


def parameters(kind: type, prefix: str = "") -> Iterator[tuple[str, Parameter, str]]:
    """Yields each parameter of a dataclass and of its groups: name, declaration and the text of its default."""
    for item, declared in _declarations(kind):
        name = prefix + item.name
        if isinstance(declared, Parameter):
            yield name, declared, declared.text(item.default)
            continue
        if declared.switch is not None:
            yield name, declared.switch, declared.switch.text(item.default is not None)
        yield from parameters(declared.kind, prefix + declared.prefix)


def read(kind: type[C], given: Mapping[str, str], prefix: str = "") -> C:
    """Returns a dataclass of parameters; those that are not given have their defaults.

    Raises:
        ConfigurationError: names the parameter, its value and what is allowed.
    """
    values: dict[str, Any] = {}
    for item, declared in _declarations(kind):
        name = prefix + item.name
        if isinstance(declared, Group):
            values[item.name] = read(declared.kind, given, prefix + declared.prefix)
            if declared.switch is not None and not declared.switch.read(name, given.get(name, "none")):
                values[item.name] = None
        elif name in given:
            values[item.name] = declared.read(name, given[name])
    return kind(**values)


def write(settings: Any, prefix: str = "") -> dict[str, str]:
    """Returns the text of every parameter of a dataclass instance; those of a group that is off have their defaults."""
    texts: dict[str, str] = {}
    for item, declared in _declarations(type(settings)):
        name, value = prefix + item.name, getattr(settings, item.name)
        if isinstance(declared, Parameter):
            texts[name] = declared.text(value)
            continue
        if declared.switch is not None:
            texts[name] = declared.switch.text(value is not None)
        texts |= write(declared.kind() if value is None else value, prefix + declared.prefix)
    return texts


def check_names(kind: type, given: Mapping[str, str]) -> None:
    """Refuses parameters that are not declared, except Triton's own, whose names are in capitals."""
    known = [name for name, _, _ in parameters(kind)]
    for name in given:
        if name not in known and not name.isupper():
            raise ConfigurationError(f"parameter {name!r} is not known; allowed: {', '.join(known)}")


def _declarations(kind: type) -> Iterator[tuple[Field[Any], Parameter | Group]]:
    for item in fields(kind):
        if DECLARED in item.metadata:
            yield item, item.metadata[DECLARED]


def _range(low: int, high: int | None) -> str:
    return f"of at least {low}" if high is None else f"from {low} to {high}"


def _whole(number: str, low: int, high: int | None = None) -> int:
    if not re.fullmatch(r"\d{1,9}", number) or not low <= int(number) <= (math.inf if high is None else high):
        raise ValueError
    return int(number)


def _whole_numbers(numbers: str) -> tuple[int, ...]:
    stripped = numbers.strip()
    inner = stripped[1:-1] if stripped.startswith("[") and stripped.endswith("]") else stripped
    return tuple(_whole(part.strip(), 0) for part in inner.split(",")) if inner.strip() else ()


def _parser(kind: type[N], is_allowed: Callable[[N], bool]) -> Callable[[str], N]:
    def parse(number: str) -> N:
        value = kind(number)
        if not is_allowed(value):
            raise ValueError
        return value

    return parse
