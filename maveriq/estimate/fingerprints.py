"""Fingerprints: constants derived from measured one- and two-layer models, and the paper's formulas (SPEC 3).

`derive` computes the constants from measurements. `Fingerprint` scales them to the whole model on
one GPU, `ParallelLatency` and `parallel_memory_gib` to any (TP, PP), and `at_batch` to any batch
size. `read_fingerprints` and `read_exponents` read the tables of a profile.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeAlias

from maveriq.domain.models import KvType, WeightType
from maveriq.domain.parallel import ParallelConfig
from maveriq.errors import InputError
from maveriq.tables import Row, choice, read_csv, unique


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """Time and memory of a layer and of the rest of a model, for one (TP, PP) and batch size.

    Times are seconds of the whole batch; memory is GiB over all GPUs used. `*_other` does not grow
    with the number of layers; it is an intercept and may be negative.
    """

    ttft_layer_s: float
    ttft_other_s: float
    tpot_layer_s: float
    tpot_other_s: float
    memory_layer_gib: float
    memory_other_gib: float

    def line(self, layers: int) -> Line:
        """Return latency as a function of output tokens for a model with `layers` layers."""
        return Line(
            ttft_s=layers * self.ttft_layer_s + self.ttft_other_s,
            tpot_s=layers * self.tpot_layer_s + self.tpot_other_s,
        )

    def memory_gib(self, layers: int) -> float:
        """Return the memory over all GPUs for a model with `layers` layers."""
        return layers * self.memory_layer_gib + self.memory_other_gib


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """Latency `ttft_s + output_tokens * tpot_s`."""

    ttft_s: float
    tpot_s: float

    def at(self, output_tokens: int) -> float:
        """Return the latency in seconds."""
        return self.ttft_s + output_tokens * self.tpot_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Exponents:
    """Exponents of the paper's latency formula in TP and PP; one fitted set per weight and KV type."""

    a: float
    b: float
    c: float
    d: float


