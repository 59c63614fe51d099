"""The state file: an SQLite database with the models, the endpoints, and every accepted request with its status.

`Store` has a method for each change and query. `SqliteJobWriter` runs them in a thread that owns the file, and
answers when they are on disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

import msgspec

from maveriq.domain.models import ModelSpec
from maveriq.domain.requests import RequestStatus
from maveriq.errors import InputError, MaveriqError
from maveriq.exec.live_cluster import EndpointRequest
from maveriq.policy.pinned import Plans

T = TypeVar("T")

INTERRUPTED = "the server stopped before the request ended"
"""The reason of a request that was in flight when the server crashed."""

_VERSION = 2
_TABLES = """
CREATE TABLE models (
    model_id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL UNIQUE,
    spec TEXT NOT NULL,
    folder TEXT NOT NULL
);
CREATE TABLE endpoints (
    endpoint_id INTEGER PRIMARY KEY AUTOINCREMENT,
    model_id INTEGER NOT NULL REFERENCES models,
    request TEXT NOT NULL,
    placement TEXT NOT NULL,
    plans TEXT NOT NULL
);
CREATE TABLE requests (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    request_id TEXT NOT NULL UNIQUE,
    model TEXT NOT NULL,
    endpoint_id INTEGER NOT NULL,
    accepted_s REAL NOT NULL,
    prompt_tokens INTEGER NOT NULL,
    status TEXT NOT NULL,
    reason TEXT NOT NULL,
    output_tokens INTEGER NOT NULL,
    ended_s REAL
);
CREATE INDEX requests_by_status ON requests (status, number);
"""
_REQUEST_COLUMNS = "request_id, model, endpoint_id, accepted_s, prompt_tokens, status, reason, output_tokens, ended_s"
_ACCEPTED = "accepted"
_PRUNE_EVERY = 1_000
_MAX_JOBS_PER_TRANSACTION = 512


class StoreError(MaveriqError):
    """The state file cannot be read or written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredModel:
    """A registered model; `folder` has its files and is empty for a known model."""

    model_id: int
    spec: ModelSpec
    folder: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredEndpoint:
    """An endpoint.

    Args:
        endpoint_id: never used again after the endpoint is removed.
        model_id: of its model.
        request: what was requested.
        placement: name of its placement policy; empty for the server's.
        plans: of its deployments, from the last decision of the policy; empty before the first.
    """

    endpoint_id: int
    model_id: int
    request: EndpointRequest
    placement: str
    plans: Plans = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRow:
    """An accepted request: `status` is `accepted` until it ends, then one of the four final statuses.

    Times are in seconds since 1970; `ended_s` is None until it ends.
    """

    request_id: str
    model: str
    endpoint_id: int
    accepted_s: float
    prompt_tokens: int
    status: str = _ACCEPTED
    reason: str = ""
    output_tokens: int = 0
    ended_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EndedRequest:
    """How an accepted request ended."""

    request_id: str
    status: RequestStatus
    reason: str
    output_tokens: int


