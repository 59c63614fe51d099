"""Writes run folders: requests.csv (or .parquet), deployments.csv, gpus.csv and run.json (docs/spec.md, section 10).

A folder is written whole or not at all, and replaces another only if the caller says so. run.json
also keeps, under "record", what the tables cannot hold (endpoints, plans, reasons), so that
`reading.read_run` returns the same `RunRecord`. Runs of engines that batch continuously also have
engines.csv and itl.csv. Real runs have engine_processes.csv with a row for each engine that served.
"""

from __future__ import annotations

import errno
import itertools
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec

from maveriq.domain.parallel import DeploymentPlan
from maveriq.domain.records import DEPLOYMENT_COLUMNS, GPU_COLUMNS, NOT_YET, DeploymentRecord, GpuSample, RunRecord
from maveriq.errors import InputError, InvariantError, MaveriqError, cannot_write
from maveriq.exec.gpus import Devices
from maveriq.exec.run_notes import EngineRecord
from maveriq.files import not_overwritten
from maveriq.report import requests_parquet
from maveriq.report.engine_csv import engine_lines, itl_lines
from maveriq.report.metrics import Summary
from maveriq.report.requests_csv import csv_cell, request_lines
from maveriq.report.saturation import Saturation
from maveriq.units import MICROS_PER_SECOND, Micros, gib, seconds

RUN_FILES = ("deployments.csv", "gpus.csv", "run.json")
"""What makes a folder a run folder; it also has requests.csv or requests.parquet."""


class RecordsFormat(StrEnum):
    """The file that has the requests of a run."""

    CSV = "csv"
    PARQUET = "parquet"


def free_folder(folder: Path) -> Path:
    """Return a folder if nothing is in it, else the first of `NAME-2`, `NAME-3`, ... of which that is true."""
    names = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
    return next(candidate for candidate in itertools.chain([folder], names) if not _holds_anything(candidate))


def _holds_anything(folder: Path) -> bool:
    try:
        return next(folder.iterdir(), None) is not None
    except FileNotFoundError:
        return False
    except OSError:  # a file, or a folder that cannot be read
        return True


def check_writable(folder: Path, *, files: Collection[str] = RUN_FILES, overwrite: bool = False) -> None:
    """Check that a folder of these files can be written there, before long work; leaves nothing behind.

    Raises:
        InputError: it is a file, or a folder that holds something else or, unless `overwrite`, anything, or its place
            cannot be written to.
    """
    target = _checked(folder, files)
    if not overwrite and _holds_anything(target):
        raise not_overwritten(f"output folder {str(target)!r}")
    ancestor = next(parent for parent in target.parents if parent.exists())
    try:
        tempfile.TemporaryDirectory(prefix=".maveriq-", dir=ancestor).cleanup()
    except OSError as error:
        raise _not_writable(target, error) from None


def write_folder(
    folder: Path, fill: Callable[[Path], None], *, files: Collection[str] = RUN_FILES, overwrite: bool = False
) -> Path:
    """Let `fill` write into a new folder beside `folder`, then put that in its place; return where it is.

    Whatever goes wrong, `folder` is left as it was. A folder that is there is replaced if it is empty or, with
    `overwrite`, if it has all of `files`, by which its kind is known. Without `overwrite`, what is written goes to
    `free_folder` instead: it may be the result of hours.

    Raises:
        InputError: as for `check_writable`.
        MaveriqError: the disk is full.
    """
    target = _checked(folder, files if overwrite else ())
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # One private folder beside the target holds the new folder and, for a moment, the old one.
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
            fresh = Path(scratch) / "new"
            fresh.mkdir()
            fill(fresh)
            if overwrite:
                _swap(fresh, target, Path(scratch) / "old")
                return folder
            written = _move_to_free(fresh, target)
            return folder if written == target else folder.with_name(written.name)
    except OSError as error:
        raise _not_writable(target, error) from None


def _swap(fresh: Path, target: Path, old: Path) -> None:
    if not target.exists():
        fresh.rename(target)
        return
    shutil.copymode(target, fresh)
    target.rename(old)
    try:
        fresh.rename(target)
    except BaseException:  # Ctrl-C too must leave what was there
        old.rename(target)
        raise


