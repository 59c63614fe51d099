"""Fits the times of an engine's process to recorded requests: their arrivals, lengths, TTFT and E2E latency.

The requests are replayed through the engine's exact scheduler (`maveriq.calibration.deployment`), with times that the
fit changes until the figures of the replay are those of the recording. The figures of a run are means and quantiles
over its requests, some for each quarter of them by how many others were in flight: their spread tells what a step takes
from what each of its sequences takes.

The preset's times are the prior: what the recording says nothing about stays as it is. A replay is stepwise in the
times, so that derivatives are finite differences over wide steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from maveriq.calibration.deployment import Deployment
from maveriq.domain.requests import Request
from maveriq.errors import InputError
from maveriq.estimate.engine_presets import EngineTimes, Uncertainty

Array: TypeAlias = npt.NDArray[Any]

FIELDS = ("step_us", "sequence_us", "kernel_factor", "prefill_factor", "api_us", "api_token_us", "api_sequence_us")
"""The times that can be fitted."""

_SMALL_STEP = 0.05  # of the prior's standard deviation, after which a fit ends
_WEIGHTINGS = 6
_MODEL_ERROR = 0.01  # no figure is trusted beyond this, however many requests it is of
_SOFT = 3.0  # figures that are off by more standard deviations count less
_QUARTERS = 4
_IDENTIFIED = 0.5  # of the prior's standard deviation that may be left


@dataclass(frozen=True, slots=True)
class Prior:
    """What is known of a time before any request was seen.

    Args:
        deviation: standard deviation around the preset's value.
        difference: by which it is changed to see what depends on it.
    """

    deviation: float
    difference: float


PRIORS: Mapping[str, Prior] = {
    "step_us": Prior(300.0, 150.0),
    "sequence_us": Prior(10.0, 10.0),
    "kernel_factor": Prior(0.03, 0.03),
    "prefill_factor": Prior(0.1, 0.08),
    "api_us": Prior(4000.0, 2000.0),
    "api_token_us": Prior(1.0, 1.0),
    "api_sequence_us": Prior(30.0, 30.0),
}


class Observation(Protocol):
    """Figures that were measured under one load, and that a replay of it has for other times."""

    @property
    def name(self) -> str:
        """The name in reports."""

    @property
    def group(self) -> str:
        """What is left out together in cross-validation, as a rule the model."""

    @property
    def measured(self) -> Mapping[str, float]:
        """The measured figures, in seconds."""

    def replayed(self, times: EngineTimes) -> Mapping[str, float]:
        """Return the same figures of a replay under an engine's times."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RecordedRequests:
    """Recorded requests of one deployment.

    Args:
        name: of the recording.
        group: what is left out together in cross-validation, as a rule the model.
        deployment: that served them.
        requests: ordered by arrival.
        ttft_s: seconds from the sending to the first token.
        e2e_s: seconds from the sending to the last.
        max_in_flight: of the client; None for no limit.
        warm_up: so many first requests are replayed, but not compared: an engine compiles, captures and fills caches.

    Raises:
        InputError: too few requests.
    """

    name: str
    group: str
    deployment: Deployment
    requests: Sequence[Request]
    ttft_s: Array
    e2e_s: Array
    max_in_flight: int | None = None
    warm_up: int = 0

    def __post_init__(self) -> None:
        if len(self.requests) - self.warm_up < _QUARTERS:
            raise InputError(
                f"{self.name}: {len(self.requests)} requests, {self.warm_up} of them to warm up; a fit needs more"
            )

    @property
    def measured(self) -> Mapping[str, float]:
        """The figures of the recording."""
        return self.figures(self.ttft_s, self.e2e_s)

    def replayed(self, times: EngineTimes) -> Mapping[str, float]:
        """Return the figures of a replay."""
        found = self.deployment.replay(self.requests, times, max_in_flight=self.max_in_flight)
        return self.figures(found.ttft_s, found.e2e_s)

    def figures(self, ttft_s: Array, e2e_s: Array) -> dict[str, float]:
        """Return the figures that are compared, in seconds, of recorded or replayed times.

        Which requests belong together is decided by the recorded times, so that both have the same ones.
        """
        output = np.asarray([request.output_tokens for request in self.requests], dtype=np.float64)
        tpot_s = (e2e_s - ttft_s) / np.maximum(output - 1, 1)
        compared = np.arange(len(output)) >= self.warm_up
        in_flight = self._in_flight()
        quarter = np.digitize(in_flight, np.quantile(in_flight[compared], (0.25, 0.5, 0.75)))
        decoded = compared & (output > 1)
        found = {"E2E mean": float(e2e_s[compared].mean()), "TTFT p90": float(np.quantile(ttft_s[compared], 0.9))}
        if decoded.any():
            found["TPOT p90"] = float(np.quantile(tpot_s[decoded], 0.9))
        for index in range(_QUARTERS):
            of_first, of_later = compared & (quarter == index), decoded & (quarter == index)
            if of_first.any():
                found[f"TTFT p50, quarter {index + 1}"] = float(np.median(ttft_s[of_first]))
            if of_later.any():
                found[f"TPOT mean, quarter {index + 1}"] = float(tpot_s[of_later].mean())
        return found

    def _in_flight(self) -> Array:
        """Return how many requests were in flight during each, a mean over its time."""
        start = np.asarray([request.arrival_us for request in self.requests]) / 1e6
        end = start + self.e2e_s
        held = [_area(start, at) - _area(end, at) for at in (start, end)]
        return np.asarray((held[1] - held[0]) / np.maximum(end - start, 1e-9))


