"""What a safety hook returns."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final


class Action(str, Enum):
    """What happens to a prompt or an image that was checked."""

    ALLOW = "allow"
    REFUSE = "refuse"
    """The request ends with an error."""
    BLUR = "blur"
    """Of an image: it is returned blurred. Of a prompt: all images of the request are."""


@dataclass(frozen=True)
class Verdict:
    """The result of a check.

    Attributes:
        action: what happens.
        reason: for the request log; the caller does not get it.
    """

    action: Action
    reason: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "action", Action(self.action))  # a hook may give its name


ALLOWED: Final = Verdict(Action.ALLOW)
