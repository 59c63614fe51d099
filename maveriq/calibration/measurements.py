"""Tables of measurements: what a configuration of a model took, row by row.

`maveriq profile`, `maveriq fit` and the estimator `measured` share one format (`maveriq.estimate.measured.COLUMNS`).
The published tables have columns of their own (`PUBLISHED_COLUMNS`), with one latency a row instead of TTFT and TPOT.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from maveriq.domain.models import KvType, ModelSpec, WeightType, read_models, shape_of
from maveriq.domain.parallel import LayerSplit, ParallelConfig
from maveriq.errors import InputError
from maveriq.estimate.fingerprints import read_config
from maveriq.estimate.measured import COLUMNS, OPTIONAL_COLUMNS
from maveriq.estimate.profile_file import held_bytes, models_of, read_profile_file
from maveriq.files import exists
from maveriq.input_files import read_lines
from maveriq.tables import MAX_TABLE_BYTES, Row, choice, read_csv
from maveriq.units import BYTES_PER_GIB

PUBLISHED_COLUMNS = (
    "model", "tp", "pp", "layer_split", "weight_dtype", "int8_kv", "output_tokens", "batch_size", "latency_s",
    "memory_after_run_gib",
)  # fmt: skip
"""Columns that a table in the published format must have."""

_PUBLISHED_OPTIONAL = (
    "prompt_tokens", "layers", "memory_before_run_gib", "fingerprint_build_s", "engine_build_s", "profile_run_s",
)  # fmt: skip
"""Columns that it may also have. Those of seconds are what the measurement cost."""

_MODELS_FILE = "models.toml"
_WHAT = "table of measurements"


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasurementCost:
    """What a measurement cost, in seconds.

    Args:
        model_build_s: to cut the model to its layers; 0 for a whole model, or one that was cut before.
        engine_build_s: until its engine could run, counted once for each engine.
        run_s: of the run itself, with the start of the engine and its warm-up.
    """

    model_build_s: float
    engine_build_s: float
    run_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One measured run of a model with a configuration: its latency, and its memory over all GPUs.

    Args:
        where: file and line.
        model_name: the model.
        layers: layers that it was measured with; fewer than the model's in a fingerprint.
        configuration: how it was split and stored.
        output_tokens: tokens of each output.
        latency_s: from the start to the last token.
        memory_gib: over all GPUs.
        prompt_tokens: tokens of each prompt; None if the table does not say it.
        tpot_s: the part of each output token, where it was measured apart.
        shape: the model's shape, where `models.toml` beside the table has it.
        layer_split: layers of each stage; () where the table does not say them.
        cost: what the measurement cost; None where the table does not say it.
    """

    where: str
    model_name: str
    layers: int
    configuration: ParallelConfig
    output_tokens: int
    latency_s: float
    memory_gib: float
    prompt_tokens: int | None = None
    tpot_s: float | None = None
    shape: ModelSpec | None = None
    layer_split: LayerSplit = ()
    cost: MeasurementCost | None = None

    @property
    def model(self) -> ModelSpec | None:
        """The shape of the model that its name stands for; None if it is not known."""
        return self.shape or shape_of(self.model_name)

    def at_first_token(self) -> Measurement | None:
        """Return the same run up to its first token; None where that was not measured."""
        if self.tpot_s is None or self.output_tokens == 1:
            return None
        return replace(self, output_tokens=1, latency_s=self.latency_s - (self.output_tokens - 1) * self.tpot_s)


def is_table_of_measurements(path: Path, *, with_prompts: bool) -> bool:
    """Return whether a file has the columns of a table of measurements.

    Args:
        path: a CSV file.
        with_prompts: only a table that says how long prompts are.
    """
    header = _header(path)
    return set(COLUMNS) <= header or (
        set(PUBLISHED_COLUMNS) <= header and not (with_prompts and "prompt_tokens" not in header)
    )


def read_measurements(table: Path) -> Iterator[Measurement]:
    """Yield the rows of a table of measurements, in either format, or those of a planned profile.

    Raises:
        InputError: not such a table, a time or a memory that is not positive, an unknown type.
    """
    if table.suffix == PROFILE_SUFFIX:
        yield from _of_profile(table)
    elif _header(table) & {"weights", "ttft_s", "tpot_s"}:
        yield from map(_reader_beside(table), read_csv(table, COLUMNS, what=_WHAT, optional=OPTIONAL_COLUMNS))
    else:
        yield from map(_published, read_csv(table, PUBLISHED_COLUMNS, what=_WHAT, optional=_PUBLISHED_OPTIONAL))


PROFILE_SUFFIX = ".json"
"""The suffix of what `maveriq profile` writes of a plan."""