class Store:
    """The state file. Every method returns when its change is on disk.

    Raises:
        InputError: the file cannot be used (construction).
        StoreError: the file cannot be read or written (all methods).
    """

    def __init__(self, path: Path, *, kept_requests: int = 100_000, open_writer: OpenWriter | None = None) -> None:
        """Open or create the file; `open_writer` replaces `SqliteJobWriter` in tests."""
        self._kept_requests = kept_requests
        self._ended_requests = 0
        self._writer: JobWriter = (open_writer or SqliteJobWriter)(path, _prepare)

    def close(self) -> None:
        """Close the file. It may be called twice."""
        self._writer.close()

    # Models

    async def add_model(self, spec: ModelSpec, folder: str) -> StoredModel:
        """Add a model with a new ID."""

        def insert(database: sqlite3.Connection) -> int:
            values = (spec.name, _to_json(spec), folder)
            return _new_id(database.execute("INSERT INTO models (name, spec, folder) VALUES (?, ?, ?)", values))

        return StoredModel(model_id=await self._writer.run(insert), spec=spec, folder=folder)

    async def remove_model(self, model_id: int) -> None:
        """Remove a model that has no endpoints."""

        def delete(database: sqlite3.Connection) -> None:
            database.execute("DELETE FROM models WHERE model_id = ?", (model_id,))

        await self._writer.run(delete)

    async def models(self) -> list[StoredModel]:
        """Return all models, ordered by ID."""

        def select(database: sqlite3.Connection) -> list[StoredModel]:
            rows = database.execute("SELECT model_id, spec, folder FROM models ORDER BY model_id")
            return [
                StoredModel(model_id=model_id, spec=msgspec.json.decode(spec, type=ModelSpec), folder=folder)
                for model_id, spec, folder in rows
            ]

        return await self._writer.run(select)

    # Endpoints

    async def add_endpoint(self, model_id: int, request: EndpointRequest, placement: str) -> int:
        """Add an endpoint and return its ID, which was never used before."""

        def insert(database: sqlite3.Connection) -> int:
            values = (model_id, _to_json(request), placement, "[]")
            return _new_id(
                database.execute(
                    "INSERT INTO endpoints (model_id, request, placement, plans) VALUES (?, ?, ?, ?)", values
                )
            )

        return await self._writer.run(insert)

    async def set_plans(self, endpoint_id: int, plans: Plans) -> None:
        """Set the plans of an endpoint's deployments."""

        def update(database: sqlite3.Connection) -> None:
            database.execute("UPDATE endpoints SET plans = ? WHERE endpoint_id = ?", (_to_json(plans), endpoint_id))

        await self._writer.run(update)

    async def remove_endpoint(self, endpoint_id: int) -> None:
        """Remove an endpoint."""

        def delete(database: sqlite3.Connection) -> None:
            database.execute("DELETE FROM endpoints WHERE endpoint_id = ?", (endpoint_id,))

        await self._writer.run(delete)

    async def endpoints(self) -> list[StoredEndpoint]:
        """Return all endpoints, ordered by ID."""

        def select(database: sqlite3.Connection) -> list[StoredEndpoint]:
            rows = database.execute(
                "SELECT endpoint_id, model_id, request, placement, plans FROM endpoints ORDER BY endpoint_id"
            )
            return [
                StoredEndpoint(
                    endpoint_id=endpoint_id,
                    model_id=model_id,
                    request=msgspec.json.decode(request, type=EndpointRequest),
                    placement=placement,
                    plans=msgspec.json.decode(plans, type=Plans),
                )
                for endpoint_id, model_id, request, placement, plans in rows
            ]

        return await self._writer.run(select)

    # Requests

    async def accept(self, row: RequestRow) -> bool:
        """Add an accepted request; return False if its ID is taken."""

        def insert(database: sqlite3.Connection) -> bool:
            cursor = database.execute(
                "INSERT INTO requests (request_id, model, endpoint_id, accepted_s, prompt_tokens, status, reason,"
                " output_tokens) VALUES (?, ?, ?, ?, ?, ?, '', 0) ON CONFLICT DO NOTHING",
                (row.request_id, row.model, row.endpoint_id, row.accepted_s, row.prompt_tokens, _ACCEPTED),
            )
            return cursor.rowcount == 1

        return await self._writer.run(insert)

    async def end(self, ended: EndedRequest) -> None:
        """Set the final status of a request. A request that already ended keeps its status."""
        self._ended_requests += 1
        prune = self._ended_requests % _PRUNE_EVERY == 0

        def update(database: sqlite3.Connection) -> None:
            database.execute(
                "UPDATE requests SET status = ?, reason = ?, output_tokens = ?, ended_s = ?"
                " WHERE request_id = ? AND status = ?",
                (ended.status.label, ended.reason, ended.output_tokens, time.time(), ended.request_id, _ACCEPTED),
            )
            if prune:
                database.execute(
                    "DELETE FROM requests WHERE status != ? AND number <= (SELECT max(number) FROM requests) - ?",
                    (_ACCEPTED, self._kept_requests),
                )

        await self._writer.run(update)

    async def fail_interrupted_requests(self) -> int:
        """Fail the requests that a crash left without a final status; return their number."""

        def update(database: sqlite3.Connection) -> int:
            cursor = database.execute(
                "UPDATE requests SET status = ?, reason = ?, ended_s = ? WHERE status = ?",
                (RequestStatus.FAILED.label, INTERRUPTED, time.time(), _ACCEPTED),
            )
            return cursor.rowcount

        return await self._writer.run(update)

    async def request(self, request_id: str) -> RequestRow | None:
        """Return a request, or None if its ID is unknown."""

        def select(database: sqlite3.Connection) -> RequestRow | None:
            query = f"SELECT {_REQUEST_COLUMNS} FROM requests WHERE request_id = ?"  # noqa: S608
            values = database.execute(query, (request_id,)).fetchone()
            return None if values is None else _request_row(values)

        return await self._writer.run(select)

    async def requests(self, *, status: str | None, limit: int) -> list[RequestRow]:
        """Return the latest accepted requests, newest first; with `status`, only those in it."""
        where, values = ("WHERE status = ?", (status,)) if status else ("", ())

        def select(database: sqlite3.Connection) -> list[RequestRow]:
            query = f"SELECT {_REQUEST_COLUMNS} FROM requests {where} ORDER BY number DESC LIMIT ?"  # noqa: S608
            return [_request_row(row) for row in database.execute(query, (*values, limit))]

        return await self._writer.run(select)


def _prepare(database: sqlite3.Connection) -> None:
    """Create the tables of an empty file.

    Raises:
        InputError: the file has other tables.
    """
    [version] = database.execute("PRAGMA user_version").fetchone()
    if version == _VERSION:
        return
    if version != 0 or database.execute("SELECT count(*) FROM sqlite_schema").fetchone() != (0,):
        raise InputError(
            "the state file is of another program or another version of maveriq serve; choose another with --state"
        )
    for statement in filter(str.strip, _TABLES.split(";")):
        database.execute(statement)
    database.execute(f"PRAGMA user_version = {_VERSION}")


