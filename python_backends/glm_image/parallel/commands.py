"""The base of the commands that an engine's executor runs on every rank."""

from __future__ import annotations

from typing import Generic, TypeVar

R = TypeVar("R", covariant=True)


class Command(Generic[R]):
    """Plain data that every rank runs in the same order; ``R`` is the type of its result."""
