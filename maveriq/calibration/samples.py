"""Samples for a fit: rows of measured tables, each with a weight, and the fingerprints derived from them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from maveriq.calibration.measurements import Measurement, is_table_of_measurements, read_measurements
from maveriq.domain.models import ModelSpec, load_model
from maveriq.domain.parallel import ParallelConfig
from maveriq.errors import InputError
from maveriq.estimate.fingerprints import Fingerprint, Fingerprints, derive
from maveriq.estimate.profile_file import PROFILE_NAME
from maveriq.files import exists, is_folder

LONG_TRUTH, BATCHED_TRUTH = "full_model_long_prompt.csv", "full_model_batched_short_prompt.csv"
_LONG_FINGERPRINTS, _SHORT_FINGERPRINTS = "fingerprint_long_prompt.csv", "fingerprint_short_prompt.csv"
_PUBLISHED_PROMPTS: Mapping[str, int] = {
    LONG_TRUTH: 923,
    BATCHED_TRUTH: 10,
    "uneven_pipeline.csv": 10,
    "batch_scaling.csv": 10,
    _LONG_FINGERPRINTS: 923,
    _SHORT_FINGERPRINTS: 10,
}
"""The published tables and their prompt lengths in tokens; they have no column `prompt_tokens`."""

_MAX_BATCH = 128  # the engine splits larger batches, which the formulas do not model
_TENSOR_PARALLEL = (1, 2, 4, 8)

Constants: TypeAlias = Mapping[str, Fingerprints]
"""Fingerprints of all models by name, measured at one prompt length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A measured row with its weight in the fit; a fingerprint is a measurement of a model cut to few layers."""

    table: str
    measured: Measurement
    model: ModelSpec
    prompt_tokens: int
    sample_weight: float
    is_fingerprint: bool = False


def read_samples(data: Path, *, prompt_tokens: int | None = None) -> list[Sample]:
    """Read the rows that a fit can use.

    Args:
        data: a table of measurements, or a folder of them: what `maveriq profile` wrote, any table with a column
            `prompt_tokens`, and the published tables by their names. A model that is neither in the catalogue nor in
            models.toml beside the table needs its Hugging Face configuration in the same folder, as MODEL/config.json.
        prompt_tokens: prompt length of tables without that column; None for that of the published tables.

    Raises:
        InputError: no such table, an invalid one, no row of a whole model, or an unknown model.
    """
    folder = data if is_folder(data) else data.parent
    samples = [
        sample
        for table, default in _tables(data, prompt_tokens)
        for measured in _with_first_tokens(read_measurements(table))
        if (sample := _sample(table.name, measured, default, folder)).measured.configuration.batch_size <= _MAX_BATCH
    ]
    if all(sample.is_fingerprint for sample in samples):
        raise InputError(f"{str(data)!r} has no row of a whole model, which a fit needs; add measurements of some")
    return samples


def _with_first_tokens(rows: Iterable[Measurement]) -> Iterator[Measurement]:
    """Yield each row, and the time to its first token where it was measured apart: a second latency of the same run."""
    for row in rows:
        yield row
        first = row.at_first_token()
        if first is not None:
            yield first


def _tables(data: Path, prompt_tokens: int | None) -> Iterator[tuple[Path, int | None]]:
    """Yield the tables, each with the prompt length to use if it has no column for it."""
    if not is_folder(data):
        yield data, prompt_tokens or _PUBLISHED_PROMPTS.get(data.name)
        return
    known = [data / name for name in _PUBLISHED_PROMPTS if exists(data / name)]
    others = [
        path
        for path in sorted(data.glob("*.csv"))
        if path not in known and is_table_of_measurements(path, with_prompts=prompt_tokens is None)
    ]
    others += [path for path in [data / PROFILE_NAME] if exists(path)]
    if not [*known, *others]:
        raise InputError(
            f"data folder {str(data)!r} has no table of measurements with a column prompt_tokens; add the column, or "
            "give --prompt-tokens"
        )
    for path in [*known, *others]:
        yield path, prompt_tokens or _PUBLISHED_PROMPTS.get(path.name)


def _sample(table: str, measured: Measurement, default: int | None, folder: Path) -> Sample:
    model = _model(measured, folder)
    prompt_tokens = measured.prompt_tokens or default
    if prompt_tokens is None:
        raise InputError(f"{measured.where}: no column prompt_tokens; add it, or give --prompt-tokens")
    if measured.configuration.tp not in _TENSOR_PARALLEL:
        raise InputError(f"{measured.where}: a calibration knows TP 1, 2, 4 and 8 only; take the row out")
    is_fingerprint = measured.layers < model.layers
    return Sample(
        table=table,
        measured=measured,
        model=replace(model, layers=measured.layers),
        prompt_tokens=prompt_tokens,
        sample_weight=_sample_weight(table, measured, is_fingerprint=is_fingerprint),
        is_fingerprint=is_fingerprint,
    )


def _model(measured: Measurement, folder: Path) -> ModelSpec:
    known, config = measured.model, folder / measured.model_name / "config.json"
    if known is None and not exists(config):
        raise InputError(
            f"{measured.where}: model {measured.model_name!r} is not in the catalogue; put its Hugging Face "
            f"configuration at {config}, or take its rows out"
        )
    return known or replace(load_model(str(config)), name=measured.model_name)


def _sample_weight(table: str, measured: Measurement, *, is_fingerprint: bool) -> float:
    """Return the weight of a row; fingerprints weigh little, because at one layer noise dominates."""
    if is_fingerprint:
        tp, pp = measured.configuration.tp, measured.configuration.pp
        if tp > 2:
            return 0.015  # all GPUs wait for the slowest one: noise of tens of milliseconds
        return 0.3 if pp <= 2 else 0.1
    return 0.5 if table == BATCHED_TRUTH else 1.0  # this table has one model only


def without_ground_truth(samples: Iterable[Sample], without_model: str | None) -> list[Sample]:
    """Return the samples for a fit without a model: only fingerprints of it and of its variants remain."""
    return [sample for sample in samples if sample.is_fingerprint or sample.model.name != without_model]


def constants_of(samples: Iterable[Sample]) -> dict[int, Constants]:
    """Return the constants of fingerprints by prompt length in tokens.

    A fingerprint needs measurements at the two smallest layer counts and the two smallest output
    lengths; a configuration without all four gives no fingerprint.
    """
    rows_of: dict[int, dict[str, dict[ParallelConfig, list[Measurement]]]] = {}
    for sample in samples:
        if sample.is_fingerprint:
            row = sample.measured
            by_model = rows_of.setdefault(sample.prompt_tokens, {})
            by_model.setdefault(row.model_name, {}).setdefault(row.configuration, []).append(row)
    return {
        prompt_tokens: {
            model: {at: fingerprint for at, rows in points.items() if (fingerprint := _derived(rows))}
            for model, points in by_model.items()
        }
        for prompt_tokens, by_model in rows_of.items()
    }


def _derived(rows: Sequence[Measurement]) -> Fingerprint | None:
    layers = sorted({row.layers for row in rows})[:2]
    outputs = sorted({row.output_tokens for row in rows})[:2]
    kept = [row for row in rows if row.layers in layers and row.output_tokens in outputs]
    latency_s = {(row.layers, row.output_tokens): row.latency_s for row in kept}
    if (len(layers), len(outputs), len(latency_s)) != (2, 2, 4):
        return None
    return derive(latency_s, {row.layers: row.memory_gib for row in kept if row.output_tokens == outputs[0]})


def nearest_fingerprints(sample: Sample, constants: Mapping[int, Constants]) -> tuple[int, Fingerprints] | None:
    """Return the fingerprints of a sample's model at the nearest prompt length, and that length.

    None if the model has no fingerprint on one GPU with the sample's weight and KV types.
    """
    one_gpu = sample.measured.configuration.at(1, 1)
    for prompt_tokens in sorted(
        constants, key=lambda measured_tokens: abs(math.log(measured_tokens / sample.prompt_tokens))
    ):
        fingerprints = constants[prompt_tokens].get(sample.model.name, {})
        if one_gpu in fingerprints:
            return prompt_tokens, fingerprints
    return None
