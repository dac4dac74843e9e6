"""What a worker tells the first rank."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Stage(IntEnum):
    """How far a rank is with loading; each comes after those before it."""

    STARTED = 0
    OPENED = 1
    JOINED = 2
    LOADED = 3

    @property
    def done(self) -> str:
        """What a rank has done that is here."""
        return ("has started", "has opened its device", "has joined the others", "has loaded")[self]

    @property
    def missing(self) -> str:
        """What a rank that is here has not done yet."""
        return ("has not opened its device", "has not joined the others", "has not loaded", "lacks nothing")[self]


@dataclass(frozen=True)
class Reached:
    """A worker has come to a stage of loading."""

    stage: Stage


@dataclass(frozen=True)
class Done:
    """A worker has run as many commands as ``number``."""

    number: int


@dataclass(frozen=True)
class Failed:
    """A worker ended with an error."""

    error: str
