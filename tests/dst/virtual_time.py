"""An asyncio event loop whose time is simulated: nothing waits, and equal programs run equally.

The loop has no sockets, threads or signals. When no task is ready it does not sleep but sets its clock to the next
timer. A program on it is therefore deterministic, and simulated hours take only as long as their steps.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

_T = TypeVar("_T")


class Deadlock(Exception):  # noqa: N818  (it names a state, as StopIteration does)
    """No task can go on and no timer is set."""


class VirtualLoop(asyncio.BaseEventLoop):
    """The event loop, and its own selector, because the selector is where a loop sleeps."""

    def __init__(self) -> None:
        super().__init__()
        self._now_s = 0.0
        self._selector = self
        self.errors: list[dict[str, Any]] = []
        self.set_exception_handler(lambda _, context: self.errors.append(context))

    def time(self) -> float:
        """Return the simulated time in seconds."""
        return self._now_s

    def stall(self, duration_s: float) -> None:
        """Let time pass without any progress, as while a process is stopped or gets no CPU."""
        self._now_s += duration_s

    def select(self, timeout_s: float | None) -> list[object]:
        """Advance the time instead of sleeping.

        Raises:
            Deadlock: no timer is set.
        """
        if timeout_s is None:
            raise Deadlock("no task can go on and no timer is set")
        self._now_s += max(0.0, timeout_s)
        return []

    def _process_events(self, event_list: list[object]) -> None:
        """There are no sockets, hence no events."""

    def _write_to_self(self) -> None:
        """The loop never sleeps, so it needs no wake-up."""


def run_virtually(main: Coroutine[Any, Any, _T], *, longest_s: float) -> _T:
    """Run a coroutine in simulated time and return what it returns.

    Args:
        main: what to run.
        longest_s: time limit in simulated seconds.

    Raises:
        Deadlock: no task can go on and no timer is set.
        TimeoutError: `main` takes longer than `longest_s`.
        AssertionError: a task failed and its exception was never retrieved.
    """
    loop = VirtualLoop()
    try:
        result = loop.run_until_complete(asyncio.wait_for(main, longest_s))
        left = [task for task in asyncio.all_tasks(loop) if not task.done()]
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        assert not loop.errors, f"a task failed unnoticed: {loop.errors[0]}"
        return result
    finally:
        loop.close()
