"""What an experiment leaves: tables, plots and JSON in a folder of its own, and what the terminal shows."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maveriq.errors import InputError, cannot_write
from maveriq.experiment.comparison import POINTS, FigureRow, Improvement, figure_rows, improvements
from maveriq.experiment.definition import Definition, Load
from maveriq.experiment.evaluation import Outcome
from maveriq.experiment.measures import measure_of
from maveriq.experiment.plot import draw
from maveriq.files import not_overwritten
from maveriq.report.formatting import figure, signed
from maveriq.report.view import Column, Part, Row, Table, Text, View, fit_width, number_column, row, spaced
from maveriq.study.folder import csv_text
from maveriq.study.result import Cell

FILES = ("figures.csv", "improvements.csv", "experiment.json", "plot.png", "plot.svg")
"""What an experiment writes."""

_FIGURE_COLUMNS = (
    "models", "trace", "scale", "slo_scale", "system", "figure", "unit", "simulated", "published", "difference",
    "differs", "saturation", "saturation_published", "blind", "source", "why",
)  # fmt: skip
_IMPROVEMENT_COLUMNS = (
    "models", "trace", "scale", "slo_scale", "system", "against", "figure", "unit", "simulated", "published",
    "difference_points", "same_direction", "within_5_points", "saturated", "why",
)  # fmt: skip
_MAX_REASONS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """How the published comparisons of an experiment came out; counts of them.

    Args:
        compared: of which both sides are published.
        same_direction: of those, where the same system is better.
        within: of those, within 5 points.
        below_saturation: of those, where both systems were below saturation, simulated and recorded.
        within_below: of the latter, within 5 points.
        figures: published figures of runs.
        figures_within: of those, within 10 %, or 5 points of a share.
    """

    figures: int
    figures_within: int
    compared: int
    same_direction: int
    within: int
    below_saturation: int
    within_below: int

    @property
    def sentence(self) -> str:
        """The verdict in words."""
        if not self.compared:
            return f"Of {self.figures} published figures of runs, {self.figures_within} agree within the bar."
        return (
            f"Of {self.compared} published comparisons, {self.same_direction} have the same direction and "
            f"{self.within} agree within {POINTS:g} points; below saturation {self.within_below} of "
            f"{self.below_saturation}."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExperimentResult:
    """An experiment that was simulated."""

    name: str
    definition: Definition
    outcomes: Sequence[Outcome]
    figures: Sequence[FigureRow]
    improvements: Sequence[Improvement]

    @property
    def verdict(self) -> Verdict:
        """How its published comparisons came out."""
        compared = [found for found in self.improvements if found.difference is not None]
        below = [found for found in compared if not found.saturated]
        figures = [found for found in self.figures if found.difference is not None]
        return Verdict(
            figures=len(figures),
            figures_within=sum(not found.differs for found in figures),
            compared=len(compared),
            same_direction=sum(found.same_direction is True for found in compared),
            within=sum(found.within is True for found in compared),
            below_saturation=len(below),
            within_below=sum(found.within is True for found in below),
        )


def result_of(name: str, definition: Definition, outcomes: Sequence[Outcome]) -> ExperimentResult:
    """Return the result of an experiment from its simulated points."""
    return ExperimentResult(
        name=name,
        definition=definition,
        outcomes=outcomes,
        figures=list(figure_rows(definition, outcomes)),
        improvements=list(improvements(definition, outcomes)),
    )


def to_json(result: ExperimentResult) -> dict[str, Any]:
    """Return a result in plain values."""
    definition, verdict = result.definition, result.verdict
    return {
        "name": result.name,
        "title": definition.title,
        "question": definition.question,
        "source": definition.source,
        "verdict": verdict.sentence,
        "published_figures": verdict.figures,
        "published_figures_within": verdict.figures_within,
        "published_comparisons": verdict.compared,
        "same_direction": verdict.same_direction,
        "within_5_points": verdict.within,
        "below_saturation": verdict.below_saturation,
        "within_5_points_below_saturation": verdict.within_below,
        "figures": [dict(zip(_FIGURE_COLUMNS, cells, strict=True)) for cells in _figure_cells(result)],
        "improvements": [dict(zip(_IMPROVEMENT_COLUMNS, cells, strict=True)) for cells in _improvement_cells(result)],
        "notes": list(definition.notes),
    }


def _figure_cells(result: ExperimentResult) -> Iterator[tuple[Cell, ...]]:
    for found in result.figures:
        outcome, load = found.outcome, found.outcome.point.load
        recorded = outcome.recorded
        yield (
            load.models, load.trace, load.scale, load.slo_scale, outcome.point.system, found.measure.label,
            found.measure.unit, _rounded(found.simulated), _rounded(found.published), _rounded(found.difference),
            found.differs, outcome.saturation, recorded.saturation if recorded else None, outcome.blind,
            recorded.source if recorded and found.published is not None else None, found.why,
        )  # fmt: skip


def _improvement_cells(result: ExperimentResult) -> Iterator[tuple[Cell, ...]]:
    for found in result.improvements:
        load = found.load
        yield (
            load.models, load.trace, load.scale, load.slo_scale, found.ours, found.theirs, found.measure.label,
            "points" if found.measure.in_points else "%", _rounded(found.simulated), _rounded(found.published),
            _rounded(found.difference), found.same_direction, found.within, found.saturated, found.why,
        )  # fmt: skip


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def write(result: ExperimentResult, folder: Path, *, overwrite: bool) -> None:
    """Write the tables, the plots and the JSON of a result into a folder, each whole.

    Raises:
        InputError: the folder cannot be written, or has a file that would change and `overwrite` is false.
    """
    texts = {
        "figures.csv": csv_text(_FIGURE_COLUMNS, _figure_cells(result)),
        "improvements.csv": csv_text(_IMPROVEMENT_COLUMNS, _improvement_cells(result)),
        "experiment.json": json.dumps(to_json(result), indent=2, allow_nan=False) + "\n",
    }
    contents = {name: text.encode() for name, text in texts.items()}
    with tempfile.TemporaryDirectory(prefix="maveriq-experiment-") as scratch:
        png, svg = Path(scratch) / "plot.png", Path(scratch) / "plot.svg"
        draw(png, svg, result.definition, result.outcomes)
        contents |= {file.name: file.read_bytes() for file in (png, svg)}
    write_files(folder, contents, overwrite=overwrite)


def write_files(folder: Path, contents: Mapping[str, bytes], *, overwrite: bool) -> None:
    """Write files into a folder, each whole; one that has its content already stays.

    Raises:
        InputError: the folder cannot be written, or has a file that would change and `overwrite` is false.
    """
    try:
        for name, content in contents.items():
            if not overwrite and (folder / name).exists() and (folder / name).read_bytes() != content:
                raise not_overwritten(f"{str(folder / name)!r}, which has another result,")
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            partial = folder / f".{name}.partial"
            partial.write_bytes(content)
            partial.replace(folder / name)
    except InputError:
        raise
    except OSError as error:
        raise cannot_write(f"folder {str(folder)!r}", error) from None


def view(result: ExperimentResult, *, width: int) -> View:
    """Return what the terminal shows of a result: figures, improvements, what differs and why."""
    definition = result.definition
    parts: list[Part] = [Text.of((definition.title, "bold"), f"\n{definition.question}")]
    parts += fit_width(_figures_table(result), width)
    if result.improvements:
        parts += fit_width(_improvements_table(result), width)
    parts.append(Text(result.verdict.sentence, "bold"))
    parts += [Text(line) for line in (*_reasons(result), *definition.notes, f"Published: {definition.source}")]
    return View(spaced(parts))


def _figures_table(result: ExperimentResult) -> Table:
    names = result.definition.figures
    rows: list[Row] = []
    last = None
    for first in range(0, len(result.figures), len(names)):
        of_run = result.figures[first : first + len(names)]
        point = of_run[0].outcome.point
        if point.load != last:
            rows.append(_load_row(point.load, len(names)))
            last = point.load
        rows.append(row(f"  {point.system}", *map(_pair, of_run)))
    headers = (f"{measure_of(name).label}\n{measure_of(name).unit}" for name in names)
    columns = [Column("\nload, system"), *map(number_column, headers)]
    return Table("Simulated (recorded)", columns, rows, dense=True)


def _load_row(load: Load, others: int) -> Row:
    return row(Text(str(load), "bold"), *[""] * others, starts_section=True)


def _pair(found: FigureRow) -> str | Text:
    if found.published is None:
        return figure(found.simulated)
    text = f"{figure(found.simulated)} ({figure(found.published)})"
    return Text(text, "bold") if found.differs else text


def _improvements_table(result: ExperimentResult) -> Table:
    by_pair: dict[tuple[Load, str, str], dict[str, Improvement]] = {}
    for found in result.improvements:
        by_pair.setdefault((found.load, found.ours, found.theirs), {})[found.measure.name] = found
    names = list(dict.fromkeys(found.measure.name for found in result.improvements))
    several = len({ours for _, ours, _ in by_pair}) > 1
    rows: list[Row] = []
    last = None
    for (load, ours, theirs), of_pair in by_pair.items():
        if load != last:
            rows.append(_load_row(load, len(names)))
            last = load
        against = f"{ours} / {theirs}" if several else theirs
        rows.append(row(f"  {against}", *(_improvement(of_pair[name]) if name in of_pair else "" for name in names)))
    headers = (f"{measure_of(name).label}\n{'points' if measure_of(name).in_points else '%'}" for name in names)
    title = "the first is better than the second" if several else f"{result.improvements[0].ours} is better"
    columns = [Column(f"\nload, {'pair' if several else 'against'}"), *map(number_column, headers)]
    return Table(f"By how much {title}: simulated (published); below 0 it is worse", columns, rows, dense=True)


def _improvement(found: Improvement) -> str | Text:
    if found.published is None:
        return signed(found.simulated)
    text = f"{signed(found.simulated)} ({signed(found.published)})"
    return Text(text, "bold") if found.why else text


def _reasons(result: ExperimentResult) -> Iterator[str]:
    """Yield which published figures differ and why, those with the same reason together."""
    by_reason: dict[str, list[str]] = {}
    for found in result.improvements:
        if found.why:
            line = f"{found.theirs}, {found.load}: {found.measure.label} {signed(found.difference)} points"
            by_reason.setdefault(found.why, []).append(line)
    if not result.improvements:
        for differing in (found for found in result.figures if found.differs):
            unit = "points" if differing.measure.in_points else "%"
            line = f"{differing.outcome.point}: {differing.measure.label} {signed(differing.difference)} {unit}"
            by_reason.setdefault(differing.why, []).append(line)
    for why, lines in by_reason.items():
        more = f"; and {len(lines) - _MAX_REASONS} more (in the tables)" if len(lines) > _MAX_REASONS else ""
        yield f"Differs: {'; '.join(lines[:_MAX_REASONS])}{more}. Why: {why}."
