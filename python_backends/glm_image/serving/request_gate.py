"""The requests of an instance, from Triton and for whoever asks over the bus."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from glm_image.config.instance import Instance
from glm_image.ipc.protocol import Event, Message, Publish, publish_nothing, socket_directory
from glm_image.ipc.run_directory import RUN_DIRECTORY_VARIABLE
from glm_image.ipc.server import Handler, IpcServer
from glm_image.lifecycle.context import RequestContext
from glm_image.lifecycle.registry import RequestRegistry
from glm_image.serving.responder import Responder
from glm_image.telemetry.metrics import MetricSink, OutcomeCounters
from glm_image.telemetry.request_log import Entry, RequestLog

logger = logging.getLogger(__name__)

GONE_SECONDS = 0.5
"""Between two questions to Triton whether a caller has gone away. It knows for requests to this model itself, not for
those of an ensemble."""


class RequestGate:
    """Lets requests in and out, counts how they end, and gives others a hold on them.

    Attributes:
        publish: publishes under a topic; nothing where there is no bus.

    Args:
        instance: whose requests.
        in_flight: keeps them.
        ends: counts those that do not end well.
        record: takes the counts.
        log: has a line for each.
        handlers: what else is answered over the bus, by ``action``.
        topics: what else is published there: tells how things are, called when somebody begins to listen.
    """

    def __init__(
        self,
        instance: Instance,
        in_flight: RequestRegistry,
        ends: OutcomeCounters,
        record: MetricSink,
        log: RequestLog,
        handlers: Mapping[str, Handler] | None = None,
        topics: Mapping[bytes, Callable[[], None]] | None = None,
    ) -> None:
        self._in_flight, self._ends, self._record, self._log = in_flight, ends, record, log
        self._node = _open_node(instance, in_flight, handlers or {}, topics or {})
        self.publish: Publish = publish_nothing if self._node is None else self._node.publish
        in_flight.publish = self.publish
        self._closing = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="callers", daemon=True)
        self._watcher.start()

    def expect(self, request: Any, answer: Responder) -> Entry:
        """Counts a request when it ends, and writes its line; before anything can go wrong with it."""
        entry = self._log.entry(request.request_id())
        answer.when_ended(self._count)
        answer.when_ended(entry.end)
        return entry

    def begin(self, context: RequestContext, answer: Responder) -> None:
        """Lets a request in, until its answer is sent.

        Raises:
            CancelledError: it has been cancelled already.
        """
        answer.when_ended(partial(self._in_flight.end, context))
        self._in_flight.begin(context, answer.is_unwanted)

    def beside(self, context: RequestContext) -> Callable[[], None]:
        """Has a job cancelled with the requests of its id; returns what lets go of it."""
        return self._in_flight.beside(context)

    def tell(self, context: RequestContext, more: Callable[[], Event]) -> None:
        """Publishes more of a job than its progress, if anybody listens."""
        self._in_flight.tell(context, more)

    def close(self) -> None:
        """Lets nobody ask any more."""
        self._closing.set()
        self._watcher.join()
        if self._node is not None:
            self._node.close()

    def _count(self, error: BaseException | None) -> None:
        if error is not None:
            self._record(self._ends.measure_of(error), 1)

    def _watch(self) -> None:
        while not self._closing.wait(GONE_SECONDS):
            self._in_flight.cancel_gone()


def _open_node(
    instance: Instance,
    in_flight: RequestRegistry,
    handlers: Mapping[str, Handler],
    topics: Mapping[bytes, Callable[[], None]],
) -> IpcServer | None:
    folder = socket_directory()
    if folder is None:
        logger.info("%s is not set: requests cannot be cancelled or watched by their id", RUN_DIRECTORY_VARIABLE)
        return None

    def cancel(question: Message) -> Message:
        asked = question.fields
        return Message({"requests": in_flight.cancel(asked["request_id"], asked["asked_ns"])})

    def status(question: Message) -> Message:
        return Message({"requests": in_flight.status(question.fields["request_id"])})

    def note_listener(topic: bytes, listens: bool) -> None:
        if topic not in topics:
            (in_flight.watch if listens else in_flight.unwatch)(topic)
        elif listens:
            topics[topic]()

    own: dict[str, Handler] = {"cancel": cancel, "status": status, **handlers}
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return IpcServer(folder, instance.name, own, note_listener)
    except OSError as error:
        logger.warning("requests cannot be cancelled or watched by their id: %s", error)
        return None
