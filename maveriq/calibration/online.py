"""Fitting what the live system does otherwise than the benchmark, on recorded runs, each left out in turn.

The benchmark restarts its engines for every figure and sums up over GPUs with custom kernels; the
live system's engines are warm, over more than two GPUs it behaves like rings, and where the GPUs of
a stage hang at both sockets of the host, every all-reduce takes longer. Seven figures say so: the
fixed time of a request, latency and bandwidth of all-reduces at TP 4 and 8, and what the second
socket adds at TP 2 and 4 (at TP 8 it is always there). They are fitted to requests without busy
neighbours; two more, fitted to the others, say what neighbours do (`crowdfit`).

Fitting what busy neighbours cost, on recorded requests that had some.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import msgspec
import numpy as np
from scipy.optimize import least_squares

from maveriq.calibration.fitting import Array, picked, stacked
from maveriq.domain.models import ModelSpec, WeightType
from maveriq.domain.parallel import ParallelConfig
from maveriq.errors import InputError
from maveriq.estimate.calibrated import share_across
from maveriq.estimate.calibration_file import Calibration, ContentionCosts, OnlineCalibration, OnlineTp, op_counts
from maveriq.estimate.roofline import OpCounts, RooflineParameters, latency_s
from maveriq.testbed.engines import MAX_CO_LOCATED, RecordedEngine, read_engines

_BANDS = 4  # of prompt length, with as many requests each: their medians say what a prompt token costs
_MIN_UNCONTENDED = 12  # requests of a band, or of an engine that had neighbours; the medians of fewer say little
TESTBED_GPUS_PER_SOCKET = 4
"""Of the published testbed: GPUs 0 to 3 hang at one socket of the host, 4 to 7 at the other."""

LayerTimeRatio: TypeAlias = Callable[[ModelSpec, WeightType], float]
"""How much longer a layer of a model took than the law says, as `CalibratedEstimator.slowness`."""

_FITTED = (
    ("4", "all_reduce_us", 10.0), ("4", "ring_gb_s", 10.0), ("4", "across_us", 30.0), ("8", "all_reduce_us", 30.0),
    ("8", "ring_gb_s", 3.0), ("2", "across_us", 30.0),
)  # fmt: skip
"""TP, figure, and where its fit begins."""

_FIRST_REQUEST_MS = 10.0
_TYPICAL_ERROR = 0.03


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedService:
    """Requests of a deployment of a recorded run: their medians."""

    run: str
    model: ModelSpec
    configuration: ParallelConfig
    gpu_ids: tuple[int, ...]
    prompt_tokens: int
    output_tokens: int
    service_s: float


def read_recorded(folder: Path) -> list[RecordedService]:
    """Return the medians of each deployment of a folder of recorded runs, over requests without busy neighbours.

    Raises:
        InputError: a table is missing or wrong.
    """
    return [one for engine in read_engines(folder) for one in uncontended_medians(engine)]


def uncontended_medians(engine: RecordedEngine, *, bands: int = 1) -> Iterator[RecordedService]:
    """Yield medians over requests without busy neighbours, shortest prompts first; none where there are too few."""
    uncontended = np.flatnonzero(engine.uncontended)
    if len(uncontended) < (1 if engine.uncontended.all() else _MIN_UNCONTENDED):
        return
    by_prompt = uncontended[np.argsort(engine.prompt_tokens[uncontended], kind="stable")]
    for band in np.array_split(by_prompt, max(1, min(bands, len(uncontended) // _MIN_UNCONTENDED))):
        yield RecordedService(
            run=engine.run,
            model=engine.model,
            configuration=engine.configuration,
            gpu_ids=engine.gpu_ids,
            prompt_tokens=max(1, round(float(np.median(engine.prompt_tokens[band])))),
            output_tokens=max(1, round(float(np.median(engine.output_tokens[band])))),
            service_s=float(np.median(engine.service_s[band])),
        )


class _Predictions:
    """Recorded deployments as arrays, to be predicted at once under any figures of the live system."""

    def __init__(
        self, layer_time_ratio: LayerTimeRatio, recorded: Sequence[RecordedService], gpus_per_socket: int
    ) -> None:
        kinds = [_kind(one, gpus_per_socket) for one in recorded]
        self._kinds = list(dict.fromkeys(kinds))
        self._kind_of = np.array([self._kinds.index(kind) for kind in kinds])
        self.service_s = np.array([one.service_s for one in recorded])
        self._output_tokens = np.array([one.output_tokens for one in recorded])
        self._work = stacked(OpCounts, [_work(one, layer_time_ratio) for one in recorded])

    def predict_s(self, calibration: Calibration) -> Array:
        """Return the service time of every deployment in seconds."""
        laws = [calibration.law(weights, tp, served=True, across=across) for weights, tp, across in self._kinds]
        predicted: Array = latency_s(
            self._work, picked(stacked(RooflineParameters, laws), self._kind_of), self._output_tokens
        )
        return predicted


def _work(one: RecordedService, layer_time_ratio: LayerTimeRatio) -> OpCounts:
    asked = one.configuration
    return op_counts(
        one.model,
        asked.kv,
        tp=asked.tp,
        pp=asked.pp,
        batch=1,
        prompt_tokens=one.prompt_tokens,
        layer_time_ratio=layer_time_ratio(one.model, asked.weights),
    )


def _kind(one: RecordedService, gpus_per_socket: int) -> tuple[WeightType, int, float]:
    across = share_across(one.gpu_ids, one.configuration.tp, gpus_per_socket)
    return one.configuration.weights, one.configuration.tp, across


def fit_served(
    layer_time_ratio: LayerTimeRatio,
    calibration: Calibration,
    engines: Sequence[RecordedEngine],
    gpus_per_socket: int = TESTBED_GPUS_PER_SOCKET,
) -> OnlineCalibration:
    """Return the figures of the live system under which the recorded service times are most likely.

    Raises:
        InputError: no engine served enough requests without busy neighbours.
    """
    medians = [one for engine in engines for one in uncontended_medians(engine, bands=_BANDS)]
    if not medians:
        raise InputError(
            f"no deployment of these runs served {_MIN_UNCONTENDED} requests while its neighbours were idle, so that "
            "nothing says what it takes alone; add a run with less load, or with one deployment"
        )
    alone = _fit_alone(layer_time_ratio, calibration, medians, gpus_per_socket)
    live = msgspec.structs.replace(calibration, served=alone)
    contended = [engine for engine in engines if not engine.uncontended.all()]
    contention = fit_contention(
        [(engine, _uncontended_s(layer_time_ratio, live, engine, gpus_per_socket)) for engine in contended]
    )
    return msgspec.structs.replace(alone, contention=contention)


def _uncontended_s(
    layer_time_ratio: LayerTimeRatio, live: Calibration, engine: RecordedEngine, gpus_per_socket: int
) -> Array:
    """Return what each request of an engine would take without neighbours."""
    lengths = np.column_stack([np.rint(engine.prompt_tokens), engine.output_tokens]).astype(int)
    kinds, kind_of = np.unique(lengths, axis=0, return_inverse=True)
    asked = [
        RecordedService(
            run=engine.run,
            model=engine.model,
            configuration=engine.configuration,
            gpu_ids=engine.gpu_ids,
            prompt_tokens=max(1, prompt_tokens),
            output_tokens=output_tokens,
            service_s=0.0,
        )
        for prompt_tokens, output_tokens in kinds.tolist()
    ]
    alone_s: Array = _Predictions(layer_time_ratio, asked, gpus_per_socket).predict_s(live)[kind_of.ravel()]
    return alone_s


def _fit_alone(
    layer_time_ratio: LayerTimeRatio,
    calibration: Calibration,
    recorded: Sequence[RecordedService],
    gpus_per_socket: int,
) -> OnlineCalibration:
    """Return the figures of engines without neighbours.

    A TP that no recorded engine had is left out; the benchmark's figures hold.
    """
    table = _Predictions(layer_time_ratio, recorded, gpus_per_socket)
    logs = np.log(table.service_s)
    seen = {str(one.configuration.tp) for one in recorded}
    fitted = [(tp, figure, first) for tp, figure, first in _FITTED if tp in seen]

    def at(position: Array, digits: int = 17) -> OnlineCalibration:
        return _at(position, [(tp, figure) for tp, figure, _ in fitted], calibration, gpus_per_socket, digits)

    def residuals(position: Array) -> Array:
        live = msgspec.structs.replace(calibration, served=at(position))
        return np.asarray(np.log(table.predict_s(live)) - logs)

    first = np.log([_FIRST_REQUEST_MS, *(first for _, _, first in fitted)])
    found = least_squares(residuals, first, loss="soft_l1", f_scale=_TYPICAL_ERROR, max_nfev=40)
    return at(found.x, digits=4)


def cross_fit_served(
    layer_time_ratio: LayerTimeRatio,
    calibration: Calibration,
    engines: Sequence[RecordedEngine],
    gpus_per_socket: int = TESTBED_GPUS_PER_SOCKET,
) -> tuple[OnlineCalibration, Mapping[str, OnlineCalibration]]:
    """Fit to all recorded runs, and to all but each one, where the others tell something.

    Raises:
        InputError: no engine served enough requests without busy neighbours.
    """
    whole = fit_served(layer_time_ratio, calibration, engines, gpus_per_socket)
    telling = {one.run for one in engines if any(uncontended_medians(one))}
    without = {
        run: fit_served(layer_time_ratio, calibration, [one for one in engines if one.run != run], gpus_per_socket)
        for run in dict.fromkeys(one.run for one in engines)
        if telling - {run}
    }
    return whole, without


def errors_without(
    layer_time_ratio: LayerTimeRatio,
    calibration: Calibration,
    engines: Sequence[RecordedEngine],
    without: Mapping[str, OnlineCalibration],
) -> list[float]:
    """Return by how many percent each deployment is off without neighbours, predicted without its run.

    Those that were hardly ever without them have no say.
    """
    errors: list[float] = []
    for run, served in without.items():
        of_run = [one for engine in engines if engine.run == run for one in uncontended_medians(engine)]
        if not of_run:
            continue
        table = _Predictions(layer_time_ratio, of_run, served.gpus_per_socket)
        predicted_s = table.predict_s(msgspec.structs.replace(calibration, served=served))
        errors.extend((100 * np.abs(predicted_s / table.service_s - 1)).tolist())
    return errors


def _at(
    position: Array,
    fitted: Sequence[tuple[str, str]],
    calibration: Calibration,
    gpus_per_socket: int,
    digits: int,
) -> OnlineCalibration:
    """Return the figures at a position; what is not fitted is the benchmark's."""
    request_ms, *values = (float(f"{value:.{digits}g}") for value in np.exp(position))
    links: dict[str, dict[str, float]] = {}
    for (tp, figure), value in zip(fitted, values, strict=True):
        two_gpus = {"all_reduce_us": calibration.all_reduce_us, "ring_gb_s": calibration.tp["2"].peer_gb_s}
        links.setdefault(tp, dict(two_gpus) if tp == "2" else {})[figure] = value
    tps = {tp: OnlineTp(**figures) for tp, figures in sorted(links.items())}
    return OnlineCalibration(request_ms=request_ms, gpus_per_socket=gpus_per_socket, tp=tps)


