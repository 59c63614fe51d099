"""Measure the speed and memory of maveriq, and compare each figure with its bar.

Usage: python benchmarks/run.py [--requests N] [--tries N] [--json] [--check]

The script prints a table, or JSON with --json. docs/performance.md explains the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from commands import conversation_requests_per_s, help_ratio, main_job_s
from large_clusters import CLUSTERS
from rich.console import Console
from rich.table import Table

LARGE_RUN = Path(__file__).with_name("large_run.py")

SIMULATE_BAR_US = 35.0
FILES_BAR_US = 10.0
MEMORY_BAR_KIB = 1.0
HELP_BAR = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A measured figure and its maximum (None: no bar)."""

    name: str
    value: float
    unit: str
    bar: float | None = None

    @property
    def met(self) -> bool:
        """Return whether the figure is within its bar."""
        return self.bar is None or self.value <= self.bar


def figures(requests: int, tries: int) -> Iterator[Figure]:
    """Measure and yield all figures."""
    for name, cluster in CLUSTERS.items():
        yield from _large_run_figures(cluster.title, _large_run(name, requests, tries))
    yield Figure(name="maveriq --help / import typer, rich", value=help_ratio(), unit="x", bar=HELP_BAR)
    yield Figure(name="maveriq sim --quiet", value=main_job_s(tries), unit="s")
    yield Figure(name="conversation trace, scale 1", value=conversation_requests_per_s(tries), unit="requests/s")


def _large_run_figures(title: str, measured: dict[str, float]) -> Iterator[Figure]:
    yield Figure(name=f"{title}: simulate", value=measured["simulate_us"], unit="µs/request", bar=SIMULATE_BAR_US)
    yield Figure(name=f"{title}: in events of SimPy alone", value=measured["bare_events"], unit="events/request")
    yield Figure(name=f"{title}: write the files", value=measured["files_us"], unit="µs/request", bar=FILES_BAR_US)
    yield Figure(name=f"{title}: memory", value=measured["memory_kib"], unit="KiB/request", bar=MEMORY_BAR_KIB)


def _large_run(cluster: str, requests: int, tries: int) -> dict[str, float]:
    """Return the minimum times and the maximum memory over some tries, each in its own process.

    This process must stay small, because the peak memory of a child starts at that of its parent.
    """
    command = [sys.executable, str(LARGE_RUN), cluster, str(requests)]
    found = [
        json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout) for _ in range(tries)
    ]
    return {
        name: max(run[name] for run in found) if name == "memory_kib" else min(run[name] for run in found)
        for name in found[0]
    }


def machine() -> dict[str, Any]:
    """Return a description of the machine and its software."""
    return {
        "cpu": platform.machine(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("maveriq", "simpy", "numpy")},
    }


def table(found: list[Figure], requests: int, tries: int) -> Table:
    """Return the figures as a table."""
    view = Table(title=f"{requests:,} requests; minimum time and maximum memory of {tries} tries", title_justify="left")
    view.add_column("figure")
    view.add_column("measured", justify="right")
    view.add_column("bar", justify="right")
    view.add_column("")
    for figure in found:
        met = "met" if figure.met else "[bold red]missed"
        bar, verdict = ("", "") if figure.bar is None else (f"{figure.bar:g}", met)
        view.add_row(figure.name, f"{figure.value:,.2f} {figure.unit}", bar, verdict)
    return view


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--requests", type=int, default=1_000_000, help="requests of each large run (default: %(default)s)"
    )
    parser.add_argument("--tries", type=int, default=3, help="tries of each measurement (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bar is missed")
    options = parser.parse_args()
    progress = Console(stderr=True)
    found = []
    for figure in figures(options.requests, options.tries):
        found.append(figure)
        progress.print(f"{figure.name}: {figure.value:,.2f} {figure.unit}", highlight=False)
    if options.json:
        rows = [asdict(figure) | {"met": figure.met} for figure in found]
        results = {"machine": machine(), "requests": options.requests, "figures": rows}
        print(json.dumps(results, indent=2, ensure_ascii=False))
    else:
        Console().print(table(found, options.requests, options.tries))
        Console().print(", ".join(f"{what} {value}" for what, value in machine().items()), highlight=False)
    return int(options.check and not all(figure.met for figure in found))


if __name__ == "__main__":
    sys.exit(main())
