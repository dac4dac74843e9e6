"""Jobs in the database: what was asked for, the state, and the result."""

from __future__ import annotations

import json
import sqlite3
import time
from dataclasses import dataclass
from typing import Any, Final, Literal, cast

from glm_image_gateway.database import Database

Status = Literal["queued", "running", "done", "failed", "cancelled"]
ENDED: Final = ("done", "failed", "cancelled")
OPEN: Final = ("queued", "running")


@dataclass(frozen=True)
class Job:
    """A job.

    Attributes:
        owner: the name of the API key.
        id: unique among those of its owner.
        request_id: the id of its request on the server.
        body: the fields of the request, with the seed that it uses.
        starts: how often a gateway has begun it.
        result: the answer; its images are names of stored files.
        error: OpenAI's error object.
    """

    owner: str
    id: str
    request_id: str
    status: Status
    body: dict[str, Any]
    webhook: str | None
    created: float
    starts: int = 0
    finished: float | None = None
    result: dict[str, Any] | None = None
    error: dict[str, Any] | None = None

    @property
    def has_ended(self) -> bool:
        return self.status in ENDED


class JobStore:
    """The table of jobs."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, job: Job) -> Job | None:
        """Adds a job; returns the one that has its id already, instead."""
        row = (job.owner, job.id, job.request_id, job.status, json.dumps(job.body), job.webhook, job.created)

        def insert(database: sqlite3.Connection) -> sqlite3.Row | None:
            present = _row(database, job.owner, job.id)
            if present is None:
                columns = "owner, id, request_id, status, body, webhook, created"
                database.execute(f"INSERT INTO jobs ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?)", row)
            return present

        present = await self._database.run(insert)
        return None if present is None else _job(present)

    async def find(self, owner: str, job_id: str) -> Job | None:
        row = await self._database.run(lambda database: _row(database, owner, job_id))
        return None if row is None else _job(row)

    async def open_jobs(self) -> list[Job]:
        """Returns what has not ended, the oldest first."""
        query = "SELECT * FROM jobs WHERE status IN (?, ?) ORDER BY created"
        return [_job(row) for row in await self._database.run(lambda db: db.execute(query, OPEN).fetchall())]

    async def begin(self, job: Job) -> int:
        """Marks a job as running and returns how often it has been begun."""

        def update(database: sqlite3.Connection) -> int:
            where = (job.owner, job.id)
            database.execute(
                "UPDATE jobs SET status = 'running', starts = starts + 1 WHERE owner = ? AND id = ?", where
            )
            return cast(
                "int", database.execute("SELECT starts FROM jobs WHERE owner = ? AND id = ?", where).fetchone()[0]
            )

        return await self._database.run(update)

    async def end(
        self, job: Job, status: Status, result: dict[str, Any] | None = None, error: dict[str, Any] | None = None
    ) -> None:
        """Writes how a job has ended."""
        values = (
            status, time.time(), None if result is None else json.dumps(result),
            None if error is None else json.dumps(error), job.owner, job.id,
        )  # fmt: skip
        statement = "UPDATE jobs SET status = ?, finished = ?, result = ?, error = ? WHERE owner = ? AND id = ?"
        await self._database.run(lambda database: database.execute(statement, values))

    async def remove(self, job: Job) -> None:
        """Removes a job."""
        statement = "DELETE FROM jobs WHERE owner = ? AND id = ?"
        await self._database.run(lambda database: database.execute(statement, (job.owner, job.id)))

    async def remove_ended_before(self, moment: float) -> None:
        """Removes the jobs that ended before a moment, in seconds since the epoch."""
        statement = "DELETE FROM jobs WHERE finished < ?"
        await self._database.run(lambda database: database.execute(statement, (moment,)))


def _row(database: sqlite3.Connection, owner: str, job_id: str) -> sqlite3.Row | None:
    found = database.execute("SELECT * FROM jobs WHERE owner = ? AND id = ?", (owner, job_id)).fetchone()
    return cast("sqlite3.Row | None", found)


def _job(row: sqlite3.Row) -> Job:
    values = {
        name: row[name] for name in ("owner", "id", "request_id", "status", "webhook", "created", "starts", "finished")
    }
    result, error = (None if row[name] is None else json.loads(row[name]) for name in ("result", "error"))
    return Job(**values, body=json.loads(row["body"]), result=result, error=error)