def _area(instants: Array, until: Array) -> Array:
    """Return the integral, up to each time, of how many instants lie before."""
    ordered = np.sort(instants)
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    count = np.searchsorted(ordered, until)
    return np.asarray(count * until - sums[count])


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedTimes:
    """The result of a fit.

    Args:
        times: with their uncertainty.
        free: the times that were fitted.
        identified: those among them of which the recordings say more than was known before.
        without: the times that are found without the observations of each group, where there are several groups.
        errors: of each figure of each observation, by name: the logarithm of replayed over measured.
        correlation: of the fitted times.
    """

    times: EngineTimes
    free: tuple[str, ...]
    identified: tuple[str, ...]
    without: Mapping[str, EngineTimes]
    errors: Mapping[str, Mapping[str, float]]
    correlation: Array


def fit_times(
    observations: Sequence[Observation],
    start: EngineTimes,
    free: Sequence[str] = FIELDS,
    *,
    rounds: int = 5,
    on_round: Callable[[int, EngineTimes], None] | None = None,
) -> FittedTimes:
    """Return the times under which replays agree best with what was measured.

    Args:
        observations: at least one.
        start: the prior's values, and the times that are not fitted.
        free: the times to fit.
        rounds: steps towards the best times, at most.
        on_round: is called with each round's number and result.

    Raises:
        InputError: nothing was measured, or a time that cannot be fitted.
    """
    unknown = [name for name in free if name not in PRIORS]
    if unknown or not observations:
        raise InputError(f"fit of engine times: {f'no time {unknown[0]!r}' if unknown else 'nothing was measured'}")
    problem = _Problem(observations, start, tuple(free))
    values, errors = problem.prior, problem.errors(problem.prior)
    for index in range(rounds):
        slopes = problem.slopes(values, errors)
        step, _ = problem.solve(values, errors, slopes)
        values = problem.clipped(values + step)
        errors = problem.errors(values)
        if on_round is not None:
            on_round(index + 1, problem.times(values))
        if np.all(np.abs(step) < _SMALL_STEP * problem.deviation):
            break
    _, covariance = problem.solve(values, errors, slopes)
    deviation = np.sqrt(np.diag(covariance))
    uncertainty = Uncertainty(**dict(zip(free, map(float, deviation), strict=True)))
    return FittedTimes(
        times=msgspec.structs.replace(problem.times(values), uncertainty=uncertainty),
        free=tuple(free),
        identified=tuple(
            name for name, left in zip(free, deviation / problem.deviation, strict=True) if left < _IDENTIFIED
        ),
        errors=problem.by_name(errors),
        correlation=covariance / np.outer(deviation, deviation),
        without=problem.without_each_group(values, errors, slopes),
    )


