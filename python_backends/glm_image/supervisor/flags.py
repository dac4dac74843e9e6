"""Command-line flags declared as dataclass fields."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import field, fields
from typing import Any


def flag(
    help_text: str,
    metavar: str | None = None,
    parse: Callable[[str], Any] = str,
    *,
    flag_default: Any = None,
    const: Any = None,
    **default: Any,
) -> Any:
    """Declares a field that is a flag.

    Args:
        help_text: the flag's help; ``%(default)s`` is its default.
        metavar: the name of its value; None for a switch.
        parse: converts the value.
        flag_default: the flag's default, where it is not the field's.
        const: the value of a flag that is given without one; None = its value is required.
        default: ``default`` or ``default_factory`` of the field; without either the flag is required.
    """
    options: dict[str, Any] = {"help": help_text}
    if metavar is None:
        options["action"] = "store_true"
    else:
        options |= {"metavar": metavar, "type": parse, "required": not default}
        options["default"] = default.get("default") if flag_default is None else flag_default
        if const is not None:
            options |= {"nargs": "?", "const": const}
    return field(**default, metadata=options)


def add_flags(parser: argparse.ArgumentParser, settings: type[Any]) -> None:
    """Adds the flags of a dataclass; its fields without ``flag`` are none."""
    for declared in fields(settings):
        if declared.metadata:
            parser.add_argument(f"--{declared.name.replace('_', '-')}", **declared.metadata)
