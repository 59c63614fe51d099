"""Tables of fingerprint constants, and of the exponents that go with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

from maveriq.domain.models import KvType, WeightType
from maveriq.errors import InputError
from maveriq.estimate.cells import choice, unique
from maveriq.estimate.formula import Exponents, Fingerprint
from maveriq.tables import Row, read_csv

# Beyond any hardware; estimates from what lies within stay finite.
_MOST, _MOST_EXPONENT = 1e6, 10

OUTPUTS = (10, 20)
"""Output tokens that fingerprints are measured with; their memory is that at the first."""

CONSTANTS = tuple(field.name for field in fields(Fingerprint))
"""Columns of constants, in the order of the files."""

COLUMNS = ("model", "weights", "kv", "tp", "pp", "batch", *CONSTANTS)
"""All columns of a fingerprint file; `scripts/derive_a6000.py` writes them."""


class Stored(NamedTuple):
    """A model as it is stored: by name, weight type and KV type."""

    model: str
    weights: WeightType
    kv: KvType


class Point(NamedTuple):
    """Where a fingerprint was taken."""

    tp: int
    pp: int
    batch: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FingerprintTable:
    """Fingerprints by stored model and point, and the exponents of each weight and KV type."""

    constants: Mapping[Stored, Mapping[Point, Fingerprint]]
    exponents: Mapping[tuple[WeightType, KvType], Exponents]

    def models(self) -> list[str]:
        """Return the names of the models that have fingerprints, in the order of the file."""
        return list(dict.fromkeys(stored.model for stored in self.constants))

    def stored_as(self, model: str) -> list[Stored]:
        """Return how a model's fingerprints are stored, in the order of the file."""
        return [stored for stored in self.constants if stored.model == model]


def read_fingerprints(path: Path) -> dict[Stored, dict[Point, Fingerprint]]:
    """Read a fingerprint file.

    Raises:
        InputError: not such a table, a key that stands twice, a constant that cannot be.
    """
    keyed = (
        (
            (
                Stored(row.text("model"), choice(row, "weights", WeightType), choice(row, "kv", KvType)),
                Point(row.count("tp", least=1), row.count("pp", least=1), row.count("batch", least=1)),
            ),
            _fingerprint(row),
            row,
        )
        for row in read_csv(path, COLUMNS, what="fingerprint table")
    )
    table: dict[Stored, dict[Point, Fingerprint]] = {}
    for (stored, point), fingerprint in unique(keyed).items():
        table.setdefault(stored, {})[point] = fingerprint
    return table


def _fingerprint(row: Row) -> Fingerprint:
    """Return a row's constants; times may be a little below zero, as measuring gives them, memory may not."""
    constants = {name: row.number(name, least=-_MOST, most=_MOST) for name in CONSTANTS}
    row.number("memory_layer_gib", least=1e-6)
    if constants["memory_layer_gib"] + constants["memory_other_gib"] <= 0:
        raise InputError(f"{row.where}: a model of one layer would take no memory; correct the memory constants")
    return Fingerprint(**constants)


def read_exponents(path: Path) -> dict[tuple[WeightType, KvType], Exponents]:
    """Read a table of exponents.

    Raises:
        InputError: not such a table, a key that stands twice, an exponent that is negative or too large.
    """
    names = [field.name for field in fields(Exponents)]
    return unique(
        (
            (choice(row, "weights", WeightType), choice(row, "kv", KvType)),
            Exponents(**{name: row.number(name, least=0, most=_MOST_EXPONENT) for name in names}),
            row,
        )
        for row in read_csv(path, ("weights", "kv", *names), what="table of exponents")
    )
