"""Fits the online calibration: the figures in which the live system differs from the benchmark.

The benchmark restarts its engines for every measurement and uses custom all-reduce kernels. The
live system's engines are warm, and above two GPUs its all-reduces take as long as ring all-reduces.
They take longer still if the GPUs of a stage span both sockets of the host.

`fit_online` fits seven figures to recorded requests without contention: the fixed time of a
request, the latency and bandwidth of all-reduces at TP 4 and 8, and the extra latency across
sockets at TP 2 and 4 (TP 8 always spans both). `fit_contention` fits two more to the other
requests: what co-located engines cost. `cross_fit_online` repeats the fit with each run left out.
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

_BANDS = 4  # of prompt length, with equally many requests; the medians of the bands give the cost of a prompt token
_MIN_UNCONTENDED = 12  # requests of a band, or of an engine with contention; the median of fewer is too noisy
TESTBED_GPUS_PER_SOCKET = 4
"""Of the published testbed: GPUs 0 to 3 belong to one socket of the host, 4 to 7 to the other."""

LayerTimeRatio: TypeAlias = Callable[[ModelSpec, WeightType], float]
"""Returns measured over predicted time of a layer, as `CalibratedEstimator.layer_time_ratio`."""

_FITTED = (
    ("4", "all_reduce_us", 10.0), ("4", "ring_gb_s", 10.0), ("4", "across_us", 30.0), ("8", "all_reduce_us", 30.0),
    ("8", "ring_gb_s", 3.0), ("2", "across_us", 30.0),
)  # fmt: skip
"""TP, figure, and the start of its fit."""

_FIRST_REQUEST_MS = 10.0
_TYPICAL_ERROR = 0.03


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedService:
    """Medians over requests of one deployment of a recorded run."""

    run: str
    model: ModelSpec
    configuration: ParallelConfig
    gpu_ids: tuple[int, ...]
    prompt_tokens: int
    output_tokens: int
    service_s: float


def read_recorded(folder: Path) -> list[RecordedService]:
    """Return the medians of each deployment of a folder of recorded runs, over requests without contention.

    Raises:
        InputError: a table is missing or wrong.
    """
    return [service for engine in read_engines(folder) for service in uncontended_medians(engine)]


def uncontended_medians(engine: RecordedEngine, *, bands: int = 1) -> Iterator[RecordedService]:
    """Yield medians over requests without contention, shortest prompts first; none if there are too few requests."""
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
    """Recorded deployments as arrays, to predict all service times at once under any online calibration."""

    def __init__(
        self, layer_time_ratio: LayerTimeRatio, recorded: Sequence[RecordedService], gpus_per_socket: int
    ) -> None:
        kinds = [_kind(service, gpus_per_socket) for service in recorded]
        self._kinds = list(dict.fromkeys(kinds))
        self._kind_of = np.array([self._kinds.index(kind) for kind in kinds])
        self.service_s = np.array([service.service_s for service in recorded])
        self._output_tokens = np.array([service.output_tokens for service in recorded])
        self._ops = stacked(OpCounts, [_op_counts(service, layer_time_ratio) for service in recorded])

    def predict_s(self, calibration: Calibration) -> Array:
        """Return the service time of every deployment in seconds."""
        rooflines = [
            calibration.roofline(weights, tp, online=True, across=across) for weights, tp, across in self._kinds
        ]
        predicted: Array = latency_s(
            self._ops, picked(stacked(RooflineParameters, rooflines), self._kind_of), self._output_tokens
        )
        return predicted


def _op_counts(service: RecordedService, layer_time_ratio: LayerTimeRatio) -> OpCounts:
    configuration = service.configuration
    return op_counts(
        service.model,
        configuration.kv,
        tp=configuration.tp,
        pp=configuration.pp,
        batch=1,
        prompt_tokens=service.prompt_tokens,
        layer_time_ratio=layer_time_ratio(service.model, configuration.weights),
    )


def _kind(service: RecordedService, gpus_per_socket: int) -> tuple[WeightType, int, float]:
    across = share_across(service.gpu_ids, service.configuration.tp, gpus_per_socket)
    return service.configuration.weights, service.configuration.tp, across


def fit_online(
    layer_time_ratio: LayerTimeRatio,
    calibration: Calibration,
    engines: Sequence[RecordedEngine],
    gpus_per_socket: int = TESTBED_GPUS_PER_SOCKET,
) -> OnlineCalibration:
    """Return the online calibration that fits the recorded service times best.

    Raises:
        InputError: no engine served enough requests without contention.
    """
    medians = [service for engine in engines for service in uncontended_medians(engine, bands=_BANDS)]
    if not medians:
        raise InputError(
            f"no deployment of these runs served {_MIN_UNCONTENDED} requests without contention, so its service time "
            "alone is unknown; add a run with less load, or with one deployment"
        )
    alone = _fit_alone(layer_time_ratio, calibration, medians, gpus_per_socket)
    live = msgspec.structs.replace(calibration, online=alone)
    contended = [engine for engine in engines if not engine.uncontended.all()]
    contention = fit_contention(
        [(engine, _uncontended_s(layer_time_ratio, live, engine, gpus_per_socket)) for engine in contended]
    )
    return msgspec.structs.replace(alone, contention=contention)


def _uncontended_s(
    layer_time_ratio: LayerTimeRatio, live: Calibration, engine: RecordedEngine, gpus_per_socket: int
) -> Array:
    """Return the predicted service time without contention of each request of an engine."""
    lengths = np.column_stack([np.rint(engine.prompt_tokens), engine.output_tokens]).astype(int)
    kinds, kind_of = np.unique(lengths, axis=0, return_inverse=True)
    services = [
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
    alone_s: Array = _Predictions(layer_time_ratio, services, gpus_per_socket).predict_s(live)[kind_of.ravel()]
    return alone_s


def _fit_alone(
    layer_time_ratio: LayerTimeRatio,
    calibration: Calibration,
    recorded: Sequence[RecordedService],
    gpus_per_socket: int,
) -> OnlineCalibration:
    """Fit the figures of engines without contention.

    A TP degree that no recorded engine has is left out, so the benchmark's figures apply to it.
    """
    table = _Predictions(layer_time_ratio, recorded, gpus_per_socket)
    logs = np.log(table.service_s)
    tp_degrees = {str(service.configuration.tp) for service in recorded}
    fitted = [(tp, figure, first) for tp, figure, first in _FITTED if tp in tp_degrees]

    def at(position: Array, digits: int = 17) -> OnlineCalibration:
        return _at(position, [(tp, figure) for tp, figure, _ in fitted], calibration, gpus_per_socket, digits)

    def residuals(position: Array) -> Array:
        live = msgspec.structs.replace(calibration, online=at(position))
        return np.asarray(np.log(table.predict_s(live)) - logs)

    first = np.log([_FIRST_REQUEST_MS, *(first for _, _, first in fitted)])
    found = least_squares(residuals, first, loss="soft_l1", f_scale=_TYPICAL_ERROR, max_nfev=40)
    return at(found.x, digits=4)


def cross_fit_online(
    layer_time_ratio: LayerTimeRatio,
    calibration: Calibration,
    engines: Sequence[RecordedEngine],
    gpus_per_socket: int = TESTBED_GPUS_PER_SOCKET,
) -> tuple[OnlineCalibration, Mapping[str, OnlineCalibration]]:
    """Fit to all recorded runs, and to all but each one if the others have requests without contention.

    Raises:
        InputError: no engine served enough requests without contention.
    """
    whole = fit_online(layer_time_ratio, calibration, engines, gpus_per_socket)
    informative = {engine.run for engine in engines if any(uncontended_medians(engine))}
    without = {
        run: fit_online(
            layer_time_ratio, calibration, [engine for engine in engines if engine.run != run], gpus_per_socket
        )
        for run in dict.fromkeys(engine.run for engine in engines)
        if informative - {run}
    }
    return whole, without


def errors_without(
    layer_time_ratio: LayerTimeRatio,
    calibration: Calibration,
    engines: Sequence[RecordedEngine],
    without: Mapping[str, OnlineCalibration],
) -> list[float]:
    """Return the error of each deployment in percent, without contention, predicted by the fit without its run.

    Deployments with too few requests without contention are left out.
    """
    errors: list[float] = []
    for run, online in without.items():
        of_run = [service for engine in engines if engine.run == run for service in uncontended_medians(engine)]
        if not of_run:
            continue
        table = _Predictions(layer_time_ratio, of_run, online.gpus_per_socket)
        predicted_s = table.predict_s(msgspec.structs.replace(calibration, online=online))
        errors.extend((100 * np.abs(predicted_s / table.service_s - 1)).tolist())
    return errors


def _at(
    position: Array,
    fitted: Sequence[tuple[str, str]],
    calibration: Calibration,
    gpus_per_socket: int,
    digits: int,
) -> OnlineCalibration:
    """Return the figures at a position of the fit; figures that are not fitted keep the benchmark's value."""
    request_ms, *values = (float(f"{value:.{digits}g}") for value in np.exp(position))
    links: dict[str, dict[str, float]] = {}
    for (tp, figure), value in zip(fitted, values, strict=True):
        two_gpus = {"all_reduce_us": calibration.all_reduce_us, "ring_gb_s": calibration.tp["2"].peer_gb_s}
        links.setdefault(tp, dict(two_gpus) if tp == "2" else {})[figure] = value
    tps = {tp: OnlineTp(**figures) for tp, figures in sorted(links.items())}
    return OnlineCalibration(request_ms=request_ms, gpus_per_socket=gpus_per_socket, tp=tps)


