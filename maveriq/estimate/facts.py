"""Measured facts of a testbed beside its fingerprints: accuracy, what does not run, SLOs, load times."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec

from maveriq.domain.models import KvType, WeightType
from maveriq.errors import InputError
from maveriq.estimate.cells import choice, unique
from maveriq.estimate.fingerprints import Stored
from maveriq.tables import Row, read_csv, read_toml


class Layout(NamedTuple):
    """A stored model under a (TP, PP)."""

    stored: Stored
    tp: int
    pp: int


class LoadedAs(NamedTuple):
    """What a load time was measured for; the KV type plays no part in loading."""

    model: str
    weights: WeightType
    tp: int
    pp: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """The least and the greatest value seen."""

    low: float
    high: float

    @property
    def middle(self) -> float:
        """Half way between the two."""
        return (self.low + self.high) / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class SloBase:
    """The latency that SLOs are multiples of: `ttft_s + tpot_s` times the output tokens."""

    ttft_s: float
    tpot_s: float


class LoadFit(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Seconds to load an engine that was never measured, from its size: a fit to those that were."""

    fixed_s: Annotated[float, msgspec.Meta(ge=0, le=1e6)]
    per_gpu_s: Annotated[float, msgspec.Meta(ge=0, le=1e6)]
    per_gib_s: Annotated[float, msgspec.Meta(ge=0, le=1e6)]

    def seconds(self, *, gpus: int, gib_per_gpu: float) -> float:
        """Return the load time of an engine over `gpus` GPUs with `gib_per_gpu` on each."""
        return self.fixed_s + self.per_gpu_s * gpus + self.per_gib_s * gib_per_gpu


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Facts:
    """All tables together; `accuracy` is None where it was never measured."""

    accuracy: Mapping[Stored, float | None]
    unsupported: frozenset[Layout]
    slo: Mapping[str, SloBase]
    load_times: Mapping[LoadedAs, Range]
    load_fit: LoadFit

    def model_names(self) -> set[str]:
        """Return every model that a table speaks of."""
        stored = [*self.accuracy, *(layout.stored for layout in self.unsupported)]
        return {*(key.model for key in stored), *self.slo, *(key.model for key in self.load_times)}


def read_accuracy(path: Path) -> dict[Stored, float | None]:
    """Read accuracy in percent of the float16 model's; an empty cell was never measured.

    Raises:
        InputError: not such a table, a key that stands twice, a value outside 0 to 100.
    """
    return unique(
        (Stored(row.text("model"), choice(row, "weights", WeightType), choice(row, "kv", KvType)), _percent(row), row)
        for row in read_csv(path, ("model", "weights", "kv", "percent"), what="accuracy table")
    )


def _percent(row: Row) -> float | None:
    if not row.cells["percent"]:
        return None
    percent = row.number("percent", least=0)
    if percent > 100:
        raise InputError(f"{row.where}: percent must be at most 100, not {percent:g}")
    return percent


def read_unsupported(path: Path) -> frozenset[Layout]:
    """Read what does not run on this hardware; an empty `kv` means both KV types.

    Raises:
        InputError: not such a table, a row that repeats another.
    """
    rows = read_csv(path, ("model", "tp", "pp", "weights", "kv"), what="table of unsupported configurations")
    return frozenset(unique((layout, None, row) for row in rows for layout in _layouts(row)))


def _layouts(row: Row) -> Iterator[Layout]:
    for kv in [choice(row, "kv", KvType)] if row.cells["kv"] else KvType:
        stored = Stored(row.text("model"), choice(row, "weights", WeightType), kv)
        yield Layout(stored, row.count("tp", least=1), row.count("pp", least=1))


def read_slo(path: Path) -> dict[str, SloBase]:
    """Read what SLOs are multiples of.

    Raises:
        InputError: not such a table, a model that stands twice, a negative time.
    """
    return unique(
        (row.text("model"), SloBase(ttft_s=_seconds(row, "ttft_s"), tpot_s=_seconds(row, "tpot_s")), row)
        for row in read_csv(path, ("model", "ttft_s", "tpot_s"), what="SLO table")
    )


def read_load_times(path: Path) -> dict[LoadedAs, Range]:
    """Read measured seconds from the deploy command to registration.

    Raises:
        InputError: not such a table, a key that stands twice, a range that is none.
    """
    columns = ("model", "weights", "tp", "pp", "low_s", "high_s")
    return unique(
        (
            LoadedAs(
                row.text("model"),
                choice(row, "weights", WeightType),
                row.count("tp", least=1),
                row.count("pp", least=1),
            ),
            _range_s(row),
            row,
        )
        for row in read_csv(path, columns, what="table of load times")
    )


def _range_s(row: Row) -> Range:
    low = _seconds(row, "low_s")
    return Range(low=low, high=_seconds(row, "high_s", least=low))


def _seconds(row: Row, column: str, *, least: float = 0.0) -> float:
    return row.number(column, least=least, most=1e6)


def read_load_fit(path: Path) -> LoadFit:
    """Read the coefficients that `scripts/derive_a6000.py` fits.

    Raises:
        InputError: not such a file, a negative coefficient.
    """
    return read_toml(path, LoadFit, what="load time fit")
