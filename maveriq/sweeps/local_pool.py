"""Worker processes on this machine, each of which simulates one cell at a time."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Self

import msgspec

from maveriq.sweeps.worker import CellResult, CellTask

_TRIES = 2  # a worker may be killed for the memory that another one takes
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}


class _Worker:
    """A worker process; its errors go to stderr."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "maveriq.sweeps.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C goes to the sweep alone, which ends its workers
            env=os.environ | _ONE_THREAD,
        )

    def simulate(self, task: CellTask) -> CellResult | None:
        """Return the result of a cell, None if the process has ended instead."""
        assert self._process.stdin and self._process.stdout  # noqa: S101, PT018 - both are pipes
        try:
            self._process.stdin.write(msgspec.json.encode(task) + b"\n")
            self._process.stdin.flush()
        except OSError:
            return None
        line = self._process.stdout.readline()
        return msgspec.json.decode(line, type=CellResult) if line.endswith(b"\n") else None

    def end(self) -> str:
        """Kill the process if it runs, and return how it ended."""
        with suppress(OSError):
            self._process.kill()
        code = self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
        return f"signal {-code}" if code < 0 else f"exit code {code}"


class LocalPool:
    """Simulates cells in worker processes, which stay for the next ones until the pool is closed (mutable).

    Args:
        workers: how many processes, at least 1.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        while not self._idle.empty():
            self._idle.get().end()

    def results(self, tasks: Iterable[CellTask]) -> Iterator[CellResult]:
        """Yield the results of cells as they end; a cell whose worker dies twice has failed.

        When the caller stops asking, the workers are killed.
        """
        waiting: queue.SimpleQueue[CellTask | None] = queue.SimpleQueue()
        done: queue.SimpleQueue[CellResult | Exception] = queue.SimpleQueue()
        queued = list(tasks)
        for task in queued:
            waiting.put(task)
        stop = threading.Event()
        busy: set[_Worker] = set()
        threads = [
            threading.Thread(target=self._serve, args=(waiting, done, busy, stop), daemon=True)
            for _ in range(min(self.workers, len(queued)))
        ]
        started = []
        try:
            for thread in threads:
                waiting.put(None)
                thread.start()
                started.append(thread)
            for _ in queued:
                yield _checked(done.get())
        except BaseException:
            stop.set()
            for worker in tuple(busy):
                worker.end()
            raise
        finally:
            for thread in started:
                thread.join()

    def _serve(
        self,
        waiting: queue.SimpleQueue[CellTask | None],
        done: queue.SimpleQueue[CellResult | Exception],
        busy: set[_Worker],
        stop: threading.Event,
    ) -> None:
        """Give one worker process cell after cell; start another where it dies."""
        worker: _Worker | None = None
        try:
            while not stop.is_set() and (task := waiting.get()) is not None:
                for tries in range(1, _TRIES + 1):
                    if worker is None:
                        worker = self._idle_worker() or _Worker()
                        busy.add(worker)
                    result = worker.simulate(task)
                    if result is not None or stop.is_set():
                        break
                    busy.discard(worker)
                    how, worker = worker.end(), None
                    if tries == _TRIES:
                        result = CellResult(
                            number=task.number, error=f"the process that simulates it died twice ({how})"
                        )
                if result is not None:
                    done.put(result)
        except Exception as error:  # the caller must not wait for ever
            done.put(error)
        finally:
            if worker is not None:
                busy.discard(worker)
                if stop.is_set():
                    worker.end()
                else:
                    self._idle.put(worker)

    def _idle_worker(self) -> _Worker | None:
        try:
            return self._idle.get_nowait()
        except queue.Empty:
            return None


def _checked(result: CellResult | Exception) -> CellResult:
    """Return a result, or raise what ended a thread."""
    if isinstance(result, Exception):
        raise result
    return result
