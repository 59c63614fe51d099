"""Shows the progress of a run: a live display, plain lines, or nothing.

The simulator calls `wants_update()` often, which only reads a clock. It makes a snapshot and calls
`update()` only when `wants_update()` returns true.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from maveriq.domain.progress import DeploymentStatus, GpuStatus, Progress
from maveriq.report.formatting import (
    ASCII,
    NONE,
    UNICODE,
    Glyphs,
    bar,
    clock,
    figure,
    gpu_list,
    layer_list,
    level_style,
    share,
    sparkline,
)
from maveriq.report.results import STATUS_STYLES
from maveriq.report.terminal import empty_table
from maveriq.units import MICROS_PER_SECOND, Micros, gib, seconds

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


_MAX_GPU_BARS = 16
_WIDE = 110
_GPU_GAP = 3
_KV_BAR = 8
_FIXED_LINES = 11  # everything but the rows of deployments and GPUs, and a line for the cursor


@dataclass(frozen=True, slots=True, kw_only=True)
class Canvas:
    """The room there is to draw in."""

    width: int
    height: int
    glyphs: Glyphs


def finished_share(progress: Progress) -> float:
    """Return the share of all requests that have ended, one way or another."""
    finished = progress.completed + progress.refused + progress.failed
    return finished / progress.total if progress.total else 0.0


def frame(progress: Progress, history: History, *, left_s: float | None, canvas: Canvas) -> Panel:
    """Return the frame: progress, counts, deployments, GPUs. `left_s` is wall time, None if not known yet."""
    inner = canvas.width - 4
    gpus = _gpus(progress.gpus, inner, canvas.glyphs)
    room = max(3, canvas.height - _FIXED_LINES - gpus.row_count)
    return Panel(
        Group(
            _progress_line(progress, left_s),
            _counts(progress),
            _figures(progress, history),
            _queue(progress, history, inner, canvas.glyphs),
            "",
            _deployments(progress.deployments, room, canvas.glyphs, wide=inner >= _WIDE),
            "",
            gpus,
        ),
        title=Text.assemble(("maveriq ", "bold default"), (clocks(progress), "default")),
        title_align="left",
        border_style="bright_black",
        box=box.ROUNDED,
        padding=(0, 1),
        width=canvas.width,
    )


def clocks(progress: Progress) -> str:
    """Return the simulated clock, and when the last request arrives or has arrived."""
    now, last = clock(seconds(progress.now_us)), clock(seconds(progress.last_arrival_us))
    return f"clock {now}" + (
        f" of {last}" if progress.now_us <= progress.last_arrival_us else f", all arrived by {last}"
    )


def _progress_line(progress: Progress, left_s: float | None) -> Table:
    done = finished_share(progress)
    line = Table.grid(padding=(0, 1), expand=True)
    line.add_column(ratio=1)
    line.add_column(justify="right", no_wrap=True)
    left = f"{clock(left_s)} left" if left_s is not None else "estimating time left"
    line.add_row(
        ProgressBar(total=1.0, completed=done, complete_style="cyan", finished_style="green"),
        Text.assemble((f"{100 * done:3.0f} %", "bold"), (f"  {left}", "dim")),
    )
    return line


def _counts(progress: Progress) -> Text:
    text = Text(no_wrap=True, overflow="ellipsis")
    text.append(f"{progress.completed:,}", style="bold green").append(f" of {progress.total:,} completed")
    text.append(f"   {progress.running:,}", style="bold").append(" running")
    text.append(f"   {progress.waiting:,}", style="bold").append(" waiting")
    for count, word in ((progress.refused, "refused"), (progress.failed, "failed")):
        if count:
            text.append(f"   {count:,}", style="bold red").append(f" {word}")
    return text


def _figures(progress: Progress, history: History) -> Text:
    pairs = (
        (figure(history.throughput_per_s), "requests/s"),
        (figure(progress.recent_p50_s), "s p50"),
        (figure(progress.recent_p95_s), "s p95"),
        *(
            [(share(progress.recent_slo_attainment), "met the SLO")]
            if progress.recent_slo_attainment is not None
            else []
        ),
    )
    text = Text(no_wrap=True, overflow="ellipsis")
    for i, (value, unit) in enumerate(pairs):
        text.append("   " if i else "").append(value, style="bold").append(f" {unit}")
    return text


def _queue(progress: Progress, history: History, width: int, glyphs: Glyphs) -> Text:
    line = sparkline(history.waiting.resampled(width - 6), glyphs=glyphs)
    style = "red" if progress.waiting else "green"
    return Text.assemble(("queue ", "dim"), (line, style), no_wrap=True, overflow="crop")


def _deployments(deployments: Sequence[DeploymentStatus], room: int, glyphs: Glyphs, *, wide: bool) -> RenderableType:
    """Return a row for each deployment, or for the busiest; with the state of engines if any batches continuously."""
    batching = any(deployment.running is not None for deployment in deployments)
    table = empty_table()
    table.add_column("model", no_wrap=True, overflow="ellipsis")
    table.add_column("configuration", no_wrap=True)
    if wide:
        table.add_column("layers", no_wrap=True)
    table.add_column("GPUs", no_wrap=True)
    table.add_column("status", no_wrap=True)
    if batching:
        table.add_column("runs", justify="right", no_wrap=True)
    table.add_column("waits", justify="right", no_wrap=True)
    if batching:
        table.add_column("KV blocks", no_wrap=True)
    table.add_column("done", justify="right", no_wrap=True)
    shown = deployments if len(deployments) <= room else _busiest(deployments, room - 1)
    for deployment in shown:
        table.add_row(*_deployment_cells(deployment, glyphs, wide=wide, batching=batching))
    if len(shown) < len(deployments):
        table.add_row(Text(f"and {len(deployments) - len(shown)} more", style="dim"))
    return table


def _busiest(deployments: Sequence[DeploymentStatus], room: int) -> list[DeploymentStatus]:
    """Return those with most waiting, then most completed, in the order they came in."""
    ranked = sorted(deployments, key=lambda d: (-d.waiting, -d.completed))[:room]
    return [deployment for deployment in deployments if deployment in ranked]


def _deployment_cells(
    deployment: DeploymentStatus, glyphs: Glyphs, *, wide: bool, batching: bool
) -> list[RenderableType]:
    runs: list[RenderableType] = [NONE if deployment.running is None else f"{deployment.running:,}"]
    return [
        Text(deployment.model),
        deployment.configuration or NONE,
        *([layer_list(deployment.layer_split) or NONE] if wide else []),
        gpu_list(deployment.gpu_ids) or NONE,
        Text(deployment.status, style=STATUS_STYLES.get(deployment.status, "")),
        *(runs if batching else []),
        f"{deployment.waiting:,}",
        *([_kv_bar(deployment.kv_use, glyphs)] if batching else []),
        f"{deployment.completed:,}",
    ]


def _kv_bar(kv_use: float | None, glyphs: Glyphs) -> RenderableType:
    if kv_use is None:
        return NONE
    line = bar(kv_use, width=_KV_BAR, style=level_style(kv_use), glyphs=glyphs)
    return line.append(_load_text(kv_use))


def _gpus(gpus: Sequence[GpuStatus], width: int, glyphs: Glyphs) -> Table:
    """Return two GPUs to a line with bars, or, where they are many, a character for each."""
    return _gpu_strips(gpus, width, glyphs) if len(gpus) > _MAX_GPU_BARS else _gpu_bars(gpus, width, glyphs)


def _gpu_bars(gpus: Sequence[GpuStatus], width: int, glyphs: Glyphs) -> Table:
    rows, width_each = -(-len(gpus) // 2), (width - _GPU_GAP) // 2
    bars = max(4, width_each - len("00 " + _memory_text(100, 100) + _load_text(1)))
    head = Text(f"GPU {'memory':<{bars // 2 + 14}}load", style="dim")
    grid = Table.grid(padding=(0, _GPU_GAP, 0, 0), pad_edge=False)
    grid.add_row(*[head] * min(2, len(gpus)))
    for i in range(rows):
        grid.add_row(*(_gpu_line(gpu, bars, glyphs) for gpu in gpus[i::rows]))
    return grid


def _gpu_line(gpu: GpuStatus, bars: int, glyphs: Glyphs) -> Text:
    line = Text.assemble((f"{gpu.gpu_id:>2} ", "dim"))
    if gpu.down:
        return line.append("down", style="bold red")
    used, capacity = gib(gpu.used_bytes), gib(gpu.capacity_bytes)
    line.append_text(bar(used / capacity, width=bars // 2, style="cyan", glyphs=glyphs))
    line.append(_memory_text(used, capacity))
    line.append_text(bar(gpu.load, width=bars - bars // 2, style=level_style(gpu.load), glyphs=glyphs))
    return line.append(_load_text(gpu.load))


def _memory_text(used_gib: float, capacity_gib: float) -> str:
    both = f"{used_gib:.1f}/{capacity_gib:.0f}"
    return f" {both:>8} GiB  "


def _load_text(load: float) -> str:
    return f" {100 * load:3.0f} %"


def _gpu_strips(gpus: Sequence[GpuStatus], width: int, glyphs: Glyphs) -> Table:
    grid = Table.grid(padding=(0, 1, 0, 0))
    per_line = max(8, width - 20)
    top = len(glyphs.levels) - 1
    for since in range(0, len(gpus), per_line):
        part = gpus[since : since + per_line]
        ids = f"GPUs {part[0].gpu_id}-{part[-1].gpu_id}"
        memory, load = Text(), Text()
        for gpu in part:
            memory.append(glyphs.levels[round(top * min(1.0, gpu.used_bytes / gpu.capacity_bytes))], style="cyan")
            mark = "x" if gpu.down else glyphs.levels[round(top * min(1.0, gpu.load))]
            load.append(mark, style="bold red" if gpu.down else level_style(gpu.load))
        grid.add_row(Text(ids, style="dim"), Text("memory", style="dim"), memory)
        grid.add_row("", Text("load", style="dim"), load)
    return grid


_FRAME_S = 0.2
_LINE_S = 10.0

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
        """Return the wall time left, at the pace of the run's clock while requests arrive, then of their ends."""
        elapsed_s = self._now() - self._started_s
        if 0 < progress.now_us < progress.last_arrival_us:
            return elapsed_s * (progress.last_arrival_us - progress.now_us) / progress.now_us
        done = finished_share(progress)
        return elapsed_s * (1 - done) / done if done else None

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
        parts.append(f"recent p50 {figure(progress.recent_p50_s)} s, p95 {figure(progress.recent_p95_s)} s")
    if progress.recent_slo_attainment is not None:
        parts.append(f"recent SLO {share(progress.recent_slo_attainment)}")
    if left_s is not None:
        parts.append(f"{clock(left_s)} left")
    return ", ".join(parts)


def make_view(console: Console, *, quiet: bool, interactive: bool) -> ProgressView:
    """Return the view for a console: nothing if quiet, live if it is a terminal, else plain lines."""
    if quiet:
        return QuietView()
    return LiveView(console) if interactive else PlainView(console)
