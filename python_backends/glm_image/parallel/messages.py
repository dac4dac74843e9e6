"""What a worker tells the first rank."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Loaded:
    """A worker has loaded its executor."""


@dataclass(frozen=True)
class Done:
    """A worker has run as many commands as ``number``."""

    number: int


@dataclass(frozen=True)
class Failed:
    """A worker ended with an error."""

    error: str