_FIRST_US = (25.0, 4000.0)
_MIN_UNCONTENDED_OF_ENGINE = 5  # requests that give the ratio of an engine without contention


def fit_contention(engines: Sequence[tuple[RecordedEngine, Array]]) -> ContentionCosts:
    """Return what co-located engines cost a token; a number of them that was never recorded costs nothing.

    Args:
        engines: each with the predicted service times of its requests without contention, in seconds.
    """
    pairs = [
        (engine, alone_s * _uncontended_ratio(engine, alone_s))
        for engine, alone_s in engines
        if not engine.uncontended.all()
    ]
    if not pairs:
        return ContentionCosts(layer_us=0.0, turn_us=0.0)
    layers = np.concatenate([np.full(len(alone_s), engine.model.layers) for engine, alone_s in pairs])
    alone_s = np.concatenate([alone_s for _, alone_s in pairs])
    busy_shares = np.concatenate([engine.busy_shares for engine, _ in pairs])
    output_tokens = np.concatenate([engine.output_tokens for engine, _ in pairs])
    logs = np.log(np.concatenate([engine.service_s for engine, _ in pairs]))
    first_us = _FIRST_US if busy_shares[:, 2:].any() else _FIRST_US[:1]

    def costs_us(position: Array) -> tuple[float, float]:
        layer_us, *turn_us = np.exp(position).tolist()
        return layer_us, *(turn_us or [0.0])

    def residuals(position: Array) -> Array:
        layer_us, turn_us = costs_us(position)
        taken_s = contended_s(alone_s, busy_shares, _delays_s(layers, layer_us, turn_us), output_tokens)
        return np.asarray(np.log(taken_s) - logs)

    found = least_squares(residuals, np.log(first_us), loss="soft_l1", f_scale=_TYPICAL_ERROR, max_nfev=40)
    layer_us, turn_us = (float(f"{value:.4g}") for value in costs_us(found.x))
    return ContentionCosts(layer_us=layer_us, turn_us=turn_us)


