"""The tables of a run as pandas DataFrames, with the columns of its CSV files.

Times and durations are seconds as floats, NaN where a cell of the CSV file is empty. Other numbers
that may be missing use the nullable types of pandas (`Int64`, `boolean`). Missing text is "".
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pandas as pd

from maveriq.domain.records import (
    DEPLOYMENT_COLUMNS,
    ENGINE_COLUMNS,
    GPU_COLUMNS,
    NOT_YET,
    REQUEST_COLUMNS,
    DeploymentRecord,
    RunRecord,
)
from maveriq.domain.requests import RequestStatus
from maveriq.report.engine_csv import engine_columns
from maveriq.report.requests_csv import filled_bits, is_filled, numeric_columns
from maveriq.units import MICROS_PER_SECOND, Micros, gib, seconds

Array: TypeAlias = npt.NDArray[Any]


def requests_frame(run: RunRecord) -> pd.DataFrame:
    """Return one row per request, in the order of arrival, with the columns of requests.csv."""
    table = run.requests
    micros_or_count = numeric_columns(table)
    bits = filled_bits(micros_or_count)
    columns: dict[str, Any] = {
        "model": _texts(table.endpoint_id, run.models),
        "status": _texts(table.status, {status.value: status.label for status in RequestStatus}),
        "reason": _texts(table.reason, dict(enumerate(table.reasons))),
    }
    for name in REQUEST_COLUMNS:
        if name in columns:
            continue
        values, filled = micros_or_count[name], is_filled(name, bits)
        if name.endswith("_s"):
            columns[name] = np.where(filled, values / MICROS_PER_SECOND, np.nan)
        elif name in ("deployment_id", "steps"):
            columns[name] = pd.array(values, dtype="Int64")
            columns[name][~filled] = pd.NA
        elif name == "slo_met":
            columns[name] = pd.array(values, dtype="boolean")
            columns[name][~filled] = pd.NA
        else:
            columns[name] = values.astype(np.int64)
    return pd.DataFrame(columns, columns=list(REQUEST_COLUMNS))


def _texts(keys: Array, text_of: dict[int, str]) -> Array:
    """Return the text of each key, "" for a key without text."""
    distinct, positions = np.unique(keys, return_inverse=True)
    texts: Array = np.array([text_of.get(key, "") for key in distinct.tolist()], dtype=object)
    return texts[positions]


def deployments_frame(run: RunRecord) -> pd.DataFrame:
    """Return one row per deployment with the columns of deployments.csv.

    `layer_split` and `gpus` are text as in the file: numbers separated by spaces.
    """
    rows = [_deployment_row(deployment) for deployment in run.deployments]
    frame = pd.DataFrame(rows, columns=list(DEPLOYMENT_COLUMNS))
    whole = dict.fromkeys(("deployment_id", "tp", "pp", "batch_size"), "Int64")
    times = ("slo_s", "requested_s", "ready_s", "removed_s", "est_latency_s", "est_memory_gib")
    return frame.astype(whole | dict.fromkeys(times, "float64"))


def _deployment_row(deployment: DeploymentRecord) -> dict[str, object]:
    endpoint, plan = deployment.endpoint, deployment.plan
    row: dict[str, object] = {
        "deployment_id": deployment.deployment_id,
        "model": endpoint.model.name,
        "intent": endpoint.intent.objective.value,
        "slo_s": endpoint.intent.slo_s,
        "requested_s": seconds(endpoint.requested_us),
        "ready_s": _seconds_or_none(deployment.ready_us),
        "removed_s": _seconds_or_none(deployment.removed_us),
        "status": deployment.status,
        "reason": deployment.reason,
        "batch_size": endpoint.batch_size,
        **dict.fromkeys(("layer_split", "weights", "kv", "gpus", "gib_per_gpu"), ""),
    }
    if plan is None:
        return row
    config = plan.configuration
    return row | {
        "reason": deployment.reason or plan.note,
        "tp": config.tp,
        "pp": config.pp,
        "layer_split": " ".join(map(str, plan.layer_split)),
        "weights": config.weights.value,
        "kv": config.kv.value,
        "batch_size": config.batch_size,
        "gpus": " ".join(map(str, plan.gpu_ids)),
        "gib_per_gpu": plan.describe_memory(),
        # 0 means that there is no estimate: a recorded run.
        "est_latency_s": plan.est_latency_s or None,
        "est_memory_gib": gib(plan.est_memory_bytes) or None,
    }


def _seconds_or_none(time_us: Micros) -> float | None:
    return None if time_us == NOT_YET else seconds(time_us)


def engines_frame(run: RunRecord) -> pd.DataFrame:
    """Return one row per engine and interval, with the columns of engines.csv."""
    columns = {} if run.engines is None else engine_columns(run.engines)
    return pd.DataFrame(columns, columns=list(ENGINE_COLUMNS))


def gpus_frame(run: RunRecord) -> pd.DataFrame:
    """Return one row per GPU and sample with the columns of gpus.csv, rounded to six decimals as there."""
    samples = run.gpu_samples
    count = len(samples)
    return pd.DataFrame(
        {
            "time_s": np.fromiter((sample.time_us for sample in samples), np.int64, count) / MICROS_PER_SECOND,
            "gpu": np.fromiter((sample.gpu_id for sample in samples), np.int64, count),
            "memory_gib": np.fromiter((round(gib(sample.memory_bytes), 6) for sample in samples), np.float64, count),
            "busy_share": np.fromiter((round(sample.busy_share, 6) for sample in samples), np.float64, count),
        },
        columns=list(GPU_COLUMNS),
    )
