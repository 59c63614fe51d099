"""The measured runs that a study analyses: published ones here, those of this machine from `measured_runs`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from maveriq.calibration.measurements import Measurement, read_measurements
from maveriq.domain.models import KvType, WeightType
from maveriq.domain.parallel import ParallelConfig
from maveriq.errors import InputError
from maveriq.estimate.fingerprints import Line
from maveriq.files import exists, measured_data_path
from maveriq.study.definition import PublishedTable

Runs: TypeAlias = Mapping[str, Sequence[Measurement]]
"""Measured runs by the part that they play in a study, such as `full_models` and `fingerprints`."""

Engine: TypeAlias = tuple[str, tuple[int, ...], ParallelConfig]
"""What is started once: a model, the layers of each stage, and the configuration."""


def read_published(tables: Mapping[str, Sequence[PublishedTable]], data: Path | None) -> Runs:
    """Read the published tables of a study.

    Args:
        tables: the tables by their part.
        data: the folder of measured data; None takes MAVERIQ_DATA, or ../shared/data beside a clone.

    Raises:
        InputError: the folder or a table is missing, or a table is damaged.
    """
    folder = data or measured_data_path()
    home = "the public repository UT-SysML/MaverIQ, outputs/"
    if folder is None:
        raise InputError(
            f"the published measurements are absent; take them from {home}, and name their folder with --data or "
            "MAVERIQ_DATA"
        )
    files = dict.fromkeys(table.file for of_part in tables.values() for table in of_part)
    missing = [file for file in files if not exists(folder / file)]
    if missing:
        raise InputError(f"folder {str(folder)!r} has no {', '.join(missing)}; take them from {home}")
    return {
        part: [run for table in of_part for run in _read(folder / table.file, table.prompt_tokens)]
        for part, of_part in tables.items()
    }


def _read(path: Path, prompt_tokens: int) -> list[Measurement]:
    return [replace(run, prompt_tokens=prompt_tokens) for run in read_measurements(path)]


def engine_of(run: Measurement) -> Engine:
    """Return the engine that a run was made on."""
    return run.model_name, run.layer_split, run.configuration


def storage(run: Measurement) -> tuple[WeightType, KvType]:
    """Return how weights and KV cache were stored."""
    return run.configuration.weights, run.configuration.kv


def degrees(run: Measurement) -> tuple[int, int]:
    """Return TP and PP."""
    return run.configuration.tp, run.configuration.pp


def is_16_bit(run: Measurement) -> bool:
    """Return whether nothing is quantised."""
    return storage(run) == (WeightType.FLOAT16, KvType.NATIVE)


def by_model(runs: Iterable[Measurement]) -> dict[str, list[Measurement]]:
    """Return the runs of each model, in the order of the table."""
    found: dict[str, list[Measurement]] = {}
    for run in runs:
        found.setdefault(run.model_name, []).append(run)
    return found


def lines_of(runs: Iterable[Measurement]) -> Iterator[tuple[Engine, Line]]:
    """Yield the line through the latencies of each engine at its shortest and its longest output.

    An engine that was measured with one output length has none.
    """
    latency_s: dict[Engine, dict[int, float]] = {}
    for run in runs:
        latency_s.setdefault(engine_of(run), {})[run.output_tokens] = run.latency_s
    for engine, at in latency_s.items():
        if len(at) > 1:
            first, last = min(at), max(at)
            tpot_s = (at[last] - at[first]) / (last - first)
            yield engine, Line(ttft_s=at[first] - first * tpot_s, tpot_s=tpot_s)
