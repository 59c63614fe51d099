"""The results as CSV files of typed rows, and their comparison with the bars."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from blind_plan import Bars
from blind_rows import BlindRow, ContentionRow, ElsewhereRow, GainRow, PlacementRow, ServiceRow

from maveriq.tables import read_csv

_Row = TypeVar("_Row")


@dataclass(frozen=True, slots=True, kw_only=True)
class BlindTables:
    """All results; each field is a CSV file of that name."""

    runs: Sequence[BlindRow]
    services: Sequence[ServiceRow]
    elsewhere: Sequence[ElsewhereRow]
    gains: Sequence[GainRow]
    placements: Sequence[PlacementRow]
    contention: Sequence[ContentionRow]


_KINDS: dict[str, type[Any]] = {
    "runs": BlindRow,
    "services": ServiceRow,
    "elsewhere": ElsewhereRow,
    "gains": GainRow,
    "placements": PlacementRow,
    "contention": ContentionRow,
}


def csv_of(kind: type[_Row], rows: Iterable[_Row]) -> str:
    """Return rows as CSV with a header; None is an empty cell."""
    columns = [field.name for field in fields(kind)]  # type: ignore[arg-type]  # rows are dataclasses
    lines = [columns, *([_cell(getattr(row, column)) for column in columns] for row in rows)]
    return "".join(",".join(line) + "\n" for line in lines)


def write_tables(folder: Path, tables: BlindTables) -> None:
    """Write a file for each table."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, kind in _KINDS.items():
        (folder / f"{name}.csv").write_text(csv_of(kind, getattr(tables, name)), encoding="utf-8", newline="")


def read_tables(folder: Path) -> BlindTables:
    """Read the files that `write_tables` wrote.

    Raises:
        InputError: a file is missing or invalid.
    """
    return BlindTables(**{name: list(read_rows(folder / f"{name}.csv", kind)) for name, kind in _KINDS.items()})


def read_rows(path: Path, kind: type[_Row]) -> Iterator[_Row]:
    """Yield the rows that `csv_of` wrote.

    Raises:
        InputError: the file is missing or invalid.
    """
    known = fields(kind)  # type: ignore[arg-type]
    columns = [field.name for field in known]
    # A table may be empty: a few runs may have no contention, for example.
    for row in read_csv(path, columns, what="results of blind runs", may_be_empty=True):
        yield kind(**{field.name: _value(row.cells[field.name], str(field.type)) for field in known})


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _value(cell: str, kind: str) -> object:
    if kind == "str":
        return cell
    if kind == "int":
        return int(cell)
    return float(cell) if cell else None


def allowed(row: BlindRow, bars: Bars) -> tuple[float, float]:
    """Return the maximum errors of the mean and the p95 latency of a run, in percent."""
    busy = row.busiest_percent >= bars.busy
    mean, p95 = (bars.mean_and_p95_when_busy,) * 2 if busy else (bars.mean, bars.p95)
    return max(mean, abs(row.mean_moves)), max(p95, abs(row.p95_moves))


def missed(row: BlindRow, bars: Bars, *, placed: bool = False) -> list[str]:
    """Return the figures of a run that miss their bar; `placed` checks the simulation on the recorded GPUs."""
    mean, p95 = (row.placed_mean_error, row.placed_p95_error) if placed else (row.mean_error, row.p95_error)
    max_mean, max_p95 = allowed(row, bars)
    return [name for name, error, maximum in (("mean", mean, max_mean), ("p95", p95, max_p95)) if abs(error) > maximum]


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A bar, the value found, and whether the bar holds; `placed` is the value on the recorded GPUs."""

    what: str
    wanted: str
    found: str
    holds: bool
    placed: str = ""


def held(tables: BlindTables, bars: Bars) -> Iterator[Held]:
    """Yield every bar with the value found."""
    yield from _latency(tables.runs, bars)
    for what, errors in (
        ("SLO attainment of completed", [row.slo_error for row in tables.runs]),
        ("SLO attainment of all", [row.slo_all_error for row in tables.runs]),
    ):
        off = [abs(error) for error in errors if error is not None]
        if off:  # a run may have no SLO
            yield _at_most(f"{what}, median", "points", median(off), bars.slo_median)
            yield _at_most(f"{what}, worst", "points", max(off), bars.slo_worst)
    same, all_of_them = (
        sum(getattr(row, name) for row in tables.runs) for name in ("same_configuration", "deployments")
    )
    share = 100 * same / all_of_them
    yield Held(
        what="configurations as recorded",
        wanted=f">= {bars.configurations:g} %",
        found=f"{share:.1f} % ({same} of {all_of_them})",
        holds=share >= bars.configurations,
    )
    off, placed = ([abs(getattr(row, name)) for row in tables.services] for name in ("error", "placed_error"))
    yield _at_most("service, median of a run and model: median", "%", median(off), bars.service_median, median(placed))
    yield _at_most("service, median of a run and model: worst", "%", max(off), bars.service_worst, max(placed))


def _latency(runs: Sequence[BlindRow], bars: Bars) -> Iterator[Held]:
    for name in ("mean", "p95"):
        within = [sum(name not in missed(row, bars, placed=placed) for row in runs) for placed in (False, True)]
        yield Held(
            what=f"{name} latency within its bar",
            wanted=f"{len(runs)} runs",
            found=f"{within[0]} runs",
            holds=within[0] == len(runs),
            placed=f"{within[1]} runs",
        )


def _at_most(what: str, unit: str, found: float, maximum: float, placed: float | None = None) -> Held:
    return Held(
        what=what,
        wanted=f"<= {maximum:g} {unit}",
        found=f"{found:.1f} {unit}",
        holds=found <= maximum,
        placed="" if placed is None else f"{placed:.1f} {unit}",
    )
