"""Figures of the live system: what it does otherwise than the benchmark that all others were fitted to."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import msgspec

from maveriq.tables import Row, read_csv

_Positive = Annotated[float, msgspec.Meta(gt=0, le=1e12)]
_NotNegative = Annotated[float, msgspec.Meta(ge=0, le=1e12)]


class ServedTp(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """All-reduces of the live system at a tensor-parallel degree; `across_us` more between sockets."""

    all_reduce_us: _Positive
    ring_gb_s: _Positive
    across_us: _NotNegative = 0.0


class Crowd(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """What a token costs more while neighbours are busy: engines that run in the same process of the host.

    `layer_us` per layer with any neighbour, `turn_us` with every further one.
    """

    layer_us: _NotNegative
    turn_us: _NotNegative


class Served(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """What the live system does otherwise than the benchmark: warm engines, rings, placement.

    GPUs 0 to `gpus_per_socket` - 1 hang at one socket of the host, the next as many at another.
    """

    request_ms: _NotNegative
    gpus_per_socket: Annotated[int, msgspec.Meta(ge=1)]
    tp: dict[str, ServedTp]
    crowd: Crowd = Crowd(layer_us=0.0, turn_us=0.0)


_SERVED_COLUMNS = (
    "without_run",
    "tp",
    "request_ms",
    "gpus_per_socket",
    "layer_us",
    "turn_us",
    "all_reduce_us",
    "ring_gb_s",
    "across_us",
)


def read_served(path: Path) -> dict[str, Served]:
    """Read the figures of the live system by the recorded run that was left out of their fit.

    A row is a run and a TP; one without a TP is of a fit that saw no tensor parallelism.

    Raises:
        InputError: not such a table, or a figure that cannot be.
    """
    found: dict[str, Served] = {}
    for row in read_csv(path, _SERVED_COLUMNS, what="calibration of the live system"):
        run = row.text("without_run")
        found[run] = Served(
            request_ms=row.number("request_ms", least=0),
            gpus_per_socket=row.count("gpus_per_socket", least=1),
            crowd=Crowd(layer_us=row.number("layer_us", least=0), turn_us=row.number("turn_us", least=0)),
            tp={**(found[run].tp if run in found else {}), **(_links(row) if row.cells["tp"] else {})},
        )
    return found


def _links(row: Row) -> dict[str, ServedTp]:
    figures = ServedTp(
        all_reduce_us=row.number("all_reduce_us", least=1e-6),
        ring_gb_s=row.number("ring_gb_s", least=1e-9),
        across_us=row.number("across_us", least=0),
    )
    return {str(row.count("tp", least=2)): figures}


def served_csv(without: Mapping[str, Served]) -> str:
    """Return the table that `read_served` reads."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(_SERVED_COLUMNS)
    for run, served in without.items():
        common = (served.request_ms, served.gpus_per_socket, served.crowd.layer_us, served.crowd.turn_us)
        for tp, figures in served.tp.items():
            table.writerow([run, tp, *common, figures.all_reduce_us, figures.ring_gb_s, figures.across_us])
        if not served.tp:
            table.writerow([run, "", *common, "", "", ""])
    return text.getvalue()