def _move_to_free(fresh: Path, target: Path) -> Path:
    """Move a folder to the first free name; another process may take one at any time."""
    while True:
        try:
            return fresh.rename(free_folder(target))
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise


def _checked(folder: Path, files: Collection[str]) -> Path:
    """Return the whole path of a folder that may be written to, as far as names tell."""
    try:
        target = folder.expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:  # no such user, links that go round
        raise InputError(
            f"output folder {str(folder)!r} leads nowhere: {str(error).rstrip('.')}; name another folder"
        ) from None
    where = f"output folder {str(target)!r}"
    try:
        if target.exists() and not target.is_dir():
            raise InputError(f"{where} is a file; name a folder")
        names = {entry.name for entry in target.iterdir()} if target.exists() else set()
        if target.is_mount():
            raise InputError(f"{where} is a mount point and cannot be replaced; name a folder inside it")
        ancestor = next(parent for parent in target.parents if parent.exists())
        if not ancestor.is_dir():
            raise InputError(f"{where} would lie in {str(ancestor)!r}, which is a file; name another folder")
    except OSError as error:
        raise _not_writable(target, error) from None
    if names and not names.issuperset(files):
        what = "run" if files == RUN_FILES else f"folder with {', '.join(files)}"
        raise InputError(f"{where} holds files that are no {what} ({min(names)}, ...); name an empty or a new folder")
    return target


def _not_writable(target: Path, error: OSError) -> MaveriqError:
    return cannot_write(f"output folder {str(target)!r}", error)


PROCESS_COLUMNS = (
    "engine_id", "deployment_id", "backend", "backend_version", "tensor_parallel_size", "pipeline_parallel_size",
    "pp_partition", "weight_precision", "kv_cache_dtype", "gpus", "gpu_uuids", "start_time_s", "weights_gib",
    "kv_cache_gib",
)  # fmt: skip


def process_lines(engines: Iterable[EngineRecord], devices: Devices) -> Iterator[str]:
    """Yield the lines of engine_processes.csv; `start_time_s` is in real seconds, memory empty where unknown."""
    yield ",".join(PROCESS_COLUMNS) + "\n"
    for engine in engines:
        launched, loaded = engine.launch_spec, engine.loaded
        spec, gpu_ids = launched.spec, tuple(launched.needed)
        cells = (
            f"{spec.deployment_id}-{spec.generation}",
            str(spec.deployment_id),
            loaded.backend,
            loaded.version,
            str(spec.tp),
            str(spec.pp),
            " ".join(map(str, spec.layer_split)),
            spec.weights,
            spec.kv,
            " ".join(map(str, gpu_ids)),
            " ".join(devices.visible_to(gpu_ids)),
            f"{engine.start_s:.3f}",
            _gib_cell(loaded.weights_bytes),
            _gib_cell(loaded.kv_cache_bytes),
        )
        yield ",".join(map(csv_cell, cells)) + "\n"


def _gib_cell(amount: int) -> str:
    return f"{gib(amount):.6f}" if amount else ""


def summary_to_json(
    summary: Summary, saturation: Saturation, deployments: Iterable[DeploymentRecord]
) -> dict[str, Any]:
    """Return saturation, metrics and deployments as plain values for JSON; a figure that does not apply is None."""
    return {
        "saturation": msgspec.to_builtins(saturation),
        **summary.to_dict(),
        "deployments": [_deployment(deployment) for deployment in deployments],
    }


def _configuration(plan: DeploymentPlan) -> dict[str, Any]:
    """Return the fields of a plan's configuration but for the layer split, which stands beside it."""
    fields: dict[str, Any] = msgspec.to_builtins(plan.configuration)
    del fields["layer_split"]
    return fields


