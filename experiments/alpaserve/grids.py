"""Tables of the outcomes, for the terminal and as Markdown.

Each row is a policy, each column a workload (a trace and a rate scale). Shares are in percent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TypeVar

from outcomes import Outcome
from recordings import Recorded
from rich.table import Table

SLO_SCALE = 5.0
"""The SLO scale of all grids that do not compare SLO scales; the results contain the others too."""

_VERDICT_MARKS = {"stable": "", "backlogged": " b", "overloaded": " **o**"}
_NONE = "-"
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """A table of text cells; `name` is its marker in a page, and the first column names the row."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """Return the grid as a Markdown table."""
        alignment = ("---", *("---:" for _ in self.columns[1:]))
        return "\n".join(f"| {' | '.join(row)} |" for row in (self.columns, alignment, *self.rows))

    def table(self) -> Table:
        """Return the grid as a table for the terminal."""
        table = Table(title=self.title, title_justify="left")
        for position, column in enumerate(self.columns):
            table.add_column(column, justify="right" if position else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*(cell.replace("**", "") for cell in row))
        return table


def grids(outcomes: Sequence[Outcome]) -> Iterator[Grid]:
    """Yield the grids of a comparison."""
    for model_set in _in_order(outcome.model_set for outcome in outcomes):
        rows = [outcome for outcome in outcomes if outcome.model_set == model_set and outcome.slo_scale == SLO_SCALE]
        if not rows:
            continue
        yield _by_workload("search", "attainment that the search expected, % (endpoints not deployed)", rows, _search)
        yield _by_workload("completed", "SLO met, % of completed requests", rows, _met_of_completed)
        yield _by_workload("scheduled", "SLO met, % of scheduled requests", rows, _met_of_scheduled)
        yield _by_workload("latency", "mean latency, s (b: backlogged, o: overloaded)", rows, _latency)
    yield _all_workloads(outcomes)


def recorded_grid(pairs: Iterable[tuple[Recorded, Outcome]]) -> Grid:
    """Return recorded runs next to simulated ones."""
    return Grid(
        name="recorded",
        title="Recorded runs of the testbed, and the same scenarios simulated",
        columns=(
            *("run", "scheduled", "completed: recorded", "simulated"),
            *("mean latency, s: recorded", "simulated", "SLO met, % of scheduled: recorded", "simulated"),
        ),
        rows=tuple(
            (
                *(there.run, str(here.scheduled), str(there.completed), str(here.completed)),
                *(_seconds(there.mean_latency_s), _seconds(here.mean_latency_s)),
                *(_percent(there.met_of_scheduled), _percent(here.met_of_scheduled)),
            )
            for there, here in pairs
        ),
    )


def _by_workload(name: str, title: str, rows: Sequence[Outcome], cell: Callable[[Outcome], str]) -> Grid:
    model_set = rows[0].model_set
    workloads = _in_order((row.trace, row.scale) for row in rows)
    at = {(row.policy, row.trace, row.scale): cell(row) for row in rows}
    lines = [
        (policy, *(at[policy, *workload] for workload in workloads)) for policy in _in_order(row.policy for row in rows)
    ]
    return Grid(
        name=f"{model_set} {name}",
        title=f"{model_set}, SLO scale {SLO_SCALE:g}: {title}",
        columns=("policy", *(f"{trace} {scale:g}" for trace, scale in workloads)),
        rows=tuple(line for line in lines if set(line[1:]) != {""}),
    )


def _search(outcome: Outcome) -> str:
    """Return the attainment that the search expected; empty for a policy without search."""
    if outcome.expected_met is None:
        return "" if outcome.completed else "infeasible"
    missing = [word.removesuffix(":none") for word in outcome.placement.split() if word.endswith(":none")]
    return _percent(outcome.expected_met) + (f" ({' '.join(missing)})" if missing else "")


def _met_of_completed(outcome: Outcome) -> str:
    return _percent(outcome.met_of_completed)


def _met_of_scheduled(outcome: Outcome) -> str:
    return _percent(outcome.met_of_scheduled)


def _latency(outcome: Outcome) -> str:
    return _seconds(outcome.mean_latency_s) + (_VERDICT_MARKS[outcome.verdict] if outcome.completed else "")


def _all_workloads(outcomes: Sequence[Outcome]) -> Grid:
    """Return, per model set and policy, the mean over workloads at each SLO scale, and counts of the verdicts."""
    slo_scales = _in_order(outcome.slo_scale for outcome in outcomes)
    lines = []
    for model_set, policy in _in_order((outcome.model_set, outcome.policy) for outcome in outcomes):
        rows = [outcome for outcome in outcomes if (outcome.model_set, outcome.policy) == (model_set, policy)]
        met = [_percent(fmean(row.met_of_scheduled or 0 for row in rows if row.slo_scale == slo)) for slo in slo_scales]
        served = [row.verdict for row in rows if row.completed]
        verdicts = " / ".join(str(served.count(word)) for word in _VERDICT_MARKS) if served else "infeasible"
        refused = sum(row.refused for row in rows) / sum(row.scheduled for row in rows)
        lines.append((f"{model_set}: {policy}", *met, _percent(refused), verdicts))
    return Grid(
        name="summary",
        title="SLO met, % of scheduled requests, plain mean over traces and scales",
        columns=(
            "policy",
            *(f"SLO scale {slo:g}" for slo in slo_scales),
            "refused, %",
            "runs stable / backlogged / overloaded",
        ),
        rows=tuple(lines),
    )


def _in_order(values: Iterable[_T]) -> list[_T]:
    return list(dict.fromkeys(values))


def _percent(share: float | None) -> str:
    return _NONE if share is None else f"{100 * share:.1f}"


def _seconds(value: float | None) -> str:
    if value is None:
        return _NONE
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"
