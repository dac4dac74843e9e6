"""What the first stage hears of the second's work, for ``admission: gathered``."""

from __future__ import annotations

import logging
from pathlib import Path

from glm_image import bus
from glm_image.ar.admission import Gathered
from glm_image.backlog import TOPIC, Backlog
from glm_image.job import Job
from glm_image.run_directory import VARIABLE
from glm_image.serving.answer import Answer
from glm_image.serving.instance import Instance

logger = logging.getLogger(__name__)

PAINTERS = "glm_dit_"
"""How the names of the second stage's instances begin."""


class Gathering:
    """Follows the painting instances, and counts what is handed on to them.

    Args:
        folder: the bus's.

    Attributes:
        admission: lets sequences in by what is heard.
    """

    def __init__(self, folder: Path) -> None:
        self._backlog = Backlog()
        self._follower = bus.Follower(folder, PAINTERS, TOPIC, self._backlog.hear)
        self.admission = Gathered(self._backlog)

    @classmethod
    def of(cls, instance: Instance) -> Gathering | None:
        """Returns what an instance's parameters ask for; None where sequences are let in at once."""
        if instance.parameters["admission"] != "gathered":
            return None
        folder = bus.folder()
        if folder is None:
            logger.warning(
                "admission is gathered, but %s is not set, so nothing is heard of glm_dit: requests are let in at once",
                VARIABLE,
            )
            return None
        return cls(folder)

    def expect(self, job: Job, pictures: int, answer: Answer) -> None:
        """Takes a request, to be counted when its tokens are handed on."""
        self._follower.look()

        def hand_on(error: BaseException | None) -> None:
            if error is None:
                self._backlog.hand_on(job.arrived_ns, pictures)

        answer.when_ended(hand_on)

    def close(self) -> None:
        """Hears no more."""
        self._follower.close()
