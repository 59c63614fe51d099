"""Measure the times to write and read the tables of a run with pandas, pyarrow and maveriq's own writer.

Usage: python benchmarks/tables.py [ROWS]

The script prints µs of CPU time per row. docs/decisions/0013-libraries.md quotes the numbers.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from pyarrow import compute, csv

from maveriq.domain.records import REQUEST_COLUMNS, RequestTable, RunRecord
from maveriq.domain.requests import RequestStatus
from maveriq.report.frames import requests_frame
from maveriq.report.reading import read_run
from maveriq.report.requests_csv import csv_cell, filled_bits, is_filled, numeric_columns, request_lines
from maveriq.report.run_folder import write_run

_ROWS_AT_ONCE = 16384
_MODELS = {endpoint: f"model-{endpoint}" for endpoint in range(1, 9)}


def main(rows: int) -> None:
    """Print the CPU time of each way to write and read `rows` requests."""
    run = a_run(rows)
    frame = requests_frame(run)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_run(folder / "run", run, {}, {})
        written = folder / "run" / "requests.csv"
        out = folder / "out.csv"
        ways: dict[str, Callable[[], object]] = {
            "write, maveriq": lambda: write_lines(run, out),
            "write, pandas to_csv(float_format='%.6f')": lambda: frame.to_csv(out, index=False, float_format="%.6f"),
            "write, pyarrow strings joined": lambda: out.write_bytes(b"".join(arrow_lines(run))),
            "write, pyarrow write_csv": lambda: csv.write_csv(pa.Table.from_pandas(frame, preserve_index=False), out),
            "read, maveriq read_run (pyarrow, checked)": lambda: read_run(folder / "run"),
            "read, pandas read_csv": lambda: pd.read_csv(written),
            "read, pandas read_csv(engine='pyarrow')": lambda: pd.read_csv(written, engine="pyarrow"),
            "frame, requests_frame": lambda: requests_frame(run),
        }
        for name, way in ways.items():
            started_s = time.process_time()
            way()
            used_s = time.process_time() - started_s
            same = name.startswith("write") and out.read_bytes() == written.read_bytes()
            print(f"{name:45} {1e6 * used_s / rows:6.2f} µs a row{'  same bytes' if same else ''}")


def write_lines(run: RunRecord, path: Path) -> None:
    """Write requests.csv with maveriq's own writer."""
    with path.open("w", encoding="utf-8", newline="") as file:
        file.writelines(request_lines(run))


def arrow_lines(run: RunRecord) -> Iterator[bytes]:
    """Yield requests.csv, formatted by pyarrow."""
    yield (",".join(REQUEST_COLUMNS) + "\n").encode()
    table = run.requests
    texts = {
        "model": (table.endpoint_id, [csv_cell(run.models.get(key, "")) for key in range(max(run.models) + 1)]),
        "status": (table.status, [csv_cell(status.label) for status in RequestStatus]),
        "reason": (table.reason, [csv_cell(reason) for reason in table.reasons]),
    }
    for start in range(0, len(table), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        column = numeric_columns(table, rows)
        bits = filled_bits(column)
        cells = []
        for name in REQUEST_COLUMNS:
            if name in texts:
                keys, known = texts[name]
                cells.append(pa.array(known).take(pa.array(keys[rows])))
                continue
            text = _seconds(column[name]) if name.endswith("_s") else pa.array(column[name].astype(int)).cast("string")
            cells.append(compute.if_else(pa.array(is_filled(name, bits)), text, ""))
        lines = compute.binary_join_element_wise(*cells, ",")
        yield compute.binary_join_element_wise(lines, "\n", "").buffers()[2].to_pybytes()


def _seconds(micros: np.ndarray[Any, Any]) -> pa.Array:
    """Return microseconds as seconds in text, with six decimals."""
    halves = np.stack([micros, micros >> 63], axis=1)
    return pa.Array.from_buffers(pa.decimal128(18, 6), len(micros), [None, pa.py_buffer(halves)]).cast("string")


def a_run(rows: int) -> RunRecord:
    """Return a run of completed requests, 2 % of them refused."""
    generator = np.random.default_rng(1)

    def draw(low: int, high: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return generator.integers(low, high, rows)

    refused = generator.random(rows) < 0.02
    arrival_us = np.sort(draw(0, 86_400_000_000))
    start_us = arrival_us + draw(0, 10_000_000)
    first_token_us = start_us + draw(1, 1_000_000)
    endpoint_id = draw(1, 9)
    return RunRecord(
        requests=RequestTable(
            request_id=np.arange(1, rows + 1),
            endpoint_id=endpoint_id,
            deployment_id=np.where(refused, 0, endpoint_id),
            arrival_us=arrival_us,
            start_us=np.where(refused, -1, start_us),
            first_token_us=np.where(refused, -1, first_token_us),
            finish_us=np.where(refused, -1, first_token_us + draw(0, 100_000_000)),
            status=np.where(refused, RequestStatus.REFUSED.value, RequestStatus.COMPLETED.value),
            reason=np.where(refused, 1, 0),
            prompt_tokens=draw(1, 2000),
            cached_tokens=draw(0, 2000),
            output_tokens=draw(1, 2000),
            steps=np.zeros(rows, dtype=np.int64),
            preemptions=draw(0, 3),
            slo_us=np.full(rows, 30_000_000),
            reasons=("", "not deployed"),
        ),
        deployments=(),
        gpu_samples=(),
        models=_MODELS,
        ended_us=90_000_000_000,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=int, nargs="?", default=1_000_000, help="number of rows (default: %(default)s)")
    main(parser.parse_args().rows)
