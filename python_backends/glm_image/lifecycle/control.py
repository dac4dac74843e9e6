"""Cancels requests and reports their state over IPC: the call to all instances of a server, and each one's reply."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from glm_image.errors import InvalidInputError
from glm_image.ipc.client import Replies, call_all
from glm_image.ipc.protocol import Event, Message, Publish, publish_nothing, socket_directory
from glm_image.ipc.run_directory import RUN_DIRECTORY_VARIABLE
from glm_image.ipc.server import Handler, IpcServer
from glm_image.lifecycle.registry import RequestRegistry, RequestState
from glm_image.request.stages import AR_STAGES, QUEUES, Stage

logger = logging.getLogger(__name__)

ACTIONS: Final = ("cancel", "status")
REPLY_SECONDS: Final = 1.0
"""An instance replies from a thread of its own; one that has not by then is gone or hangs."""

INTERNAL_FIELDS: Final = ("arrived_ns", "cancelled_now")


def control(directory: Path, request_id: str, action: str) -> dict[str, Any]:
    """Performs an action on all requests of an id.

    Args:
        directory: the folder of IPC sockets.
        request_id: the id.
        action: one of ``ACTIONS``.

    Returns:
        ``request_id``, ``action``, ``state`` (of the requests in flight, else of the latest), ``requests`` (each with
        its own state, stage, done, total and seconds); for a cancel, how many requests it ``cancelled``; and the names
        of the instances that did not reply in ``silent``, if there are any.

    Raises:
        InvalidInputError: the action is unknown, or the id is empty.
    """
    if action not in ACTIONS:
        raise InvalidInputError.of("action", action, ", ".join(ACTIONS))
    if not request_id:
        raise InvalidInputError.of("request_id", request_id, "the id that a request was sent with")
    call = Message({"action": action, "request_id": request_id, "requested_ns": time.monotonic_ns()})
    replies = call_all(directory, call, REPLY_SECONDS)
    requests = _merge(_events(replies))
    result: dict[str, Any] = {"request_id": request_id, "action": action, "state": _overall_state(requests)}
    if action == "cancel":
        cancelled = sum(request["cancelled_now"] for request in requests)
        before = "already_cancelled" if result["state"] == "cancelled" else result["state"]
        result |= {"state": "cancelled" if cancelled else before, "cancelled": cancelled}
    result["requests"] = [
        {name: value for name, value in request.items() if name not in INTERNAL_FIELDS} for request in requests
    ]
    return {**result, "silent": replies.unresponsive} if replies.unresponsive else result


def _events(replies: Replies) -> Iterable[Event]:
    for reply in replies.replies.values():
        yield from reply.fields.get("requests", ())


def _merge(events: Iterable[Event]) -> list[Event]:
    """Returns one event per request in the order of arrival: that of ``glm_dit``, or else that of ``glm_ar``."""
    of_ar: list[Event] = []
    of_dit: list[Event] = []
    for event in events:
        (of_ar if event["stage"] in AR_STAGES else of_dit).append(event)
    at_dit = {event["arrived_ns"] for event in of_dit}
    latest = of_dit + [event for event in of_ar if event["arrived_ns"] not in at_dit]
    return [_public(event) for event in sorted(latest, key=lambda event: int(event["arrived_ns"]))]


def _public(event: Event) -> Event:
    """Replaces the states that one instance sees by those of the whole server."""
    if event["state"] == RequestState.FORWARDED:
        return {**event, "state": "queued", "stage": Stage.DIT_QUEUE, "done": 0, "total": 1}
    is_queued = event["state"] == RequestState.RUNNING and event["stage"] in QUEUES
    return {**event, "state": "queued"} if is_queued else event


def _overall_state(requests: list[Event]) -> str:
    states = [request["state"] for request in requests]
    in_flight = [state for state in ("running", "queued") if state in states]
    return str((in_flight or states[-1:] or ["unknown"])[0])


class ControlServer:
    """An instance's end: replies to ``control``, and publishes the events of its requests while there is a subscriber.

    Without a run directory, or where its sockets cannot be made, it does nothing: requests are served all the same.

    Args:
        name: the name of the instance.
        registry: its requests.
        handlers: handlers of further actions.
        topics: further topics; each is published by calling its function when a subscriber comes.

    Attributes:
        publish: publishes an event under a topic.
    """

    def __init__(
        self,
        name: str,
        registry: RequestRegistry,
        handlers: Mapping[str, Handler] | None = None,
        topics: Mapping[bytes, Callable[[], None]] | None = None,
    ) -> None:
        self._registry = registry
        self._topics = topics or {}
        self._server = self._open(name, {"cancel": self._cancel, "status": self._status, **(handlers or {})})
        self.publish: Publish = publish_nothing if self._server is None else self._server.publish
        registry.publish = self.publish

    def close(self) -> None:
        if self._server is not None:
            self._server.close()

    def _open(self, name: str, handlers: Mapping[str, Handler]) -> IpcServer | None:
        folder = socket_directory()
        if folder is None:
            logger.info("%s is not set: requests cannot be cancelled or watched by their id", RUN_DIRECTORY_VARIABLE)
            return None
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            return IpcServer(folder, name, handlers, self._on_subscriber)
        except OSError as error:
            logger.warning("requests cannot be cancelled or watched by their id: %s", error)
            return None

    def _cancel(self, call: Message) -> Message:
        return Message({"requests": self._registry.cancel(call.fields["request_id"], call.fields["requested_ns"])})

    def _status(self, call: Message) -> Message:
        return Message({"requests": self._registry.status(call.fields["request_id"])})

    def _on_subscriber(self, topic: bytes, is_there: bool) -> None:
        if topic not in self._topics:
            (self._registry.watch if is_there else self._registry.unwatch)(topic)
        elif is_there:
            self._topics[topic]()
