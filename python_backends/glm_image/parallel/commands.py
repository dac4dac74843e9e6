"""What rank 0 and the workers send each other.

Not in ``worker``: that module is ``__main__`` in a worker, and rank 0 could not unpickle its classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Generic, TypeVar

R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


class Command(Generic[R_co]):
    """Plain data that every rank runs in the same order; ``R_co`` is the type of its result."""


class LoadStage(IntEnum):
    """The stages of a rank's start, in order."""

    STARTED = 0
    OPENED = 1
    JOINED = 2
    LOADED = 3

    @property
    def label(self) -> str:
        """Follows "has" or "has not" in log lines and errors."""
        return ("started", "opened its device", "joined the process group", "loaded")[self]


@dataclass(frozen=True)
class Reached:
    """Message to rank 0: a stage of the start is complete."""

    stage: LoadStage


@dataclass(frozen=True)
class Done:
    """Message to rank 0: one more command has run."""


@dataclass(frozen=True)
class Failed:
    """Message to rank 0: this rank ends with an error."""

    error: str
