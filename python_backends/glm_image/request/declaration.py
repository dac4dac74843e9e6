"""Configuration parameters declared as dataclass fields: a field's metadata says how its text is read and written.

``max_queue: int = whole(64, "Requests that may wait.", low=1)`` is the whole declaration of a parameter: ``read`` and
``write`` convert between the dataclass and the strings of ``config.pbtxt``, and ``glm_image.config.docs`` renders the
documentation from it. Other fields of the dataclass are no parameters.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Final, TypeVar

from glm_image.errors import ConfigurationError

C = TypeVar("C")
N = TypeVar("N", int, float)
T = TypeVar("T")

PARAMETER: Final = "parameter"
GROUP: Final = "group"


@dataclass(frozen=True)
class Parameter:
    """How a parameter is written, and what it means.

    Attributes:
        help: Markdown for the documentation; links are relative to ``docs/``.
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
        """Returns the value of ``text``.

        Raises:
            ConfigurationError: names the parameter, its value and what is allowed.
        """
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
        """Returns the text of a value."""
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
    return field(default_factory=kind, metadata={GROUP: Group(kind, prefix)})


def switched_group(kind: type[C], prefix: str, help_text: str, *, on: str) -> C | None:
    """Declares an optional dataclass of parameters, switched by a parameter whose values are ``none`` and ``on``."""
    switch = Parameter(help_text, f"none, {on}", {"none": False, on: True})
    return field(default=None, metadata={GROUP: Group(kind, prefix, switch)})


def declare(default: T, parameter: Parameter) -> T:
    """Declares a parameter as a field."""
    return field(default=default, metadata={PARAMETER: parameter})


def text(default: str, help_text: str, *, allowed: str) -> str:
    """Declares a text that is checked elsewhere; ``allowed`` is for the documentation."""
    return declare(default, Parameter(help_text, allowed, parse=str))


def choice(default: str, values: Sequence[str], help_text: str, declined: Mapping[str, str] | None = None) -> str:
    """Declares one of several texts."""
    words = {value: value for value in values}
    return declare(default, Parameter(help_text, ", ".join(values), words, declined=declined or {}))


def switch(default: bool, help_text: str) -> bool:
    """Declares ``false`` or ``true``."""
    return declare(default, Parameter(help_text, "false, true", {"false": False, "true": True}))


def whole(default: T, help_text: str, *, low: int, none: bool = False, unlimited: bool = False, unit: str = "") -> T:
    """Declares a whole number of at least ``low``.

    Args:
        default: the default.
        help_text: what it means.
        low: the smallest.
        none: whether ``none`` is allowed too, for None.
        unlimited: whether -1 is allowed too.
        unit: of the number.
    """
    words = {"none": None} if none else {"-1": -1} if unlimited else {}
    allowed = f"{'none, or ' * none}a whole number of at least {low}{', or -1 (no limit)' * unlimited}"
    return declare(default, Parameter(help_text, allowed, words, lambda number: _whole(number, low), unit=unit))


def whole_numbers(default: tuple[int, ...], help_text: str) -> tuple[int, ...]:
    """Declares a list of whole numbers such as ``8`` or ``[1, 8]``, as a tuple."""

    def write_numbers(value: tuple[int, ...]) -> str:
        return ",".join(map(str, value))

    allowed = "empty, or whole numbers with commas between"
    return declare(default, Parameter(help_text, allowed, parse=_whole_numbers, write=write_numbers))


def number(default: T, help_text: str, *, auto: bool = False, unit: str = "") -> T:
    """Declares a number of at least 0; with ``auto`` that word is allowed too, for None."""
    words = {"auto": None} if auto else {}
    allowed = f"{'auto, or ' * auto}a number of at least 0"
    return declare(default, Parameter(help_text, allowed, words, _number, "{:g}".format, unit))


