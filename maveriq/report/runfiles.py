"""Run folders: requests.csv, deployments.csv, gpus.csv and run.json (docs/spec.md, section 10).

run.json also keeps, under "record", what the tables cannot hold (whole asks and plans, endpoints,
reasons), so that a folder reads back into the `RunRecord` it was written from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from maveriq.domain.records import DEPLOYMENT_COLUMNS, GPU_COLUMNS, NOT_YET, DeploymentRecord, GpuSample, RunRecord
from maveriq.errors import InvariantError
from maveriq.report.folders import write_folder
from maveriq.report.request_csv import csv_cell, request_lines
from maveriq.units import MICROS_PER_SECOND, Micros, gib


def write_run(
    folder: Path,
    run: RunRecord,
    summary: Mapping[str, object],
    meta: Mapping[str, object],
    *,
    more: Callable[[Path], None] | None = None,
) -> None:
    """Write a run folder, whole or not at all. The same input gives the same bytes.

    Args:
        folder: the folder to make, with its parents; see `folders.check_writable`.
        run: what happened.
        summary: the results in plain values, as `summary_json` gives them.
        meta: what led to them: resolved configuration, seed, versions. Its keys stand first in
            run.json, in their order, before "summary" and "record".
        more: writes more files into the folder that it is given.

    Raises:
        InputError: the folder cannot be written, or holds something else than a run.
        InvariantError: a value is not finite, or JSON has no form for it.
    """

    def fill(fresh: Path) -> None:
        _write_lines(fresh / "requests.csv", request_lines(run))
        _write_lines(fresh / "deployments.csv", _deployment_lines(run.deployments))
        _write_lines(fresh / "gpus.csv", _gpu_lines(run.gpu_samples))
        body = {**meta, "summary": summary, "record": _record(run)}
        _write_lines(fresh / "run.json", [_as_json(body)])
        if more is not None:
            more(fresh)

    write_folder(folder, fill)


def _write_lines(path: Path, pieces: Iterable[str]) -> None:
    # A path of the user's may hold bytes that are no UTF-8; the records stay readable without them.
    with path.open("w", encoding="utf-8", errors="replace", newline="") as file:
        file.writelines(pieces)


def _deployment_lines(deployments: Iterable[DeploymentRecord]) -> Iterable[str]:
    yield ",".join(DEPLOYMENT_COLUMNS) + "\n"
    for deployment in deployments:
        cells = _deployment_cells(deployment)
        yield ",".join(csv_cell(cells.get(column, "")) for column in DEPLOYMENT_COLUMNS) + "\n"


def _deployment_cells(deployment: DeploymentRecord) -> dict[str, str]:
    ask, plan = deployment.ask, deployment.plan
    cells = {
        "deployment_id": str(deployment.deployment_id),
        "model": ask.model.name,
        "intent": ask.intent.objective.value,
        "slo_s": "" if ask.intent.slo_s is None else f"{ask.intent.slo_s:.6f}",
        "asked_s": _time_cell(ask.asked_us),
        "ready_s": _time_cell(deployment.ready_us),
        "removed_s": _time_cell(deployment.removed_us),
        "status": deployment.status,
        "reason": deployment.reason,
        "batch_size": str(ask.batch_size),
    }
    if plan is None:
        return cells
    return cells | {
        "reason": deployment.reason or plan.note,
        "tp": str(plan.configuration.tp),
        "pp": str(plan.configuration.pp),
        "layer_split": " ".join(map(str, plan.layer_split)),
        "weights": plan.configuration.weights.value,
        "kv": plan.configuration.kv.value,
        "batch_size": str(plan.configuration.batch_size),
        "gpus": " ".join(map(str, plan.gpu_ids)),
        "gib_per_gpu": plan.describe_memory(),
        # 0 where nobody estimated: a recorded run.
        "est_latency_s": f"{plan.est_latency_s:.6f}" if plan.est_latency_s else "",
        "est_memory_gib": f"{gib(plan.est_memory_bytes):.6f}" if plan.est_memory_bytes else "",
    }


def _gpu_lines(samples: Iterable[GpuSample]) -> Iterable[str]:
    yield ",".join(GPU_COLUMNS) + "\n"
    for sample in samples:
        time, memory_gib = _time_cell(sample.time_us), gib(sample.memory_bytes)
        yield f"{time},{sample.gpu_id},{memory_gib:.6f},{sample.busy_share:.6f}\n"


def _time_cell(time_us: Micros) -> str:
    return "" if time_us == NOT_YET else "{}.{:06d}".format(*divmod(time_us, MICROS_PER_SECOND))


def _record(run: RunRecord) -> dict[str, Any]:
    return {
        "ended_us": run.ended_us,
        "rows": {"requests": len(run.requests), "gpus": len(run.gpu_samples)},
        "models": {str(endpoint_id): name for endpoint_id, name in run.models.items()},
        "reasons": list(run.requests.reasons),
        "deployments": msgspec.to_builtins(run.deployments),
    }


def _as_json(body: Mapping[str, object]) -> str:
    try:
        text = json.dumps(body, indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvariantError(f"run.json cannot hold what it was given: {error}") from error
    # Short lists stand on one line: json would give each GPU id a line of its own. A line break
    # after the bracket cannot lie inside a string, where JSON writes it as \\n.
    return re.sub(r"\[\n\s+([^\[\]{}]*?)\n\s*\]", _on_one_line, text) + "\n"


def _on_one_line(found: re.Match[str]) -> str:
    line = "[" + re.sub(r",\n\s+", ", ", found[1]) + "]"
    return line if len(line) <= 100 else found[0]
