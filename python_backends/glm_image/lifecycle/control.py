"""Cancels requests and says where they are, by asking every instance of a server."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from glm_image.errors import InvalidInputError
from glm_image.ipc.client import Replies, call_all
from glm_image.ipc.protocol import Event, Message

ACTIONS = ("cancel", "status")
ANSWER_SECONDS = 1.0
"""An instance answers from a thread of its own; one that has not by then is gone or stands still."""

FIRST_STAGE = ("ar_queue", "prefill", "tokens")
QUEUES = ("ar_queue", "dit_queue")
INTERNAL = ("arrived_ns", "cancelled_now")


def control(directory: Path, request_id: str, action: str) -> dict[str, Any]:
    """Does an action on all requests of an id.

    Args:
        directory: the bus's folder.
        request_id: the id.
        action: one of ``ACTIONS``.

    Returns:
        ``request_id``, ``action``, ``state`` (of the requests in flight, else of the latest), ``requests`` (each with
        its own state, stage, done, total and seconds); of a cancel how many it ``cancelled``; and if any instance gave
        no answer, its name in ``silent``.

    Raises:
        InvalidInputError: the action is not known, or the id is empty.
    """
    if action not in ACTIONS:
        raise InvalidInputError.of("action", action, ", ".join(ACTIONS))
    if not request_id:
        raise InvalidInputError.of("request_id", request_id, "the id that a request was sent with")
    question = {"action": action, "request_id": request_id, "asked_ns": time.monotonic_ns()}
    answers = call_all(directory, Message(question), ANSWER_SECONDS)
    requests = _merged(_events(answers))
    told: dict[str, Any] = {"request_id": request_id, "action": action, "state": _state(requests)}
    if action == "cancel":
        cancelled = sum(one["cancelled_now"] for one in requests)
        was_before = "already_cancelled" if told["state"] == "cancelled" else told["state"]
        told |= {"state": "cancelled" if cancelled else was_before, "cancelled": cancelled}
    told["requests"] = [{name: one[name] for name in one if name not in INTERNAL} for one in requests]
    return {**told, "silent": answers.silent} if answers.silent else told


def _events(answers: Replies) -> Iterable[Event]:
    for answer in answers.answers.values():
        yield from answer.fields.get("requests", ())


def _merged(events: Iterable[Event]) -> list[Event]:
    """Returns one event a request, in the order of their arrival: the second stage's, where it has one."""
    first: list[Event] = []
    second: list[Event] = []
    for event in events:
        (first if event["stage"] in FIRST_STAGE else second).append(event)
    painted = {event["arrived_ns"] for event in second}
    told = second + [event for event in first if event["arrived_ns"] not in painted]
    return [_in_words(event) for event in sorted(told, key=lambda event: int(event["arrived_ns"]))]


def _in_words(event: Event) -> Event:
    if event["state"] == "handed_on":
        return {**event, "state": "queued", "stage": "dit_queue", "done": 0, "total": 1}
    return {**event, "state": "queued"} if event["state"] == "running" and event["stage"] in QUEUES else event


def _state(requests: list[Event]) -> str:
    states = [one["state"] for one in requests]
    in_flight = [state for state in ("running", "queued") if state in states]
    return (in_flight or states[-1:] or ["unknown"])[0]
