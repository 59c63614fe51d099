"""The outcomes as grids of finished cells, for the terminal and as Markdown.

A row is a policy, a column a workload: a trace and a rate scale. Shares are in percent.
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
"""The SLO scale of all grids that do not compare SLO scales; the results have the others."""

_VERDICT_MARKS = {"stable": "", "backlogged": " b", "overloaded": " **o**"}
_NONE = "-"
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """A table of finished cells; `name` is its marker in a page. The first column names the row."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """Return it as a Markdown table."""
        alignment = ("---", *("---:" for _ in self.columns[1:]))
        return "\n".join(f"| {' | '.join(row)} |" for row in (self.columns, alignment, *self.rows))

    def table(self) -> Table:
        """Return it for the terminal."""
        table = Table(title=self.title, title_justify="left")
        for position, column in enumerate(self.columns):
            table.add_column(column, justify="right" if position else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*(cell.replace("**", "") for cell in row))
        return table


def grids(outcomes: Sequence[Outcome]) -> Iterator[Grid]:
    """Yield what the page shows of a comparison."""
    for model_set in _in_order(one.model_set for one in outcomes):
        rows = [one for one in outcomes if one.model_set == model_set and one.slo_scale == SLO_SCALE]
        if not rows:
            continue
        yield _by_workload("search", "attainment that the search expected, % (endpoints not deployed)", rows, _search)
        yield _by_workload("completed", "SLO met, % of completed requests", rows, _met_of_completed)
        yield _by_workload("scheduled", "SLO met, % of scheduled requests", rows, _met_of_scheduled)
        yield _by_workload("latency", "mean latency, s (b: backlogged, o: overloaded)", rows, _latency)
    yield _all_workloads(outcomes)


def recorded_grid(pairs: Iterable[tuple[Recorded, Outcome]]) -> Grid:
    """Return recorded runs beside the simulated ones."""
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
    workloads = _in_order((one.trace, one.scale) for one in rows)
    at = {(one.policy, one.trace, one.scale): cell(one) for one in rows}
    lines = [
        (policy, *(at[policy, *workload] for workload in workloads)) for policy in _in_order(one.policy for one in rows)
    ]
    return Grid(
        name=f"{model_set} {name}",
        title=f"{model_set}, SLO scale {SLO_SCALE:g}: {title}",
        columns=("policy", *(f"{trace} {scale:g}" for trace, scale in workloads)),
        rows=tuple(line for line in lines if set(line[1:]) != {""}),
    )


def _search(one: Outcome) -> str:
    """Return what the search expected; empty for a policy that does not search."""
    if one.expected_met is None:
        return "" if one.completed else "infeasible"
    missing = [word.removesuffix(":none") for word in one.placement.split() if word.endswith(":none")]
    return _percent(one.expected_met) + (f" ({' '.join(missing)})" if missing else "")


def _met_of_completed(one: Outcome) -> str:
    return _percent(one.met_of_completed)


def _met_of_scheduled(one: Outcome) -> str:
    return _percent(one.met_of_scheduled)


def _latency(one: Outcome) -> str:
    return _seconds(one.mean_latency_s) + (_VERDICT_MARKS[one.verdict] if one.completed else "")


def _all_workloads(outcomes: Sequence[Outcome]) -> Grid:
    """Return, per model set and policy, the plain mean over workloads at each SLO scale, and the verdicts."""
    slo_scales = _in_order(one.slo_scale for one in outcomes)
    lines = []
    for model_set, policy in _in_order((one.model_set, one.policy) for one in outcomes):
        rows = [one for one in outcomes if (one.model_set, one.policy) == (model_set, policy)]
        met = [_percent(fmean(one.met_of_scheduled or 0 for one in rows if one.slo_scale == slo)) for slo in slo_scales]
        served = [one.verdict for one in rows if one.completed]
        verdicts = " / ".join(str(served.count(word)) for word in _VERDICT_MARKS) if served else "infeasible"
        refused = sum(one.refused for one in rows) / sum(one.scheduled for one in rows)
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
