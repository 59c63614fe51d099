"""Runs jobs on an SQLite file in order, in one thread, and answers when their changes are on disk.

Jobs that arrive during a transaction share the next one, so many requests need few flushes. Each job has a savepoint
of its own in it: a job that fails, fails alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import sqlite3
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

from maveriq.errors import InputError, MaveriqError

T = TypeVar("T")

_MAX_JOBS_PER_TRANSACTION = 512
_PRIVATE = 0o600


class StoreError(MaveriqError):
    """The state file cannot be read or written."""


class JobWriter(Protocol):
    """Runs jobs on an SQLite database, as `SqliteJobWriter` does."""

    async def run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run a job and return its result when its changes are on disk."""

    def problem(self) -> str:
        """Return what is wrong with the file, "" if nothing is."""

    def close(self) -> None:
        """Run the jobs that wait, then close the file."""


Prepare: TypeAlias = Callable[[sqlite3.Connection], None]
OpenWriter: TypeAlias = Callable[[Path, Prepare], JobWriter]


class SqliteJobWriter:
    """`JobWriter` on a file. The file is locked against other processes, and readable by its owner alone."""

    def __init__(self, path: Path, prepare: Prepare) -> None:
        """Open or create the file.

        Args:
            path: of the file; its folder must exist.
            prepare: creates the tables, in a transaction.

        Raises:
            InputError: the file cannot be opened, is not a database, is damaged, or is locked by another process.
        """
        self._path = path
        self._closed = False
        self._database = _open_database(path, prepare)
        self._identity = FileIdentity(path)
        self._jobs: queue.SimpleQueue[_Job[Any] | None] = queue.SimpleQueue()  # None: close
        self._thread = threading.Thread(target=self._run_jobs, name="maveriq-state", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:  # the limit of threads
            self._database.close()
            raise MaveriqError(f"state file {str(path)!r}: {error}; allow more threads (ulimit -u)") from None

    async def run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run a job and return its result when its changes are on disk.

        Raises:
            StoreError: the file cannot be read or written, was deleted or replaced, or is closed.
        """
        if self._closed:
            raise StoreError(f"state file {str(self._path)!r} is closed")
        job: _Job[T] = _Job(work, asyncio.get_running_loop().create_future())
        self._jobs.put(job)
        return await job.future

    def problem(self) -> str:
        """Return what is wrong with the file: it was deleted or replaced; "" if nothing is."""
        return self._identity.problem()

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
            self._run_batch([job for job in jobs if job is not None])
        self._database.close()

    def _run_batch(self, jobs: list[_Job[Any]]) -> None:
        """Run jobs in one transaction or, if that fails as a whole, each in one of its own; then tell their callers."""
        problem = self._identity.problem()
        if problem:
            for job in jobs:
                job.error = StoreError(problem)
        elif not self._run_transaction(jobs) and len(jobs) > 1:
            for job in jobs:
                self._run_transaction([job])
        for job in jobs:
            with contextlib.suppress(RuntimeError):  # its event loop is closed
                job.future.get_loop().call_soon_threadsafe(job.set_future)

    def _run_transaction(self, jobs: list[_Job[Any]]) -> bool:
        """Run jobs in one transaction; return whether it was committed. Jobs that failed have an error either way."""
        try:
            self._database.execute("BEGIN IMMEDIATE")
            for job in jobs:
                self._run_job(job)
            self._database.execute("COMMIT")
        except Exception as error:  # any error must reach the callers of `run`
            with contextlib.suppress(sqlite3.Error):
                self._database.execute("ROLLBACK")
            for job in jobs:
                job.error = self._store_error(error)
            return False
        return True

    def _run_job(self, job: _Job[Any]) -> None:
        """Run a job within a savepoint; an error that ends the whole transaction is raised."""
        job.error = None
        self._database.execute("SAVEPOINT job")
        try:
            job.result = job.work(self._database)
        except Exception as error:  # any error must reach the caller of `run`
            if not self._database.in_transaction:  # SQLite has rolled back more than this statement
                raise
            self._database.execute("ROLLBACK TO job")
            job.error = self._store_error(error)
        self._database.execute("RELEASE job")

    def _store_error(self, error: Exception) -> StoreError:
        remedy = "free disk space or repair the file" if isinstance(error, sqlite3.Error) else "repair it"
        return StoreError(
            f"state file {str(self._path)!r} cannot be used: {str(error) or type(error).__name__}; {remedy}"
        )


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


class FileIdentity:
    """Tells whether the paths of an open SQLite file and of its log still lead to the files that were opened.

    SQLite goes on writing to a file that was deleted, and everything written then is lost.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inodes: dict[Path, tuple[int, int]] = {}
        self.problem()

    def problem(self) -> str:
        """Return which of the files was deleted or replaced, "" if none was."""
        for path in (self._path, Path(f"{self._path}-wal")):
            inode = _inode(path)
            if inode != self._inodes.get(path, inode):
                changed = "deleted" if inode is None else "replaced"
                return (
                    f"state file {str(path)!r} was {changed} while the server runs, so nothing can be stored; "
                    "put it back or restart the server"
                )
            if inode is not None:
                self._inodes[path] = inode
        return ""


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _open_database(path: Path, prepare: Prepare) -> sqlite3.Connection:
    name = f"state file {str(path)!r}"
    _make_private(path, name)
    try:
        # An absolute path: SQLite gives names like ":memory:" and "file:x" a meaning of their own.
        database = sqlite3.connect(path.absolute(), isolation_level=None, timeout=1.0, check_same_thread=False)
    except sqlite3.Error as error:
        raise InputError(f"{name} cannot be opened: {error}; choose a file in a folder that exists") from None
    try:
        # Exclusive, because two services on one state file would both start its endpoints.
        database.execute("PRAGMA locking_mode = EXCLUSIVE")
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        database.execute("PRAGMA foreign_keys = ON")
        database.execute("BEGIN IMMEDIATE")
        _check_undamaged(database, name)
        prepare(database)
        database.execute("COMMIT")
    except sqlite3.Error as error:
        database.close()
        if "locked" in str(error):
            raise InputError(
                f"{name} is in use by another maveriq serve or another program; stop it or choose another file"
            ) from None
        raise InputError(f"{name} cannot be used: {error}; choose another file") from None
    except BaseException:
        database.close()
        raise
    return database


def _check_undamaged(database: sqlite3.Connection, name: str) -> None:
    [damage] = database.execute("PRAGMA quick_check(1)").fetchone()
    if damage != "ok":
        raise InputError(f"{name} is damaged: {damage}; restore it from a copy, or choose another with --state")


def _make_private(path: Path, name: str) -> None:
    """Create a file that only its owner may read and write, or take the rights of others from an existing one.

    An existing file is not opened: closing it would release the locks that this process has on it.

    Raises:
        InputError: it cannot be created, is not a regular file, or is read-only.
    """
    if str(path) == ":memory:":
        raise InputError(f"{name} would be lost at the end; choose a file with --state")
    try:
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, _PRIVATE))
        status = path.stat()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{name} cannot be opened: {reason}; choose a file in a folder that exists") from None
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{name} is not a regular file; choose another with --state")
    if not os.access(path, os.R_OK | os.W_OK, effective_ids=True):
        raise InputError(f"{name} is read-only for this user; choose another with --state")
    if stat.S_IMODE(status.st_mode) & ~_PRIVATE:
        with contextlib.suppress(OSError):  # another owner's file; SQLite tells whether it can be used
            path.chmod(stat.S_IMODE(status.st_mode) & _PRIVATE)
