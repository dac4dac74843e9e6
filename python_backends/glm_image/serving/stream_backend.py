"""The models that stream: each runs stages for a request, and reports its progress meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Mapping
from typing import Any, ClassVar, Final

from glm_image.config.instance import position
from glm_image.errors import QueueFullError, UnavailableError
from glm_image.lifecycle.durations import KEPT_KINDS
from glm_image.lifecycle.lru import LatestEntries
from glm_image.serving import bytes_tensors
from glm_image.serving.exit import end_process
from glm_image.serving.stream_events import EventSender
from glm_image.serving.stream_session import ArStream, DitStream, StreamSession, WholeStream
from glm_image.telemetry.heartbeat import Heartbeat
from glm_image.telemetry.logs import start_logging

MAX_STREAMS: Final = 128
"""Concurrent streams, each of which has threads of its own; more than the default queue of ``glm_ar``."""


class StreamBackend:
    """The decoupled Triton Python model that calls the stages.

    Triton unloads it only after the last response of every stream.
    """

    session: ClassVar[type[StreamSession]] = WholeStream

    def initialize(self, args: Mapping[str, str]) -> None:
        bytes_tensors.install()
        start_logging(args["model_instance_name"])
        self._dit_seconds: LatestEntries[Hashable, float] = LatestEntries(KEPT_KINDS)
        self._changed = threading.Condition()
        self._running = 0
        self._is_draining = False
        self._name = args["model_name"]
        index, _ = position(args)
        self._heartbeat = Heartbeat(f"{args['model_name']}_{index}", hang_seconds=0)
        self._heartbeat.start(commands={"drain": self._drain})

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = EventSender(request, self.session.no_outputs)
            with sender.errors_sent():
                self._start(self.session(request, sender, self._dit_seconds))

    def finalize(self) -> None:
        """Waits for what streams hold after their last response, which must not outlive the interpreter."""
        with self._changed:
            self._changed.wait_for(lambda: self._running == 0)
        self._heartbeat.close()
        end_process()

    def _drain(self) -> None:
        """Refuses requests that Triton has yet to pass on, and reports when the last stream has ended."""
        with self._changed:
            self._is_draining = True
            self._report_if_drained()

    def _report_if_drained(self) -> None:
        if self._is_draining and self._running == 0:
            self._heartbeat.mark_drained()

    def _start(self, stream: StreamSession) -> None:
        with self._changed:
            if self._is_draining:
                raise UnavailableError("the server is stopping")
            if self._running >= MAX_STREAMS:
                raise QueueFullError(f"{self._name} has {MAX_STREAMS} streams, as many as may be; try again later")
            self._running += 1
        threading.Thread(target=self._run, args=(stream,), name="stream", daemon=True).start()

    def _run(self, stream: StreamSession) -> None:
        try:
            stream.run()
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()
                self._report_if_drained()


class ArStreamBackend(StreamBackend):
    """``glm_ar_stream``."""

    session = ArStream


class DitStreamBackend(StreamBackend):
    """``glm_dit_stream``."""

    session = DitStream
