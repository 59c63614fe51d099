"""The state file: an SQLite database with the models, the endpoints, and every accepted request with its status.

`Store` has a method for each change and query. `maveriq.serve.job_writer.SqliteJobWriter` runs them in a thread that
owns the file, and answers when they are on disk.
"""

from __future__ import annotations

import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from maveriq.domain.decoder import part_of
from maveriq.domain.models import ModelSpec
from maveriq.domain.requests import RequestStatus
from maveriq.errors import InputError, MaveriqError
from maveriq.exec.live_cluster import EndpointRequest
from maveriq.policy.pinned import Plans
from maveriq.serve.job_writer import JobWriter, OpenWriter, SqliteJobWriter

INTERRUPTED = "the server stopped before the request ended"
"""The reason of a request that was in flight when the server crashed."""

_VERSION = 3
_OLDER = (2,)
"""Versions that are read, too: their endpoints have no engines that batch continuously."""

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

    def problem(self) -> str:
        """Return what is wrong with the file: it was deleted or replaced; "" if nothing is."""
        return self._writer.problem()

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
                StoredModel(
                    model_id=model_id, spec=_from_json(spec, ModelSpec, where=f"model {model_id}"), folder=folder
                )
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
                    request=_from_json(request, EndpointRequest, where=f"endpoint {endpoint_id}"),
                    placement=placement,
                    plans=_from_json(plans, Plans, where=f"endpoint {endpoint_id}"),
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
                (
                    ended.status.label,
                    _encodable(ended.reason),
                    ended.output_tokens,
                    time.time(),
                    ended.request_id,
                    _ACCEPTED,
                ),
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
    """Create the tables of an empty file, and bring an older one to this version.

    Raises:
        InputError: the file has other tables.
    """
    [version] = database.execute("PRAGMA user_version").fetchone()
    if version == _VERSION:
        return
    if version in _OLDER:
        database.execute(f"PRAGMA user_version = {_VERSION}")
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


def _from_json(text: str, kind: Any, *, where: str) -> Any:
    """Decode a value of a row.

    Raises:
        ValueError: the value is not of its type; the message names the row.
    """
    try:
        return msgspec.json.decode(text, type=kind, dec_hook=part_of)
    except (msgspec.DecodeError, MaveriqError) as error:
        raise ValueError(f"{where} cannot be read: {error}") from None


def _encodable(text: str) -> str:
    """Return a text without lone surrogates, which SQLite cannot store: a reason may quote anything."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


def _new_id(cursor: sqlite3.Cursor) -> int:
    if cursor.lastrowid is None:
        raise sqlite3.DatabaseError("an inserted row has no ID")
    return cursor.lastrowid


def _request_row(values: tuple[Any, ...]) -> RequestRow:
    return RequestRow(**dict(zip(_REQUEST_COLUMNS.split(", "), values, strict=True)))