def contended_s(alone_s: Array, busy_shares: Array, delays_s: Array, output_tokens: Array) -> Array:
    """Return the service times of requests under contention, in seconds.

    Args:
        alone_s: (requests,), the service times without contention.
        busy_shares: (requests, n), the share of the service time with 0 to n - 1 busy co-located engines.
        delays_s: likewise, how much longer a token takes with that many.
        output_tokens: (requests,), generated at an even pace.
    """
    pace = alone_s[:, None] / (alone_s[:, None] + output_tokens[:, None] * delays_s)
    contended: Array = alone_s / (busy_shares * pace).sum(axis=1)
    return contended


def _delays_s(layers: Array, layer_us: float, turn_us: float) -> Array:
    busy = np.arange(MAX_CO_LOCATED + 1)
    delays: Array = 1e-6 * (layers[:, None] * layer_us * (busy > 0) + turn_us * np.maximum(busy - 1, 0))
    return delays


def _uncontended_ratio(engine: RecordedEngine, alone_s: Array) -> float:
    """Return measured over predicted service time of an engine without contention, the part that is not contention."""
    uncontended = engine.uncontended
    return (
        float(np.median(engine.service_s[uncontended] / alone_s[uncontended]))
        if uncontended.sum() >= _MIN_UNCONTENDED_OF_ENGINE
        else 1.0
    )
