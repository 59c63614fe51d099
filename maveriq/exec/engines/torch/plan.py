"""Which part of a model a rank holds, and what cannot be split so."""

from __future__ import annotations

from dataclasses import dataclass

from maveriq.domain.models import KvType, WeightType
from maveriq.exec.engines.torch.architecture import Architecture, refuse
from maveriq.exec.messages import EngineSpec

_WEIGHTS = (WeightType.FLOAT16, WeightType.INT8, WeightType.INT4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The part of a model that one rank holds: some layers, and of each its share of heads and of feed-forward width.

    Ranks are counted stage by stage: rank = stage * tp + place.
    """

    tp: int
    pp: int
    stage: int
    place: int
    layers: range

    @property
    def first(self) -> bool:
        """Whether tokens come in here."""
        return self.stage == 0

    @property
    def last(self) -> bool:
        """Whether tokens come out here."""
        return self.stage == self.pp - 1

    def share(self, count: int) -> range:
        """Return this rank's share of so many things in a row; uneven where tp does not divide them."""
        return range(count * self.place // self.tp, count * (self.place + 1) // self.tp)

    def kv_share(self, kv_heads: int) -> range:
        """Return this rank's KV heads; ranks that outnumber them share one."""
        if kv_heads >= self.tp:
            return self.share(kv_heads)
        mine = self.place * kv_heads // self.tp
        return range(mine, mine + 1)


def part_of(spec: EngineSpec, rank: int) -> Part:
    """Return what `rank` holds of a split that `check` has passed."""
    stage, place = divmod(rank, spec.tp)
    start = sum(spec.layer_split[:stage])
    return Part(tp=spec.tp, pp=spec.pp, stage=stage, place=place, layers=range(start, start + spec.layer_split[stage]))


def check(spec: EngineSpec, arch: Architecture) -> None:
    """Refuse what this engine cannot split or store so.

    Raises:
        EngineError: with the reason, and the nearest thing it can do where there is one.
    """
    _check_types(spec)
    _check_split(spec, arch)
    _check_degree(spec.tp, arch)


def _check_types(spec: EngineSpec) -> None:
    if spec.weights == WeightType.INT4_GPTQ:
        refuse("int4_gptq needs weights that GPTQ has calibrated; the torch engine rounds to nearest: ask for int4")
    if spec.weights not in _WEIGHTS:
        refuse(f"weights {spec.weights!r} are not one of {', '.join(_WEIGHTS)}")
    if spec.kv not in tuple(KvType):
        refuse(f"KV cache {spec.kv!r} is not one of {', '.join(KvType)}")


def _check_split(spec: EngineSpec, arch: Architecture) -> None:
    ranks = spec.tp * spec.pp
    if len(spec.devices) != ranks:
        refuse(f"TP {spec.tp} x PP {spec.pp} needs {ranks} devices, got {len(spec.devices)}")
    if len(spec.layer_split) != spec.pp or sum(spec.layer_split) != arch.layers:
        refuse(f"layer split {list(spec.layer_split)} must deal {arch.layers} layers to {spec.pp} stages")
    if len({device.partition(":")[0] for device in spec.devices}) > 1:
        refuse(f"devices {', '.join(spec.devices)} are of more than one kind")
    for device in spec.devices:
        kind, _, number = device.partition(":")
        if kind not in ("cpu", "cuda") or (number and not number.isdecimal()):
            refuse(f"device {device!r} is neither cpu nor cuda:N")


def _check_degree(tp: int, arch: Architecture) -> None:
    for what, count in (("attention heads", arch.heads), ("feed-forward width", arch.intermediate)):
        if count % tp:
            fitting = max(
                degree for degree in range(1, tp) if not arch.heads % degree and not arch.intermediate % degree
            )
            refuse(f"TP {tp} does not divide {what} ({count}); the nearest that does is TP {fitting}")
    if arch.vocabulary < tp:
        refuse(f"TP {tp} leaves some rank without any of {arch.vocabulary} tokens")
    if arch.kv_heads % tp and tp % arch.kv_heads:
        refuse(f"TP {tp} and {arch.kv_heads} KV heads: neither divides the other")