def _deployment(deployment: DeploymentRecord) -> dict[str, Any]:
    endpoint, plan = deployment.endpoint, deployment.plan
    return {
        "deployment_id": deployment.deployment_id,
        "model": endpoint.model.name,
        "intent": endpoint.intent.objective.value,
        "slo_s": endpoint.intent.slo_s,
        "requested_s": seconds(endpoint.requested_us),
        "ready_s": _time_s(deployment.ready_us),
        "removed_s": _time_s(deployment.removed_us),
        "status": deployment.status,
        "reason": deployment.reason or (plan.note if plan else ""),
        "configuration": _configuration(plan) if plan else None,
        "layer_split": list(plan.layer_split) if plan else None,
        "gpus": list(plan.gpu_ids) if plan else None,
        "gib_per_gpu": [gib(amount) for amount in plan.gpu_bytes] if plan else None,
        "est_latency_s": (plan.est_latency_s or None) if plan else None,
        "est_memory_gib": (gib(plan.est_memory_bytes) or None) if plan else None,
    }


def _time_s(time_us: Micros) -> float | None:
    return None if time_us == NOT_YET else seconds(time_us)


def write_run(
    folder: Path,
    run: RunRecord,
    summary: Mapping[str, object],
    meta: Mapping[str, object],
    *,
    more: Callable[[Path], None] | None = None,
    records: RecordsFormat = RecordsFormat.CSV,
    overwrite: bool = False,
) -> Path:
    """Write a run folder, whole or not at all, and return where it is. The same input gives the same bytes.

    Args:
        folder: the folder to make, with its parents; see `check_writable`.
        run: what happened.
        summary: the results in plain values, as `summary_to_json` returns them.
        meta: what led to them: resolved configuration, seed, versions. Its keys stand first in
            run.json, in their order, before "summary" and "record".
        more: writes more files into the folder that it is given.
        records: the format of the table of requests.
        overwrite: see `write_folder`.

    Raises:
        InputError: the folder cannot be written, or holds something else than a run.
        InvariantError: a value is not finite, or JSON has no form for it.
    """

    def fill(fresh: Path) -> None:
        if records is RecordsFormat.PARQUET:
            requests_parquet.write_requests(fresh / requests_parquet.FILE, run)
        else:
            _write_lines(fresh / "requests.csv", request_lines(run))
        _write_lines(fresh / "deployments.csv", _deployment_lines(run.deployments))
        _write_lines(fresh / "gpus.csv", _gpu_lines(run.gpu_samples))
        if run.engines is not None:
            _write_lines(fresh / "engines.csv", engine_lines(run.engines))
        if run.itl is not None:
            _write_lines(fresh / "itl.csv", itl_lines(run.itl))
        body = {**meta, "summary": summary, "record": _record(run)}
        _write_lines(fresh / "run.json", [_as_json(body)])
        if more is not None:
            more(fresh)

    return write_folder(folder, fill, overwrite=overwrite)


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
    endpoint, plan = deployment.endpoint, deployment.plan
    cells = {
        "deployment_id": str(deployment.deployment_id),
        "model": endpoint.model.name,
        "intent": endpoint.intent.objective.value,
        "slo_s": "" if endpoint.intent.slo_s is None else f"{endpoint.intent.slo_s:.6f}",
        "requested_s": _time_cell(endpoint.requested_us),
        "ready_s": _time_cell(deployment.ready_us),
        "removed_s": _time_cell(deployment.removed_us),
        "status": deployment.status,
        "reason": deployment.reason,
        "batch_size": str(endpoint.batch_size),
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
        # 0 means that there is no estimate: a recorded run.
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
    rows = {"requests": len(run.requests), "gpus": len(run.gpu_samples)}
    for name, table in (("engines", run.engines), ("itl", run.itl)):
        if table is not None:
            rows[name] = len(table)
    return {
        "ended_us": run.ended_us,
        "rows": rows,
        "models": {str(endpoint_id): name for endpoint_id, name in run.models.items()},
        "reasons": list(run.requests.reasons),
        "deployments": msgspec.to_builtins(run.deployments),
    }


def _as_json(body: Mapping[str, object]) -> str:
    try:
        text = json.dumps(body, indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvariantError(f"a value cannot be written to run.json: {error}") from error
    # Short lists stand on one line: json would give each GPU id a line of its own. A line break
    # after the bracket cannot lie inside a string, where JSON writes it as \\n.
    return re.sub(r"\[\n\s+([^\[\]{}]*?)\n\s*\]", _on_one_line, text) + "\n"


def _on_one_line(found: re.Match[str]) -> str:
    line = "[" + re.sub(r",\n\s+", ", ", found[1]) + "]"
    return line if len(line) <= 100 else found[0]
