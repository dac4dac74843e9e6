"""Stored results, in a folder or anywhere that fsspec reaches.

Their names cannot be guessed, they expire, and their total size has a limit.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import secrets
import sqlite3
import time
from dataclasses import dataclass
from typing import Any, Final

import fsspec

from glm_image_gateway.database import Database
from glm_image_gateway.errors import ApiError
from glm_image_gateway.metrics import Metrics
from glm_image_gateway.settings import GatewaySettings, SettingsError

logger = logging.getLogger(__name__)

MEDIA_TYPES: Final = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
SWEEP_SECONDS: Final = 300.0
NAME: Final = re.compile(r"[A-Za-z0-9_-]{32}\.(?:png|jpeg|webp)")


@dataclass(frozen=True)
class StoredFile:
    """A stored image.

    Attributes:
        expires: seconds since the epoch.
    """

    name: str
    media_type: str
    expires: float


class Storage:
    """The stored results of a gateway.

    Raises:
        SettingsError: the place cannot be used.
    """

    def __init__(self, settings: GatewaySettings, database: Database, metrics: Metrics) -> None:
        self._database, self._metrics = database, metrics
        self._lifetime, self._max_bytes = settings.file_hours * 3600, settings.store_bytes
        try:
            self._files, self._folder = fsspec.core.url_to_fs(settings.store_url)
            self._files.makedirs(self._folder, exist_ok=True)
        except (OSError, ValueError, ImportError) as error:
            raise SettingsError(f"--store is {settings.store_url!r}, which cannot be used: {error}") from None
        self._sweeper: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Starts the deletion of expired files."""
        self._sweeper = asyncio.ensure_future(self._sweep())

    async def close(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.wait({self._sweeper})

    async def save(self, file: bytes, output_format: str) -> StoredFile:
        """Stores an image file; the oldest files are deleted where the size of all is above the limit."""
        now = time.time()
        stored = StoredFile(
            f"{secrets.token_urlsafe(24)}.{output_format}", MEDIA_TYPES[output_format], now + self._lifetime
        )
        await asyncio.to_thread(self._files.pipe_file, self._path(stored.name), file)
        row = (stored.name, len(file), stored.media_type, now, stored.expires)
        await self._database.run(lambda db: db.execute("INSERT INTO files VALUES (?, ?, ?, ?, ?)", row))
        await self.delete_old()
        return stored

    async def read(self, name: str) -> tuple[StoredFile, bytes]:
        """Returns a stored file.

        Raises:
            ApiError: there is none of the name, or it has expired.
        """
        missing = ApiError(404, "there is no such file, or it has expired", "file_not_found")
        if not NAME.fullmatch(name):
            raise missing
        row = await self._database.run(
            lambda db: db.execute("SELECT * FROM files WHERE name = ? AND expires > ?", (name, time.time())).fetchone()
        )
        if row is None:
            raise missing
        try:
            content = await asyncio.to_thread(self._files.cat_file, self._path(name))
        except FileNotFoundError:
            raise missing from None
        return StoredFile(name, row["media_type"], row["expires"]), bytes(content)

    async def delete_old(self) -> None:
        """Deletes what has expired, and the oldest files above the limit of size."""
        names, left = await self._database.run(self._forget_old)
        self._metrics.store_bytes.set(left)
        for name in names:
            # What cannot be deleted now is not offered any more either.
            with contextlib.suppress(FileNotFoundError):
                await asyncio.to_thread(self._files.rm_file, self._path(name))

    def _forget_old(self, database: sqlite3.Connection) -> tuple[list[str], int]:
        rows: list[Any] = database.execute("SELECT name, bytes, expires FROM files ORDER BY created DESC").fetchall()
        kept, old, now = 0, [], time.time()
        for index, row in enumerate(rows):
            if row["expires"] <= now or (index and kept + row["bytes"] > self._max_bytes):
                old.append(row["name"])
            else:
                kept += row["bytes"]
        database.executemany("DELETE FROM files WHERE name = ?", [(name,) for name in old])
        return old, kept

    def _path(self, name: str) -> str:
        return f"{self._folder.rstrip('/')}/{name}"

    async def _sweep(self) -> None:
        while True:
            try:
                await self.delete_old()
            except Exception:  # the next sweep may succeed
                logger.exception("expired files could not be deleted")
            await asyncio.sleep(SWEEP_SECONDS)
