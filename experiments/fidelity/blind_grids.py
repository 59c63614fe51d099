"""Tables of the results, for the terminal and for docs/fidelity.md."""

from __future__ import annotations

from collections.abc import Iterator

from blind_plan import BlindPlan
from blind_tables import BlindTables, allowed, held, missed
from grids import Grid

_NONE = "-"


def grids(tables: BlindTables, plan: BlindPlan) -> Iterator[Grid]:
    """Yield the tables of the page."""
    yield _bars(tables, plan)
    yield _runs(tables, plan)
    yield _worst_services(tables, plan)
    yield _elsewhere(tables)
    yield _draws(tables)
    yield _placements(tables)
    yield _contention(tables)
    yield _gains(tables)


def _bars(tables: BlindTables, plan: BlindPlan) -> Grid:
    return Grid(
        name="bars",
        title="Blind runs against the bars",
        columns=("what", "bar", "found", "holds", "on the recorded GPUs (not blind)"),
        rows=tuple(
            (bar.what, bar.wanted, bar.found, "yes" if bar.holds else "**no**", bar.placed or _NONE)
            for bar in held(tables, plan.bars)
        ),
    )


def _runs(tables: BlindTables, plan: BlindPlan) -> Grid:
    rows = []
    for row in tables.runs:
        max_mean, max_p95 = allowed(row, plan.bars)
        off = missed(row, plan.bars)
        rows.append(
            (
                row.run,
                f"{row.busiest_percent:.0f}",
                f"{row.recorded_mean_s:.2f}",
                _bold(f"{row.mean_error:+.1f}", on="mean" in off),
                f"{row.mean_moves:.1f}",
                f"{max_mean:.1f}",
                _bold(f"{row.p95_error:+.1f}", on="p95" in off),
                f"{row.p95_moves:.1f}",
                f"{max_p95:.1f}",
                f"{row.placed_mean_error:+.1f}",
                f"{row.placed_p95_error:+.1f}",
                _points(row.slo_error),
                _points(row.slo_all_error),
                f"{row.same_configuration} of {row.deployments}",
                f"{row.same_gpus:.1f}",
            )
        )
    return Grid(
        name="runs",
        title="Blind runs: errors in percent of the recording",
        columns=(
            *("run", "busiest GPU, %", "mean, s"),
            *("mean off, %", "moves", "may be", "p95 off, %", "moves", "may be"),
            *("mean on recorded GPUs", "p95 there", "SLO of completed, points", "of all", "configurations", "GPUs"),
        ),
        rows=tuple(rows),
    )


def _worst_services(tables: BlindTables, plan: BlindPlan) -> Grid:
    worst = sorted(tables.services, key=lambda row: -abs(row.error))
    return Grid(
        name="services",
        title="Median service times that are furthest off",
        columns=("run", "model", "requests", "recorded, s", "off, %", "on recorded GPUs, %"),
        rows=tuple(
            (
                row.run,
                row.model,
                f"{row.requests:,}",
                f"{row.recorded_s:.3f}",
                _bold(f"{row.error:+.1f}", on=abs(row.error) > plan.bars.service_worst),
                f"{row.placed_error:+.1f}",
            )
            for row in worst
            if abs(row.error) > plan.bars.service_median
        ),
    )


def _elsewhere(tables: BlindTables) -> Grid:
    return Grid(
        name="elsewhere",
        title="Deployments on other GPUs than recorded",
        columns=("run", "endpoint", "recorded", "GPUs", "simulated", "GPUs", "recorded GPUs in draws"),
        rows=tuple(
            (
                row.run,
                f"{row.endpoint_id}: {row.model}",
                row.recorded,
                row.recorded_gpus,
                "the same" if row.sim == row.recorded else row.sim,
                row.sim_gpus,
                f"{row.draws_there} of {row.draws}",
            )
            for row in tables.elsewhere
        ),
    )


def _draws(tables: BlindTables) -> Grid:
    rows = [row for row in tables.runs if row.draws > 1]
    return Grid(
        name="draws",
        title="The effect of chance on placement: minimum and maximum over draws, and the default seed",
        columns=("run", "mean off, %", "default seed", "p95 off, %", "default seed", "on the recorded GPUs"),
        rows=tuple(
            (
                row.run,
                f"{row.mean_error_low:+.1f} to {row.mean_error_high:+.1f}",
                f"{row.mean_error_alone:+.1f}",
                f"{row.p95_error_low:+.1f} to {row.p95_error_high:+.1f}",
                f"{row.p95_error_alone:+.1f}",
                f"{row.same_gpus:.1f} of {row.deployments}",
            )
            for row in rows
        ),
    )


def _placements(tables: BlindTables) -> Grid:
    return Grid(
        name="placements",
        title="Samplers of load against recorded placements, given the recorded executions",
        columns=("readings of GPUs differ in age by", "draws", "as recorded", "in every draw", "in no draw"),
        rows=tuple(
            (
                f"up to {row.max_phase_s:.2f} s" if row.max_phase_s else "nothing",
                str(row.draws),
                f"{row.expected:.1f} of {row.deployments}",
                str(row.always),
                str(row.never),
            )
            for row in tables.placements
        ),
    )


def _contention(tables: BlindTables) -> Grid:
    return Grid(
        name="contention",
        title="Service times while other engines are busy, relative to those of the same engine alone",
        columns=("engine on", "other busy engines", "engines", "requests", "recorded longer, %", "simulated longer, %"),
        rows=tuple(
            (
                row.engine,
                row.co_located,
                str(row.engines),
                f"{row.requests:,}",
                f"{row.recorded_longer:+.1f}",
                f"{row.sim_longer:+.1f}",
            )
            for row in tables.contention
        ),
    )


def _gains(tables: BlindTables) -> Grid:
    return Grid(
        name="gains",
        title="What planning with the other estimator changes",
        columns=("run", "other plans", "mean, s", "mean, %", "p95, %", "cost, %", "GPU-hours, %", "SLO of all, points"),
        rows=tuple(
            (
                row.run,
                str(row.other_plans),
                f"{row.mean_s:.2f}",
                *(
                    f"{change:+.1f}"
                    for change in (row.mean_change, row.p95_change, row.cost_change, row.gpu_hours_change)
                ),
                _points(row.slo_gain),
            )
            for row in tables.gains
        ),
    )


def _bold(text: str, *, on: bool) -> str:
    return f"**{text}**" if on else text


def _points(value: float | None) -> str:
    return _NONE if value is None else f"{value:+.1f}"
