"""engines.csv: a row for each engine that served in a real run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from maveriq.exec.devices import Devices
from maveriq.exec.world import EngineRecord
from maveriq.report.request_csv import csv_cell
from maveriq.units import gib

ENGINE_COLUMNS = (
    "engine_id", "deployment_id", "backend", "backend_version", "tensor_parallel_size", "pipeline_parallel_size",
    "pp_partition", "weight_precision", "kv_cache_dtype", "gpus", "gpu_uuids", "start_time_s", "weights_gib",
    "kv_cache_gib",
)  # fmt: skip


def engine_lines(engines: Iterable[EngineRecord], devices: Devices) -> Iterator[str]:
    """Yield the lines of engines.csv; `start_time_s` is in real seconds, memory empty where unknown."""
    yield ",".join(ENGINE_COLUMNS) + "\n"
    for engine in engines:
        spec, loaded, gpu_ids = engine.order.spec, engine.loaded, tuple(engine.order.needed)
        cells = (
            f"{spec.deployment_id}-{spec.incarnation}",
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
