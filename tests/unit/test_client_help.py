"""``help()`` of the client: every public class, method and function explains itself."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import glm_image
import glm_image_client
from glm_image_client import AsyncGlmImageClient, GlmImageClient
from glm_image_client.options import GenerateOptions, PaintOptions, PriorOptions, StreamOptions


def public_classes() -> list[type]:
    found = (getattr(glm_image_client, name) for name in glm_image_client.__all__)
    return [item for item in found if inspect.isclass(item)]


def public_methods() -> Iterator[Any]:
    for kind in public_classes():
        for name, method in inspect.getmembers(kind, callable):
            is_own = name in vars(kind) and method.__module__.startswith("glm_image_client")
            if is_own and (not name.startswith("_") or name == "__call__"):
                yield pytest.param(method, id=method.__qualname__)


@pytest.mark.parametrize("kind", public_classes())
def test_every_class_has_a_docstring(kind: type) -> None:
    assert len(kind.__doc__ or "") > 20


@pytest.mark.parametrize("method", public_methods())
def test_help_of_a_method_stands_by_itself(method: Callable[..., Any]) -> None:
    documentation = inspect.getdoc(method)
    assert documentation
    assert not documentation.startswith("See ")
    parameters = set(inspect.signature(method).parameters) - {"self"}
    if len(parameters) > 1:  # a single one is described by the first sentence
        described = set(re.findall(r"^    (\w+): \S", documentation.partition("Args:")[2], re.MULTILINE))
        assert parameters <= described


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("generate", GenerateOptions),
        ("stream", StreamOptions),
        ("prior_tokens", PriorOptions),
        ("paint", PaintOptions),
    ],
)
def test_methods_show_their_options(name: str, options: Any) -> None:
    signatures = [inspect.signature(getattr(client, name)) for client in (GlmImageClient, AsyncGlmImageClient)]
    for signature in signatures:
        assert set(options.__annotations__) <= set(signature.parameters)
        assert "options" not in signature.parameters
    assert signatures[0].parameters == signatures[1].parameters
    assert str(signatures[0].parameters["seed"]) == "seed: int | None = None"


def test_version_is_that_of_the_server() -> None:
    assert glm_image_client.__version__ == glm_image.__version__
