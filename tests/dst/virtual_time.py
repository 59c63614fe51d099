"""An asyncio event loop whose time is simulated: nothing waits, and equal programs run equally.

The loop knows no sockets, no threads and no signals. When nothing is ready it does not sleep, it
sets its clock to the next timer. Whatever runs on it is therefore as deterministic as its own
choices, and hours of it take as long as its steps need.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

_T = TypeVar("_T")


class Deadlock(Exception):  # noqa: N818  (it names a state, as StopIteration does)
    """No task can go on and no timer is set."""


class VirtualLoop(asyncio.BaseEventLoop):
    """The loop; its own selector, too, for that is where a loop would sleep."""

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
        """Let time pass in which nothing gets on, as where a process is stopped or has no processor."""
        self._now_s += duration_s

    def select(self, timeout_s: float | None) -> list[object]:
        """Let time pass instead of sleeping.

        Raises:
            Deadlock: there is nothing to wait for.
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
        longest_s: simulated seconds after which it counts as hanging.

    Raises:
        Deadlock: no task can go on and no timer is set.
        TimeoutError: it takes longer than that.
        AssertionError: a task of its failed and nobody looked.
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
