"""How far two arrangements of a model lie apart, and the nearest that something allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import product
from math import log2

from maveriq.domain.models import KvType, ModelSpec, WeightType
from maveriq.exec.matrix import Arrangement
from maveriq.policy.split import even_split

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


def neighbours(model: ModelSpec, asked: Arrangement) -> Iterator[Arrangement]:
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
    for one in sorted(neighbours(model, asked), key=lambda one: distance(asked, one)):
        if allows(one):
            return one
    return None
