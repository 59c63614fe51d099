"""One frame of the live view, drawn from a snapshot of the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from maveriq.domain.progress import DeploymentStatus, GpuStatus, Progress
from maveriq.report.bars import Glyphs, bar, level_style, sparkline
from maveriq.report.history import History
from maveriq.report.tables import STATUS_STYLES, new_table
from maveriq.report.wording import NONE, clock, figure, gpu_list, layer_list, share
from maveriq.units import gib, seconds

_MOST_GPU_BARS = 16
_WIDE = 110
_GPU_GAP = 3
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
            _deployments(progress.deployments, room, wide=inner >= _WIDE),
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


def _deployments(deployments: Sequence[DeploymentStatus], room: int, *, wide: bool) -> RenderableType:
    table = new_table()
    table.add_column("model", no_wrap=True, overflow="ellipsis")
    table.add_column("configuration", no_wrap=True)
    if wide:
        table.add_column("layers", no_wrap=True)
    table.add_column("GPUs", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_column("waits", justify="right", no_wrap=True)
    table.add_column("done", justify="right", no_wrap=True)
    shown = deployments if len(deployments) <= room else _busiest(deployments, room - 1)
    for deployment in shown:
        table.add_row(*_deployment_cells(deployment, wide=wide))
    if len(shown) < len(deployments):
        table.add_row(Text(f"and {len(deployments) - len(shown)} more", style="dim"))
    return table


def _busiest(deployments: Sequence[DeploymentStatus], room: int) -> list[DeploymentStatus]:
    """Return those with most waiting, then most completed, in the order they came in."""
    ranked = sorted(deployments, key=lambda d: (-d.waiting, -d.completed))[:room]
    return [deployment for deployment in deployments if deployment in ranked]


def _deployment_cells(deployment: DeploymentStatus, *, wide: bool) -> list[RenderableType]:
    return [
        Text(deployment.model),
        deployment.configuration or NONE,
        *([layer_list(deployment.layer_split) or NONE] if wide else []),
        gpu_list(deployment.gpu_ids) or NONE,
        Text(deployment.status, style=STATUS_STYLES.get(deployment.status, "")),
        f"{deployment.waiting:,}",
        f"{deployment.completed:,}",
    ]


def _gpus(gpus: Sequence[GpuStatus], width: int, glyphs: Glyphs) -> Table:
    """Return two GPUs to a line with bars, or, where they are many, a character for each."""
    return _gpu_strips(gpus, width, glyphs) if len(gpus) > _MOST_GPU_BARS else _gpu_bars(gpus, width, glyphs)


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