def _to_json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _new_id(cursor: sqlite3.Cursor) -> int:
    if cursor.lastrowid is None:
        raise sqlite3.DatabaseError("an inserted row has no ID")
    return cursor.lastrowid


def _request_row(values: tuple[Any, ...]) -> RequestRow:
    return RequestRow(**dict(zip(_REQUEST_COLUMNS.split(", "), values, strict=True)))


class JobWriter(Protocol):
    """Runs jobs on an SQLite database, as `SqliteJobWriter` does."""

    async def run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run a job and return its result when its changes are on disk."""

    def close(self) -> None:
        """Run the jobs that wait, then close the file."""


Prepare: TypeAlias = Callable[[sqlite3.Connection], None]
OpenWriter: TypeAlias = Callable[[Path, Prepare], JobWriter]


class SqliteJobWriter:
    """Runs jobs on an SQLite file in order, in one thread.

    Jobs that arrive during a transaction share the next one, so many requests need few flushes. The file is locked
    against other processes.
    """

    def __init__(self, path: Path, prepare: Prepare) -> None:
        """Open or create the file.

        Args:
            path: of the file; its folder must exist.
            prepare: creates the tables, in a transaction.

        Raises:
            InputError: the file cannot be opened, is not a database, or is locked by another process.
        """
        self._path = path
        self._closed = False
        self._database = _open_database(path, prepare)
        self._jobs: queue.SimpleQueue[_Job[Any] | None] = queue.SimpleQueue()  # None: close
        self._thread = threading.Thread(target=self._run_jobs, name="maveriq-state", daemon=True)
        self._thread.start()

    async def run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run a job and return its result when its changes are on disk.

        Raises:
            StoreError: the file cannot be read or written, or is closed.
        """
        if self._closed:
            raise StoreError(f"state file {str(self._path)!r} is closed")
        job: _Job[T] = _Job(work, asyncio.get_running_loop().create_future())
        self._jobs.put(job)
        return await job.future

    def close(self) -> None:
        """Run the jobs that wait, then close the file. It may be called twice."""
        self._closed = True
        self._jobs.put(None)
        self._thread.join()

    def _run_jobs(self) -> None:
        is_open = True
        while is_open:
            jobs = [self._jobs.get()]
            with contextlib.suppress(queue.Empty):
                while len(jobs) < _MAX_JOBS_PER_TRANSACTION:
                    jobs.append(self._jobs.get_nowait())
            is_open = None not in jobs
            self._run_transaction([job for job in jobs if job is not None])
        self._database.close()

    def _run_transaction(self, jobs: list[_Job[Any]]) -> None:
        try:
            self._database.execute("BEGIN IMMEDIATE")
            for job in jobs:
                job.result = job.work(self._database)
            self._database.execute("COMMIT")
        except Exception as error:  # any error must reach the callers of `run`
            with contextlib.suppress(sqlite3.Error):
                self._database.execute("ROLLBACK")
            for job in jobs:
                job.error = StoreError(
                    f"state file {str(self._path)!r} cannot be used: {error}; free disk space or repair the file"
                )
        for job in jobs:
            with contextlib.suppress(RuntimeError):  # its event loop is closed
                job.future.get_loop().call_soon_threadsafe(job.set_future)


class _Job(Generic[T]):
    """A function to run on the database, and the future of its result."""

    __slots__ = ("error", "future", "result", "work")

    def __init__(self, work: Callable[[sqlite3.Connection], T], future: asyncio.Future[T]) -> None:
        self.work = work
        self.future = future
        self.result: T | None = None
        self.error: Exception | None = None

    def set_future(self) -> None:
        if self.future.done():  # cancelled
            return
        if self.error is not None:
            self.future.set_exception(self.error)
        else:
            self.future.set_result(self.result)  # type: ignore[arg-type]  # `work` has set it


def _open_database(path: Path, prepare: Prepare) -> sqlite3.Connection:
    name = f"state file {str(path)!r}"
    try:
        database = sqlite3.connect(path, isolation_level=None, timeout=1.0, check_same_thread=False)
    except sqlite3.Error as error:
        raise InputError(f"{name} cannot be opened: {error}; choose a file in a folder that exists") from None
    try:
        # Exclusive, because two services on one state file would both start its endpoints.
        database.execute("PRAGMA locking_mode = EXCLUSIVE")
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        database.execute("PRAGMA foreign_keys = ON")
        database.execute("BEGIN IMMEDIATE")
        prepare(database)
        database.execute("COMMIT")
    except sqlite3.Error as error:
        database.close()
        if "locked" in str(error):
            raise InputError(f"{name} is in use by another maveriq serve; stop it or choose another file") from None
        raise InputError(f"{name} cannot be used: {error}; choose another file") from None
    except BaseException:
        database.close()
        raise
    return database
