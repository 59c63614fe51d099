"""Views of a run under way: a live display, plain lines, or nothing.

A simulator asks `wants_update()` as often as it likes, which reads a clock and no more, and makes
a snapshot only when told that it is time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.live import Live

from maveriq.domain.progress import Progress
from maveriq.report.bars import ASCII, UNICODE
from maveriq.report.frame import Canvas, clocks, finished_share, frame
from maveriq.report.history import History
from maveriq.report.wording import clock, figure, share

_FRAME_S = 0.2
_LINE_S = 10.0
_LEAST_SHARE = 0.02  # below it, the time left would be a guess

Clock = Callable[[], float]


class ProgressView(Protocol):
    """Shows a run while it goes on; enter it before the first update."""

    def __enter__(self) -> Self:
        """Start showing."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop showing, and leave the terminal as it was."""

    def wants_update(self) -> bool:
        """Say cheaply whether it is time for another snapshot."""

    def update(self, progress: Progress) -> None:
        """Show a snapshot, whether or not it was wanted."""


class QuietView:
    """Shows nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def wants_update(self) -> bool:
        """Say no."""
        return False

    def update(self, progress: Progress) -> None:
        """Do nothing."""


class _PacedView:
    """A view that wants a snapshot each `every_s` of wall time."""

    def __init__(self, console: Console, *, every_s: float, now: Clock) -> None:
        self._console = console
        self._every_s = every_s
        self._now = now
        self._started_s = now()
        self._due_s = self._started_s

    def wants_update(self) -> bool:
        """Say whether it is time."""
        return self._now() >= self._due_s

    def _left_s(self, progress: Progress) -> float | None:
        """Return the wall time left at the pace so far, None while that would be a guess."""
        done = finished_share(progress)
        return (self._now() - self._started_s) * (1 - done) / done if done >= _LEAST_SHARE else None

    def _pace(self) -> None:
        # From the end of drawing, so that a slow terminal cannot take all the time there is.
        self._due_s = self._now() + self._every_s


class LiveView(_PacedView):
    """A live display on a terminal, drawn five times a second at most; its last frame stays."""

    def __init__(self, console: Console, *, every_s: float = _FRAME_S, now: Clock = time.monotonic) -> None:
        super().__init__(console, every_s=every_s, now=now)
        self._history = History()
        self._live = Live(console=console, auto_refresh=False)

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)

    def update(self, progress: Progress) -> None:
        """Draw a snapshot."""
        self._history.add(progress)
        options = self._console.options
        canvas = Canvas(
            width=options.max_width,
            height=self._console.height,
            glyphs=ASCII if options.ascii_only else UNICODE,
        )
        self._live.update(
            frame(progress, self._history, left_s=self._left_s(progress), canvas=canvas),
            refresh=True,
        )
        self._pace()


class PlainView(_PacedView):
    """A line every ten seconds of wall time, for logs and pipes; the first after ten seconds."""

    def __init__(self, console: Console, *, every_s: float = _LINE_S, now: Clock = time.monotonic) -> None:
        super().__init__(console, every_s=every_s, now=now)
        self._pace()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def update(self, progress: Progress) -> None:
        """Print a line."""
        line = progress_line(progress, left_s=self._left_s(progress))
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        self._pace()


def progress_line(progress: Progress, *, left_s: float | None) -> str:
    """Return a snapshot as one plain line."""
    parts = [
        clocks(progress),
        f"{progress.completed:,} of {progress.total:,} completed",
        f"{progress.running:,} running",
        f"{progress.waiting:,} waiting",
    ]
    parts += [f"{progress.refused:,} refused"] if progress.refused else []
    parts += [f"{progress.failed:,} failed"] if progress.failed else []
    if progress.recent_p50_s is not None:
        parts.append(f"p50 {figure(progress.recent_p50_s)} s, p95 {figure(progress.recent_p95_s)} s")
    if progress.recent_slo_attainment is not None:
        parts.append(f"SLO {share(progress.recent_slo_attainment)}")
    if left_s is not None:
        parts.append(f"{clock(left_s)} left")
    return ", ".join(parts)


def make_view(console: Console, *, quiet: bool, interactive: bool) -> ProgressView:
    """Return the view for a console: nothing if quiet, live if it is a terminal, else plain lines."""
    if quiet:
        return QuietView()
    return LiveView(console) if interactive else PlainView(console)
