"""Compares systems by figures, simulated and recorded, and says where the two disagree and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from maveriq.experiment.definition import Definition, Load
from maveriq.experiment.evaluation import Outcome
from maveriq.experiment.measures import Measure, measure_of
from maveriq.report.saturation import SaturationLabel

POINTS = 5.0
"""Improvements, in percent or points, agree with the published ones within this many points."""

FIGURES_PERCENT = 10.0
"""A figure of a run agrees with the recorded one within this many percent; a share within `POINTS`."""

EVEN = 1.0
"""Improvements of less, in percent or points, are even: neither system is better."""

UNEXPLAINED = "not explained"


@dataclass(frozen=True, slots=True, kw_only=True)
class FigureRow:
    """A figure of a run, simulated and recorded, in the unit of its measure."""

    outcome: Outcome
    measure: Measure
    simulated: float | None
    published: float | None
    why: str

    @property
    def difference(self) -> float | None:
        """Simulated less published, in percent of the published one or in points of a share; None without one."""
        if self.simulated is None or self.published is None:
            return None
        if self.measure.in_points:
            return self.simulated - self.published
        return 100 * (self.simulated / self.published - 1) if self.published else None

    @property
    def differs(self) -> bool:
        """Whether they differ by more than the bar."""
        found = self.difference
        return found is not None and abs(found) > (POINTS if self.measure.in_points else FIGURES_PERCENT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Improvement:
    """By how much one system is better than another under a load, simulated and published.

    Args:
        load: the load.
        ours: the system.
        theirs: what it is compared with.
        measure: by which.
        simulated: percent or points, see `Measure.improvement`; None where a system has no such figure.
        published: likewise of the recordings; None where one is missing.
        saturated: who was not below saturation, simulated or recorded, in words; "" where all were.
        why: why the two differ, "" where they agree.
    """

    load: Load
    ours: str
    theirs: str
    measure: Measure
    simulated: float | None
    published: float | None
    saturated: str
    why: str

    @property
    def difference(self) -> float | None:
        """Simulated less published, in points; None where one is missing."""
        return None if self.simulated is None or self.published is None else self.simulated - self.published

    @property
    def same_direction(self) -> bool | None:
        """Whether the same system is better; None where one is missing."""
        if self.simulated is None or self.published is None:
            return None
        return _direction(self.simulated) == _direction(self.published)

    @property
    def within(self) -> bool | None:
        """Whether they agree within `POINTS`; None where one is missing."""
        return None if self.difference is None else abs(self.difference) <= POINTS


def _direction(improvement: float) -> int:
    return 0 if abs(improvement) < EVEN else 1 if improvement > 0 else -1


def figure_rows(definition: Definition, outcomes: Sequence[Outcome]) -> Iterator[FigureRow]:
    """Yield the figures of each run, in the order of the definition."""
    for outcome in outcomes:
        for name in definition.figures:
            measure = measure_of(name)
            found = FigureRow(
                outcome=outcome,
                measure=measure,
                simulated=_scaled(measure, outcome.figures.get(name)),
                published=_scaled(measure, outcome.published(name)),
                why="",
            )
            if found.differs:
                why = _why(definition, [outcome], measure, _saturated([outcome]))
                found = FigureRow(
                    outcome=outcome, measure=measure, simulated=found.simulated, published=found.published, why=why
                )
            yield found


def improvements(definition: Definition, outcomes: Sequence[Outcome]) -> Iterator[Improvement]:
    """Yield the comparisons of an experiment: load by load, in the order of the definition."""
    by_load: dict[Load, dict[str, Outcome]] = {}
    for outcome in outcomes:
        by_load.setdefault(outcome.point.load, {})[outcome.point.system] = outcome
    for load, systems in by_load.items():
        for compare in definition.compare:
            for ours in compare.ours:
                for theirs in compare.against:
                    if ours != theirs and ours in systems and theirs in systems:
                        for name in compare.by:
                            yield _improvement(definition, load, systems[ours], systems[theirs], measure_of(name))


def _improvement(definition: Definition, load: Load, ours: Outcome, theirs: Outcome, measure: Measure) -> Improvement:
    saturated = _saturated([ours, theirs])
    found = Improvement(
        load=load,
        ours=ours.point.system,
        theirs=theirs.point.system,
        measure=measure,
        simulated=_better(measure, ours.figures.get(measure.name), theirs.figures.get(measure.name)),
        published=_better(measure, ours.published(measure.name), theirs.published(measure.name)),
        saturated=saturated,
        why="",
    )
    if found.within is not False and found.same_direction is not False:
        return found
    return Improvement(
        load=found.load, ours=found.ours, theirs=found.theirs, measure=measure, simulated=found.simulated,
        published=found.published, saturated=saturated, why=_why(definition, [ours, theirs], measure, saturated),
    )  # fmt: skip


def _better(measure: Measure, ours: float | None, theirs: float | None) -> float | None:
    return None if ours is None or theirs is None else measure.improvement(ours, theirs)


def _scaled(measure: Measure, value: float | None) -> float | None:
    return None if value is None else measure.factor * value


def _saturated(outcomes: Sequence[Outcome]) -> str:
    """Return who was not below saturation: "AlpaServe overloaded (simulated and recorded)"."""
    parts = []
    for outcome in outcomes:
        labels = {"simulated": outcome.saturation}
        if outcome.recorded is not None:
            labels["recorded"] = outcome.recorded.saturation
        by_label: dict[str, list[str]] = {}
        for source, label in labels.items():
            if label != SaturationLabel.STABLE:
                by_label.setdefault(label, []).append(source)
        parts += [f"{outcome.point.system} {label} ({' and '.join(sources)})" for label, sources in by_label.items()]
    return ", ".join(parts)


def _why(definition: Definition, outcomes: Sequence[Outcome], measure: Measure, saturated: str) -> str:
    systems = {outcome.point.system for outcome in outcomes}
    given = [
        reason.why
        for reason in definition.reasons
        if (not reason.systems or systems & set(reason.systems))
        and (not reason.figures or measure.name in reason.figures)
    ]
    if saturated and measure.is_queued:
        given.insert(0, f"{saturated}: queueing amplifies small errors of service times")
    return "; ".join(given) or UNEXPLAINED
