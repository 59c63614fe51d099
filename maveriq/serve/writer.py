"""One thread that owns an SQLite file: all that waits is done in one transaction, safe on disk."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

from maveriq.errors import InputError, MaveriqError

T = TypeVar("T")

_MOST_IN_ONE_GO = 512


class StoreError(MaveriqError):
    """The state file cannot be written or read now."""


class DoesJobs(Protocol):
    """Runs jobs on an SQLite file; `Writer` says how."""

    async def do(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run a job and wait until what it wrote is safe."""

    def close(self) -> None:
        """Do what waits, then close the file."""


Prepare: TypeAlias = Callable[[sqlite3.Connection], None]
OpenWriter: TypeAlias = Callable[[Path, Prepare], DoesJobs]


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
                while len(jobs) < _MOST_IN_ONE_GO:
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
