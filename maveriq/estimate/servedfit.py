"""Fitting what the live system does otherwise than the benchmark, on recorded runs, each left out in turn.

The benchmark restarts its engines for every figure and sums up over GPUs with custom kernels; the
live system's engines are warm, over more than two GPUs it behaves like rings, and where the GPUs of
a stage hang at both sockets of the host, every all-reduce takes longer. Seven figures say so: the
fixed time of a request, latency and bandwidth of all-reduces at TP 4 and 8, and what the second
socket adds at TP 2 and 4 (at TP 8 it is always there).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import msgspec
import numpy as np

from maveriq.domain.catalog import load_model
from maveriq.domain.deployment import Configuration
from maveriq.domain.models import KvType, ModelSpec, WeightType
from maveriq.estimate.calibrated import CalibratedEstimator, share_across
from maveriq.estimate.calibration import Calibration, Served, ServedTp, work
from maveriq.estimate.cells import choice
from maveriq.estimate.fitting import Array, picked, stacked
from maveriq.estimate.hardware import HardwareProfile
from maveriq.estimate.physics import Law, Work, latency_s
from maveriq.tables import read_csv

OUTPUT_TOKENS = 20
"""Output tokens of every recorded request."""

CHARACTERS_PER_TOKEN = 4
_GPUS_PER_SOCKET = 4  # of the testbed
_FITTED = (
    ("4", "all_reduce_us"), ("4", "ring_gb_s"), ("4", "across_us"), ("8", "all_reduce_us"), ("8", "ring_gb_s"),
    ("2", "across_us"),
)  # fmt: skip
_FIRST = (10.0, 10.0, 30.0, 30.0, 3.0, 30.0)
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
            prompt_tokens=max(1, round(median(prompts[key]) / CHARACTERS_PER_TOKEN)),
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


def fit_served(profile: HardwareProfile, calibration: Calibration, recorded: Sequence[Recorded]) -> Served:
    """Return the figures of the live system under which the recorded service times are most likely."""
    from scipy.optimize import least_squares

    table = Deployments(profile, calibration, recorded)
    logs = np.log(table.service_s)

    def residuals(position: Array) -> Array:
        live = msgspec.structs.replace(calibration, served=_at(position, calibration))
        return np.asarray(np.log(table.predict_s(live)) - logs)

    first = np.log([_FIRST_REQUEST_MS, *_FIRST])
    found = least_squares(residuals, first, loss="soft_l1", f_scale=_TYPICAL_ERROR, max_nfev=40)
    return _at(found.x, calibration, digits=4)


def cross_fit_served(
    profile: HardwareProfile, calibration: Calibration, recorded: Sequence[Recorded]
) -> tuple[Served, Mapping[str, Served]]:
    """Fit to all recorded runs, and to all but each one."""
    without = {
        run: fit_served(profile, calibration, [one for one in recorded if one.run != run])
        for run in dict.fromkeys(one.run for one in recorded)
    }
    return fit_served(profile, calibration, recorded), without


def _at(position: Array, calibration: Calibration, digits: int = 17) -> Served:
    """Return the figures at a position; what is not fitted is the benchmark's."""
    request_ms, *fitted = (float(f"{value:.{digits}g}") for value in np.exp(position))
    two_gpus = calibration.tp["2"].peer_gb_s
    links: dict[str, dict[str, float]] = {"2": {"all_reduce_us": calibration.all_reduce_us, "ring_gb_s": two_gpus}}
    for (tp, figure), value in zip(_FITTED, fitted, strict=True):
        links.setdefault(tp, {})[figure] = value
    tps = {tp: ServedTp(**figures) for tp, figures in links.items()}
    return Served(request_ms=request_ms, gpus_per_socket=_GPUS_PER_SOCKET, tp=tps)
