"""The answers that are still owed, for the day when the engine cannot give them any more."""

from __future__ import annotations

import logging

from glm_image.errors import UnavailableError
from glm_image.serving.exit import end_process
from glm_image.serving.responder import Responder

logger = logging.getLogger(__name__)

EXIT_CODE = 1


class PendingResponses:
    """All answers of an instance that have not been sent."""

    def __init__(self) -> None:
        self._answers: set[Responder] = set()

    def add(self, answer: Responder) -> Responder:
        """Takes note of an answer until it is sent; returns it."""
        self._answers.add(answer)
        answer.when_ended(lambda _: self._answers.discard(answer))
        return answer

    def end_process(self, error: UnavailableError) -> None:
        """Answers all that are open with an error and ends this process, in which the engine may be stuck for ever.

        The server's guard sees the process end, and the server is started anew.
        """
        try:
            for answer in list(self._answers):
                answer.fail(error)
            logger.error("this instance ends: %s", error)
        finally:  # a process that went on would refuse all requests and never be started anew
            end_process(EXIT_CODE)
