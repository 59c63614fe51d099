"""What each engine can do, as data (`maveriq/data/engines.toml`), and whether that holds a given arrangement."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from types import MappingProxyType
from typing import Annotated

import msgspec

from maveriq.domain.deployment import Configuration, LayerSplit
from maveriq.domain.models import KvType, ModelSpec, WeightType
from maveriq.embedded import data_path
from maveriq.errors import InputError, UnknownNameError
from maveriq.tables import read_toml

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


class Row(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
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
    most_tp: _Bound = 0
    most_pp: _Bound = 0


class EngineFacts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An engine: what it is, which packages it needs, and its rows. One not `started` is listed only."""

    title: str
    version: str
    packages: tuple[str, ...]
    can: tuple[Row, ...]
    started: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrangement:
    """A configuration and its layers per stage.

    Raises:
        InputError: not one stage per pipeline degree, or a stage without a layer.
    """

    configuration: Configuration
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


def reason_against(engine: EngineFacts, model: ModelSpec, arrangement: Arrangement, device: Device) -> str | None:
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


def _names(rows: Sequence[Row], of: Callable[[Row], Sequence[object]]) -> str:
    """Return the values of a column as words, each once, in the order of the file."""
    words = list(dict.fromkeys(str(value) for row in rows for value in of(row)))
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _limit(row: Row, model: ModelSpec, arrangement: Arrangement) -> str | None:
    """Return what of a row's limits the arrangement breaks."""
    cfg = arrangement.configuration
    if row.most_tp and cfg.tp > row.most_tp:
        return f"TP {cfg.tp} is more than its {row.most_tp}"
    if row.most_pp and cfg.pp > row.most_pp:
        return f"PP {cfg.pp} is more than its {row.most_pp}"
    if arrangement.uneven and not row.uneven:
        return f"its pipeline stages must have equally many layers, not {arrangement.layer_split}"
    return _cut(row, model, cfg.tp)


def _cut(row: Row, model: ModelSpec, tp: int) -> str | None:
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
