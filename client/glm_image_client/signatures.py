"""Signatures and help of the clients' methods, completed at import.

Type checkers read the options of a method from its ``Unpack[...]``. ``help()`` reads the docstring and the signature,
which ``with_options`` completes by each option, and ``documented_by`` copies from the blocking client.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from inspect import Parameter
from typing import Any, Final, TypeVar

from glm_image_client.options import OPTIONS, ArOptions, CommonOptions, DitOptions, PreviewOptions

Method = TypeVar("Method", bound=Callable[..., Any])

_GROUPS: Final = (CommonOptions, ArOptions, DitOptions, PreviewOptions)
_ATTRIBUTE: Final = re.compile(r"^    (\w+): (.*(?:\n     +.*)*)", re.MULTILINE)
_OPTIONS_LINE: Final = re.compile(r"^( *)options: .*(?:\n\1 +.*)*\n", re.MULTILINE)


def with_options(kind: type) -> Callable[[Method], Method]:
    """Replaces a method's ``**options`` in ``help()`` by the options of a typed dictionary."""

    def complete(method: Method) -> Method:
        declared = inspect.signature(method)
        own = [item for item in declared.parameters.values() if item.kind is not Parameter.VAR_KEYWORD]
        options = [
            Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=_annotation(name, declared_as))
            for name, declared_as in kind.__annotations__.items()
        ]
        method.__signature__ = declared.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
        if method.__doc__:
            method.__doc__ = _OPTIONS_LINE.sub(lambda found: _lines(kind, found[1]), method.__doc__)
        return method

    return complete


def documented_by(original: Callable[..., Any]) -> Callable[[Method], Method]:
    """Gives a method the signature and the docstring of another one."""

    def complete(method: Method) -> Method:
        returned = inspect.signature(method).return_annotation
        signature = inspect.signature(original)
        method.__signature__ = signature.replace(return_annotation=returned)  # type: ignore[attr-defined]
        method.__doc__ = original.__doc__
        return method

    return complete


def _annotation(name: str, declared: Any) -> Any:
    return OPTIONS[name].kind if name in OPTIONS else declared.__forward_arg__


def _lines(kind: type, indent: str) -> str:
    return "".join(f"{indent}{name}: {_HELP[name]}\n" for name in kind.__annotations__ if name in _HELP)


def _attributes() -> Iterator[tuple[str, str]]:
    for group in _GROUPS:
        for name, text in _ATTRIBUTE.findall(inspect.getdoc(group) or ""):
            yield name, " ".join(text.split())


_HELP: Final = dict(_attributes())
