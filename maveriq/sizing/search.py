"""The fewest GPUs that meet a target, found with few simulations, and how sure that is.

Each simulation of a cluster size has a seed and gives the share of requests that meet their SLOs. More GPUs are mostly
no worse, and the search begins as if that always held. It does not: a policy that deploys one model after the other may
give the first one more GPUs than it needs, and leave too few for the next. So smaller sizes are screened afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from maveriq.compat import StrEnum

CONFIDENCE = 0.95
_NEIGHBORS = 3  # on each side of the answer, where the sizes there are uncertain
_SCREENED = 24  # smaller sizes, those nearest to the answer
_DEVIATIONS = 3  # a size that misses the target by more with one seed gets no more seeds

Simulate = Callable[[int, Sequence[int]], Sequence[float]]
"""Returns the attainment (0 to 1) of so many GPUs for each of some seeds."""


class Verdict(StrEnum):
    """Whether a cluster size meets the target."""

    MEETS = "meets"
    LIKELY_MEETS = "likely meets"
    LIKELY_MISSES = "likely misses"
    MISSES = "misses"

    @property
    def is_met(self) -> bool:
        """Whether the mean over seeds reaches the target."""
        return self in (Verdict.MEETS, Verdict.LIKELY_MEETS)

    @property
    def is_sure(self) -> bool:
        """Whether the confidence interval is on one side of the target."""
        return self in (Verdict.MEETS, Verdict.MISSES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """What was found about one cluster size.

    Args:
        gpus: how many.
        attainments: the share of requests within their SLOs, for each seed from 1.
        target: the share asked for.
    """

    gpus: int
    attainments: tuple[float, ...]
    target: float

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return float(np.mean(self.attainments))

    @property
    def deviation(self) -> float:
        """The standard deviation over seeds; 0 for one seed."""
        return float(np.std(self.attainments, ddof=1)) if len(self.attainments) > 1 else 0.0

    @property
    def half_width(self) -> float:
        """Half the 95 % confidence interval of the mean (Student's t); infinite for one seed."""
        count = len(self.attainments)
        return math.inf if count < 2 else _quantile(count - 1) * self.deviation / math.sqrt(count)

    @property
    def verdict(self) -> Verdict:
        """Whether this size meets the target, and how sure that is."""
        if self.mean - self.half_width >= self.target:
            return Verdict.MEETS
        if self.mean + self.half_width < self.target:
            return Verdict.MISSES
        return Verdict.LIKELY_MEETS if self.mean >= self.target else Verdict.LIKELY_MISSES


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The answer of a search.

    Args:
        answer: the fewest GPUs whose mean reaches the target; None if none of at most `max_gpus` does.
        low: the fewest that are not sure to miss it, of those that were simulated with several seeds.
        high: the fewest that are sure to meet it; None where none of those tried are.
        points: every size that was simulated, ascending.
    """

    answer: int | None
    low: int
    high: int | None
    points: tuple[Point, ...]

    @property
    def simulations(self) -> int:
        """How many simulations it took."""
        return sum(len(point.attainments) for point in self.points)


@cache
def _quantile(degrees_of_freedom: int) -> float:
    from scipy import stats

    return float(stats.t.ppf((1 + CONFIDENCE) / 2, degrees_of_freedom))


@dataclass(slots=True)
class _Probes:
    """The sizes simulated so far (mutable)."""

    simulate: Simulate
    target: float
    seeds: int
    max_seeds: int
    points: dict[int, Point] = field(default_factory=dict)

    def at(self, gpus: int, *, least: int = 0) -> Point:
        """Return what is known of a size: after more seeds, as long as that leaves it open whether it meets the target.

        Seeds are the same for all sizes. `least` is how many a size gets at least, up to the most.
        """
        least = min(self.max_seeds, max(self.seeds, least))
        while self._count(gpus) < least or (
            not self.points[gpus].verdict.is_sure and self._count(gpus) < self.max_seeds
        ):
            known = self._count(gpus)
            self._simulate(gpus, min(self.max_seeds, max(least, 2 * known if known >= self.seeds else 0)))
        return self.points[gpus]

    def may_meet(self, gpus: int) -> bool:
        """Return whether a size may meet the target, after one seed if it has none.

        It does not if a size that misses the target is no worse with that seed, or if it misses by far.
        """
        if not self._count(gpus):
            self._simulate(gpus, 1)
        first = self.points[gpus].attainments[0]
        known = [point for point in self.points.values() if len(point.attainments) > 1 and point.gpus != gpus]
        if any(not point.verdict.is_met and point.attainments[0] >= first for point in known):
            return False
        margin = _DEVIATIONS * max((near.deviation for near in self._nearest(gpus)), default=0.0)
        return first + margin >= self.target

    def _count(self, gpus: int) -> int:
        return len(self.points[gpus].attainments) if gpus in self.points else 0

    def _simulate(self, gpus: int, seeds: int) -> None:
        """Simulate a size with as many seeds as it lacks."""
        known = self.points[gpus].attainments if gpus in self.points else ()
        more = tuple(self.simulate(gpus, range(len(known) + 1, seeds + 1)))
        self.points[gpus] = Point(gpus=gpus, attainments=known + more, target=self.target)

    def _nearest(self, gpus: int) -> list[Point]:
        """Return the next smaller and the next larger size that have several seeds."""
        known = [point for point in self.points.values() if len(point.attainments) > 1]
        below = [point for point in known if point.gpus < gpus]
        above = [point for point in known if point.gpus > gpus]
        return [*sorted(below, key=lambda point: -point.gpus)[:1], *sorted(above, key=lambda point: point.gpus)[:1]]


def fewest_gpus(
    simulate: Simulate,
    *,
    target: float,
    max_gpus: int,
    first: int = 1,
    least: int = 1,
    seeds: int = 3,
    max_seeds: int = 12,
) -> Sizes:
    """Return the fewest GPUs that meet a target.

    The size doubles until it meets the target, and is then found by bisection. The answer gets twice the seeds; while
    it then misses the target, the next size is tried. The smaller sizes nearest to it are screened with one seed each,
    and those that may meet the target get more. Without an answer, the sizes nearest to the best one are screened.
    Around the answer, sizes are simulated until one is sure to miss and one is sure to meet the target.

    Args:
        simulate: simulates a size.
        target: the share of requests that must meet their SLOs, 0 to 1.
        max_gpus: the most GPUs to consider, at least 1.
        first: the size to begin with.
        least: the fewest GPUs to consider, at least 1.
        seeds: simulations of each size, at least 2.
        max_seeds: the most of a size that is near the target.
    """
    probes = _Probes(simulate, target, seeds, max(seeds, max_seeds))
    answer = _by_bisection(probes, first=max(least, first), least=least, max_gpus=max_gpus)
    if answer is None:
        best = max(probes.points.values(), key=lambda point: (point.mean, -point.gpus)).gpus
        answer = _screened(probes, range(least, max_gpus + 1), near=best)
    else:
        below = _screened(probes, range(least, answer), near=answer)
        answer = answer if below is None else below
    if answer is not None:
        _probe_until(probes, range(answer - 1, max(least - 1, answer - 1 - _NEIGHBORS), -1), Verdict.MISSES)
        _probe_until(probes, range(answer + 1, min(max_gpus, answer + _NEIGHBORS) + 1), Verdict.MEETS)
    return _sizes(answer, probes)


def _by_bisection(probes: _Probes, *, first: int, least: int, max_gpus: int) -> int | None:
    """Return the fewest GPUs that meet the target if more are never worse, None if not even the most do."""
    misses, meets = least - 1, min(first, max_gpus)
    while not probes.at(meets).verdict.is_met:
        if meets == max_gpus:
            return None
        misses, meets = meets, min(2 * meets, max_gpus)
    while meets - misses > 1:
        middle = (misses + meets) // 2
        if probes.at(middle).verdict.is_met:
            meets = middle
        else:
            misses = middle
    while not probes.at(meets, least=2 * probes.seeds).verdict.is_met:
        if meets == max_gpus:
            return None
        meets += 1
    return meets


def _screened(probes: _Probes, sizes: Sequence[int], *, near: int) -> int | None:
    """Return the fewest GPUs that meet the target after all, of the sizes nearest to one."""
    for gpus in sorted(sorted(sizes, key=lambda size: abs(size - near))[:_SCREENED]):
        if not probes.may_meet(gpus) or not probes.at(gpus).verdict.is_met:
            continue
        if probes.at(gpus, least=2 * probes.seeds).verdict.is_met:
            return gpus
    return None


def _probe_until(probes: _Probes, sizes: Iterable[int], verdict: Verdict) -> None:
    """Simulate sizes one after the other until one is sure to be as given."""
    for gpus in sizes:
        if probes.at(gpus).verdict is verdict:
            return


def _sizes(answer: int | None, probes: _Probes) -> Sizes:
    points = sorted(probes.points.values(), key=lambda point: point.gpus)
    several = [point for point in points if len(point.attainments) > 1]  # one seed: it misses by far
    open_sizes = [point.gpus for point in several if point.verdict is not Verdict.MISSES]
    sure = [point.gpus for point in several if point.verdict is Verdict.MEETS and point.gpus >= (answer or 0)]
    return Sizes(
        answer=answer,
        low=min([*open_sizes, *([] if answer is None else [answer])], default=points[-1].gpus + 1),
        high=None if answer is None else min(sure, default=None),
        points=tuple(points),
    )
