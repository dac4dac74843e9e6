"""``glm_image_stream``: runs both stages for a request, and tells meanwhile how far it is."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import Any

import triton_python_backend_utils as pb_utils

from glm_image.config.instance import position
from glm_image.errors import QueueFullError, UnavailableError
from glm_image.lifecycle.events import DitSecondsByKind
from glm_image.serving import bytes_tensors
from glm_image.serving.errors import triton_error
from glm_image.serving.exit import end_process
from glm_image.serving.stream_session import StreamSession
from glm_image.telemetry.heartbeat import Heartbeat

logger = logging.getLogger(__name__)

MAX_STREAMS = 128
"""Streams at once; each has threads of its own. More than the first stage lets wait by default."""


class StreamBackend:
    """The decoupled Triton Python model beside the ensemble.

    Triton ends it only after the last response of every stream.
    """

    def initialize(self, args: Mapping[str, str]) -> None:
        """Prepares for requests."""
        bytes_tensors.install()
        logging.basicConfig(level=logging.INFO, format=f"%(asctime)s {args['model_instance_name']} %(message)s")
        self._times = DitSecondsByKind()
        self._changed = threading.Condition()
        self._running = 0
        self._drains = False
        index, _ = position(args)
        self._pulse = Heartbeat(f"{args['model_name']}_{index}", hang_seconds=0)
        self._pulse.start(orders={"drain": self._drain})

    def execute(self, requests: list[Any]) -> None:
        """Begins a stream for each request; its responses go out from threads of its own."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._begin(StreamSession(request, sender, self._times))
            except Exception as error:  # whatever it is, the client must get an answer
                made = pb_utils.InferenceResponse(error=triton_error(error))
                sender.send(made, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def finalize(self) -> None:
        """Waits for what streams still have open after their last response, which would outlive the interpreter."""
        with self._changed:
            self._changed.wait_for(lambda: self._running == 0)
        self._pulse.close()
        end_process()

    def _drain(self) -> None:
        """Refuses requests that Triton has yet to hand over, and reports when the last stream has ended."""
        with self._changed:
            self._drains = True
            self._report_drained()

    def _report_drained(self) -> None:
        if self._drains and self._running == 0:
            self._pulse.mark_drained()

    def _begin(self, stream: StreamSession) -> None:
        with self._changed:
            if self._drains:
                raise UnavailableError("the server is stopping")
            if self._running >= MAX_STREAMS:
                raise QueueFullError(f"glm_image_stream has {MAX_STREAMS} streams, as many as may be; try again later")
            self._running += 1
        threading.Thread(target=self._run, args=(stream,), name="stream", daemon=True).start()

    def _run(self, stream: StreamSession) -> None:
        try:
            stream.run()
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()
                self._report_drained()