_FIRST_US = (25.0, 4000.0)
_MIN_UNCONTENDED_OF_ENGINE = 5  # requests that say how far an engine is off without neighbours


def fit_contention(engines: Sequence[tuple[RecordedEngine, Array]]) -> ContentionCosts:
    """Return what neighbours cost a token; a number of co-located engines that was never recorded costs nothing.

    Args:
        engines: with what each of their requests would take without neighbours, in seconds.
    """
    pairs = [(engine, alone_s * _off(engine, alone_s)) for engine, alone_s in engines if not engine.uncontended.all()]
    if not pairs:
        return ContentionCosts(layer_us=0.0, turn_us=0.0)
    layers = np.concatenate([np.full(len(alone_s), engine.model.layers) for engine, alone_s in pairs])
    alone_s = np.concatenate([alone_s for _, alone_s in pairs])
    beside = np.concatenate([engine.beside for engine, _ in pairs])
    output_tokens = np.concatenate([engine.output_tokens for engine, _ in pairs])
    logs = np.log(np.concatenate([engine.service_s for engine, _ in pairs]))
    first_us = _FIRST_US if beside[:, 2:].any() else _FIRST_US[:1]

    def costs_us(position: Array) -> tuple[float, float]:
        layer_us, *turn_us = np.exp(position).tolist()
        return layer_us, *(turn_us or [0.0])

    def residuals(position: Array) -> Array:
        layer_us, turn_us = costs_us(position)
        taken_s = contended_s(alone_s, beside, _waits_s(layers, layer_us, turn_us), output_tokens)
        return np.asarray(np.log(taken_s) - logs)

    found = least_squares(residuals, np.log(first_us), loss="soft_l1", f_scale=_TYPICAL_ERROR, max_nfev=40)
    layer_us, turn_us = (float(f"{value:.4g}") for value in costs_us(found.x))
    return ContentionCosts(layer_us=layer_us, turn_us=turn_us)


