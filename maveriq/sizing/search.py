"""The fewest GPUs that meet a target, found with few simulations, and how sure that is.

Each simulation of a cluster size has a seed and gives the share of requests that meet their SLOs. More GPUs are taken
to be no worse on average; the probes around the answer show where that does not hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from maveriq.compat import StrEnum

CONFIDENCE = 0.95
_NEIGHBORS = 3  # on each side of the answer, where the sizes there are uncertain

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
    def half_width(self) -> float:
        """Half the 95 % confidence interval of the mean (Student's t); infinite for one seed."""
        from scipy import stats

        count = len(self.attainments)
        if count < 2:
            return math.inf
        quantile = stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)
        return float(quantile * np.std(self.attainments, ddof=1) / math.sqrt(count))

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
        low: the fewest that are not sure to miss it.
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


@dataclass(slots=True)
class _Probes:
    """The sizes simulated so far (mutable)."""

    simulate: Simulate
    target: float
    seeds: int
    max_seeds: int
    points: dict[int, Point] = field(default_factory=dict)

    def at(self, gpus: int) -> Point:
        """Return what is known of a size: after more seeds, as long as that leaves it open whether it meets the target.

        Seeds are the same for all sizes.
        """
        point = self.points.get(gpus)
        known: tuple[float, ...] = () if point is None else point.attainments
        while point is None or (not point.verdict.is_sure and len(known) < self.max_seeds):
            wanted = min(self.max_seeds, max(self.seeds, 2 * len(known)))
            known += tuple(self.simulate(gpus, range(len(known) + 1, wanted + 1)))
            point = Point(gpus=gpus, attainments=known, target=self.target)
        self.points[gpus] = point
        return point


def fewest_gpus(
    simulate: Simulate, *, target: float, max_gpus: int, first: int = 1, seeds: int = 3, max_seeds: int = 12
) -> Sizes:
    """Return the fewest GPUs that meet a target.

    The size doubles until it meets the target, and is then found by bisection. Around the answer, sizes are
    simulated until one is sure to miss and one is sure to meet the target.

    Args:
        simulate: simulates a size.
        target: the share of requests that must meet their SLOs, 0 to 1.
        max_gpus: the most GPUs to consider, at least 1.
        first: the size to begin with.
        seeds: simulations of each size, at least 2.
        max_seeds: the most of a size that is near the target.
    """
    probes = _Probes(simulate, target, seeds, max(seeds, max_seeds))
    misses, meets = 0, min(max(1, first), max_gpus)
    while not probes.at(meets).verdict.is_met:
        if meets == max_gpus:
            return _sizes(None, probes)
        misses, meets = meets, min(2 * meets, max_gpus)
    while meets - misses > 1:
        middle = (misses + meets) // 2
        if probes.at(middle).verdict.is_met:
            meets = middle
        else:
            misses = middle
    _probe_until(probes, range(meets - 1, max(0, meets - 1 - _NEIGHBORS), -1), Verdict.MISSES)
    _probe_until(probes, range(meets + 1, min(max_gpus, meets + _NEIGHBORS) + 1), Verdict.MEETS)
    return _sizes(meets, probes)


def _probe_until(probes: _Probes, sizes: Iterable[int], verdict: Verdict) -> None:
    """Simulate sizes one after the other until one is sure to be as given."""
    for gpus in sizes:
        if probes.at(gpus).verdict is verdict:
            return


def _sizes(answer: int | None, probes: _Probes) -> Sizes:
    points = sorted(probes.points.values(), key=lambda point: point.gpus)
    sure_misses = [point.gpus for point in points if point.verdict is Verdict.MISSES]
    sure = [point.gpus for point in points if point.verdict is Verdict.MEETS]
    below = [gpus for gpus in sure_misses if answer is None or gpus < answer]
    return Sizes(
        answer=answer,
        low=max(below, default=0) + 1,
        high=min((gpus for gpus in sure if answer is None or gpus >= answer), default=None),
        points=tuple(points),
    )
