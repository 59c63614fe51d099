"""Fitting what the live system does otherwise than the benchmark, on recorded runs, each left out in turn.

The benchmark restarts its engines for every figure and sums up over GPUs with custom kernels; the
live system's engines are warm, over more than two GPUs it behaves like rings, and where the GPUs of
a stage hang at both sockets of the host, every all-reduce takes longer. Seven figures say so: the
fixed time of a request, latency and bandwidth of all-reduces at TP 4 and 8, and what the second
socket adds at TP 2 and 4 (at TP 8 it is always there). They are fitted to requests without busy
neighbours; two more, fitted to the others, say what neighbours do (`crowdfit`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
import numpy as np

from maveriq.domain.deployment import Configuration
from maveriq.domain.models import ModelSpec, WeightType
from maveriq.estimate.calibrated import CalibratedEstimator
from maveriq.estimate.calibration import Calibration, work
from maveriq.estimate.crowdfit import fit_crowd
from maveriq.estimate.fitting import Array, picked, stacked
from maveriq.estimate.hardware import HardwareProfile
from maveriq.estimate.host import share_across
from maveriq.estimate.physics import Law, Work, latency_s
from maveriq.estimate.recorded import RecordedEngine, read_engines
from maveriq.estimate.served import Served, ServedTp

OUTPUT_TOKENS = 20
"""Output tokens of every recorded request."""

_BANDS = 4  # of prompt length, with as many requests each: their medians say what a prompt token costs
_LEAST_CALM = 12  # requests; the medians of fewer say nothing
_GPUS_PER_SOCKET = 4  # of the testbed
_FITTED = (
    ("4", "all_reduce_us"), ("4", "ring_gb_s"), ("4", "across_us"), ("8", "all_reduce_us"), ("8", "ring_gb_s"),
    ("2", "across_us"),
)  # fmt: skip
_FIRST = (10.0, 10.0, 30.0, 30.0, 3.0, 30.0)
_FIRST_REQUEST_MS = 10.0
_TYPICAL_ERROR = 0.03


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """Requests of a deployment of a recorded run: their medians."""

    run: str
    model: ModelSpec
    configuration: Configuration
    gpu_ids: tuple[int, ...]
    prompt_tokens: int
    service_s: float


def read_recorded(folder: Path) -> list[Recorded]:
    """Return the medians of each deployment of a folder of recorded runs, over requests without busy neighbours.

    Raises:
        InputError: a table is missing or wrong.
    """
    return [one for engine in read_engines(folder) for one in calm_medians(engine, bands=1)]


def calm_medians(engine: RecordedEngine, *, bands: int) -> Iterator[Recorded]:
    """Yield medians over requests without busy neighbours, shortest prompts first; none where there are too few."""
    calm = np.flatnonzero(engine.calm)
    if len(calm) >= _LEAST_CALM:
        for band in np.array_split(calm[np.argsort(engine.prompt_tokens[calm], kind="stable")], bands):
            yield Recorded(
                run=engine.run,
                model=engine.model,
                configuration=engine.configuration,
                gpu_ids=engine.gpu_ids,
                prompt_tokens=max(1, round(float(np.median(engine.prompt_tokens[band])))),
                service_s=float(np.median(engine.service_s[band])),
            )


class Deployments:
    """Recorded deployments as arrays, to be predicted at once under any figures of the live system."""

    def __init__(self, profile: HardwareProfile, calibration: Calibration, recorded: Sequence[Recorded]) -> None:
        benchmarked = CalibratedEstimator(profile, calibration, served=False)
        kinds = [_kind(one) for one in recorded]
        self._kinds = list(dict.fromkeys(kinds))
        self._kind_of = np.array([self._kinds.index(kind) for kind in kinds])
        self.service_s = np.array([one.service_s for one in recorded])
        self._work = stacked(Work, [_work(one, benchmarked) for one in recorded])

    def predict_s(self, calibration: Calibration) -> Array:
        """Return the service time of every deployment in seconds."""
        laws = [calibration.law(weights, tp, served=True, across=across) for weights, tp, across in self._kinds]
        predicted: Array = latency_s(self._work, picked(stacked(Law, laws), self._kind_of), OUTPUT_TOKENS)
        return predicted


def _work(one: Recorded, benchmarked: CalibratedEstimator) -> Work:
    asked = one.configuration
    slowness = benchmarked.slowness(one.model, asked.weights)
    return work(
        one.model,
        asked.kv,
        tp=asked.tp,
        pp=asked.pp,
        batch=1,
        prompt_tokens=one.prompt_tokens,
        slowness=slowness,
    )


def _kind(one: Recorded) -> tuple[WeightType, int, float]:
    across = share_across(one.gpu_ids, one.configuration.tp, _GPUS_PER_SOCKET)
    return one.configuration.weights, one.configuration.tp, across


def fit_served(profile: HardwareProfile, calibration: Calibration, engines: Sequence[RecordedEngine]) -> Served:
    """Return the figures of the live system under which the recorded service times are most likely."""
    alone = _fit_alone(profile, calibration, [one for engine in engines for one in calm_medians(engine, bands=_BANDS)])
    live = CalibratedEstimator(profile, msgspec.structs.replace(calibration, served=alone), served=True)
    crowd = fit_crowd([(engine, _alone_s(live, engine)) for engine in engines], output_tokens=OUTPUT_TOKENS)
    return msgspec.structs.replace(alone, crowd=crowd)


def _fit_alone(profile: HardwareProfile, calibration: Calibration, recorded: Sequence[Recorded]) -> Served:
    from scipy.optimize import least_squares

    table = Deployments(profile, calibration, recorded)
    logs = np.log(table.service_s)

    def residuals(position: Array) -> Array:
        live = msgspec.structs.replace(calibration, served=_at(position, calibration))
        return np.asarray(np.log(table.predict_s(live)) - logs)

    first = np.log([_FIRST_REQUEST_MS, *_FIRST])
    found = least_squares(residuals, first, loss="soft_l1", f_scale=_TYPICAL_ERROR, max_nfev=40)
    return _at(found.x, calibration, digits=4)


def _alone_s(live: CalibratedEstimator, engine: RecordedEngine) -> Array:
    """Return what each request of an engine would take without neighbours."""
    ask = partial(live.service_on, engine.gpu_ids, engine.model, engine.configuration)
    return np.array(
        [
            ask(prompt_tokens=round(tokens), output_tokens=OUTPUT_TOKENS, batch=1).latency_s
            for tokens in engine.prompt_tokens.tolist()
        ]
    )


def cross_fit_served(
    profile: HardwareProfile, calibration: Calibration, engines: Sequence[RecordedEngine]
) -> tuple[Served, Mapping[str, Served]]:
    """Fit to all recorded runs, and to all but each one."""
    without = {
        run: fit_served(profile, calibration, [one for one in engines if one.run != run])
        for run in dict.fromkeys(one.run for one in engines)
    }
    return fit_served(profile, calibration, engines), without


def _at(position: Array, calibration: Calibration, digits: int = 17) -> Served:
    """Return the figures at a position; what is not fitted is the benchmark's."""
    request_ms, *fitted = (float(f"{value:.{digits}g}") for value in np.exp(position))
    two_gpus = calibration.tp["2"].one_shot_gb_s
    links: dict[str, dict[str, float]] = {"2": {"all_reduce_us": calibration.all_reduce_us, "ring_gb_s": two_gpus}}
    for (tp, figure), value in zip(_FITTED, fitted, strict=True):
        links.setdefault(tp, {})[figure] = value
    tps = {tp: ServedTp(**figures) for tp, figures in links.items()}
    return Served(request_ms=request_ms, gpus_per_socket=_GPUS_PER_SOCKET, tp=tps)