def contended_s(alone_s: Array, beside: Array, waits_s: Array, output_tokens: Array) -> Array:
    """Return what requests take that would take `alone_s`.

    Args:
        alone_s: (requests).
        beside: (requests, neighbours + 1), the share of the service with so many neighbours.
        waits_s: likewise, how much longer a token takes with so many.
        output_tokens: (requests); a service goes through its tokens at an even pace.
    """
    pace = alone_s[:, None] / (alone_s[:, None] + output_tokens[:, None] * waits_s)
    contended: Array = alone_s / (beside * pace).sum(axis=1)
    return contended


def _waits_s(layers: Array, layer_us: float, turn_us: float) -> Array:
    neighbours = np.arange(MAX_CO_LOCATED + 1)
    waits: Array = 1e-6 * (layers[:, None] * layer_us * (neighbours > 0) + turn_us * np.maximum(neighbours - 1, 0))
    return waits


def _off(engine: RecordedEngine, alone_s: Array) -> float:
    """Return how much longer an engine takes without neighbours than it should; that is not theirs to answer for."""
    uncontended = engine.uncontended
    return (
        float(np.median(engine.service_s[uncontended] / alone_s[uncontended]))
        if uncontended.sum() >= _MIN_UNCONTENDED_OF_ENGINE
        else 1.0
    )
