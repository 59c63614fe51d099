"""Simulate the runs of tests/golden/runs.toml and compare the SHA-256 of their tables with the recorded hashes.

Usage: python scripts/golden_runs.py [--only NAME] [--kernel KERNEL] [--record]

The script prints the differences and exits with 1 if there are any. --record replaces the recorded hashes. --kernel
fast runs only what the fast kernel covers. Each table is hashed with all columns, and without the `reason` column,
whose wording may change. The header line is not hashed.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
TABLES = ("requests.csv", "deployments.csv", "gpus.csv")

Hashes: TypeAlias = dict[str, dict[str, str]]
"""Hashes by table and by part: "rows" or "rows without reason"."""


def main() -> int:
    """Run the chosen runs and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write hashes.json")
    parser.add_argument("--only", default="", help="run only runs whose name contains this")
    parser.add_argument("--kernel", default="auto", help="what simulates: auto, fast or simpy")
    arguments = parser.parse_args()
    chosen = [name for name in runs() if arguments.only in name]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        hashed = dict(zip(chosen, threads.map(lambda name: hashes(name, arguments.kernel), chosen), strict=True))
    found = {name: tables for name, tables in hashed.items() if tables}
    if arguments.record:
        (GOLDEN / "hashes.json").write_text(json.dumps(found, indent=1) + "\n")
        return 0
    different = [line for name in found for line in differences(name, found[name])]
    print("\n".join(different) or f"{len(found)} runs: all tables as recorded")
    return bool(different)


def runs() -> dict[str, dict[str, Any]]:
    """Return the options of each run."""
    return tomllib.loads((GOLDEN / "runs.toml").read_text())


def differences(name: str, found: Hashes) -> list[str]:
    """Compare a run's hashes with the recorded ones; return a line for each difference."""
    recorded = json.loads((GOLDEN / "hashes.json").read_text())[name]
    return [
        f"{name}: {table} differs in {part}"
        for table in TABLES
        for part, value in found[table].items()
        if recorded[table][part] != value
    ]


def hashes(name: str, kernel: str = "auto") -> Hashes:
    """Run `maveriq sim` with the options of a run, and return the hashes of its tables; none if the kernel refuses."""
    options = [word for option, value in runs()[name].items() for word in _arguments(option, value)]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "maveriq", "sim", *options, "--quiet", "--kernel", kernel, "--out", str(out)]
        ran = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True, cwd=GOLDEN)  # noqa: S603
        if ran.returncode and "--kernel fast does not simulate" in ran.stderr:
            return {}
        sys.stderr.write(ran.stderr)
        ran.check_returncode()
        return {table: _table_hashes((out / table).read_text()) for table in TABLES}


def _arguments(option: str, value: Any) -> list[str]:
    flag = f"--{option.replace('_', '-')}"
    if value is True:
        return [flag]
    return [word for each in (value if isinstance(value, list) else [value]) for word in (flag, str(each))]


def _table_hashes(text: str) -> dict[str, str]:
    head, rest = text.split("\n", 1)
    columns = head.split(",")
    kept = [place for place, column in enumerate(columns) if column != "reason"]
    rows = csv.reader(io.StringIO(rest))
    without_reason = "\n".join(",".join(row[place] for place in kept) for row in rows)
    return {"rows": _sha256(rest), "rows without reason": _sha256(without_reason)}


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
