"""Write tables from the records of measure.py: fingerprints against full models, decode against the bandwidth bound.

Usage: python experiments/h100/table.py [--records DIR]

Reads records.csv, operators.csv, checks.csv and versions.json in the folder, and writes table.md there.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
# bytes a second, of the vendor's data sheets of the SXM parts
_SHEET_BANDWIDTHS = {"H100": 3.35e12, "H200": 4.8e12}

Row = dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """A full model's measured quantity, and what its one- and two-layer versions predict."""

    row: Row
    quantity: str
    measured: float
    predicted: float

    @property
    def error_percent(self) -> float:
        """The error of the prediction in percent of the measured value; above zero: predicted too much."""
        return 100 * (self.predicted / self.measured - 1)


def main(arguments: list[str]) -> int:
    """Read the records, write the tables, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--records",
        type=Path,
        default=_HERE / "results",
        metavar="DIR",
        help="folder of the records (default: results)",
    )
    folder = parser.parse_args(arguments).records
    (folder / "table.md").write_text(page(folder), encoding="utf-8")
    return 0


def page(folder: Path) -> str:
    """Return all tables of a folder of records as Markdown."""
    records, operators = read_rows(folder / "records.csv"), read_rows(folder / "operators.csv")
    versions: dict[str, Any] = json.loads((folder / "versions.json").read_text(encoding="utf-8"))
    predictions = predict_full_models(records)
    copy_bandwidth = measured_bandwidth(operators)
    sheet_bandwidth = next((value for gpu, value in _SHEET_BANDWIDTHS.items() if gpu in versions.get("gpu", "")), None)
    parts = [
        "# Steps of full models, their fingerprints, and the bandwidth bound\n",
        "`experiments/h100/table.py` writes this page from the records beside it.\n",
        f"GPU {versions.get('gpu', 'none')}, torch {versions['torch']}, transformers {versions['transformers']}. "
        + _bandwidth_text(copy_bandwidth, sheet_bandwidth),
        "\n## Fingerprints\n",
        "A full model of L layers is predicted as t1 + (L - 1) (t2 - t1) from one and two layers. Errors in percent.\n",
        _summary_table(predictions),
        "\n## Decode against the bandwidth bound\n",
        "The bound is the time to read the weights that the step uses and the KV cache once. Full models, `graph`.\n",
        _bound_table(records, copy_bandwidth, sheet_bandwidth),
        "\n## Every prediction\n",
        _detail_table(predictions),
        "\n## Checks\n",
        _table(
            ("model", "layers", "weights", "check", "relative error", "equal tokens", "note"),
            [tuple(row.values()) for row in read_rows(folder / "checks.csv")],
        ),
        "\n## Not measured\n",
        _skipped_table([*records, *operators]),
    ]
    return "\n".join(parts) + "\n"


def read_rows(path: Path) -> list[Row]:
    """Read a CSV file; a missing one has no rows."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def predict_full_models(records: Iterable[Row]) -> list[Prediction]:
    """Predict time and peak memory of full models from the records of one and two layers of the same step."""
    steps: dict[tuple[str, ...], dict[int, Row]] = defaultdict(dict)
    for row in records:
        if row["status"] == "measured":
            key = tuple(row[name] for name in ("model", "weights", "kind", "mode", "batch", "tokens_each"))
            steps[key][int(row["layers"])] = row
    predictions = []
    for by_layers in steps.values():
        full_layers = int(next(iter(by_layers.values()))["full_layers"])
        if not {1, 2, full_layers} <= set(by_layers):
            continue
        for quantity in ("seconds", "peak_bytes"):
            texts = [by_layers[layers][quantity] for layers in (1, 2, full_layers)]
            if all(texts):
                one, two, full = map(float, texts)
                predicted = one + (full_layers - 1) * (two - one)
                row = by_layers[full_layers]
                predictions.append(Prediction(row=row, quantity=quantity, measured=full, predicted=predicted))
    return predictions


