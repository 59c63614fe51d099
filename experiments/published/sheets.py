"""The comparisons as sheets of finished cells, for the terminal and as CSV."""

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
    """A table of finished cells; the first `names` columns name a row, the rest are its figures."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    names: int = 1

    def csv(self) -> str:
        """Return it as CSV; its cells need no quotes."""
        return "".join(",".join(row) + "\n" for row in (self.columns, *self.rows))

    def table(self) -> Table:
        """Return it for the terminal."""
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
                *(one.table, one.group.by, one.group.value, str(one.group.latency.n)),
                *(f"{getattr(one.group.latency, figure):.2f}" for figure in figures),
                *(f"{getattr(one.group.memory, figure):.2f}" for figure in figures),
            )
            for one in errors
        ),
        names=3,
    )


def configurations_sheet(compared: Sequence[Compared]) -> Sheet:
    """Return how many configurations equal the recorded ones, run by run and in all."""
    runs = [(run, list(rows)) for run, rows in groupby(compared, key=lambda one: one.run)]
    return Sheet(
        name="configurations",
        title="MaverIQ's deployments with the recorded configuration",
        columns=("run", "deployments", "given_memory", "free", "free_on_same_gpus", "worst_gib_error"),
        rows=tuple(_configurations_row(run, rows) for run, rows in [*runs, ("all", compared)]),
    )


def _configurations_row(run: str, compared: Sequence[Compared]) -> tuple[str, ...]:
    errors_gib = [one.memory_error_gib for one in compared if one.memory_error_gib is not None]
    return (
        run,
        str(len(compared)),
        str(sum(one.given_memory == one.recorded for one in compared)),
        str(sum(one.free == one.recorded for one in compared)),
        str(sum(one.free == one.recorded and one.same_gpus for one in compared)),
        f"{max(errors_gib):.6f}" if errors_gib else "",
    )


def queue_sheet(errors: Sequence[QueueErrors]) -> Sheet:
    """Return the errors of the queue model, run by run, and the largest of each without its sign."""
    rows = [
        (
            *(one.run, str(one.requests), f"{one.recorded_mean_s:.3f}", f"{one.recorded_p95_s:.3f}"),
            *(f"{error:.2f}" for error in (one.mean_error, one.p95_error, one.median_request_error)),
        )
        for one in errors
    ]
    largest = (
        max(abs(one.mean_error) for one in errors),
        max(abs(one.p95_error) for one in errors),
        max(one.median_request_error for one in errors),
    )
    total = str(sum(one.requests for one in errors))
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
    """Return how many scheduled requests are drawn as they were recorded, run by run and in all."""
    figures = [(one.requests, one.from_counts, one.from_public) for one in redrawn]
    totals = [sum(column) for column in zip(*figures, strict=True)]
    rows = [(one.run, *map(str, row)) for one, row in zip(redrawn, figures, strict=True)]
    return Sheet(
        name="schedules",
        title="Scheduled requests drawn as recorded, to the microsecond and in model",
        columns=("run", "requests", "from_counts", "from_public_files"),
        rows=(*rows, ("all", *map(str, totals))),
    )
