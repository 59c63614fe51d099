"""Hardware profiles: the measurements of a kind of GPU that maveriq plans and simulates with.

A profile is a TOML file that names tables in the same folder: fingerprints, accuracy, unsupported
configurations, SLOs and load times. The profiles of the A6000 testbed in `maveriq/data/a6000` show
the format.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, TypeAlias

import msgspec

from maveriq.domain.cluster import DispatchTiming, LoadWindow
from maveriq.domain.deployments import Cost
from maveriq.domain.gpu_kinds import GpuSheet, gpu_sheet, gpu_sheets
from maveriq.domain.models import KvType, ModelSpec, WeightType, known_models, read_models
from maveriq.domain.parallel import ParallelConfig
from maveriq.errors import InputError, UnknownNameError
from maveriq.estimate.engine_presets import EnginePreset, EngineTimes
from maveriq.estimate.fingerprints import FingerprintTable, read_config, read_exponents, read_fingerprints
from maveriq.estimate.full_models import FullModelTable, read_full_models
from maveriq.estimate.observations import Observation
from maveriq.files import data_path
from maveriq.tables import Row, choice, read_csv, read_toml, unique
from maveriq.units import Bytes, Micros, bytes_from_gib, micros

StorageTypes: TypeAlias = tuple[str, WeightType, KvType]
"""A model's name, its weight type and its KV type; accuracy depends on these."""

ModelConfig: TypeAlias = tuple[str, ParallelConfig]
"""A model's name and a configuration at batch 1 with an even split."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """The smallest and the largest measured value."""

    low: float
    high: float

    @property
    def middle(self) -> float:
        """The mean of the two."""
        return (self.low + self.high) / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class SloBase:
    """The latency that SLOs are multiples of: `ttft_s + output_tokens * tpot_s`."""

    ttft_s: float
    tpot_s: float


class LoadFit(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Predicts the load time of an engine from its size; fitted to measured load times."""

    fixed_s: Annotated[float, msgspec.Meta(ge=0, le=1e6)]
    per_gpu_s: Annotated[float, msgspec.Meta(ge=0, le=1e6)]
    per_gib_s: Annotated[float, msgspec.Meta(ge=0, le=1e6)]

    def seconds(self, *, gpus: int, gib_per_gpu: float) -> float:
        """Return the load time of an engine over `gpus` GPUs with `gib_per_gpu` on each."""
        return self.fixed_s + self.per_gpu_s * gpus + self.per_gib_s * gib_per_gpu


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MeasuredFacts:
    """The tables of a profile other than fingerprints.

    Args:
        accuracy: percent of the float16 model's score, None if it was never measured.
        unsupported: configurations known not to run.
        slo: the base of each model's SLOs.
        load_times: measured seconds to load an engine; the KV type does not matter and is `NATIVE` in the key.
        load_fit: predicts load times that were never measured.
    """

    accuracy: Mapping[StorageTypes, float | None]
    unsupported: frozenset[ModelConfig]
    slo: Mapping[str, SloBase]
    load_times: Mapping[ModelConfig, Range]
    load_fit: LoadFit

    def model_names(self) -> set[str]:
        """Return the names of all models in the tables."""
        return {*self.slo, *(k[0] for k in self.accuracy), *(k[0] for k in self.unsupported | self.load_times.keys())}


_MORE_ABOUT_ACCURACY = ("percent_low", "percent_high", "measure", "score", "float16_score", "samples")
"""Further columns that `maveriq accuracy` writes."""


def read_accuracy(path: Path) -> dict[StorageTypes, float | None]:
    """Read accuracy in percent of the float16 model's; an empty cell means never measured.

    Raises:
        InputError: not such a table, a duplicate key, or a value outside 0 to 100.
    """
    return unique(
        (
            (row.text("model"), choice(row, "weights", WeightType), choice(row, "kv", KvType)),
            _percent(row),
            row,
        )
        for row in read_csv(
            path, ("model", "weights", "kv", "percent"), what="accuracy table", optional=_MORE_ABOUT_ACCURACY
        )
    )