def measured_bandwidth(operators: Iterable[Row]) -> float | None:
    """Return bytes a second, read and written, of the largest copy."""
    copies = [row for row in operators if row["operator"] == "copy" and row["status"] == "measured"]
    if not copies:
        return None
    largest = max(copies, key=lambda row: float(row["bytes_moved"]))
    return float(largest["bytes_moved"]) / float(largest["seconds"])


def bound_seconds(row: Row, bandwidth: float) -> float:
    """Return the time in which a decode step could read its weights and KV cache at a bandwidth (bytes a second)."""
    return (float(row["read_bytes"]) + float(row["kv_bytes"])) / bandwidth


def _summary_table(predictions: Sequence[Prediction]) -> str:
    groups: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for prediction in predictions:
        row = prediction.row
        groups[(row["model"], row["weights"], row["kind"], row["mode"], prediction.quantity)].append(
            prediction.error_percent
        )
    lines = []
    for key, errors in groups.items():
        sizes = sorted(map(abs, errors))
        median, p90 = statistics.median(sizes), sizes[min(len(sizes) - 1, int(0.9 * len(sizes)))]
        bias = statistics.median(errors)
        lines.append((*key, len(errors), f"{median:.1f}", f"{p90:.1f}", f"{sizes[-1]:.1f}", f"{bias:+.1f}"))
    return _table(
        ("model", "weights", "kind", "mode", "quantity", "rows", "median", "p90", "worst", "bias"), sorted(lines)
    )


def _detail_table(predictions: Sequence[Prediction]) -> str:
    lines = []
    for prediction in predictions:
        row, is_time = prediction.row, prediction.quantity == "seconds"
        scale, unit = (1e3, "ms") if is_time else (2.0**-30, "GiB")
        values = (f"{prediction.measured * scale:.2f} {unit}", f"{prediction.predicted * scale:.2f} {unit}")
        names = (row["model"], row["weights"], row["kind"], row["mode"], row["batch"], row["tokens_each"])
        lines.append((*names, *values, f"{prediction.error_percent:+.1f}"))
    return _table(("model", "weights", "kind", "mode", "batch", "tokens each", "measured", "predicted", "error"), lines)


def _bound_table(records: Sequence[Row], copy_bandwidth: float | None, sheet_bandwidth: float | None) -> str:
    lines = []
    for row in records:
        is_full = row["layers"] == row["full_layers"]
        if not (row["kind"] == "decode" and row["mode"] == "graph" and row["status"] == "measured" and is_full):
            continue
        seconds = float(row["seconds"])
        ratios = [
            f"{seconds / bound_seconds(row, bandwidth):.2f}" if bandwidth else ""
            for bandwidth in (copy_bandwidth, sheet_bandwidth)
        ]
        read_gb = (float(row["read_bytes"]) + float(row["kv_bytes"])) / 1e9
        names = (row["model"], row["weights"], row["batch"], row["tokens_each"])
        lines.append((*names, f"{read_gb:.1f}", f"{seconds * 1e3:.2f}", *ratios))
    return _table(
        ("model", "weights", "batch", "context", "GB to read", "ms", "ms / copy bound", "ms / data sheet bound"), lines
    )


def _skipped_table(rows: Iterable[Row]) -> str:
    counts = Counter(
        (row.get("model") or row.get("operator", ""), row["status"], row["reason"])
        for row in rows
        if row["status"] != "measured"
    )
    return _table(("what", "status", "reason", "rows"), [(*key, count) for key, count in sorted(counts.items())])


def _bandwidth_text(copy: float | None, sheet: float | None) -> str:
    parts = [f"copy bandwidth measured {copy / 1e12:.2f} TB/s"] if copy else []
    parts += [f"data sheet {sheet / 1e12:.2f} TB/s"] if sheet else []
    return f"Memory: {', '.join(parts)}." if parts else ""


def _table(header: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "/") for cell in line) + " |" for line in lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