def positive(default: N, help_text: str, *, unit: str = "") -> N:
    """Declares a number above 0 of the default's type."""
    kind = type(default)

    def parse(number: str) -> float:
        value = kind(number)
        if not 0 < value < math.inf:
            raise ValueError
        return value

    write = "{:g}".format if kind is float else str
    return declare(default, Parameter(help_text, "a number above 0", parse=parse, write=write, unit=unit))


def share(default: float, help_text: str) -> float:
    """Declares a number above 0 and at most 1."""

    def parse(number: str) -> float:
        value = float(number)
        if not 0 < value <= 1:
            raise ValueError
        return value

    return declare(default, Parameter(help_text, "above 0, at most 1", parse=parse, write="{:g}".format))


def parameters(kind: type, prefix: str = "") -> Iterator[tuple[str, Parameter, str]]:
    """Yields each parameter of a dataclass and of its groups: name, declaration and the text of its default."""
    for item in fields(kind):
        if PARAMETER in item.metadata:
            declared: Parameter = item.metadata[PARAMETER]
            yield prefix + item.name, declared, declared.text(_default(item))
        elif GROUP in item.metadata:
            inner: Group = item.metadata[GROUP]
            if inner.switch is not None:
                yield prefix + item.name, inner.switch, inner.switch.text(_default(item) is not None)
            yield from parameters(inner.kind, prefix + inner.prefix)


def read(kind: type[C], given: Mapping[str, str], prefix: str = "") -> C:
    """Returns a dataclass of parameters; those that are not given have their defaults.

    Raises:
        ConfigurationError: names the parameter, its value and what is allowed.
    """
    values: dict[str, Any] = {}
    for item in fields(kind):  # type: ignore[arg-type] # it is a dataclass
        name = prefix + item.name
        if PARAMETER in item.metadata:
            if name in given:
                values[item.name] = item.metadata[PARAMETER].read(name, given[name])
        elif GROUP in item.metadata:
            inner: Group = item.metadata[GROUP]
            values[item.name] = read(inner.kind, given, prefix + inner.prefix)
            if inner.switch is not None and not inner.switch.read(name, given.get(name, "none")):
                values[item.name] = None
    return kind(**values)


def write(settings: Any, prefix: str = "") -> dict[str, str]:
    """Returns the text of every parameter of a dataclass instance; those of a group that is off have their defaults."""
    texts: dict[str, str] = {}
    for item in fields(settings):
        value = getattr(settings, item.name)
        if PARAMETER in item.metadata:
            texts[prefix + item.name] = item.metadata[PARAMETER].text(value)
        elif GROUP in item.metadata:
            inner: Group = item.metadata[GROUP]
            if inner.switch is not None:
                texts[prefix + item.name] = inner.switch.text(value is not None)
            texts |= write(inner.kind() if value is None else value, prefix + inner.prefix)
    return texts


def check_names(kind: type, given: Mapping[str, str]) -> None:
    """Refuses parameters that are not declared, except Triton's own, whose names are in capitals.

    Raises:
        ConfigurationError: names the parameter and lists the allowed names.
    """
    known = [name for name, _, _ in parameters(kind)]
    for name in given:
        if name not in known and not name.isupper():
            raise ConfigurationError(f"parameter {name!r} is not known; allowed: {', '.join(known)}")


def _default(item: Field[Any]) -> Any:
    if item.default_factory is not MISSING:
        return item.default_factory()
    return item.default


def _whole(number: str, low: int) -> int:
    if not re.fullmatch(r"\d{1,9}", number) or int(number) < low:
        raise ValueError
    return int(number)


def _whole_numbers(numbers: str) -> tuple[int, ...]:
    stripped = numbers.strip()
    inner = stripped[1:-1] if stripped.startswith("[") and stripped.endswith("]") else stripped
    return tuple(_whole(part.strip(), 0) for part in inner.split(",")) if inner.strip() else ()


def _number(number: str) -> float:
    value = float(number)
    if not 0 <= value < math.inf:
        raise ValueError
    return value
