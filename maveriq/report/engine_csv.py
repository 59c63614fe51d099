"""engines.csv and itl.csv: engines that batch continuously over time, and the times between tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from maveriq.domain.records import ENGINE_COLUMNS, ITL_COLUMNS, EngineTable, ItlTable
from maveriq.units import MICROS_PER_SECOND

Array: TypeAlias = npt.NDArray[Any]

_ROWS_AT_ONCE = 8192
_BUSY = "%d.%06d,%d,%.6f,%.6f,%.6f,%.6f,%.6f,%.6f\n"
_LATENCY = "%d,%d.%06d,%d\n"
_IDLE = "%d.%06d,%d,%.6f,%.6f,%.6f,%.0s,%.0s,%.6f\n"


def engine_columns(table: EngineTable) -> dict[str, Array]:
    """Return the columns of engines.csv in the units of their names; NaN where a cell is empty."""
    return {
        "time_s": table.time_us / MICROS_PER_SECOND,
        "deployment_id": table.deployment_id,
        "running": table.running,
        "waiting": table.waiting,
        "kv_use": table.kv_use,
        "batch_tokens": table.batch_tokens,
        "step_s": table.step_us / MICROS_PER_SECOND,
        "busy_share": table.busy_share,
    }


def engine_lines(table: EngineTable) -> Iterator[str]:
    """Yield engines.csv, header first, in pieces of many lines."""
    yield ",".join(ENGINE_COLUMNS) + "\n"
    columns = engine_columns(table)
    for start in range(0, len(table), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        cells = [
            *(part.tolist() for part in np.divmod(table.time_us[rows], MICROS_PER_SECOND)),
            *(columns[name][rows].tolist() for name in ENGINE_COLUMNS[1:]),
        ]
        ran = np.isfinite(table.step_us[rows]).tolist()
        yield "".join(
            [(_BUSY if busy else _IDLE) % row for busy, row in zip(ran, zip(*cells, strict=True), strict=True)]
        )


def itl_lines(table: ItlTable) -> Iterator[str]:
    """Yield itl.csv, header first, in pieces of many lines."""
    yield ",".join(ITL_COLUMNS) + "\n"
    for start in range(0, len(table), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        whole, part = np.divmod(table.itl_us[rows], MICROS_PER_SECOND)
        cells = [column.tolist() for column in (table.endpoint_id[rows], whole, part, table.tokens[rows])]
        yield "".join([_LATENCY % row for row in zip(*cells, strict=True)])
