"""Derive the CSV files of traces/ from the public Azure traces and the recorded schedules.

Usage: python scripts/derive_traces.py DATA_DIR [--out traces]

DATA_DIR contains `azure/AzureLLMInferenceTrace_{code,conv}.csv` and `testbed/scheduled.csv.gz`. The script writes
the tables of traces/; equal input gives equal files.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from maveriq.workload.trace_formats import RequestTrace, read_requests

PUBLIC_FILES = {"code": "AzureLLMInferenceTrace_code.csv", "conversation": "AzureLLMInferenceTrace_conv.csv"}
# Two more points in the tail: linear interpolation between 99 and 100 % would raise the mean by up to 22 %.
PERCENT = (*range(100), 99.5, 99.9, 100)


def derive(data: Path) -> dict[str, str]:
    """Return the text of each file by its name.

    Args:
        data: the folder of measured data.
    """
    traces = {name: read_requests(data / "azure" / file) for name, file in PUBLIC_FILES.items()}
    files = {f"azure-{name}-per-minute.csv": _counts(trace) for name, trace in traces.items()}
    files["azure-lengths.csv"] = _quantiles(
        {
            f"{name}_{kind}_tokens": tokens
            for name, trace in traces.items()
            for kind, tokens in (("context", trace.prompt_tokens), ("generated", trace.output_tokens))
        }
    )
    files["sharegpt-prompt-chars.csv"] = _quantiles(
        {"prompt_chars": _prompt_chars(data / "testbed" / "scheduled.csv.gz")}
    )
    return files


def _counts(trace: RequestTrace) -> str:
    return _table(("minute", "requests"), enumerate(trace.requests_per_minute.tolist()))


def _prompt_chars(path: Path) -> np.ndarray[Any, Any]:
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        return np.array([int(row["prompt_chars"]) for row in csv.DictReader(file)])


def _quantiles(columns: dict[str, np.ndarray[Any, Any]]) -> str:
    """Return quantiles that are observed values (the inverse of the empirical distribution function)."""
    values = (np.percentile(column, PERCENT, method="inverted_cdf").tolist() for column in columns.values())
    return _table(("percent", *columns), zip(PERCENT, *values, strict=True))


def _table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    return "".join(",".join(map(str, row)) + "\n" for row in (header, *rows))


def main(arguments: list[str]) -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA_DIR", help="folder of measured data")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "traces", help="output folder")
    options = parser.parse_args(arguments)
    for name, text in derive(options.data).items():
        (options.out / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