def derive(latency_s: Mapping[tuple[int, int], float], memory_gib: Mapping[int, float]) -> Fingerprint:
    """Derive the constants from four latencies and two memories.

    Args:
        latency_s: by (layers, output tokens), on a grid of two by two.
        memory_gib: by layers, the same two.

    Raises:
        InputError: not a grid of two by two.
    """
    layers = sorted({n for n, _ in latency_s})
    outputs = sorted({o for _, o in latency_s})
    if (len(layers), len(outputs), len(latency_s)) != (2, 2, 4) or sorted(memory_gib) != layers:
        raise InputError(
            f"a fingerprint needs two layer counts by two output lengths, got latencies for {sorted(latency_s)} "
            f"(layers, output tokens) and memory for {sorted(memory_gib)} layers"
        )
    (n1, n2), (o1, o2) = layers, outputs
    l11, l12, l21, l22 = (latency_s[n, o] for n in layers for o in outputs)
    tpot_layer = ((l22 - l12) - (l21 - l11)) / ((o2 - o1) * (n2 - n1))
    tpot_other = (l12 - l11) / (o2 - o1) - n1 * tpot_layer
    ttft_layer = (l21 - l11) / (n2 - n1) - o1 * tpot_layer
    memory_layer = (memory_gib[n2] - memory_gib[n1]) / (n2 - n1)
    return Fingerprint(
        ttft_layer_s=ttft_layer,
        ttft_other_s=l11 - n1 * ttft_layer - o1 * (n1 * tpot_layer + tpot_other),
        tpot_layer_s=tpot_layer,
        tpot_other_s=tpot_other,
        memory_layer_gib=memory_layer,
        memory_other_gib=memory_gib[n1] - n1 * memory_layer,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelLatency:
    """Latency of one model under one (TP, PP) as a function of output tokens.

    Built by `scaled`, which computes the powers of TP and PP once because `at` is called very often.
    """

    single: Line
    tp2: Line | None
    divisor: float
    tp_factor: float
    pp_factor: float
    pp_share: float

    @classmethod
    def scaled(cls, single: Line, tp2: Line | None, exponents: Exponents, *, tp: int, pp: int) -> ParallelLatency:
        """Scale latency from one GPU (and from TP 2, needed only if `tp` is above 1) to (TP, PP).

        The paper sets L(1,2) = L(1,1), because a one-layer fingerprint overstates the cost of a
        pipeline. Therefore no fingerprint with PP 2 is needed.
        """
        return cls(
            single=single,
            tp2=tp2 if tp > 1 else None,
            divisor=tp * pp**exponents.a,
            tp_factor=(tp - 1) ** exponents.b / pp**exponents.c,
            pp_factor=(pp - 1) ** exponents.d if pp > 1 else 0.0,
            pp_share=2**exponents.a,
        )

    def at(self, output_tokens: int) -> float:
        """Return the latency in seconds."""
        single_s = self.single.at(output_tokens)
        latency_s = single_s / self.divisor + self.pp_factor * max(0.0, single_s - single_s / self.pp_share)
        if self.tp2 is not None:
            latency_s += self.tp_factor * max(0.0, self.tp2.at(output_tokens) - single_s / 2)
        return latency_s


def parallel_memory_gib(single: float, tp2: float | None, pp2: float | None, *, tp: int, pp: int) -> float:
    """Return the memory over all GPUs at (TP, PP), in GiB.

    Args:
        single: memory of the whole model at (1, 1).
        tp2: at (2, 1); needed only if `tp` is above 1.
        pp2: at (1, 2); needed only if `pp` is above 1.
        tp: tensor-parallel degree.
        pp: pipeline-parallel degree.
    """
    memory = single
    if tp > 1 and tp2 is not None:
        memory += (tp - 1) * max(0.0, tp2 - single)
    if pp > 1 and pp2 is not None:
        memory += tp * (pp - 1) * max(0.0, pp2 - single)
    return memory


def at_batch(at_batch_one: float, at_batch_two: float, batch: int) -> float:
    """Extrapolate a latency or a memory from batch 1 and 2 to any batch size."""
    return at_batch_one + (batch - 1) * max(0.0, at_batch_two - at_batch_one)


_MAX_CONSTANT, _MAX_EXPONENT = 1e6, 10

OUTPUTS = (10, 20)
"""Output lengths in tokens of fingerprint measurements; memory is measured at the first."""

CONSTANTS = tuple(field.name for field in fields(Fingerprint))
"""Columns of constants, in the order of the files."""

COLUMNS = ("model", "weights", "kv", "tp", "pp", "batch", *CONSTANTS)
"""All columns of a fingerprint file; `scripts/derive_a6000.py` writes them."""


Fingerprints: TypeAlias = Mapping[ParallelConfig, Fingerprint]
"""A model's fingerprints by the configuration (with batch size) they were measured with."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FingerprintTable:
    """Fingerprints by model name and configuration, and the exponents of each weight and KV type."""

    by_model: Mapping[str, Fingerprints]
    exponents: Mapping[tuple[WeightType, KvType], Exponents]

    def models(self) -> list[str]:
        """Return the names of the models that have fingerprints, in the order of the file."""
        return list(self.by_model)

    def of(self, model_name: str) -> Fingerprints:
        """Return a model's fingerprints, an empty mapping where it has none."""
        return self.by_model.get(model_name, {})


def read_fingerprints(path: Path) -> dict[str, dict[ParallelConfig, Fingerprint]]:
    """Read a fingerprint file: fingerprints by model name and configuration.

    Raises:
        InputError: not such a table, a duplicate key, or an impossible constant.
    """
    keyed = (
        (
            (row.text("model"), read_config(row, batch="batch")),
            _fingerprint(row),
            row,
        )
        for row in read_csv(path, COLUMNS, what="fingerprint table")
    )
    table: dict[str, dict[ParallelConfig, Fingerprint]] = {}
    for (model, configuration), fingerprint in unique(keyed).items():
        table.setdefault(model, {})[configuration] = fingerprint
    return table


def read_config(row: Row, *, kv: KvType | None = None, batch: str | None = None) -> ParallelConfig:
    """Return the configuration of a row with the columns `tp`, `pp` and `weights`.

    Args:
        row: the row.
        kv: the KV type; None for the one in the column `kv`.
        batch: the column of the batch size; None for batch 1.

    Raises:
        InputError: an invalid degree, or an unknown type.
    """
    return ParallelConfig(
        tp=row.count("tp", minimum=1),
        pp=row.count("pp", minimum=1),
        weights=choice(row, "weights", WeightType),
        kv=choice(row, "kv", KvType) if kv is None else kv,
        batch_size=row.count(batch, minimum=1) if batch else 1,
    )


def _fingerprint(row: Row) -> Fingerprint:
    """Return the constants of a row; noise may make times slightly negative, but memory must be positive."""
    constants = {name: row.number(name, minimum=-_MAX_CONSTANT, maximum=_MAX_CONSTANT) for name in CONSTANTS}
    row.number("memory_layer_gib", minimum=1e-6)
    if constants["memory_layer_gib"] + constants["memory_other_gib"] <= 0:
        raise InputError(f"{row.where}: a model of one layer would take no memory; correct the memory constants")
    return Fingerprint(**constants)


def read_exponents(path: Path) -> dict[tuple[WeightType, KvType], Exponents]:
    """Read a table of exponents.

    Raises:
        InputError: not such a table, a duplicate key, or an exponent that is negative or too large.
    """
    names = [field.name for field in fields(Exponents)]
    return unique(
        (
            (choice(row, "weights", WeightType), choice(row, "kv", KvType)),
            Exponents(**{name: row.number(name, minimum=0, maximum=_MAX_EXPONENT) for name in names}),
            row,
        )
        for row in read_csv(path, ("weights", "kv", *names), what="table of exponents")
    )
