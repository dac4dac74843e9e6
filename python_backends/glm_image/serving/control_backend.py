"""``glm_control``: cancels requests and says where they are."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from glm_image.errors import InvalidInputError, UnavailableError
from glm_image.ipc.protocol import socket_directory
from glm_image.ipc.run_directory import RUN_DIRECTORY_VARIABLE
from glm_image.lifecycle.control import control
from glm_image.serving import bytes_tensors
from glm_image.serving.exit import end_process
from glm_image.serving.responder import Responder
from glm_image.serving.tensors import Inputs, text_array

THREADS = 4
"""Questions at once: an instance that stands still keeps one waiting."""


class ControlBackend:
    """The Triton Python model that reaches all instances of the others."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Makes the threads that ask."""
        bytes_tensors.install()
        logging.basicConfig(level=logging.INFO, format=f"%(asctime)s {args['model_instance_name']} %(message)s")
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="control")

    def execute(self, requests: list[Any]) -> None:
        """Hands requests to threads; each is answered when all instances have answered."""
        for request in requests:
            answer = Responder(request)
            try:
                inputs = Inputs(request)
                asked = [_required(inputs, name) for name in ("request_id", "action")]
                self._threads.submit(self._answer, answer, *asked)
            except Exception as error:  # whatever it is, the client must get an answer
                answer.fail(error)

    def finalize(self) -> None:
        """Waits for the last answers."""
        self._threads.shutdown(wait=True)
        end_process()

    def _answer(self, answer: Responder, request_id: str, action: str) -> None:
        try:
            folder = socket_directory()
            if folder is None:
                raise UnavailableError(
                    f"this Triton was started without {RUN_DIRECTORY_VARIABLE}, the folder in which glm_control finds the other "
                    "models: start it with serve, or name a folder of mode 0700 there"
                )
            answer.send({"result": text_array(json.dumps(control(folder, request_id, action)))})
        except Exception as error:  # whatever it is, the client must get an answer
            answer.fail(error)


def _required(inputs: Inputs, name: str) -> str:
    text = inputs.text(name)
    if text is None:
        raise InvalidInputError(f"{name} is missing; allowed: a text")
    return text
