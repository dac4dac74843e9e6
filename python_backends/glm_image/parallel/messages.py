"""Messages from a worker process to rank 0."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

_LABELS = {
    "STARTED": "started",
    "OPENED": "opened its device",
    "JOINED": "joined the process group",
    "LOADED": "loaded",
}


class LoadStage(IntEnum):
    """The stages of a rank's start, in order."""

    STARTED = 0
    OPENED = 1
    JOINED = 2
    LOADED = 3

    @property
    def label(self) -> str:
        """The stage as log lines and errors name it, after "has" or "has not"."""
        return _LABELS[self.name]

    @property
    def next(self) -> LoadStage:
        """The stage after this one.

        Raises:
            ValueError: there is none after ``LOADED``.
        """
        return LoadStage(self + 1)


@dataclass(frozen=True)
class Reached:
    """A worker has reached a stage of its start."""

    stage: LoadStage


@dataclass(frozen=True)
class Done:
    """A worker has run its first ``number`` commands."""

    number: int


@dataclass(frozen=True)
class Failed:
    """A worker ended with an error."""

    error: str
