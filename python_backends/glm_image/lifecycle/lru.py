"""A mapping that keeps its latest entries."""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class LatestEntries(Generic[Key, Value]):
    """Keeps the entries that were put last, bounded in number and in age; thread-safe."""

    def __init__(self, max_entries: int, max_seconds: float = math.inf) -> None:
        self._max_entries, self._max_seconds = max_entries, max_seconds
        self._entries: OrderedDict[Key, tuple[float, Value]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Key) -> Value | None:
        with self._lock:
            entry = self._entries.get(key)
        return None if entry is None else entry[1]

    def put(self, key: Key, value: Value) -> None:
        now = time.monotonic()
        with self._lock:
            self._entries[key] = (now, value)
            self._entries.move_to_end(key)
            while len(self._entries) > self._max_entries or self._oldest() < now - self._max_seconds:
                self._entries.popitem(last=False)

    def _oldest(self) -> float:
        return next(iter(self._entries.values()))[0]