def _percent(row: Row) -> float | None:
    if not row.cells["percent"]:
        return None
    percent = row.number("percent", minimum=0)
    if percent > 100:
        raise InputError(f"{row.where}: percent must be at most 100, not {percent:g}")
    return percent


def read_unsupported(path: Path) -> frozenset[ModelConfig]:
    """Read the configurations that do not run on this hardware; an empty `kv` means both KV types.

    Raises:
        InputError: not such a table, or a duplicate row.
    """
    rows = read_csv(path, ("model", "tp", "pp", "weights", "kv"), what="table of unsupported configurations")
    return frozenset(unique((key, None, row) for row in rows for key in _unsupported(row)))


def _unsupported(row: Row) -> Iterator[ModelConfig]:
    for kv in [choice(row, "kv", KvType)] if row.cells["kv"] else KvType:
        yield row.text("model"), read_config(row, kv=kv)


def read_slo(path: Path) -> dict[str, SloBase]:
    """Read the base of each model's SLOs.

    Raises:
        InputError: not such a table, a duplicate model, or a negative time.
    """
    return unique(
        (row.text("model"), SloBase(ttft_s=_seconds(row, "ttft_s"), tpot_s=_seconds(row, "tpot_s")), row)
        for row in read_csv(path, ("model", "ttft_s", "tpot_s"), what="SLO table")
    )


def read_load_times(path: Path) -> dict[ModelConfig, Range]:
    """Read measured seconds from the deploy command to registration.

    Raises:
        InputError: not such a table, a duplicate key, or an empty range.
    """
    columns = ("model", "weights", "tp", "pp", "low_s", "high_s")
    return unique(
        (
            (row.text("model"), read_config(row, kv=KvType.NATIVE)),
            _range_s(row),
            row,
        )
        for row in read_csv(path, columns, what="table of load times")
    )


def _range_s(row: Row) -> Range:
    low = _seconds(row, "low_s")
    return Range(low=low, high=_seconds(row, "high_s", minimum=low))


def _seconds(row: Row, column: str, *, minimum: float = 0.0) -> float:
    return row.number(column, minimum=minimum, maximum=1e6)


def read_load_fit(path: Path) -> LoadFit:
    """Read the coefficients that `scripts/derive_a6000.py` fits.

    Raises:
        InputError: not such a file, or a negative coefficient.
    """
    return read_toml(path, LoadFit, what="load time fit")


# The upper bound also rejects infinity, which TOML can express.
_Positive = Annotated[float, msgspec.Meta(gt=0, le=1e6)]
_NotNegative = Annotated[float, msgspec.Meta(ge=0, le=1e6)]


