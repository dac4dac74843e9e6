"""The sockets' addresses, and the encoding of messages."""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from glm_image.ipc.run_directory import run_directory

CONTROL, EVENTS = ".control", ".events"

KEY_BYTES = 16

Event = dict[str, Any]
"""The state of a request as plain data for JSON."""

Publish = Callable[[bytes, Callable[[], Event]], None]
"""Publishes an event: takes a key and a function that builds the event if anyone subscribes to the key.

Callable from any thread; does not block.
"""


class Message(NamedTuple):
    """A request or a reply: fields for JSON, and binary parts."""

    fields: Mapping[str, Any]
    parts: Sequence[bytes] = ()


def socket_directory() -> Path | None:
    """Returns the folder of this server's sockets; None where the server was started without a run directory."""
    private = run_directory()
    return private / "ipc" if private else None


def address(path: Path) -> str:
    """Returns a socket's ZeroMQ address."""
    return f"ipc://{path}"


def instance_sockets(directory: Path, prefix: str = "") -> dict[str, Path]:
    """Returns the control sockets of the instances whose names begin with ``prefix``, by name."""
    return {path.stem: path for path in sorted(directory.glob(f"{prefix}*{CONTROL}"))}


def is_open(path: Path) -> bool:
    """Whether a process listens on a socket; a killed process leaves the file behind."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.setblocking(False)
        with contextlib.suppress(BlockingIOError):  # it listens, with a full backlog
            return connection.connect_ex(str(path)) == 0
    return True


def encode(message: Message) -> list[bytes]:
    """Returns a message as ZeroMQ frames."""
    return [json.dumps(message.fields).encode(), *message.parts]


def decode(frames: Sequence[bytes]) -> Message:
    """Returns the message in ZeroMQ frames."""
    return Message(json.loads(frames[0]), frames[1:])


def encode_event(key: bytes, event: Event) -> bytes:
    """Returns an event as one frame, which subscribers of its key receive.

    One frame, since libzmq aborts the process when a subscriber leaves amid the frames of a message.
    """
    return key + json.dumps(event).encode()


def decode_event(frame: bytes) -> Event:
    """Returns the event in a frame."""
    return dict(json.loads(frame[KEY_BYTES:]))


def key_of(request_id: str) -> bytes:
    """Returns the key of a request id: of fixed length, as ids may be long and keys are kept for long."""
    return hashlib.sha256(request_id.encode("utf-8", "surrogatepass")).digest()[:KEY_BYTES]
