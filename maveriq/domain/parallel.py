"""Parallel configurations: how a model is split over GPUs and stored, and the rules that a split obeys.

`ParallelConfig` is the key under which estimates, measurements and caches are kept. The rules of
pipeline parallelism (which layers on which stage) and of tensor parallelism (which degrees divide
a layer) stand here once; estimators, policies, engines and readers of tables call them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import TypeAlias

from maveriq.domain.models import KvType, ModelSpec, WeightType
from maveriq.errors import InputError
from maveriq.units import Bytes, gib

LayerSplit: TypeAlias = tuple[int, ...]
"""Layers of each pipeline stage, first stage first."""


KV_SUFFIX = {KvType.NATIVE: "", KvType.INT8: "+kv8", KvType.FP8: "+kvfp8"}
"""How a configuration is written: `int8+kv8` has weights and KV cache of 8 bits."""


def format_of(text: str) -> tuple[WeightType, KvType]:
    """Return the types of weights and KV cache that a format names: int8, or int8+kv8.

    Raises:
        InputError: it is none.
    """
    weights, plus, suffix = text.strip().partition("+")
    kv = next((kv for kv, written in KV_SUFFIX.items() if written == plus + suffix), None)
    if weights not in list(WeightType) or kv is None:
        raise InputError(f"--formats {text!r} is none; write one of {', '.join(WeightType)}, or int8+kv8")
    return WeightType(weights), kv


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """How a model is parallelised and stored.

    Args:
        tp: tensor-parallel degree, GPUs of a stage.
        pp: pipeline-parallel degree, stages.
        weights: how weights are stored.
        kv: how the KV cache is stored.
        layer_split: layers of each stage; () for an even split, whatever the model's layers.
        batch_size: requests that an engine takes into one batch at most.
        ep: expert-parallel degree: groups of a stage's GPUs, among which whole experts are dealt. 1 splits each expert
            over all GPUs of the stage, as TP splits everything else.
        gpu: the kind of its GPUs where a cluster has several; "" where there is only one to choose.
        network_hops: how often a stage hands over to one on another node.

    Raises:
        InputError: a degree or the batch size is below 1, EP does not divide TP, or the split does not give each stage
            a layer.
    """

    tp: int
    pp: int
    weights: WeightType
    kv: KvType = KvType.NATIVE
    layer_split: LayerSplit = ()
    batch_size: int = 1
    ep: int = 1
    gpu: str = ""
    network_hops: int = 0

    def __post_init__(self) -> None:
        if self.tp < 1 or self.pp < 1 or self.batch_size < 1 or self.ep < 1:
            field = next(field for field in ("tp", "pp", "batch_size", "ep") if getattr(self, field) < 1)
            raise InputError(f"configuration: {field} must be at least 1, not {getattr(self, field)}")
        if self.tp % self.ep:
            raise InputError(f"configuration: EP {self.ep} must divide the {self.tp} GPUs of a stage")
        if not 0 <= self.network_hops < self.pp:
            raise InputError(f"configuration: {self.pp} stages cannot have {self.network_hops} network hops")
        if self.layer_split:
            check_layer_split(self.layer_split, self.pp)

    @property
    def gpus(self) -> int:
        """GPUs that one deployment takes: TP times PP."""
        return self.tp * self.pp

    def at(self, tp: int, pp: int, batch_size: int = 1) -> ParallelConfig:
        """Return the same storage types at other degrees, split evenly."""
        return _even_config(tp, pp, self.weights, self.kv, batch_size)

    def at_any_place(self) -> ParallelConfig:
        """Return it without what depends on the GPUs that it was placed on."""
        return replace(self, layer_split=(), gpu="", network_hops=0)

    def layers_per_stage(self, layers: int) -> LayerSplit:
        """Return the layers of each stage for a model of so many layers."""
        return self.layer_split or even_split(layers, self.pp)

    def normalised(self, layers: int) -> ParallelConfig:
        """Return the one spelling of this configuration for a model of so many layers: an even split becomes ().

        Raises:
            InputError: the split does not add up to the model's layers, or there are more stages than layers.
        """
        check_layer_split(self.layers_per_stage(layers), self.pp, layers)
        return replace(self, layer_split=()) if self.layer_split == even_split(layers, self.pp) else self

    def describe(self, layers: int) -> str:
        """Return the configuration as text, with the layers of each stage where these differ."""
        split = self.layers_per_stage(layers)
        return f"{self} ({_plus(split)} layers)" if len(set(split)) > 1 else str(self)

    def __str__(self) -> str:
        experts = f" x EP {self.ep}" if self.ep > 1 else ""
        batch = f" b{self.batch_size}" if self.batch_size > 1 else ""
        kind = f" on {self.gpu}" if self.gpu else ""
        nodes = " across nodes" if self.network_hops else ""
        return f"TP {self.tp} x PP {self.pp}{experts} {self.weights}{KV_SUFFIX[self.kv]}{batch}{kind}{nodes}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigurationPattern:
    """What is fixed of a configuration that a policy chooses; None leaves it open.

    Args:
        pp: stages.
        expert_parallel: whether whole experts are dealt to the GPUs of a stage.
        weights: how weights are stored.
        kv: how the KV cache is stored.
    """

    pp: int | None = None
    expert_parallel: bool | None = None
    weights: WeightType | None = None
    kv: KvType | None = None

    def allows(self, configuration: ParallelConfig) -> bool:
        """Return whether a configuration has all that is fixed."""
        return (
            self.pp in (None, configuration.pp)
            and self.weights in (None, configuration.weights)
            and self.kv in (None, configuration.kv)
            and self.expert_parallel in (None, configuration.ep > 1)
        )


ANY_CONFIGURATION = ConfigurationPattern()


@cache
def _even_config(tp: int, pp: int, weights: WeightType, kv: KvType, batch_size: int) -> ParallelConfig:
    return ParallelConfig(tp=tp, pp=pp, weights=weights, kv=kv, batch_size=batch_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentPlan:
    """A model, its parallel configuration, and the GPUs of its shards.

    `gpu_ids` and `gpu_bytes` are stage-major: stage i owns positions i*TP to i*TP+TP-1, so that
    a shard's position is its identity (stage, rank) on whatever GPU it lies. `est_*` are the
    planning estimator's figures, 0 where there was no estimate; they are kept for the records and
    not used to serve.

    Raises:
        InputError: the parts do not belong together (counts, a GPU used twice, a wrong layer split).
    """

    model: ModelSpec
    configuration: ParallelConfig
    gpu_ids: tuple[int, ...]
    gpu_bytes: tuple[Bytes, ...]
    est_latency_s: float
    est_memory_bytes: Bytes
    note: str = ""

    def __post_init__(self) -> None:
        cfg, where = self.configuration, f"plan for {self.model.name} ({self.configuration})"
        try:
            object.__setattr__(self, "configuration", cfg.normalised(self.model.layers))
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        if len(self.gpu_ids) != cfg.gpus or len(set(self.gpu_ids)) != cfg.gpus:
            raise InputError(f"{where}: needs {cfg.gpus} different GPUs, got {self.gpu_ids}")
        if len(self.gpu_bytes) != cfg.gpus or min(self.gpu_bytes) <= 0:
            raise InputError(f"{where}: needs a positive memory for each of {cfg.gpus} shards, got {self.gpu_bytes}")

    @property
    def layer_split(self) -> LayerSplit:
        """Layers of each pipeline stage."""
        return self.configuration.layers_per_stage(self.model.layers)

    @property
    def shares(self) -> dict[int, Bytes]:
        """Its memory on each of its GPUs."""
        return dict(zip(self.gpu_ids, self.gpu_bytes, strict=True))

    @property
    def memory_bytes(self) -> Bytes:
        """Memory over all its GPUs."""
        return sum(self.gpu_bytes)

    def describe_memory(self) -> str:
        """Return the memory of each GPU in GiB, space-separated, in rank order."""
        return " ".join(f"{gib(amount):.4f}" for amount in self.gpu_bytes)


def even_split(layers: int, stages: int) -> LayerSplit:
    """Return the most even split there is; the first stages take the remainder."""
    each, rest = divmod(layers, stages)
    return (each + 1,) * rest + (each,) * (stages - rest)


def check_layer_split(split: Sequence[int], stages: int, layers: int | None = None) -> None:
    """Check that a split gives every stage a layer and, where `layers` is given, all layers of the model.

    Raises:
        InputError: it does not.
    """
    if len(split) != stages or min(split) < 1:
        raise InputError(f"layer split {_plus(split)} must give each of {stages} stages at least one layer")
    if layers is not None and sum(split) != layers:
        raise InputError(f"layer split {_plus(split)} must add up to {layers} layers")


def _plus(split: Sequence[int]) -> str:
    return "+".join(map(str, split))


def network_hops(nodes: Sequence[int], tp: int) -> int:
    """Return how often a stage hands over to one on another node, for the nodes of GPUs in stage-major order."""
    return sum(here != there for here, there in pairwise(nodes[::tp]))


def max_layers_per_stage(free_bytes: Sequence[Bytes], *, tp: int, layers: int, memory_bytes: Bytes) -> list[int]:
    """Return how many layers each stage can hold.

    Stage i owns the GPUs at positions i*tp to i*tp+tp-1, and each of them holds 1/tp of each of
    its layers. One layer on one GPU takes `memory_bytes / (tp * layers)`; multiplying out keeps
    it in whole numbers.

    Args:
        free_bytes: free memory of the GPUs, stage-major; a whole number of stages.
        tp: GPUs of a stage.
        layers: layers of the whole model.
        memory_bytes: memory of the whole model over all its GPUs.
    """
    stages = (free_bytes[start : start + tp] for start in range(0, len(free_bytes), tp))
    return [max(0, min(stage)) * tp * layers // memory_bytes for stage in stages]


def deal_layers(layers: int, max_layers: Sequence[int]) -> LayerSplit | None:
    """Deal layers one by one to each stage in turn that can hold one more (SPEC 4).

    Returns:
        Layers of each stage, or None if some are left over or a stage got none.
    """
    split = [0] * len(max_layers)
    while layers:
        open_stages = [stage for stage, maximum in enumerate(max_layers) if split[stage] < maximum]
        if not open_stages:
            return None
        for stage in open_stages[:layers]:
            split[stage] += 1
        layers -= min(layers, len(open_stages))
    return tuple(split) if all(split) else None


def shard_bytes(split: LayerSplit, *, tp: int, layers: int, memory_bytes: Bytes) -> tuple[Bytes, ...]:
    """Return the memory of each shard, stage-major, rounded up to whole bytes."""
    return tuple(-(-held * memory_bytes // (tp * layers)) for held in split for _ in range(tp))


def tensor_parallel_degrees(model: ModelSpec, gpus: int) -> list[int]:
    """Return the degrees that policies consider: powers of two up to `gpus` that divide the attention heads."""
    degrees = (1 << k for k in range(gpus.bit_length()))
    return [tp for tp in degrees if tp <= gpus and why_tp_does_not_divide(tp, heads=model.attention_heads) is None]


def why_tp_does_not_divide(
    tp: int, *, heads: int | None = None, kv_heads: int | None = None, feed_forward: int | None = None
) -> str | None:
    """Return which part of a layer `tp` GPUs cannot share, None where they can share all of them.

    Args:
        tp: tensor-parallel degree.
        heads: attention heads, of which each GPU takes equally many; None if they need not be shared.
        kv_heads: KV heads, which are shared or, below TP, replicated.
        feed_forward: width of the feed-forward part.
    """
    if heads is not None and heads % tp:
        return f"TP {tp} does not divide the {heads} attention heads"
    if kv_heads is not None and kv_heads % tp and tp % kv_heads:
        return f"TP {tp} neither divides the {kv_heads} KV heads nor is a multiple of them"
    if feed_forward is not None and feed_forward % tp:
        return f"TP {tp} does not divide the feed-forward width {feed_forward}"
    return None