def _weights(errors: Array) -> Array:
    """Return the weight of each figure: that of a soft L1 loss, so that a few odd figures do not decide."""
    scale = max(_MODEL_ERROR, 1.5 * float(np.median(np.abs(errors))))
    return np.asarray(1 / (scale**2 * np.sqrt(1 + (errors / (_SOFT * scale)) ** 2)))


class _Problem:
    """The figures of replays as a function of the free times."""

    def __init__(self, observations: Sequence[Observation], start: EngineTimes, free: tuple[str, ...]) -> None:
        self._observations = observations
        self._start = start
        self._free = free
        self._measured = [observation.measured for observation in observations]
        self.prior = np.asarray([getattr(start, name) for name in free])
        self.deviation = np.asarray([PRIORS[name].deviation for name in free])
        # The figures of one observation err together, so that they count as fewer than they are.
        self._share = np.concatenate([np.full(len(found), len(found) ** -0.5) for found in self._measured])

    def times(self, values: Array) -> EngineTimes:
        return msgspec.structs.replace(self._start, **dict(zip(self._free, map(float, values), strict=True)))

    def clipped(self, values: Array) -> Array:
        """Return values that a preset may have: no negative time, no factor that says nothing."""
        low = np.asarray([0.5 if name.endswith("_factor") else 0.0 for name in self._free])
        return np.asarray(np.maximum(values, low))

    def errors(self, values: Array) -> Array:
        """Return the logarithm of replayed over measured, of all figures of all observations."""
        times, found = self.times(values), []
        for observation, measured in zip(self._observations, self._measured, strict=True):
            replayed = observation.replayed(times)
            found += [np.log(replayed[name] / measured[name]) for name in measured]
        return np.asarray(found)

    def slopes(self, values: Array, errors: Array) -> Array:
        """Return how the errors change with each free time, from the errors there."""
        columns = []
        for index, name in enumerate(self._free):
            further = values.copy()
            further[index] += PRIORS[name].difference
            columns.append((self.errors(further) - errors) / PRIORS[name].difference)
        return np.stack(columns, axis=1)

    def without_each_group(self, values: Array, errors: Array, slopes: Array) -> dict[str, EngineTimes]:
        """Return the times found without each group, by the linear problem around those found with all."""
        groups = np.concatenate(
            [
                np.full(len(measured), observation.group)
                for observation, measured in zip(self._observations, self._measured, strict=True)
            ]
        )
        found = {}
        for group in dict.fromkeys(groups.tolist()) if len(set(groups.tolist())) > 1 else ():
            step, _ = self.solve(values, errors, slopes, kept=groups != group)
            found[group] = self.times(self.clipped(values + step))
        return found

    def solve(self, values: Array, errors: Array, slopes: Array, *, kept: Array | None = None) -> tuple[Array, Array]:
        """Return the step to the best values of the linear problem, and the covariance of these.

        How far the figures are trusted follows from the errors that are left there, not from those that a step removes.
        Figures that are not `kept` do not count.
        """
        precision, share = np.diag(self.deviation**-2.0), self._share
        if kept is not None:
            errors, slopes, share = errors[kept], slopes[kept], share[kept]
        step = np.zeros(len(values))
        for _ in range(_WEIGHTINGS):
            weights = _weights(errors + slopes @ step) * share
            normal = slopes.T @ (weights[:, None] * slopes) + precision
            gradient = slopes.T @ (weights * errors) + precision @ (values - self.prior)
            step = -np.linalg.solve(normal, gradient)
        return step, np.linalg.inv(normal)

    def by_name(self, errors: Array) -> dict[str, dict[str, float]]:
        left = iter(errors)
        return {
            observation.name: {name: float(next(left)) for name in measured}
            for observation, measured in zip(self._observations, self._measured, strict=True)
        }
