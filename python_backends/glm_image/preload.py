"""Imports what takes seconds, without a part of it that nothing here uses."""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

logger = logging.getLogger(__name__)

COMPILER = "torch._dynamo"
"""The front end of torch.compile: a sixth of what the imports of an engine take."""


def preload(*modules: str) -> None:
    """Imports modules that import transformers or diffusers, and so would import torch's compiler to mark functions.

    Where nothing has imported the compiler yet, their marks are left out. Whoever compiles later imports it as ever,
    and compiles through what is not marked.

    Raises:
        ImportError: a module cannot be imported.
    """
    import torch  # noqa: F401, PLC0415

    if COMPILER not in sys.modules:
        with _without_compiler():
            try:
                _import_all(modules)
            except Exception as error:  # another version wants more of the compiler than its marks
                logger.info("%s is imported after all: %s", COMPILER, error)
    _import_all(modules)


def _import_all(modules: tuple[str, ...]) -> None:
    for module in modules:
        importlib.import_module(module)


@contextlib.contextmanager
def _without_compiler() -> Iterator[None]:
    sys.modules[COMPILER] = _marks()
    try:
        yield
    finally:
        del sys.modules[COMPILER]


def _marks() -> ModuleType:
    """Returns a module with the compiler's marks, which leave a function as it is, and with its own submodules."""
    marks: Any = ModuleType(COMPILER)
    marks.__path__ = [str(Path(folder) / "_dynamo") for folder in sys.modules["torch"].__path__]
    marks.allow_in_graph = marks.assume_constant_result = _unmarked
    marks.disable = _disable
    return marks  # type: ignore[no-any-return]


def _unmarked(marked: Any) -> Any:
    return marked


def _disable(marked: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Any:
    return _unmarked if marked is None else marked
