"""The file that `maveriq profile` writes: what was measured, where, when and with what, every sample.

The file is JSON with a version. It may come from anybody: it is read within bounds, into a strict schema, and nothing
in it is run or opened.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Annotated, Final, Literal

import msgspec
import numpy as np

from maveriq.domain.cluster import DispatchTiming, LoadWindow
from maveriq.domain.engine_versions import release_numbers
from maveriq.domain.gpu_kinds import GpuSheet, gpu_sheets
from maveriq.domain.models import KvType, ModelSpec, WeightType, known_models, model_from_hf_config
from maveriq.domain.parallel import ParallelConfig
from maveriq.errors import InputError
from maveriq.estimate.engine_presets import EngineTimes, engine_preset
from maveriq.estimate.fingerprints import FingerprintTable
from maveriq.estimate.hardware_profile import HardwareProfile, LoadFit, MeasuredFacts
from maveriq.estimate.machine_drift import TimedSamples, machine_drift
from maveriq.estimate.observations import Batch, Observation, with_layers
from maveriq.tables import read_json
from maveriq.units import bytes_from_gib, micros

FORMAT: Final = "maveriq profile"
VERSION: Final = 1
PROFILE_NAME = "profile.json"
"""The name of the file in the folder that `maveriq profile` writes."""

_MAX_LAYERS, _MAX_SAMPLES, _MAX_CASES, _MAX_RUNS, _MAX_MODELS = 10_000, 1_000, 1_000, 10_000, 100

_Text = Annotated[str, msgspec.Meta(max_length=300)]
_Kind = Annotated[str, msgspec.Meta(pattern=r"^[\w][\w .+-]{0,79}$")]  # it becomes part of a file's name
_Seconds = Annotated[float, msgspec.Meta(gt=0, le=1e6)]
_NotNegative = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
_Bytes = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
_Degree = Annotated[int, msgspec.Meta(ge=1, le=1024)]
_Tokens = Annotated[int, msgspec.Meta(ge=1, le=10_000_000)]
_Samples = Annotated[tuple[_Seconds, ...], msgspec.Meta(max_length=_MAX_SAMPLES)]


class MachineRecord(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """What was measured on.

    Args:
        kind: the kind of GPU, or `cpu`.
        memory_gib: memory of one GPU, or of one process on a CPU.
        idle_gib: what the driver holds while no engine is loaded.
        device: name of the GPU or processor.
        driver: version of the driver; "" on a CPU.
        clock_mhz: clock at the start; 0 where it is not known.
        system: operating system and its version.
        cores: processor cores.
        sheet: speeds that were measured, where the kind has no data sheet.
    """

    kind: _Kind
    memory_gib: Annotated[float, msgspec.Meta(gt=0, le=1e6)]
    idle_gib: _NotNegative = 0.0
    device: _Text = ""
    driver: _Text = ""
    clock_mhz: _NotNegative = 0.0
    system: _Text = ""
    cores: _Bytes = 0
    sheet: GpuSheet | None = None


class EngineRecord(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The engine that was measured: its name and version."""

    name: _Text
    version: _Text = ""


