"""The gateway's SQLite database: jobs and stored files. All statements run in one thread."""

from __future__ import annotations

import asyncio
import fcntl
import os
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeVar

from glm_image_gateway.settings import SettingsError

FILE: Final = "gateway.sqlite3"
VERSION: Final = 1
SCHEMA: Final = """
CREATE TABLE jobs (
    owner TEXT NOT NULL, id TEXT NOT NULL, request_id TEXT NOT NULL, status TEXT NOT NULL, body TEXT NOT NULL,
    webhook TEXT, created REAL NOT NULL, finished REAL, result TEXT, error TEXT, starts INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (owner, id)
);
CREATE TABLE files (
    name TEXT PRIMARY KEY, bytes INTEGER NOT NULL, media_type TEXT NOT NULL, created REAL NOT NULL,
    expires REAL NOT NULL
);
CREATE INDEX files_by_age ON files (created);
"""

T = TypeVar("T")


class Database:
    """A database in a folder that belongs to one gateway.

    Raises:
        SettingsError: the folder cannot be written, or another gateway uses it.
    """

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise SettingsError(f"the state folder {str(folder)!r} cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise SettingsError(
                f"another gateway uses the state folder {str(folder)!r}; allowed: a folder of its own (--state)"
            ) from None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="database")
        self._connection = self._thread.submit(_opened, folder / FILE).result()

    async def run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Returns the result of work, which is one transaction."""

        def transaction() -> T:
            with self._connection:
                return work(self._connection)

        return await asyncio.get_running_loop().run_in_executor(self._thread, transaction)

    async def close(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self._connection.close)
        self._thread.shutdown()
        os.close(self._lock)


def _opened(path: Path) -> sqlite3.Connection:
    try:
        connection = sqlite3.connect(path, check_same_thread=False)
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA journal_mode = WAL")
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version == 0:
            connection.executescript(f"BEGIN; {SCHEMA} PRAGMA user_version = {VERSION}; COMMIT;")
        elif version != VERSION:
            raise SettingsError(f"{str(path)!r} has version {version}; allowed: {VERSION}, of this gateway")
    except sqlite3.Error as error:
        raise SettingsError(f"the database {str(path)!r} cannot be opened: {error}") from None
    return connection