def _of_profile(path: Path) -> Iterator[Measurement]:
    """Yield what a planned profile measured; memory is that of the largest batch of its engine."""
    profile = read_profile_file(path)
    models = models_of(profile)
    for number, run in enumerate(profile.runs):
        for case in run.cases:
            first_s, tpot_s = median(case.first_s), median(case.each_s)
            yield Measurement(
                where=f"profile {str(path)!r}, run {number}",
                model_name=run.model,
                layers=len(run.layers),
                configuration=ParallelConfig(
                    tp=run.tp, pp=run.pp, weights=run.weights, kv=run.kv, batch_size=case.batch
                ),
                output_tokens=case.output_tokens,
                latency_s=first_s + (case.output_tokens - 1) * tpot_s,
                memory_gib=max(_LEAST, held_bytes(profile, run) / BYTES_PER_GIB),
                prompt_tokens=case.prompt_tokens,
                tpot_s=tpot_s,
                shape=models[run.model],
            )


def _header(path: Path) -> set[str]:
    lines = read_lines(path, what=_WHAT, max_bytes=MAX_TABLE_BYTES)
    return set(next(lines, "").lstrip("\ufeff").strip().split(","))


def _reader_beside(table: Path) -> Callable[[Row], Measurement]:
    """Return the reader of rows of `maveriq profile`, which knows the shapes that lie beside the table."""
    beside = table.with_name(_MODELS_FILE)
    shapes: Mapping[str, ModelSpec] = read_models(beside) if exists(beside) else {}

    def read(row: Row) -> Measurement:
        name, tpot_s = row.text("model"), row.number("tpot_s", minimum=0)
        if "output_tokens" not in row.cells:
            raise InputError(
                f"{row.where}: no column output_tokens, which a comparison needs: tokens of each output; add it"
            )
        output_tokens = row.count("output_tokens", minimum=1)
        latency_s = row.number("ttft_s") + output_tokens * tpot_s
        if not latency_s >= _LEAST:
            raise InputError(f"{row.where}: ttft_s and {output_tokens} x tpot_s add up to {latency_s:g} s")
        shape = shapes.get(name)
        return Measurement(
            where=row.where,
            model_name=name,
            layers=_layers_of(row, shape or shape_of(name)),
            configuration=read_config(row, batch="batch"),
            output_tokens=output_tokens,
            latency_s=latency_s,
            memory_gib=_positive(row, "memory_gib"),
            prompt_tokens=row.count("prompt_tokens", minimum=1),
            tpot_s=tpot_s,
            shape=shape,
        )

    return read


def _layers_of(row: Row, shape: ModelSpec | None) -> int:
    if "layers" in row.cells:
        return row.count("layers", minimum=1)
    if shape is None:
        raise InputError(f"{row.where}: model {row.text('model')!r} is not known; add a column layers")
    return shape.layers


def _published(row: Row) -> Measurement:
    layer_split = _layer_split(row)
    return Measurement(
        where=row.where,
        model_name=row.text("model"),
        layers=sum(layer_split),
        configuration=ParallelConfig(
            tp=row.count("tp", minimum=1),
            pp=row.count("pp", minimum=1),
            weights=choice(row, "weight_dtype", WeightType),
            kv=KvType.INT8 if row.count("int8_kv") else KvType.NATIVE,
            batch_size=row.count("batch_size", minimum=1),
        ),
        output_tokens=row.count("output_tokens", minimum=1),
        latency_s=_positive(row, "latency_s"),
        memory_gib=_positive(row, "memory_after_run_gib"),
        prompt_tokens=row.count("prompt_tokens", minimum=1) if "prompt_tokens" in row.cells else None,
        layer_split=layer_split,
        cost=_cost(row),
    )


def _cost(row: Row) -> MeasurementCost | None:
    if not {"engine_build_s", "profile_run_s"} <= row.cells.keys():
        return None
    model_build_s = row.number("fingerprint_build_s", minimum=0) if "fingerprint_build_s" in row.cells else 0.0
    return MeasurementCost(
        model_build_s=model_build_s,
        engine_build_s=row.number("engine_build_s", minimum=0),
        run_s=row.number("profile_run_s", minimum=0),
    )


def _layer_split(row: Row) -> LayerSplit:
    split = row.text("layer_split").split()
    if not all(part.isascii() and part.isdigit() and len(part) < 6 for part in split) or not sum(map(int, split)):
        raise InputError(f"{row.where}: layer_split must be layers of each stage, such as '16 16', not {split!r}")
    return tuple(map(int, split))


_LEAST = 1e-9  # a percentage error of a smaller value is meaningless, and may be infinite


def _positive(row: Row, column: str) -> float:
    return row.number(column, minimum=_LEAST)
