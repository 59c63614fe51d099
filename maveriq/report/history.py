"""The past of a live view: a series that keeps a whole run in few points, and recent throughput."""

from __future__ import annotations

from collections import deque

from maveriq.domain.progress import Progress
from maveriq.units import MICROS_PER_SECOND, Micros

_POINTS = 256
_RECENT = 20


class Series:
    """At most 256 points over the whole past; when full, neighbours merge into the larger of the two."""

    def __init__(self) -> None:
        self._points: list[int] = []
        self._stride = 1
        self._seen = 0

    def add(self, value: int) -> None:
        """Add the newest value."""
        if self._seen % self._stride == 0:
            self._points.append(value)
        else:
            self._points[-1] = max(self._points[-1], value)
        self._seen += 1
        if len(self._points) == _POINTS:
            self._points = [max(pair) for pair in zip(self._points[::2], self._points[1::2], strict=True)]
            self._stride *= 2

    def resampled(self, width: int) -> list[int]:
        """Return at most `width` values, each the largest of its share of the past."""
        count = len(self._points)
        if count <= width:
            return list(self._points)
        return [max(self._points[count * i // width : count * (i + 1) // width]) for i in range(width)]


class History:
    """What a live view remembers of the snapshots it was shown."""

    def __init__(self) -> None:
        self.waiting = Series()
        self._recent: deque[tuple[Micros, int]] = deque(maxlen=_RECENT)

    def add(self, progress: Progress) -> None:
        """Remember a snapshot."""
        self.waiting.add(progress.waiting)
        self._recent.append((progress.now_us, progress.completed))

    @property
    def throughput_per_s(self) -> float | None:
        """Completions per second of run time (not of wall time) over the last snapshots."""
        if not self._recent:
            return None
        (since_us, before), (now_us, completed) = self._recent[0], self._recent[-1]
        return (completed - before) * MICROS_PER_SECOND / (now_us - since_us) if now_us > since_us else None
