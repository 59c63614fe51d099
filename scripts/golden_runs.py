"""Runs the runs of tests/golden/runs.toml and compares their tables with the recorded SHA-256.

`python scripts/golden_runs.py` prints what differs and exits with 1; `--record` writes the hashes anew.
A table is hashed twice: whole, and with its `reason` column left out, whose wording may improve.
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
from typing import Any

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
TABLES = ("requests.csv", "deployments.csv", "gpus.csv")


def main() -> int:
    """Run what the command line names; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write hashes.json")
    parser.add_argument("--only", default="", help="a part of the names of the runs")
    arguments = parser.parse_args()
    runs = tomllib.loads((GOLDEN / "runs.toml").read_text())
    chosen = {name: options for name, options in runs.items() if arguments.only in name}
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        found = dict(zip(chosen, threads.map(hashes, chosen.values()), strict=True))
    path = GOLDEN / "hashes.json"
    if arguments.record:
        path.write_text(json.dumps(found, indent=1) + "\n")
        return 0
    recorded = json.loads(path.read_text())
    different = [
        f"{name}: {table} differs in {part}"
        for name in chosen
        for table in TABLES
        for part, value in found[name][table].items()
        if recorded[name][table][part] != value
    ]
    print("\n".join(different) or f"{len(chosen)} runs: all tables as recorded")
    return bool(different)


def hashes(options: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Run `maveriq sim` with options and return each table's hashes."""
    words = [word for name, value in options.items() for word in _words(name, value)]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "maveriq", "sim", *words, "--quiet", "--out", str(out)]
        subprocess.run(command, check=True, cwd=GOLDEN)  # noqa: S603  (the tree's own command)
        return {table: _table_hashes((out / table).read_text()) for table in TABLES}


def _words(name: str, value: Any) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    if value is True:
        return [flag]
    return [word for each in (value if isinstance(value, list) else [value]) for word in (flag, str(each))]


def _table_hashes(text: str) -> dict[str, str]:
    head, body = text.split("\n", 1)
    columns = head.split(",")
    kept = [place for place, column in enumerate(columns) if column != "reason"]
    rows = csv.reader(io.StringIO(body))
    without_reason = "\n".join(",".join(row[place] for place in kept) for row in rows)
    return {"rows": _sha256(body), "rows without reason": _sha256(without_reason)}


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
