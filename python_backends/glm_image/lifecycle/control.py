"""Cancels requests and reports their state over IPC: the call to all instances of a server, and each one's reply."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from glm_image.errors import InvalidInputError, UnavailableError
from glm_image.ipc.client import call
from glm_image.ipc.protocol import Event, Message, instance_sockets, socket_directory
from glm_image.ipc.run_directory import RUN_DIRECTORY_VARIABLE
from glm_image.ipc.server import Handler, IpcServer
from glm_image.lifecycle.context import NANOSECONDS
from glm_image.lifecycle.registry import RequestRegistry, RequestState
from glm_image.request.request_id import check_request_id
from glm_image.request.stages import AR_STAGES, QUEUES, Stage

logger = logging.getLogger(__name__)

ACTIONS: Final = ("cancel", "status", "defaults", "describe")
REPLY_SECONDS: Final = 1.0
"""An instance replies from a thread of its own; one that has not by then is gone or hangs."""


def control(directory: Path, request_id: str, action: str) -> dict[str, Any]:
    """Performs one of ``ACTIONS``; ``directory`` is the folder of IPC sockets.

    ``cancel`` and ``status`` concern all requests of an id; the others ignore the id.

    Returns:
        For ``describe``: ``action`` and ``stages``, for each stage its checkpoint's ``name``, ``revision`` and
        ``fingerprint``, its ``instances`` and their ``slots``, the images that each works on at the same time.
        For ``defaults``: ``action`` and ``defaults``, the options that suit the checkpoint. Else ``request_id``,
        ``action``, ``state`` (of the requests in flight, else of the latest), ``requests`` (each with its own state,
        stage, done, total and seconds); for a cancel, how many requests it ``cancelled``; and the names of the
        instances that did not reply in ``silent``, if there are any.

    Raises:
        InvalidInputError: the action is unknown, or the id is empty or none that a request may have.
        UnavailableError: no instance replied with the defaults.
    """
    if action not in ACTIONS:
        raise InvalidInputError.of("action", action, ", ".join(ACTIONS))
    if action == "defaults":
        return _defaults(directory)
    if action == "describe":
        return _description(directory)
    if not request_id:
        raise InvalidInputError.of("request_id", request_id, "the id that a request was sent with")
    check_request_id("request_id", request_id)
    message = Message({"action": action, "request_id": request_id, "requested_ns": time.monotonic_ns()})
    replies = call(instance_sockets(directory), message, REPLY_SECONDS)
    requests = _merge([event for reply in replies.replies.values() for event in reply.fields.get("requests", ())])
    result: dict[str, Any] = {"request_id": request_id, "action": action, "state": _overall_state(requests)}
    if action == "cancel":
        cancelled = sum(request["cancelled_now"] for request in requests)
        before = "already_cancelled" if result["state"] == "cancelled" else result["state"]
        result |= {"state": "cancelled" if cancelled else before, "cancelled": cancelled}
    internal = ("arrived_ns", "cancelled_now", "seconds_left")
    result["requests"] = [{name: request[name] for name in request if name not in internal} for request in requests]
    return {**result, "silent": replies.unresponsive} if replies.unresponsive else result


def _defaults(directory: Path) -> dict[str, Any]:
    replies = call(instance_sockets(directory), Message({"action": "defaults"}), REPLY_SECONDS)
    for _, reply in sorted(replies.replies.items()):
        if "defaults" in reply.fields:
            return {"action": "defaults", "defaults": reply.fields["defaults"]}
    raise UnavailableError("no instance replied with the defaults of its checkpoint: try again later")


def _description(directory: Path) -> dict[str, Any]:
    replies = call(instance_sockets(directory), Message({"action": "describe"}), REPLY_SECONDS)
    stages: dict[str, Event] = {}
    for _, reply in sorted(replies.replies.items()):
        if "stage" in reply.fields:  # the instances of a stage are alike
            description = dict(reply.fields)
            stages.setdefault(description.pop("stage"), description)
    return {"action": "describe", "stages": stages}


def _merge(events: Sequence[Event]) -> list[Event]:
    """Returns one event per request in the order of arrival: that of ``glm_dit``, or else that of ``glm_ar``."""
    of_dit = [event for event in events if event["stage"] not in AR_STAGES]
    at_dit = {event["arrived_ns"] for event in of_dit}
    of_ar = [event for event in events if event["stage"] in AR_STAGES and event["arrived_ns"] not in at_dit]
    return [_public(event) for event in sorted(of_dit + of_ar, key=lambda event: int(event["arrived_ns"]))]


def _public(event: Event) -> Event:
    """Replaces the states that one instance sees by those of the whole server."""
    if event["state"] == RequestState.FORWARDED:  # it waits, and its instance has no clock for that
        seconds = round((time.monotonic_ns() - event["arrived_ns"]) / NANOSECONDS, 3)
        return {**event, "state": "queued", "stage": Stage.DIT_QUEUE, "done": 0, "total": 1, "seconds": seconds}
    is_queued = event["state"] == RequestState.RUNNING and event["stage"] in QUEUES
    return {**event, "state": "queued"} if is_queued else event


def _overall_state(requests: list[Event]) -> str:
    states = [request["state"] for request in requests]
    in_flight = [state for state in ("running", "queued") if state in states]
    return str((in_flight or states[-1:] or ["unknown"])[0])


def start_control_server(
    server: IpcServer,
    name: str,
    registry: RequestRegistry,
    handlers: Mapping[str, Handler],
    topics: Mapping[bytes, Callable[[], None]],
) -> None:
    """Starts an instance's server, for ``control`` and for the subscribers of requests.

    Without a run directory, or where its sockets cannot be made, it stays off: requests are served all the same.
    ``handlers`` are those of further actions. The functions of ``topics`` publish further topics; they are called when
    a subscriber comes.
    """

    def cancel(message: Message) -> Message:
        return Message({"requests": registry.cancel(message.fields["request_id"], message.fields["requested_ns"])})

    def status(message: Message) -> Message:
        return Message({"requests": registry.status(message.fields["request_id"])})

    def on_subscriber(topic: bytes, is_there: bool) -> None:
        if topic not in topics:
            (registry.watch if is_there else registry.unwatch)(topic)
        elif is_there:
            topics[topic]()

    folder = socket_directory()
    if folder is None:
        logger.info("%s is not set: requests cannot be cancelled or watched by their id", RUN_DIRECTORY_VARIABLE)
        return
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        server.start(folder, name, {"cancel": cancel, "status": status, **handlers}, on_subscriber)
    except OSError as error:
        logger.warning("requests cannot be cancelled or watched by their id: %s", error)
