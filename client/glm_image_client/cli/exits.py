"""Exit codes, and the errors that go with them."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from typing import Any, Final

from glm_image_client.errors import BadArgumentError, GlmImageClientError, RefusedError, UnreachableError, printable
from glm_image_client.options import OPTIONS

EXIT_REFUSED: Final = 2
EXIT_UNREACHABLE: Final = 3
EXIT_SERVER: Final = 4
EXIT_INTERRUPTED: Final = 130


def _flags() -> dict[str, str]:
    declared = {name: option.input.flags[-1] for name, option in OPTIONS.items() if option.input.flags}
    own = {name: f"--{name.replace('_', '-')}" for name in ("image", "output", "request_id", "timeout", "url")}
    return {**declared, **own}


FLAGS: Final[Mapping[str, str]] = _flags()
"""The flag that sets a value, by the name with which an error begins."""

_NAME: Final = re.compile(r"\w+")


def exit_code_of(error: GlmImageClientError) -> int:
    """Returns the exit code that goes with an error."""
    if isinstance(error, (BadArgumentError, RefusedError)):
        return EXIT_REFUSED
    return EXIT_UNREACHABLE if isinstance(error, UnreachableError) else EXIT_SERVER


def flag_message(message: str) -> str:
    """Returns an error's message with the flag in place of the name of the input that it begins with."""
    found = _NAME.match(message)
    name = found[0] if found else ""
    if name in ("height", "width"):
        return f"--size: {message}"
    return FLAGS[name] + message[len(name) :] if name in FLAGS else message


def print_error(error: GlmImageClientError, as_json: bool) -> None:
    """Prints an error as a sentence on standard error, or as a JSON object on standard output."""
    message = flag_message(str(error))
    if as_json:
        _print_json(message, type(error).__name__, exit_code_of(error))
    else:
        print(printable(f"glm-image: {message}"), file=sys.stderr)


def print_usage_error(error: Any, as_json: bool) -> int:
    """Prints typer's error about the arguments and returns its exit code."""
    if as_json:
        _print_json(error.format_message(), "UsageError", error.exit_code)
    else:
        error.show()
    return int(error.exit_code)


def _print_json(message: str, kind: str, code: int) -> None:
    print(json.dumps({"error": message, "kind": kind, "exit_code": code}, ensure_ascii=False))
