"""Laws of the tables that experiments/h100 writes from its records."""

from __future__ import annotations

import csv
import json
import runpy
from pathlib import Path
from typing import Any

import pytest

TABLE = runpy.run_path(str(Path(__file__).parents[2] / "experiments" / "h100" / "table.py"))


def record(layers: int, seconds: float | None, **changes: Any) -> dict[str, str]:
    row = {
        "model": "any", "layers": layers, "full_layers": 12, "weights": "bf16", "kind": "decode", "mode": "graph",
        "batch": 4, "tokens_each": 128, "status": "measured", "seconds": seconds, "peak_bytes": layers * 10**9,
        "read_bytes": layers * 1e9, "kv_bytes": layers * 5e8, "reason": "",
    }  # fmt: skip
    return {name: "" if value is None else str(value) for name, value in (row | changes).items()}


def test_equal_layers_are_predicted_exactly() -> None:
    head, layer = 0.002, 0.0005
    rows = [record(layers, head + layers * layer) for layers in (1, 2, 12)]
    predictions = TABLE["predict_full_models"](rows)
    assert [prediction.quantity for prediction in predictions] == ["seconds", "peak_bytes"]
    assert [prediction.error_percent for prediction in predictions] == pytest.approx([0, 0], abs=1e-9)


def test_error_is_signed_and_relative_to_the_full_model() -> None:
    rows = [record(1, 1.0), record(2, 2.0), record(12, 10.0)]
    assert TABLE["predict_full_models"](rows)[0].error_percent == pytest.approx(20)


@pytest.mark.parametrize("changes", [{"mode": "eager"}, {"batch": 1}, {"weights": "int8"}, {"status": "skipped"}])
def test_only_the_same_measured_step_is_combined(changes: dict[str, Any]) -> None:
    assert TABLE["predict_full_models"]([record(1, 1.0), record(2, 2.0, **changes), record(12, 12.0)]) == []


def test_bandwidth_is_that_of_the_largest_copy() -> None:
    copies = [
        {"operator": "copy", "status": "measured", "bytes_moved": str(size), "seconds": str(seconds)}
        for size, seconds in ((1e6, 1e-7), (8e9, 4e-3))
    ]
    assert TABLE["measured_bandwidth"](copies) == pytest.approx(2e12)
    assert TABLE["bound_seconds"](record(12, 1.0), 2e12) == pytest.approx(18e9 / 2e12)


def test_page_has_errors_bound_and_what_was_skipped(tmp_path: Path) -> None:
    rows = [record(1, 0.001), record(2, 0.002), record(12, 0.024), record(12, None, status="skipped", reason="full")]
    operators = [{"operator": "copy", "status": "measured", "bytes_moved": "3e9", "seconds": "1e-3", "reason": ""}]
    for name, content in (("records.csv", rows), ("operators.csv", operators)):
        with (tmp_path / name).open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(content[0]))
            writer.writeheader()
            writer.writerows(content)
    versions = {"gpu": "NVIDIA H100 80GB HBM3", "torch": "2", "transformers": "5"}
    (tmp_path / "versions.json").write_text(json.dumps(versions), encoding="utf-8")
    assert TABLE["main"](["--records", str(tmp_path)]) == 0
    page = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "| any | bf16 | decode | graph | seconds | 1 | 50.0 | 50.0 | 50.0 | -50.0 |" in page
    assert "| any | bf16 | 4 | 128 | 18.0 | 24.00 | 4.00 | 4.47 |" in page  # 18 GB at 3 and 3.35 TB/s
    assert "| any | skipped | full | 1 |" in page