class ModelRecord(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """A model: its `config.json`, "" for a known one; and whether its own weights were measured, or random ones."""

    name: _Text
    config_json: Annotated[str, msgspec.Meta(max_length=4 << 20)] = ""
    own_weights: bool = False


class CaseRecord(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """A batch of equal prompts, sample by sample.

    Args:
        batch: how many.
        prompt_tokens: of each.
        output_tokens: of each.
        first_s: until the first token; of an engine that batches continuously, of the step with all the prompts.
        each_s: for each further token.
        mixed_s: of a step with one more such prompt while the batch decodes; none where an engine has no such steps.
        at_s: when each sample ended, in seconds since 1970; none where that was not recorded.
    """

    batch: _Tokens
    prompt_tokens: _Tokens
    output_tokens: _Tokens
    first_s: _Samples
    each_s: _Samples
    mixed_s: _Samples = ()
    at_s: Annotated[
        tuple[Annotated[float, msgspec.Meta(ge=0, le=1e11)], ...], msgspec.Meta(max_length=_MAX_SAMPLES)
    ] = ()

    def __post_init__(self) -> None:
        if len(self.first_s) != len(self.each_s) or not self.first_s:
            raise ValueError("first_s and each_s must have as many samples, at least one")
        if self.at_s and len(self.at_s) != len(self.first_s):
            raise ValueError("at_s must have as many entries as first_s, or none")

    @property
    def seconds(self) -> tuple[float, ...]:
        """The seconds that each sample took."""
        rest = self.output_tokens - 1
        return tuple(first + rest * each for first, each in zip(self.first_s, self.each_s, strict=True))


class RunRecord(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """An engine that was started: with which layers of which model, how it was split, and what it took.

    Args:
        model: the model's name.
        layers: the layers that it had, numbered from 0; all of them for the whole model.
        tp: GPUs that shared each layer.
        pp: stages.
        weights: how weights were stored.
        kv: how the KV cache was.
        start_s: from the launch until it served.
        weights_bytes: of weights over all GPUs, as the engine says; 0 where it does not.
        kv_cache_bytes: of the KV cache that the engine has after loading, as it says; 0 where it does not.
        memory_before_bytes: what was held on its GPUs before.
        memory_after_bytes: what the engine held after the last sample.
        memory_peak_bytes: the most that it was seen to hold.
        kv_tokens: tokens that its KV cache has room for, where it has a fixed size; else 0.
        admission_s: of an engine that batches continuously: what a request's first token takes beside its step.
        cases: what was measured.
    """

    model: _Text
    layers: Annotated[
        tuple[Annotated[int, msgspec.Meta(ge=0, lt=_MAX_LAYERS)], ...],
        msgspec.Meta(min_length=1, max_length=_MAX_LAYERS),
    ]
    tp: _Degree
    pp: _Degree
    weights: WeightType
    kv: KvType
    start_s: _NotNegative
    weights_bytes: _Bytes = 0
    kv_cache_bytes: _Bytes = 0
    memory_before_bytes: _Bytes = 0
    memory_after_bytes: _Bytes = 0
    memory_peak_bytes: _Bytes = 0
    kv_tokens: _Bytes = 0
    admission_s: _Samples = ()
    cases: Annotated[tuple[CaseRecord, ...], msgspec.Meta(max_length=_MAX_CASES)]


class ProfileFile(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """A profile as it is stored.

    Args:
        format: says what file this is.
        version: of the format.
        name: of the profile.
        made_at: date and time, UTC, in ISO 8601.
        made_by: the version of maveriq.
        machine: what was measured on.
        engine: what was measured with.
        models: the models.
        runs: the measurements.
    """

    format: Literal["maveriq profile"]
    version: Literal[1]
    name: _Text
    made_at: _Text
    made_by: _Text
    machine: MachineRecord
    engine: EngineRecord
    models: Annotated[tuple[ModelRecord, ...], msgspec.Meta(max_length=_MAX_MODELS)]
    runs: Annotated[tuple[RunRecord, ...], msgspec.Meta(max_length=_MAX_RUNS)]


def read_profile_file(path: Path) -> ProfileFile:
    """Read a profile.

    Raises:
        InputError: not such a file, or one of another version.
    """
    profile = read_json(path, ProfileFile, what="profile")
    names = [model.name for model in profile.models]
    if len(set(names)) < len(names):
        raise InputError(f"profile {str(path)!r}: two models have one name; keep one of them")
    for run in profile.runs:
        if run.model not in names:
            raise InputError(f"profile {str(path)!r}: a run is of model {run.model!r}, which is not among its models")
    return profile


def models_of(profile: ProfileFile) -> dict[str, ModelSpec]:
    """Return the models of a profile by name.

    Raises:
        InputError: a configuration that is not one of a decoder, or a model that is not known.
    """
    return {record.name: _model(record, profile.name) for record in profile.models}


def _model(record: ModelRecord, profile: str) -> ModelSpec:
    if record.config_json:
        return model_from_hf_config(record.config_json, name=record.name, where=f"profile {profile!r}")
    if record.name not in known_models():
        raise InputError(f"profile {profile!r}: model {record.name!r} is not known, and has no config_json")
    return known_models()[record.name]


def observations_of(profile: ProfileFile) -> tuple[Observation, ...]:
    """Return what a profile measured.

    Raises:
        InputError: as `models_of`, or a run with layers that its model has not.
    """
    models, admission_s = models_of(profile), admission_of(profile)
    profile = steadied(profile)
    found: list[Observation] = []
    cases = [case for run in profile.runs for case in run.cases]
    noises = iter(
        zip(
            noise_of_medians([case.first_s for case in cases]),
            noise_of_medians([case.each_s for case in cases]),
            strict=True,
        )
    )
    for run in profile.runs:
        model = models[run.model]
        if max(run.layers) >= model.layers or run.pp > len(run.layers):
            raise InputError(f"profile {profile.name!r}: {model.name} has no layers {run.layers[:8]} for PP {run.pp}")
        whole = run.layers == tuple(range(model.layers))
        short = model if whole else with_layers(model, run.layers)
        largest = max(run.cases, key=lambda case: case.batch * (case.prompt_tokens + case.output_tokens), default=None)
        sequences = max((case.batch for case in run.cases), default=1)
        loaded_for = Batch(sequences, *_WARM_UP)
        if run.kv_tokens > 2 * sequences:
            loaded_for = Batch(sequences, run.kv_tokens // sequences - 1, 1)
        for case in run.cases:
            configuration = ParallelConfig(tp=run.tp, pp=run.pp, weights=run.weights, kv=run.kv)
            first_token_noise, tpot_noise = next(noises)
            found.append(
                Observation(
                    model=short,
                    configuration=configuration,
                    batch=Batch(case.batch, case.prompt_tokens, case.output_tokens),
                    first_token_s=median(case.first_s) + admission_s,
                    tpot_s=median(case.each_s),
                    first_token_noise=first_token_noise,
                    tpot_noise=tpot_noise,
                    memory_bytes=held_bytes(profile, run) or None if case is largest else None,
                    memory_batch=loaded_for if run.kv_tokens or _is_loaded(profile, run) else None,
                    mixed_s=median(case.mixed_s) if case.mixed_s else None,
                )
            )
    return tuple(found)


def steadied(profile: ProfileFile) -> ProfileFile:
    """Return a profile whose samples are as on a machine of steady speed, as far as their times tell its speed.

    The times are left out: nothing is taken off twice.
    """
    cases = [case for run in profile.runs for case in run.cases if case.at_s]
    drift = iter(machine_drift([TimedSamples(case.at_s, case.seconds) for case in cases]))

    def without(case: CaseRecord) -> CaseRecord:
        if not case.at_s:
            return case
        factors = np.exp(-next(drift))
        changed = {
            name: tuple(float(sample) for sample in np.array(samples) * factors)
            for name in ("first_s", "each_s", "mixed_s")
            if len(samples := getattr(case, name)) == len(factors)
        }
        return msgspec.structs.replace(case, at_s=(), **changed)

    runs = tuple(msgspec.structs.replace(run, cases=tuple(map(without, run.cases))) for run in profile.runs)
    return msgspec.structs.replace(profile, runs=runs)


def admission_of(profile: ProfileFile) -> float:
    """Return what a request's first token takes beside its step, in s; 0 where that is part of what was measured."""
    samples = [each for run in profile.runs for each in run.admission_s]
    return median(samples) if samples else 0.0


def held_bytes(profile: ProfileFile, run: RunRecord) -> int:
    """Return what an engine held: of GPUs after its batches, of processes the weights and cache that they loaded.

    What a process holds beside these depends on what its allocator gave back; a few layers do not tell it.
    """
    return run.weights_bytes + run.kv_cache_bytes if _is_loaded(profile, run) else run.memory_after_bytes


def _is_loaded(profile: ProfileFile, run: RunRecord) -> bool:
    """Return whether what an engine holds is what it says that it loaded."""
    return profile.machine.sheet is not None and run.weights_bytes > 0


_WARM_UP = (8, 2)  # tokens of the prompts and outputs with which the torch engine warms up when it loads
_DEVIATION_OF_MAD = 1.4826  # a normal distribution's, over its median absolute deviation
_MEDIAN_OF_MEAN = 1.2533  # standard error of a median over that of a mean, for normal samples: the root of pi / 2
_FEW_CORRECTION = 0.8  # Rousseeuw and Croux (1993): the median absolute deviation of few samples is too small
_LEAST_NOISE = 0.003
_FEW, _USUAL_SPREAD = 3, 0.05
_POOLED_SAMPLES = 8  # what the spread of all batches counts for in the spread of each


def relative_mad(samples: tuple[float, ...]) -> float:
    """Return the median absolute deviation of samples over their median."""
    middle = median(samples)
    return float(median(abs(sample - middle) for sample in samples) / middle)


def noise_of_median(samples: tuple[float, ...]) -> float:
    """Return the standard error of the median of samples, relative to it; few samples cannot say that it is small."""
    number = len(samples)
    usual = _USUAL_SPREAD / math.sqrt(number) if number < _FEW else 0.0
    few = number / (number - _FEW_CORRECTION)
    spread = few * _DEVIATION_OF_MAD * relative_mad(samples) * _MEDIAN_OF_MEAN / math.sqrt(number)
    return max(_LEAST_NOISE, usual, spread)


def noise_of_medians(measured: Sequence[tuple[float, ...]]) -> list[float]:
    """Return the standard errors of the medians of batches that were measured on one machine, relative to them.

    Few samples agree by chance. So the spread of a batch is taken together with the usual one of all batches, which
    counts as much as eight samples do.
    """
    spreads = [noise_of_median(samples) * math.sqrt(len(samples)) for samples in measured]
    usual = median(spreads) if spreads else 0.0
    return [
        max(
            _LEAST_NOISE,
            math.sqrt((_POOLED_SAMPLES * usual**2 + len(samples) * spread**2) / (_POOLED_SAMPLES + len(samples)))
            / math.sqrt(len(samples)),
        )
        for samples, spread in zip(measured, spreads, strict=True)
    ]


def planned_profile(path: Path) -> HardwareProfile:
    """Return the hardware profile of a file that `maveriq profile` wrote.

    Raises:
        InputError: not such a file, a kind of GPU that is not known, or a model that cannot be read.
    """
    read = read_profile_file(path)
    if read.engine.name not in _ENGINES:
        raise InputError(f"profile {str(path)!r}: unknown engine {read.engine.name!r} (known: {', '.join(_ENGINES)})")
    return hardware_profile_of(read, f"profile {str(path)!r}")


def hardware_profile_of(read: ProfileFile, where: str) -> HardwareProfile:
    """Return the hardware profile of what was measured, also of emulated engines.

    Args:
        read: the measurements.
        where: what it is, for messages.

    Raises:
        InputError: a kind of GPU that is not known, or a model that cannot be read.
    """
    machine = read.machine
    if (machine.sheet is None) != (machine.kind in gpu_sheets()):
        has = (
            "no data sheet, and the profile no speeds"
            if machine.sheet is None
            else "a data sheet; leave its speeds out"
        )
        raise InputError(f"{where}: GPU kind {machine.kind!r} has {has}")
    observed = observations_of(read)
    empty = planning_profile(machine, _preset_of(read.engine))
    admission_s = admission_of(read)
    return replace(
        empty,
        admission_s=admission_s,
        engine_times=times_without_server(empty.engine, admission_s) if empty.engine else {},
        name=read.name,
        prompt_tokens=round(median(seen.batch.prompt_tokens for seen in observed)) if observed else _PROMPT_TOKENS,
        facts=replace(empty.facts, load_fit=_load_fit(read)),
        models=models_of(read),
        observed=observed,
    )


def planning_profile(machine: MachineRecord, engine: str) -> HardwareProfile:
    """Return the hardware profile of a machine before anything is measured.

    Args:
        machine: its GPUs.
        engine: an engine's preset.
    """
    return HardwareProfile(
        name="not measured",
        gpu_kind=machine.kind,
        capacity_bytes=bytes_from_gib(machine.memory_gib),
        idle_bytes=bytes_from_gib(machine.idle_gib),
        prompt_tokens=_PROMPT_TOKENS,
        timing=DispatchTiming(),
        drain_us=micros(_DRAIN_S),
        load_window=LoadWindow(),
        fingerprints=FingerprintTable(by_model={}, exponents={}),
        facts=MeasuredFacts(accuracy={}, unsupported=frozenset(), slo={}, load_times={}, load_fit=_LOAD_FIT),
        engine=engine,
        sheet=msgspec.structs.replace(machine.sheet, name=machine.kind) if machine.sheet else None,
    )


def times_without_server(engine: str, admission_s: float) -> dict[str, EngineTimes]:
    """Return the times of an engine's process whose requests come as measured, and not through a server of its own."""
    preset = engine_preset(engine)
    times = msgspec.structs.replace(
        preset.times, api_us=1e6 * admission_s, api_token_us=0.0, api_sequence_us=0.0, uncertainty=preset.uncertainty
    )
    return {preset.name: times}


_LOAD_FIT = LoadFit(fixed_s=20.0, per_gpu_s=0.0, per_gib_s=0.5)
_PROMPT_TOKENS, _DRAIN_S = 512, 300.0
_ENGINES = ("torch", "vllm", "trtllm")


def _preset_of(engine: EngineRecord) -> str:
    """Return the preset of an engine: of its version where it has one that is known."""
    if engine.name not in _ENGINES:
        return ""  # an emulated one
    if engine.name == "torch" or release_numbers(engine.version) is None:
        return engine.name
    return f"{engine.name}-{engine.version}"


def _load_fit(profile: ProfileFile) -> LoadFit:
    """Return the load time of engines: the median of those that started, and what weights take from a local disk."""
    starts = [run.start_s for run in profile.runs]
    return msgspec.structs.replace(_LOAD_FIT, fixed_s=median(starts)) if starts else _LOAD_FIT
