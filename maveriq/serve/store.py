"""One thread that owns an SQLite file: all that waits is done in one transaction, safe on disk.

What must survive a restart: models, endpoints, and each accepted request with its status.
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

_MAX_IN_ONE_GO = 512


class StoreError(MaveriqError):
    """The state file cannot be written or read now."""


class JobWriter(Protocol):
    """Runs jobs on an SQLite file; `Writer` says how."""

    async def do(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run a job and wait until what it wrote is safe."""

    def close(self) -> None:
        """Do what waits, then close the file."""


Prepare: TypeAlias = Callable[[sqlite3.Connection], None]
OpenWriter: TypeAlias = Callable[[Path, Prepare], JobWriter]


class _Job(Generic[T]):
    """Something to do with the file, and who waits for it."""

    __slots__ = ("done", "error", "result", "work")

    def __init__(self, work: Callable[[sqlite3.Connection], T], done: asyncio.Future[T]) -> None:
        self.work = work
        self.done = done
        self.result: T | None = None
        self.error: Exception | None = None

    def deliver(self) -> None:
        if self.done.done():  # nobody waits any more
            return
        if self.error is not None:
            self.done.set_exception(self.error)
        else:
            self.done.set_result(self.result)  # type: ignore[arg-type]  # the work has set it


class Writer:
    """Runs jobs on an SQLite file in their order, and answers when they are safe on disk.

    Jobs that come while a transaction is under way share the next one, so that many requests cost
    few flushes. Another process cannot open the file meanwhile.
    """

    def __init__(self, path: Path, prepare: Prepare) -> None:
        """Open or make the file.

        Args:
            path: of the file; its folder must be there.
            prepare: brings the tables up to date, in a transaction.

        Raises:
            InputError: it cannot be opened, is no such file, or another process holds it.
        """
        self._path = path
        self._closed = False
        self._file = _open(path, prepare)
        self._jobs: queue.SimpleQueue[_Job[Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="maveriq-state", daemon=True)
        self._thread.start()

    async def do(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run a job and wait until what it wrote is safe on disk.

        Raises:
            StoreError: the file cannot be written or read, or is closed.
        """
        if self._closed:
            raise StoreError(f"state file {str(self._path)!r} is closed")
        job: _Job[T] = _Job(work, asyncio.get_running_loop().create_future())
        self._jobs.put(job)
        return await job.done

    def close(self) -> None:
        """Do what waits, then close the file. May be called twice."""
        self._closed = True
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        open_ = True
        while open_:
            jobs = [self._jobs.get()]
            with contextlib.suppress(queue.Empty):
                while len(jobs) < _MAX_IN_ONE_GO:
                    jobs.append(self._jobs.get_nowait())
            open_ = None not in jobs
            self._in_one_go([job for job in jobs if job is not None])
        self._file.close()

    def _in_one_go(self, jobs: list[_Job[Any]]) -> None:
        try:
            self._file.execute("BEGIN IMMEDIATE")
            for job in jobs:
                job.result = job.work(self._file)
            self._file.execute("COMMIT")
        except Exception as error:  # whatever it is, those who wait must hear of it
            with contextlib.suppress(sqlite3.Error):
                self._file.execute("ROLLBACK")
            for job in jobs:
                job.error = StoreError(f"state file {str(self._path)!r} cannot be used: {error}; make room or mend it")
        for job in jobs:
            with contextlib.suppress(RuntimeError):  # its loop is closed, so nobody waits
                job.done.get_loop().call_soon_threadsafe(job.deliver)


def _open(path: Path, prepare: Prepare) -> sqlite3.Connection:
    what = f"state file {str(path)!r}"
    try:
        file = sqlite3.connect(path, isolation_level=None, timeout=1.0, check_same_thread=False)
    except sqlite3.Error as error:
        raise InputError(f"{what} cannot be opened: {error}; name a file in a folder that exists") from None
    try:
        # Alone with the file: two services on one state would each believe in its own engines.
        file.execute("PRAGMA locking_mode = EXCLUSIVE")
        file.execute("PRAGMA journal_mode = WAL")
        file.execute("PRAGMA synchronous = FULL")
        file.execute("PRAGMA foreign_keys = ON")
        file.execute("BEGIN IMMEDIATE")
        prepare(file)
        file.execute("COMMIT")
    except sqlite3.Error as error:
        file.close()
        if "locked" in str(error):
            raise InputError(f"{what} is in use by another maveriq serve; stop that one or name another file") from None
        raise InputError(f"{what} cannot be used: {error}; name another file") from None
    except BaseException:
        file.close()
        raise
    return file


__all__ = ["EndedRequest", "RequestRow", "Store", "StoreError", "StoredEndpoint", "StoredModel"]

STOPPED_FIRST = "the server stopped first"
"""Why an accepted request failed that had no end when the server's last life ended."""

_VERSION = 2
_PRUNE_EVERY = 1_000

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

_ACCEPTED = "accepted"
_COLUMNS = "request_id, model, endpoint_id, accepted_s, prompt_tokens, status, reason, output_tokens, ended_s"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredModel:
    """A registered model; `folder` is where its files lie, empty for one of the catalogue."""

    model_id: int
    spec: ModelSpec
    folder: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredEndpoint:
    """An endpoint as it was asked for; `plans` as it was last decided on, empty if it never was.

    `placement` is the placement that its developer named, empty for the service's.
    """

    endpoint_id: int
    model_id: int
    request: EndpointRequest
    placement: str
    plans: Plans = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRow:
    """An accepted request: `status` is `accepted` until it ends, then one of the four final ones.

    Times are seconds since 1970; `ended_s` is None until it ends.
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
    """The state file. Every method returns when what it says is safe on disk.

    Raises:
        InputError: the file cannot be used (construction).
        StoreError: the file cannot be written or read (all methods).
    """

    def __init__(self, path: Path, *, kept_requests: int = 100_000, writer: OpenWriter = Writer) -> None:
        """Open or make the file; `writer` opens what does the work."""
        self._kept = kept_requests
        self._ends = 0
        self._writer = writer(path, _prepare)

    def close(self) -> None:
        """Close the file. May be called twice."""
        self._writer.close()

    # Models

    async def add_model(self, spec: ModelSpec, folder: str) -> StoredModel:
        """Register a model under the next number."""

        def add(file: sqlite3.Connection) -> int:
            values = (spec.name, _json(spec), folder)
            return _new_id(file.execute("INSERT INTO models (name, spec, folder) VALUES (?, ?, ?)", values))

        return StoredModel(model_id=await self._writer.do(add), spec=spec, folder=folder)

    async def remove_model(self, model_id: int) -> None:
        """Drop a model that no endpoint serves."""

        def remove(file: sqlite3.Connection) -> None:
            file.execute("DELETE FROM models WHERE model_id = ?", (model_id,))

        await self._writer.do(remove)

    async def models(self) -> list[StoredModel]:
        """Return all models, in the order of their numbers."""

        def read(file: sqlite3.Connection) -> list[StoredModel]:
            return [
                StoredModel(model_id=number, spec=msgspec.json.decode(spec, type=ModelSpec), folder=folder)
                for number, spec, folder in file.execute("SELECT model_id, spec, folder FROM models ORDER BY model_id")
            ]

        return await self._writer.do(read)

    # Endpoints

    async def add_endpoint(self, model_id: int, request: EndpointRequest, placement: str) -> int:
        """Note that an endpoint is wanted and return its number, which was never given before."""

        def add(file: sqlite3.Connection) -> int:
            values = (model_id, _json(request), placement, "[]")
            return _new_id(
                file.execute("INSERT INTO endpoints (model_id, request, placement, plans) VALUES (?, ?, ?, ?)", values)
            )

        return await self._writer.do(add)

    async def set_plans(self, endpoint_id: int, plans: Plans) -> None:
        """Note how an endpoint was deployed."""

        def update(file: sqlite3.Connection) -> None:
            file.execute("UPDATE endpoints SET plans = ? WHERE endpoint_id = ?", (_json(plans), endpoint_id))

        await self._writer.do(update)

    async def remove_endpoint(self, endpoint_id: int) -> None:
        """Note that an endpoint is not wanted any more."""

        def remove(file: sqlite3.Connection) -> None:
            file.execute("DELETE FROM endpoints WHERE endpoint_id = ?", (endpoint_id,))

        await self._writer.do(remove)

    async def endpoints(self) -> list[StoredEndpoint]:
        """Return all endpoints that are wanted, in the order of their numbers."""

        def read(file: sqlite3.Connection) -> list[StoredEndpoint]:
            rows = file.execute(
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

        return await self._writer.do(read)

    # Requests

    async def accept(self, row: RequestRow) -> bool:
        """Note that a request was accepted; False if its id is taken."""

        def add(file: sqlite3.Connection) -> bool:
            done = file.execute(
                "INSERT INTO requests (request_id, model, endpoint_id, accepted_s, prompt_tokens, status, reason,"
                " output_tokens) VALUES (?, ?, ?, ?, ?, ?, '', 0) ON CONFLICT DO NOTHING",
                (row.request_id, row.model, row.endpoint_id, row.accepted_s, row.prompt_tokens, _ACCEPTED),
            )
            return done.rowcount == 1

        return await self._writer.do(add)

    async def end(self, ended: EndedRequest) -> None:
        """Note how a request ended; of one that has ended before, the first end stays."""
        self._ends += 1
        prune = self._ends % _PRUNE_EVERY == 0

        def update(file: sqlite3.Connection) -> None:
            file.execute(
                "UPDATE requests SET status = ?, reason = ?, output_tokens = ?, ended_s = ?"
                " WHERE request_id = ? AND status = ?",
                (ended.status.label, ended.reason, ended.output_tokens, time.time(), ended.request_id, _ACCEPTED),
            )
            if prune:
                file.execute(
                    "DELETE FROM requests WHERE status != ? AND number <= (SELECT max(number) FROM requests) - ?",
                    (_ACCEPTED, self._kept),
                )

        await self._writer.do(update)

    async def end_all_of_last_life(self) -> int:
        """Fail what was accepted and has no end; returns how many there were."""

        def update(file: sqlite3.Connection) -> int:
            done = file.execute(
                "UPDATE requests SET status = ?, reason = ?, ended_s = ? WHERE status = ?",
                (RequestStatus.FAILED.label, STOPPED_FIRST, time.time(), _ACCEPTED),
            )
            return done.rowcount

        return await self._writer.do(update)

    async def request(self, request_id: str) -> RequestRow | None:
        """Return a request, None if there is none (or it ended long ago)."""

        def read(file: sqlite3.Connection) -> RequestRow | None:
            found = file.execute(f"SELECT {_COLUMNS} FROM requests WHERE request_id = ?", (request_id,)).fetchone()  # noqa: S608
            return None if found is None else _row(found)

        return await self._writer.do(read)

    async def requests(self, *, status: str | None, maximum: int) -> list[RequestRow]:
        """Return the last accepted requests, the newest first, perhaps only those of one status."""
        where, values = ("WHERE status = ?", (status,)) if status else ("", ())

        def read(file: sqlite3.Connection) -> list[RequestRow]:
            asked = f"SELECT {_COLUMNS} FROM requests {where} ORDER BY number DESC LIMIT ?"  # noqa: S608
            return [_row(found) for found in file.execute(asked, (*values, maximum))]

        return await self._writer.do(read)


def _prepare(file: sqlite3.Connection) -> None:
    [version] = file.execute("PRAGMA user_version").fetchone()
    if version == _VERSION:
        return
    if version != 0 or file.execute("SELECT count(*) FROM sqlite_schema").fetchone() != (0,):
        raise InputError(
            "the state file is of another program or another version of maveriq serve; name another file with --state"
        )
    for statement in filter(str.strip, _TABLES.split(";")):
        file.execute(statement)
    file.execute(f"PRAGMA user_version = {_VERSION}")


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _new_id(cursor: sqlite3.Cursor) -> int:
    if cursor.lastrowid is None:
        raise sqlite3.DatabaseError("an inserted row has no number")
    return cursor.lastrowid


def _row(found: tuple[Any, ...]) -> RequestRow:
    return RequestRow(**dict(zip(_COLUMNS.split(", "), found, strict=True)))
