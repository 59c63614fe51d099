"""Fitting what the live system does otherwise than the benchmark, on recorded runs, each left out in turn.

The benchmark restarts its engines for every figure and sums up over GPUs with custom kernels; the
live system's engines are warm, over more than two GPUs it behaves like rings, and where the GPUs of
a stage hang at both sockets of the host, every all-reduce takes longer. Seven figures say so: the
fixed time of a request, latency and bandwidth of all-reduces at TP 4 and 8, and what the second
socket adds at TP 2 and 4 (at TP 8 it is always there).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TypeAlias

import msgspec
import numpy as np

from maveriq.domain.catalog import load_model
from maveriq.domain.deployment import Configuration
from maveriq.domain.models import KvType, ModelSpec, WeightType
from maveriq.domain.records import RunRecord
from maveriq.domain.requests import RequestStatus
from maveriq.estimate.calibrated import share_across
from maveriq.estimate.calibration import Calibration, Served, ServedTp, work
from maveriq.estimate.cells import choice
from maveriq.estimate.fitting import Array, picked, stacked
from maveriq.estimate.physics import Law, Work, latency_s
from maveriq.tables import read_csv
from maveriq.units import MICROS_PER_SECOND

_PUBLISHED_OUTPUT_TOKENS = 20  # of every request of the published recordings
_CHARACTERS_PER_TOKEN = 4
TESTBED_GPUS_PER_SOCKET = 4
"""Of the published testbed: GPUs 0 to 3 hang at one socket of the host, 4 to 7 at the other."""

Slowness: TypeAlias = Callable[[ModelSpec, WeightType], float]
"""How much longer a layer of a model took than the law says, as `CalibratedEstimator.slowness`."""

_FITTED = (
    ("4", "all_reduce_us", 10.0), ("4", "ring_gb_s", 10.0), ("4", "across_us", 30.0), ("8", "all_reduce_us", 30.0),
    ("8", "ring_gb_s", 3.0), ("2", "across_us", 30.0),
)  # fmt: skip
"""TP, figure, and where its fit begins."""

_FIRST_REQUEST_MS = 10.0
_TYPICAL_ERROR = 0.03
_DEPLOYMENTS = (
    "run", "model_id", "model", "deploy_s", "deployed", "registered_s", "tp", "pp", "layer_split", "weight_dtype",
    "int8_kv", "gpus", "est_gib_per_gpu", "used_gib_after",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """A deployment of a recorded run: medians over its requests."""

    run: str
    model: ModelSpec
    configuration: Configuration
    gpu_ids: tuple[int, ...]
    prompt_tokens: int
    output_tokens: int
    service_s: float


def read_recorded(folder: Path) -> list[Recorded]:
    """Read the deployments of a folder of recorded runs that served at least one request.

    Raises:
        InputError: a table is missing or wrong.
    """
    deployed = {
        (row.text("run"), row.text("model_id")): row
        for row in read_csv(folder / "deployments.csv", _DEPLOYMENTS, what="recorded deployments")
        if row.count("deployed")
    }
    characters = _admitted_characters(folder / "scheduled.csv.gz", set(deployed))
    prompts: dict[tuple[str, str], list[int]] = defaultdict(list)
    services: dict[tuple[str, str], list[float]] = defaultdict(list)
    columns = ("run", "req_id", "model_id", "arrival_s", "latency_s", "service_s")
    for row in read_csv(folder / "completed.csv.gz", columns, what="recorded requests"):
        key = row.text("run"), row.text("model_id")
        services[key].append(row.number("service_s"))
        prompts[key].append(characters[key[0]][row.count("req_id", least=1) - 1])
    return [
        Recorded(
            run=key[0],
            model=load_model(row.text("model")),
            configuration=Configuration(
                tp=row.count("tp", least=1),
                pp=row.count("pp", least=1),
                weights=choice(row, "weight_dtype", WeightType),
                kv=KvType.INT8 if row.count("int8_kv") else KvType.NATIVE,
            ),
            gpu_ids=tuple(map(int, row.text("gpus").split())),
            prompt_tokens=max(1, round(median(prompts[key]) / _CHARACTERS_PER_TOKEN)),
            output_tokens=_PUBLISHED_OUTPUT_TOKENS,
            service_s=median(services[key]),
        )
        for key, row in deployed.items()
        if key in services
    ]


def _admitted_characters(path: Path, deployed: set[tuple[str, str]]) -> dict[str, list[int]]:
    """Return prompt lengths by run in the order of admission; requests of models never deployed were dropped."""
    found: dict[str, list[int]] = defaultdict(list)
    columns = ("run", "req_id", "model_id", "scheduled_s", "prompt_chars")
    for row in read_csv(path, columns, what="scheduled requests"):
        if (row.text("run"), row.text("model_id")) in deployed:
            found[row.text("run")].append(row.count("prompt_chars"))
    return found


class Deployments:
    """Recorded deployments as arrays, to be predicted at once under any figures of the live system."""

    def __init__(self, slowness: Slowness, recorded: Sequence[Recorded], gpus_per_socket: int) -> None:
        kinds = [_kind(one, gpus_per_socket) for one in recorded]
        self._kinds = list(dict.fromkeys(kinds))
        self._kind_of = np.array([self._kinds.index(kind) for kind in kinds])
        self.service_s = np.array([one.service_s for one in recorded])
        self._output_tokens = np.array([one.output_tokens for one in recorded])
        self._work = stacked(Work, [_work(one, slowness) for one in recorded])

    def predict_s(self, calibration: Calibration) -> Array:
        """Return the service time of every deployment in seconds."""
        laws = [calibration.law(weights, tp, served=True, across=across) for weights, tp, across in self._kinds]
        predicted: Array = latency_s(self._work, picked(stacked(Law, laws), self._kind_of), self._output_tokens)
        return predicted


def _work(one: Recorded, slowness: Slowness) -> Work:
    asked = one.configuration
    return work(
        one.model,
        asked.kv,
        tp=asked.tp,
        pp=asked.pp,
        batch=1,
        prompt_tokens=one.prompt_tokens,
        slowness=slowness(one.model, asked.weights),
    )


def _kind(one: Recorded, gpus_per_socket: int) -> tuple[WeightType, int, float]:
    across = share_across(one.gpu_ids, one.configuration.tp, gpus_per_socket)
    return one.configuration.weights, one.configuration.tp, across


def fit_served(
    slowness: Slowness,
    calibration: Calibration,
    recorded: Sequence[Recorded],
    gpus_per_socket: int = TESTBED_GPUS_PER_SOCKET,
) -> Served:
    """Return the figures of the live system under which the recorded service times are most likely.

    Of a TP that no recorded engine had nothing is said, and the benchmark's figures hold.
    """
    from scipy.optimize import least_squares

    table = Deployments(slowness, recorded, gpus_per_socket)
    logs = np.log(table.service_s)
    seen = {str(one.configuration.tp) for one in recorded}
    fitted = [(tp, figure, first) for tp, figure, first in _FITTED if tp in seen]

    def at(position: Array, digits: int = 17) -> Served:
        return _at(position, [(tp, figure) for tp, figure, _ in fitted], calibration, gpus_per_socket, digits)

    def residuals(position: Array) -> Array:
        live = msgspec.structs.replace(calibration, served=at(position))
        return np.asarray(np.log(table.predict_s(live)) - logs)

    first = np.log([_FIRST_REQUEST_MS, *(first for _, _, first in fitted)])
    found = least_squares(residuals, first, loss="soft_l1", f_scale=_TYPICAL_ERROR, max_nfev=40)
    return at(found.x, digits=4)


def cross_fit_served(
    slowness: Slowness,
    calibration: Calibration,
    recorded: Sequence[Recorded],
    gpus_per_socket: int = TESTBED_GPUS_PER_SOCKET,
) -> tuple[Served, Mapping[str, Served]]:
    """Fit to all recorded runs, and to all but each one, where there are several."""
    runs = list(dict.fromkeys(one.run for one in recorded))
    without = {
        run: fit_served(slowness, calibration, [one for one in recorded if one.run != run], gpus_per_socket)
        for run in (runs if len(runs) > 1 else [])
    }
    return fit_served(slowness, calibration, recorded, gpus_per_socket), without


def errors_without(
    slowness: Slowness, calibration: Calibration, recorded: Sequence[Recorded], without: Mapping[str, Served]
) -> list[float]:
    """Return by how many percent the service time of each deployment is off, predicted without its run."""
    errors: list[float] = []
    for run, served in without.items():
        of_run = [one for one in recorded if one.run == run]
        table = Deployments(slowness, of_run, served.gpus_per_socket)
        predicted_s = table.predict_s(msgspec.structs.replace(calibration, served=served))
        errors.extend((100 * np.abs(predicted_s / table.service_s - 1)).tolist())
    return errors


def _at(
    position: Array,
    fitted: Sequence[tuple[str, str]],
    calibration: Calibration,
    gpus_per_socket: int,
    digits: int,
) -> Served:
    """Return the figures at a position; what is not fitted is the benchmark's."""
    request_ms, *values = (float(f"{value:.{digits}g}") for value in np.exp(position))
    links: dict[str, dict[str, float]] = {}
    for (tp, figure), value in zip(fitted, values, strict=True):
        two_gpus = {"all_reduce_us": calibration.all_reduce_us, "ring_gb_s": calibration.tp["2"].peer_gb_s}
        links.setdefault(tp, dict(two_gpus) if tp == "2" else {})[figure] = value
    tps = {tp: ServedTp(**figures) for tp, figures in sorted(links.items())}
    return Served(request_ms=request_ms, gpus_per_socket=gpus_per_socket, tp=tps)


def recorded_of(run: str, record: RunRecord) -> list[Recorded]:
    """Return the deployments of a run that served at least one request, by medians over those completed alone.

    Requests of batches say nothing of a single one, so deployments with batches are left out.
    """
    table, found = record.requests, []
    done = table.status == RequestStatus.COMPLETED.value
    for deployment in record.deployments:
        served = done & (table.deployment_id == deployment.deployment_id)
        plan = deployment.plan
        if plan is None or not served.any() or plan.configuration.batch_size > 1:
            continue
        service_us = (table.finish_us - table.start_us)[served]
        found.append(
            Recorded(
                run=run,
                model=plan.model,
                configuration=plan.configuration,
                gpu_ids=plan.gpu_ids,
                prompt_tokens=max(1, round(float(np.median(table.prompt_tokens[served])))),
                output_tokens=max(1, round(float(np.median(table.output_tokens[served])))),
                service_s=float(np.median(service_us)) / MICROS_PER_SECOND,
            )
        )
    return found
