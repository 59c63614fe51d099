"""More than two runs compared: each against the last one, which they are measured by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from maveriq.domain.records import RunRecord
from maveriq.report.compare import PERCENT, QUANTITIES, Comparison, Difference, compare
from maveriq.report.compare_view import matching_line, saturation_line
from maveriq.report.formatting import NONE, figure, share, signed
from maveriq.report.results import WIDE
from maveriq.report.run_labels import RunLabel, short_labels
from maveriq.report.view import Column, Part, Row, Table, Text, View, fit_width, number_column, row, spaced

if TYPE_CHECKING:
    from pathlib import Path

    from maveriq.report.page.run_page import ReportableRun

_COLUMNS = {
    "mean": "latency\nmean s",
    "p50": "\np50",
    "p95": "\np95",
    "p99": "\np99",
    "queue-mean": "queue\nmean s",
    "service-mean": "service\nmean s",
    "ttft-mean": "TTFT\nmean s",
    "tpot-mean": "TPOT\nmean ms",
    "itl-p95": "ITL\np95 ms",
    "slo": "SLO\nmet",
}


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class ManyComparison:
    """Several runs, each compared with the last one.

    Args:
        labels: names and kinds of all runs, in their order.
        comparisons: each run but the last, against the last.
        reported: the runs as reports show them, empty where only their records were compared.
    """

    labels: tuple[RunLabel, ...]
    comparisons: tuple[Comparison, ...]
    reported: tuple[ReportableRun, ...] = field(default=(), compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the comparisons as plain values for JSON, with the labels of all runs."""
        return {
            "runs": msgspec.to_builtins(self.labels),
            "reference": self.labels[-1].name,
            "comparisons": [comparison.to_dict() for comparison in self.comparisons],
        }

    def to_html(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write a report of the comparison as one HTML file that loads nothing, and return where it is.

        Args:
            path: the file to write.
            overwrite: replace a file that is there.

        Raises:
            InputError: the file is there already and `overwrite` is false, or it cannot be written.
            MaveriqError: the extra `maveriq[report]` is not installed; the disk is full.
        """
        from maveriq.report.page.comparison_page import write_comparison

        return write_comparison(self.reported, self.labels, path, overwrite=overwrite)

    def _repr_html_(self) -> str:
        """Return the tables for a notebook."""
        from maveriq.report.html import to_html

        return to_html(many_view(self))

    def __repr__(self) -> str:
        *runs, reference = map(str, self.labels)
        return f"<ManyComparison: {', '.join(runs)} against {reference}>"


def compare_many(runs: Sequence[RunRecord], labels: Sequence[RunLabel]) -> ManyComparison:
    """Compare each run with the last one.

    Args:
        runs: at least two.
        labels: of the runs.

    Raises:
        InvariantError: a request has no final status.
    """
    pairs = zip(runs[:-1], labels[:-1], strict=True)
    return ManyComparison(
        labels=tuple(labels),
        comparisons=tuple(compare(run, runs[-1], labels=(label, labels[-1])) for run, label in pairs),
    )


def many_view(many: ManyComparison, *, width: int = WIDE) -> View:
    """Return the figures of each run, the errors against the last, mean latencies by model, and saturations.

    Tables wider than `width` are split.
    """
    names = short_labels(many.labels)
    tables = (_figures_table(many, names), _errors_table(many, names), _models_table(many, names))
    parts: list[Part] = [part for table in tables for part in fit_width(table, width)]
    return View(spaced([*parts, _saturations(many, names)]))


def _differences(many: ManyComparison) -> Iterator[dict[str, float | None]]:
    """Yield the figures of each run by name of their quantity."""
    for comparison in many.comparisons:
        yield {name: difference.sim for name, difference in comparison.overall.differences.items()}
    last = many.comparisons[-1].overall
    yield {name: difference.real for name, difference in last.differences.items()}


def _shown(many: ManyComparison) -> list[str]:
    """Return the names of the quantities that a run has."""
    figures = list(_differences(many))
    return [name for name in _COLUMNS if any(values[name] is not None for values in figures)]


def _figures_table(many: ManyComparison, names: Sequence[str]) -> Table:
    shown = _shown(many)
    formats = {quantity.name: figure if quantity.unit == PERCENT else share for quantity in QUANTITIES}
    completed = [
        *(comparison.overall.sim_completed for comparison in many.comparisons),
        many.comparisons[-1].overall.real_completed,
    ]
    rows = [
        row(name, label.kind, f"{count:,}", *(formats[quantity](values[quantity]) for quantity in shown))
        for name, label, count, values in zip(names, many.labels, completed, _differences(many), strict=True)
    ]
    headers = ("\ndone", *(_COLUMNS[name] for name in shown))
    return Table("All requests", [Column("\nrun"), Column("\nkind"), *map(number_column, headers)], rows)


def _errors_table(many: ManyComparison, names: Sequence[str]) -> Table:
    shown = _shown(many)
    headers = [_COLUMNS[name].removesuffix(" s").removesuffix(" ms").replace("met", "pt") for name in shown]
    rows = [
        Row((name, *_errors(comparison.overall.differences, shown), _ks(comparison)))
        for name, comparison in zip(names, many.comparisons, strict=False)
    ]
    columns = [Column("\nrun"), *map(number_column, (*headers, "\nKS"))]
    return Table(f"Errors against {names[-1]}, %", columns, rows)


def _errors(differences: dict[str, Difference], shown: Sequence[str]) -> list[str]:
    return [signed(differences[name].error) for name in shown]


def _ks(comparison: Comparison) -> str:
    return NONE if comparison.overall.ks is None else f"{comparison.overall.ks:.3f}"


def _models_table(many: ManyComparison, names: Sequence[str]) -> Table:
    models = list(dict.fromkeys(model for comparison in many.comparisons for model in comparison.models))
    rows = [row(model, *map(figure, _model_means(many, model))) for model in models]
    return Table("Mean latency by model, s", [Column("model"), *map(number_column, names)], rows)


def _model_means(many: ManyComparison, model: str) -> Iterator[float | None]:
    found = [comparison.models.get(model) for comparison in many.comparisons]
    for distance in found:
        yield distance.differences["mean"].sim if distance else None
    yield next((distance.differences["mean"].real for distance in found if distance), None)


def _saturations(many: ManyComparison, names: Sequence[str]) -> Text:
    width = max(map(len, names))
    saturations = [
        *(comparison.sim_saturation for comparison in many.comparisons),
        many.comparisons[-1].real_saturation,
    ]
    lines = [saturation_line(name.ljust(width), found) for name, found in zip(names, saturations, strict=True)]
    matches = [
        Text(f"{name}: {matching_line(comparison)}\n")
        for name, comparison in zip(names, many.comparisons, strict=False)
    ]
    return Text.of(*lines, *matches)
