"""The capability table of docs/engines.md: for each cell, ran here, listed in the source, or refused."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import TypeAlias, TypeVar

from maveriq.domain.models import KvType, WeightType
from maveriq.domain.parallel import KV_SUFFIX
from maveriq.exec.capabilities import ANY, CapabilityRow, EngineFacts, Status

REFUSED = "refused"

_Key = TypeVar("_Key", bound=Hashable)
_Holds: TypeAlias = Callable[[CapabilityRow], bool]


def capability_markdown(engines: Mapping[str, EngineFacts]) -> str:
    """Return a table for each engine and device, as Markdown.

    Columns are architectures, rows are how weights and KV cache are stored, and kinds of splits. What has equal cells
    shares a column or a row.
    """
    tables = [
        f"**{name}, {' and '.join(devices)}**\n\n{table}"
        for name, facts in engines.items()
        for table, devices in _grouped(
            (_table([row for row in facts.can if device in row.devices]), device.value)
            for device in dict.fromkeys(device for row in facts.can for device in row.devices)
        ).items()
    ]
    return "\n\n".join(tables) + "\n"


def _table(rows: Sequence[CapabilityRow]) -> str:
    columns = _grouped(
        (
            tuple(_cell([row for row in rows if architecture in row.architectures and holds(row)]) for holds in _HOLDS),
            "any" if architecture == ANY else architecture,
        )
        for architecture in dict.fromkeys(architecture for row in rows for architecture in row.architectures)
    )
    lines = [_line(["", *(", ".join(names) for names in columns.values())]), _line(["---"] * (len(columns) + 1))]
    for cells, features in _grouped(zip(zip(*columns, strict=True), _FEATURES, strict=True)).items():
        lines.append(_line([", ".join(features), *cells]))
    return "\n".join(lines)


def _grouped(pairs: Iterable[tuple[_Key, str]]) -> dict[_Key, list[str]]:
    """Return the names of each key, in the order of its first."""
    groups: dict[_Key, list[str]] = {}
    for key, name in pairs:
        groups.setdefault(key, []).append(name)
    return groups


def _stores(weights: WeightType, kv: KvType, row: CapabilityRow) -> bool:
    return weights in row.weights and kv in row.kv


_ROWS: Mapping[str, _Holds] = {
    **{
        f"{weights.value}{KV_SUFFIX[kv]}": partial(_stores, weights, kv)
        for weights, kv in product(WeightType, (KvType.NATIVE, KvType.INT8))
    },
    "fp8 KV cache": lambda row: KvType.FP8 in row.kv,
    "TP above 1": lambda row: row.max_tp != 1,
    "PP above 1": lambda row: row.max_pp != 1,
    "uneven stages": lambda row: row.max_pp != 1 and row.uneven,
}
"""The rows of a table, and which rows of the matrix hold each."""

_FEATURES, _HOLDS = tuple(_ROWS), tuple(_ROWS.values())


def _cell(rows: Sequence[CapabilityRow]) -> str:
    """Return how the capability of these rows is known; what ran counts before what is listed."""
    if not rows:
        return REFUSED
    row = min(rows, key=lambda row: row.status is not Status.RAN)
    if row.status is Status.RAN:
        return f"ran ({row.version}, {row.date})"
    return f"listed ({row.file}, {row.version})"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
