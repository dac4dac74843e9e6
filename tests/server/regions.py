"""System shared memory that a client and the server share for a test."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tritonclient.utils import InferenceServerException, shared_memory

FREE_SECONDS = 30
SECONDS_BETWEEN_ASKING = 0.01


@contextmanager
def registered_region(client: Any, size: int) -> Iterator[tuple[str, Any]]:
    """Registers a region of ``size`` bytes with a server and unregisters it; yields its name there and its handle."""
    name = f"glm_image_test_{secrets.token_hex(8)}"
    handle = shared_memory.create_shared_memory_region(name, f"/{name}", size)
    try:
        client.register_system_shared_memory(name, f"/{name}", size)
        try:
            yield name, handle
        finally:
            _unregister(client, name)
    finally:
        shared_memory.destroy_shared_memory_region(handle)


def _unregister(client: Any, name: str) -> None:
    # The server responds before it releases the regions of the request, and does not report the release.
    deadline = time.monotonic() + FREE_SECONDS
    while True:
        try:
            client.unregister_system_shared_memory(name)
        except InferenceServerException as error:
            if "it is currently in use" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(SECONDS_BETWEEN_ASKING)
        else:
            return