class _Dispatch(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    tick_ms: _NotNegative
    after_arrival_ms: _NotNegative
    after_release_ms: _NotNegative
    registration_delay_s: _NotNegative


class _Run(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    drain_s: _NotNegative
    serves_beyond_context: bool = False


class _LoadWindow(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    samples: int
    sample_s: _Positive
    look_s: _Positive
    busy_percent: _NotNegative
    max_phase_s: _NotNegative = 0.0


class _Tables(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    load_fit: str
    exponents: str | None = None
    accuracy: str | None = None
    unsupported: str | None = None
    slo: str | None = None
    load_times: str | None = None
    calibrated: str | None = None
    measured: str | None = None
    models: str | None = None
    full_models: str | None = None


class _Hardware(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    kind: str
    memory_gib: _Positive
    idle_gib: _NotNegative
    published_testbed: str = ""
    min_cost: Cost = Cost.MONEY
    engine: str = ""
    dispatch: _Dispatch
    run: _Run
    load_window: _LoadWindow
    tables: _Tables


class _Profile(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    name: str
    prompt_tokens: Annotated[int, msgspec.Meta(ge=1)]
    hardware: str
    fingerprints: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuKind:
    """A kind of GPU: its memory, and the part that the driver holds while no engine is loaded.

    `gpus_per_node` is the usual size of a node; None if it is not known.
    """

    name: str
    capacity_bytes: Bytes
    idle_bytes: Bytes
    gpus_per_node: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HardwareProfile:
    """Measurements of one kind of GPU at one prompt length.

    Profiles compare by identity, because their tables are large; load a profile once.

    Args:
        name: the name for `--profile`.
        gpu_kind: name of the kind of GPU.
        capacity_bytes: memory of one GPU.
        idle_bytes: memory that the driver holds while no engine is loaded.
        prompt_tokens: prompt length of the fingerprints.
        timing: delays of the testbed's dispatcher.
        drain_us: time from the last arrival to the end of a run.
        load_window: how the testbed measures load.
        fingerprints: fingerprint constants and exponents, for estimators.
        facts: accuracy, unsupported configurations, SLOs and load times; prefer the methods below.
        calibrated: file of the calibration, None if there is none.
        measured: table of measured whole models, None if there is none.
        models: the shapes of the models that were measured, by name.
        serves_beyond_context: whether the testbed served requests longer than their model's context; replays of the
            traces that come with maveriq then serve them too.
        full_models: measured latencies of whole models, relative to each other.
        published_testbed: the GPUs of the published testbed, as `--gpus` takes them; "" if there is none.
        min_cost: what the intent `min-cost` counts.
        engine: the engine that it was measured with, by `maveriq.estimate.engine_presets`; "" where it names none.
        engine_times: times that were fitted to a deployment, by the preset in whose place they stand.
        sheet: measured speeds of a kind of GPU that has no data sheet; None where the catalogue has it.
        observed: what a planned profile measured, in fingerprints and whole models; the estimator `blended` reads it.
        admission_s: what was measured to pass from a request's arrival until it is in an engine's queue.
    """

    name: str
    gpu_kind: str
    capacity_bytes: Bytes
    idle_bytes: Bytes
    prompt_tokens: int
    timing: DispatchTiming
    drain_us: Micros
    load_window: LoadWindow
    fingerprints: FingerprintTable
    facts: MeasuredFacts
    calibrated: Path | None = None
    measured: Path | None = None
    models: Mapping[str, ModelSpec] = field(default_factory=dict)
    serves_beyond_context: bool = False
    published_testbed: str = ""
    min_cost: Cost = Cost.MONEY
    engine: str = ""
    full_models: FullModelTable = field(default_factory=FullModelTable)
    engine_times: Mapping[str, EngineTimes] = field(default_factory=dict)
    sheet: GpuSheet | None = None
    observed: tuple[Observation, ...] = ()
    admission_s: float = 0.0

    def engine_preset(self, preset: EnginePreset) -> EnginePreset:
        """Return a preset with the times that were fitted to the profile's deployment, if it was one of that preset."""
        times = self.engine_times.get(preset.name)
        return preset if times is None else preset.with_times(times)

    def has_measured(self, model: ModelSpec) -> bool:
        """Return whether anything of a model was measured: whole, or fingerprints of it."""
        return model.name in self.fingerprints.by_model or model.name in self.models

    def why_other_model(self, model: ModelSpec) -> str | None:
        """Return why a model is not the one that was measured under its name: its shape differs; None if it may be.

        Without a table of shapes, the known model of that name counts. Only models read from a file are compared: known
        models cut to a few layers have measurements too.
        """
        if not model.config_json:
            return None
        measured = self.models.get(model.name) or known_models().get(model.name)
        different = model.differences_from(measured) if measured else ""
        if not different:
            return None
        return (
            f"it is not the {model.name} that profile {self.name} was measured with: {different}; measure it under a "
            "name of its own (_name_or_path in its config.json)"
        )

    def accuracy(self, model_name: str, weights: WeightType, kv: KvType) -> float | None:
        """Return the accuracy in percent of the float16 model's, None if it was never measured.

        That of the float16 model itself is 100, by definition.
        """
        if (weights, kv) == (WeightType.FLOAT16, KvType.NATIVE):
            return self.facts.accuracy.get((model_name, weights, kv), 100.0)
        return self.facts.accuracy.get((model_name, weights, kv))

    def supports(self, model_name: str, configuration: ParallelConfig) -> bool:
        """Return False if the configuration is known not to run on this hardware."""
        return (model_name, configuration.at(configuration.tp, configuration.pp)) not in self.facts.unsupported

    def load_time_s(self, model: ModelSpec, configuration: ParallelConfig, gib_per_gpu: float) -> float:
        """Return the seconds from the deploy command to registration of an engine that is already built.

        The result is the middle of the measured range if this configuration was measured. Otherwise
        it is predicted from the number of GPUs and the memory on the fullest of them.
        """
        key = ParallelConfig(tp=configuration.tp, pp=configuration.pp, weights=configuration.weights)
        measured = self.facts.load_times.get((model.name, key))
        if measured is not None:
            return measured.middle
        return self.facts.load_fit.seconds(gpus=configuration.gpus, gib_per_gpu=gib_per_gpu)

    def slo_s(self, model_name: str, output_tokens: int) -> float | None:
        """Return the latency SLO of a request at scale 1, None if the model has none (SPEC 7)."""
        base = self.facts.slo.get(model_name)
        return None if base is None else base.ttft_s + base.tpot_s * output_tokens


DEFAULT_PROFILE = "a6000-short"
"""The default of `--profile`."""

IDLE_GIB = 0.5
"""What a driver holds of a GPU while no engine is loaded, where it was not measured."""


def known_profiles() -> Mapping[str, Path]:
    """Return the files of the built-in profiles by name; `a6000/profile-short.toml` is `a6000-short`."""
    paths = sorted(data_path().glob("*/profile-*.toml"))
    return {f"{path.parent.name}-{path.stem.removeprefix('profile-')}": path for path in paths}


def load_profile(name_or_path: str) -> HardwareProfile:
    """Read a hardware profile with its tables, and check that they belong together.

    Args:
        name_or_path: a name of `known_profiles`, or the path of a profile's TOML file.

    Raises:
        UnknownNameError: neither a known name nor a path.
        InputError: a file is missing or invalid, or a model lacks entries in a table.
    """
    known = known_profiles()
    path = known.get(name_or_path, Path(name_or_path))
    if name_or_path not in known and not (path.suffix == ".toml" or os.sep in name_or_path):
        raise UnknownNameError("profile", name_or_path, known, "or give the path of a profile: its folder, or its file")
    profile = read_toml(path, _Profile, what="profile")
    folder = path.parent
    hardware = _read_hardware(folder / profile.hardware)
    tables = (folder / profile.hardware).parent
    fingerprints = FingerprintTable(
        by_model=read_fingerprints(folder / profile.fingerprints) if profile.fingerprints else {},
        exponents=read_exponents(tables / hardware.tables.exponents) if hardware.tables.exponents else {},
    )
    read_facts = _read_facts(tables, hardware.tables)
    _check_names(read_facts.model_names(), {*known_models(), *fingerprints.models()})
    _check_coverage(profile.name, fingerprints, read_facts)
    return HardwareProfile(
        name=profile.name,
        gpu_kind=hardware.kind,
        capacity_bytes=bytes_from_gib(hardware.memory_gib),
        idle_bytes=bytes_from_gib(hardware.idle_gib),
        prompt_tokens=profile.prompt_tokens,
        timing=_timing(hardware.dispatch),
        drain_us=micros(hardware.run.drain_s),
        load_window=_load_window(hardware.load_window),
        fingerprints=fingerprints,
        facts=read_facts,
        calibrated=tables / hardware.tables.calibrated if hardware.tables.calibrated else None,
        measured=tables / hardware.tables.measured if hardware.tables.measured else None,
        serves_beyond_context=hardware.run.serves_beyond_context,
        models=read_models(tables / hardware.tables.models) if hardware.tables.models else {},
        published_testbed=hardware.published_testbed,
        min_cost=hardware.min_cost,
        engine=hardware.engine,
        full_models=read_full_models(tables / hardware.tables.full_models)
        if hardware.tables.full_models
        else FullModelTable(),
    )


def load_gpu_kind(name: str) -> GpuKind:
    """Return a kind of GPU: one that a profile of maveriq was measured on, else one of the catalogue of data sheets.

    Raises:
        UnknownNameError: no kind has this name.
    """
    kinds = {}
    for path in sorted(data_path().glob("*/hardware.toml")):
        read = _read_hardware(path)
        kinds[read.kind] = gpu_kind(
            read.kind, capacity_bytes=bytes_from_gib(read.memory_gib), idle_bytes=bytes_from_gib(read.idle_gib)
        )
    for kind in kinds.values():
        if kind.name.casefold() == name.casefold():
            return kind
    sheet = gpu_sheet(name)
    return kinds.get(
        sheet.name,
        gpu_kind(sheet.name, capacity_bytes=bytes_from_gib(sheet.usable_gib), idle_bytes=bytes_from_gib(IDLE_GIB)),
    )


def gpu_kind(name: str, *, capacity_bytes: Bytes, idle_bytes: Bytes) -> GpuKind:
    """Return a kind of GPU with so much memory; the catalogue says how many a node has, if it knows the name."""
    sheet = gpu_sheets().get(name)
    return GpuKind(
        name=name,
        capacity_bytes=capacity_bytes,
        idle_bytes=idle_bytes,
        gpus_per_node=sheet.gpus_per_node if sheet else None,
    )


def _read_hardware(path: Path) -> _Hardware:
    return read_toml(path, _Hardware, what="hardware description")


def _read_facts(folder: Path, tables: _Tables) -> MeasuredFacts:
    return MeasuredFacts(
        accuracy=read_accuracy(folder / tables.accuracy) if tables.accuracy else {},
        unsupported=read_unsupported(folder / tables.unsupported) if tables.unsupported else frozenset(),
        slo=read_slo(folder / tables.slo) if tables.slo else {},
        load_times=read_load_times(folder / tables.load_times) if tables.load_times else {},
        load_fit=read_load_fit(folder / tables.load_fit),
    )


def _timing(dispatch: _Dispatch) -> DispatchTiming:
    return DispatchTiming(
        tick_us=micros(dispatch.tick_ms / 1e3),
        after_arrival_us=micros(dispatch.after_arrival_ms / 1e3),
        after_release_us=micros(dispatch.after_release_ms / 1e3),
        registration_delay_us=micros(dispatch.registration_delay_s),
    )


def _load_window(window: _LoadWindow) -> LoadWindow:
    return LoadWindow(
        samples=window.samples,
        sample_us=micros(window.sample_s),
        look_us=micros(window.look_s),
        busy_share=window.busy_percent / 100,
        max_phase_us=micros(window.max_phase_s),
    )


def _check_names(named: Collection[str], known: Collection[str]) -> None:
    """Reject a table with an unknown model: the values of a misspelt name would be ignored."""
    for name in sorted(set(named) - set(known)):
        raise UnknownNameError("model", name, known, "in the tables of the hardware profile")


def _check_coverage(name: str, fingerprints: FingerprintTable, read_facts: MeasuredFacts) -> None:
    keys = ((model, at.weights, at.kv) for model, points in fingerprints.by_model.items() for at in points)
    for model, weights, kv in dict.fromkeys(keys):
        what = f"profile {name!r}: {model} has fingerprints with {weights} weights and {kv} KV"
        if (weights, kv) not in fingerprints.exponents:
            raise InputError(f"{what}, but the table of exponents has no row for these types; add one")
        if (model, weights, kv) not in read_facts.accuracy:
            remedy = "add one, with percent left empty if it was never measured"
            raise InputError(f"{what}, but the accuracy table has no row for it; {remedy}")
