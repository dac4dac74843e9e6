"""What the first stage hears of the second's work, for ``admission: gathered``."""

from __future__ import annotations

import logging
from pathlib import Path

from glm_image.ar.admission import BatchAdmission
from glm_image.config.instance import Instance
from glm_image.ipc.protocol import socket_directory
from glm_image.ipc.run_directory import RUN_DIRECTORY_VARIABLE
from glm_image.ipc.subscriber import Subscriber
from glm_image.lifecycle.context import RequestContext
from glm_image.lifecycle.downstream import TOPIC, DitLoad
from glm_image.serving.responder import Responder

logger = logging.getLogger(__name__)

PAINTERS = "glm_dit_"
"""How the names of the second stage's instances begin."""


class AdmissionFeed:
    """Follows the painting instances, and counts what is handed on to them.

    Args:
        folder: the bus's.

    Attributes:
        admission: lets sequences in by what is heard.
    """

    def __init__(self, folder: Path) -> None:
        self._backlog = DitLoad()
        self._follower = Subscriber(folder, PAINTERS, TOPIC, self._backlog.hear)
        self.admission = BatchAdmission(self._backlog)

    @classmethod
    def of(cls, instance: Instance) -> AdmissionFeed | None:
        """Returns what an instance's parameters ask for; None where sequences are let in at once."""
        if instance.parameters["admission"] != "gathered":
            return None
        folder = socket_directory()
        if folder is None:
            logger.warning(
                "admission is gathered, but %s is not set, so nothing is heard of glm_dit: requests are let in at once",
                RUN_DIRECTORY_VARIABLE,
            )
            return None
        return cls(folder)

    def expect(self, context: RequestContext, pictures: int, answer: Responder) -> None:
        """Takes a request, to be counted when its tokens are handed on."""
        self._follower.discover()

        def hand_on(error: BaseException | None) -> None:
            if error is None:
                self._backlog.hand_on(context.arrived_ns, pictures)

        answer.when_ended(hand_on)

    def close(self) -> None:
        """Hears no more."""
        self._follower.close()
