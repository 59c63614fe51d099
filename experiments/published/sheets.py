"""Tables of the comparisons, for the terminal and as CSV."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from configurations import Compared
from estimates import EstimateErrors
from queue_model import QueueErrors
from rich.table import Table
from schedules import Redrawn


@dataclass(frozen=True, slots=True, kw_only=True)
class Sheet:
    """A table of text cells; the first `names` columns name a row, the others are its figures."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    names: int = 1

    def csv(self) -> str:
        """Return the sheet as CSV; its cells need no quotes."""
        return "".join(",".join(row) + "\n" for row in (self.columns, *self.rows))

    def table(self) -> Table:
        """Return the sheet as a table for the terminal."""
        table = Table(title=self.title, title_justify="left")
        for position, column in enumerate(self.columns):
            justify = "left" if position < self.names else "right"
            heading = column.replace("_", "\n", 1).replace("_", " ")  # two lines keep the columns narrow
            table.add_column(heading, justify=justify, overflow="fold")  # type: ignore[arg-type]
        for row in self.rows:
            table.add_row(*row)
        return table


def estimates_sheet(errors: Iterable[EstimateErrors]) -> Sheet:
    """Return the errors of the paper's estimator."""
    figures = ("median", "mean", "p90", "worst")
    return Sheet(
        name="estimates",
        title="Paper's estimator against measured full models: absolute percentage error",
        columns=(
            *("table", "by", "value", "rows"),
            *(f"latency_{figure}" for figure in figures),
            *(f"memory_{figure}" for figure in figures),
        ),
        rows=tuple(
            (
                *(group.table, group.group.by, group.group.value, str(group.group.latency.n)),
                *(f"{getattr(group.group.latency, figure):.2f}" for figure in figures),
                *(f"{getattr(group.group.memory, figure):.2f}" for figure in figures),
            )
            for group in errors
        ),
        names=3,
    )


def configurations_sheet(compared: Sequence[Compared]) -> Sheet:
    """Return how many configurations equal the recorded ones, by run and in total."""
    runs = [(run, list(rows)) for run, rows in groupby(compared, key=lambda comparison: comparison.run)]
    return Sheet(
        name="configurations",
        title="MaverIQ's deployments with the recorded configuration",
        columns=("run", "deployments", "given_memory", "free", "free_on_same_gpus", "worst_gib_error"),
        rows=tuple(_configurations_row(run, rows) for run, rows in [*runs, ("all", compared)]),
    )


def _configurations_row(run: str, compared: Sequence[Compared]) -> tuple[str, ...]:
    errors_gib = [comparison.memory_error_gib for comparison in compared if comparison.memory_error_gib is not None]
    return (
        run,
        str(len(compared)),
        str(sum(comparison.given_memory == comparison.recorded for comparison in compared)),
        str(sum(comparison.free == comparison.recorded for comparison in compared)),
        str(sum(comparison.free == comparison.recorded and comparison.same_gpus for comparison in compared)),
        f"{max(errors_gib):.6f}" if errors_gib else "",
    )


def queue_sheet(errors: Sequence[QueueErrors]) -> Sheet:
    """Return the errors of the queue model by run, and the largest absolute value of each."""
    rows = [
        (
            *(run.run, str(run.requests), f"{run.recorded_mean_s:.3f}", f"{run.recorded_p95_s:.3f}"),
            *(f"{error:.2f}" for error in (run.mean_error, run.p95_error, run.median_request_error)),
        )
        for run in errors
    ]
    largest = (
        max(abs(run.mean_error) for run in errors),
        max(abs(run.p95_error) for run in errors),
        max(run.median_request_error for run in errors),
    )
    total = str(sum(run.requests for run in errors))
    return Sheet(
        name="queue_model",
        title="Recorded arrivals and service times through maveriq's queue: error of latency in percent",
        columns=(
            *("run", "requests", "recorded_mean_s", "recorded_p95_s"),
            *("mean_error", "p95_error", "median_request_error"),
        ),
        rows=(*rows, ("largest", total, "", "", *(f"{error:.2f}" for error in largest))),
    )


def schedules_sheet(redrawn: Sequence[Redrawn]) -> Sheet:
    """Return how many scheduled requests are drawn as recorded, by run and in total."""
    figures = [(run.requests, run.from_counts, run.from_public) for run in redrawn]
    totals = [sum(column) for column in zip(*figures, strict=True)]
    rows = [(run.run, *map(str, row)) for run, row in zip(redrawn, figures, strict=True)]
    return Sheet(
        name="schedules",
        title="Scheduled requests drawn as recorded, to the microsecond and in model",
        columns=("run", "requests", "from_counts", "from_public_files"),
        rows=(*rows, ("all", *map(str, totals))),
    )
