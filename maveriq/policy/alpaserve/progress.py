"""How far a search has come."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchProgress:
    """Counts so far. `candidates` grows while a search with buckets goes on."""

    candidates: int = 0
    candidates_done: int = 0
    simulations: int = 0
    requests: int = 0


class SearchStopped(Exception):  # noqa: N818  (no error, and never seen outside a search)
    """Ends the threads of a search that was interrupted."""


class ProgressTally:
    """Counts what the threads of a search report, and tells one listener after each report."""

    def __init__(self, listener: Callable[[SearchProgress], None] | None) -> None:
        """Start at zero; without a listener nobody is told."""
        self._listener = listener
        self._lock = threading.Lock()
        self._progress = SearchProgress()
        self._stopped = False

    def stop(self) -> None:
        """Let every thread end at its next report."""
        self._stopped = True

    def expect(self, candidates: int) -> None:
        """So many candidates more are to be filled."""
        self._add(candidates=candidates)

    def filled(self) -> None:
        """One of them is done."""
        self._add(candidates_done=1)

    def simulated(self, requests: int) -> None:
        """A placement was simulated with so many requests."""
        self._add(simulations=1, requests=requests)

    def _add(self, **counts: int) -> None:
        if self._stopped:
            raise SearchStopped
        if self._listener is None:
            return
        with self._lock:
            now = {name: getattr(self._progress, name) + more for name, more in counts.items()}
            self._progress = replace(self._progress, **now)
            self._listener(self._progress)
