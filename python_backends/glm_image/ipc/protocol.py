"""Where the sockets lie, and how what goes through them is written."""

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


class Message(NamedTuple):
    """A question or an answer: fields for JSON, and binary parts."""

    fields: Mapping[str, Any]
    parts: Sequence[bytes] = ()


def folder() -> Path | None:
    """Returns the folder of this server's sockets; None where the server was started without one."""
    private = run_directory()
    return private / "bus" if private else None


def address(path: Path) -> str:
    """Returns a socket's address in ZeroMQ's words."""
    return f"ipc://{path}"


def nodes(directory: Path) -> dict[str, Path]:
    """Returns the control socket of every node that has one, by the node's name."""
    return {path.stem: path for path in sorted(directory.glob(f"*{CONTROL}"))}


def is_open(path: Path) -> bool:
    """Tells whether a process listens at a socket: one that was killed leaves its file behind."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.setblocking(False)
        with contextlib.suppress(BlockingIOError):  # it listens, and has much to do
            return connection.connect_ex(str(path)) == 0
    return True


def packed(message: Message) -> list[bytes]:
    """Returns a message's frames."""
    return [json.dumps(message.fields).encode(), *message.parts]


def unpacked(frames: Sequence[bytes]) -> Message:
    """Reads a message's frames."""
    return Message(json.loads(frames[0]), frames[1:])


Event = dict[str, Any]
"""What is told of a request: plain data for JSON."""


Publish = Callable[[bytes, Callable[[], Event]], None]
"""Takes the key of an id, and what makes the event if anybody wants it, in any thread; returns at once."""


KEY_BYTES = 16


def key_of(request_id: str) -> bytes:
    """Returns what stands for an id here: ids may be of any length, and this is kept for long."""
    return hashlib.sha256(request_id.encode("utf-8", "surrogatepass")).digest()[:KEY_BYTES]


def publish_nothing(key: bytes, event: Callable[[], Event]) -> None:
    """Where nobody can listen."""
