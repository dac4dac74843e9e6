"""The base of the commands that an engine's executor runs on every rank."""

from __future__ import annotations

from typing import Generic, TypeVar

R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


class Command(Generic[R_co]):
    """Plain data that every rank runs in the same order; ``R_co`` is the type of its result."""
