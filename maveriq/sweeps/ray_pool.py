"""Cells as tasks of a Ray cluster: one on this machine, or one that runs already."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Self

import msgspec

from maveriq.errors import InputError, MaveriqError
from maveriq.sweeps.worker import CellResult, CellTask, simulate_cell

HERE = "ray"
_TRIES_AFTER_A_LOST_WORKER = 3
_AHEAD = 2  # tasks in Ray's queue for each core, so that no core waits for this process


def simulate_encoded(task: bytes) -> bytes:
    """Simulate a cell; both ways travel as JSON, so that a cluster of another Python reads them."""
    return msgspec.json.encode(simulate_cell(msgspec.json.decode(task, type=CellTask)))


class RayPool:
    """Simulates cells on a Ray cluster, where maveriq must be installed; paths in options are those of its machines.

    Args:
        on: `ray` starts a cluster on this machine and ends it; anything else is the address of one that runs.
        workers: cores of the started cluster, or most tasks at once on another; None for all.

    Raises:
        InputError: Ray is not installed.
    """

    def __init__(self, on: str, workers: int | None) -> None:
        try:
            import ray  # type: ignore[import-not-found, unused-ignore]  # an extra
        except ImportError:
            raise InputError("--on ray needs the package ray; install it with pip install 'maveriq[ray]'") from None
        self._ray: Any = ray
        self._on = on
        self._workers = workers

    def __enter__(self) -> Self:
        self._connect()
        return self

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()

    def results(self, tasks: Iterable[CellTask]) -> Iterator[CellResult]:
        """Yield the results of cells as they end. Ray runs a task again whose worker died."""
        ray = self._ray
        remote = ray.remote(num_cpus=1, max_retries=_TRIES_AFTER_A_LOST_WORKER)(simulate_encoded)
        cores = self._workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        at_once = self._workers if self._workers and self._on != HERE else cores * _AHEAD
        numbers: dict[Any, int] = {}
        waiting = iter(tasks)
        while True:
            for task in waiting:
                numbers[remote.remote(msgspec.json.encode(task))] = task.number
                if len(numbers) >= at_once:
                    break
            if not numbers:
                return
            (ended, *_), _ = ray.wait(list(numbers), num_returns=1)
            yield self._result(ended, numbers.pop(ended))

    def _connect(self) -> None:
        quiet = {"log_to_driver": False, "logging_level": "ERROR"}
        try:
            if self._on == HERE:
                self._ray.init(num_cpus=self._workers, include_dashboard=False, **quiet)
            else:
                self._ray.init(address=self._on, **quiet)
        except (ConnectionError, OSError, RuntimeError, ValueError) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise MaveriqError(f"no Ray cluster at {self._on!r}: {first}") from None

    def _result(self, ended: Any, number: int) -> CellResult:
        try:
            return msgspec.json.decode(self._ray.get(ended), type=CellResult)
        except self._ray.exceptions.RayError as error:
            return CellResult(number=number, error=f"Ray: {' '.join(str(error).split())}"[:1_000])
