"""90 % intervals of step times, by what an estimate rests on: measured operators or a data sheet, engine, model family.

`maveriq/data/physics_intervals.toml` holds them, derived from errors of predictions that no fit had seen
(`experiments/physics/derive_intervals.py`) and widened for models and GPUs that are not among them. They widen further
where less is known: for an engine without a version, and most where a family of models was never measured on an engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from functools import cache
from typing import Annotated, NamedTuple

import msgspec

from maveriq.domain.decoder import Decoder, ExpertFeedForward, LatentAttention
from maveriq.estimate.engine_presets import EnginePreset
from maveriq.files import data_path
from maveriq.tables import read_toml

ANY_ENGINE = "any"
"""Stands for all engines together, in the file of intervals."""

NOT_FITTED = "not fitted"
"""Stands for engines whose host times were never fitted, all together."""

_WIDER, _MUCH_WIDER = 1.5, 2.0


class Interval(NamedTuple):
    """Where a value lies in 90 of 100 cases: between `low` and `high` times its estimate."""

    low: float
    high: float

    def widened(self, power: float) -> Interval:
        """Return an interval whose logarithms are `power` times as far from the estimate's."""
        return Interval(self.low**power, self.high**power)

    def holds(self, estimate: float, value: float) -> bool:
        """Return whether a value lies in the interval of an estimate."""
        return self.low * estimate <= value <= self.high * estimate


def within(margin: float) -> Interval:
    """Return the interval from 1 / (1 + margin) to 1 + margin times an estimate."""
    return Interval(1 / (1 + margin), 1 + margin)


class Family(StrEnum):
    """Families of models, by what of them is hard to estimate."""

    DENSE = "dense"
    EXPERTS = "MoE"
    LATENT = "MLA"


def family_of(decoder: Decoder) -> Family:
    """Return the family of a model; latent attention weighs more than experts."""
    kinds = decoder.layer_kinds
    if any(isinstance(kind.attention, LatentAttention) for kind in kinds):
        return Family.LATENT
    has_experts = any(isinstance(kind.feed_forward, ExpertFeedForward) for kind in kinds)
    return Family.EXPERTS if has_experts else Family.DENSE


_Factor = Annotated[float, msgspec.Meta(gt=0, le=100)]


class _Row(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    measured: bool
    engine: str
    family: Family
    low: _Factor
    high: _Factor
    rows: int
    models: int


class _File(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    interval: list[_Row]


@cache
def _intervals() -> Mapping[tuple[bool, str, Family], Interval]:
    read = read_toml(data_path("physics_intervals.toml"), _File, what="table of intervals")
    return {(row.measured, row.engine, row.family): Interval(row.low, row.high) for row in read.interval}


def group_of(engine: EnginePreset) -> str:
    """Return the engines among which an engine's errors count: itself, or all whose host times were never fitted."""
    return engine.name if engine.fitted else NOT_FITTED


def interval_of(engine: EnginePreset, family: Family, *, measured: bool) -> Interval:
    """Return the interval of step times.

    Args:
        engine: the engine, by generation.
        family: the model's family.
        measured: whether the operators of the GPU were measured; else its data sheet answers.
    """
    known = _intervals().get((measured, group_of(engine), family))
    if known is None:
        return _intervals()[measured, ANY_ENGINE, family].widened(_MUCH_WIDER)
    return known if engine.version else known.widened(_WIDER)
