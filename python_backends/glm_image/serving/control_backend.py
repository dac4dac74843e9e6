"""``glm_control``: cancels requests and reports their state."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from glm_image.config.instance import position
from glm_image.errors import InvalidInputError, UnavailableError
from glm_image.ipc.protocol import socket_directory
from glm_image.ipc.run_directory import RUN_DIRECTORY_VARIABLE
from glm_image.lifecycle.call_header import CallHeader
from glm_image.lifecycle.control import control
from glm_image.serving import bytes_tensors
from glm_image.serving.exit import end_process
from glm_image.serving.responder import Responder
from glm_image.serving.tensors import Inputs, text_array
from glm_image.telemetry.heartbeat import Heartbeat
from glm_image.telemetry.logs import start_logging

THREADS: Final = 4
"""Concurrent calls: an instance that hangs keeps one waiting."""


class ControlBackend:
    """The Triton Python model that reaches all instances of the others."""

    def initialize(self, args: Mapping[str, str]) -> None:
        bytes_tensors.install()
        start_logging(args["model_instance_name"])
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="control")
        index, _ = position(args)
        self._heartbeat = Heartbeat(f"{args['model_name']}_{index}", hang_seconds=0)
        self._heartbeat.start()

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            responder = Responder(request)
            with responder.errors_sent():
                CallHeader.read(request)
                inputs = Inputs(request)
                request_id, action = (_required(inputs, name) for name in ("request_id", "action"))
                self._threads.submit(self._call, responder, request_id, action)

    def finalize(self) -> None:
        self._heartbeat.close()
        self._threads.shutdown(wait=True)
        end_process()

    def _call(self, responder: Responder, request_id: str, action: str) -> None:
        with responder.errors_sent():
            folder = socket_directory()
            if folder is None:
                raise UnavailableError(
                    f"this Triton was started without {RUN_DIRECTORY_VARIABLE}, the folder in which glm_control finds "
                    "the other models: start it with serve, or name a folder of mode 0700 there"
                )
            responder.send({"result": text_array(json.dumps(control(folder, request_id, action)))})


def _required(inputs: Inputs, name: str) -> str:
    text = inputs.text(name)
    if text is None:
        raise InvalidInputError(f"{name} is missing; allowed: a text")
    return text
