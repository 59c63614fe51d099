"""Measure how fast maveriq is and how much memory it takes, each figure against its bar.

Usage: python benchmarks/run.py [--requests N] [--tries N] [--json] [--check]

docs/performance.md says what is measured and how.
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
from large_worlds import WORLDS
from rich.console import Console
from rich.table import Table

LARGE_RUN = Path(__file__).with_name("large_run.py")

SIMULATE_BAR_US = 35.0
FILES_BAR_US = 10.0
MEMORY_BAR_KIB = 1.0
HELP_BAR = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measured figure, and the most that it may be (None: no bar)."""

    name: str
    value: float
    unit: str
    bar: float | None = None

    @property
    def met(self) -> bool:
        """Say whether it is within its bar."""
        return self.bar is None or self.value <= self.bar


def figures(requests: int, tries: int) -> Iterator[Figure]:
    """Measure everything, one figure after the other."""
    for name, world in WORLDS.items():
        yield from _large_run_figures(world.title, _large_run(name, requests, tries))
    yield Figure(name="maveriq --help / import typer, rich", value=help_ratio(), unit="x", bar=HELP_BAR)
    yield Figure(name="maveriq sim --quiet", value=main_job_s(tries), unit="s")
    yield Figure(name="conversation trace, scale 1", value=conversation_requests_per_s(tries), unit="requests/s")


def _large_run_figures(title: str, measured: dict[str, float]) -> Iterator[Figure]:
    yield Figure(name=f"{title}: simulate", value=measured["simulate_us"], unit="µs/request", bar=SIMULATE_BAR_US)
    yield Figure(name=f"{title}: in events of SimPy alone", value=measured["bare_events"], unit="events/request")
    yield Figure(name=f"{title}: write the files", value=measured["files_us"], unit="µs/request", bar=FILES_BAR_US)
    yield Figure(name=f"{title}: memory", value=measured["memory_kib"], unit="KiB/request", bar=MEMORY_BAR_KIB)


def _large_run(world: str, requests: int, tries: int) -> dict[str, float]:
    """Return the least time and the most memory over some tries, each in a process of its own.

    This process must stay small: at its start, a child's peak memory counts that of its parent.
    """
    command = [sys.executable, str(LARGE_RUN), world, str(requests)]
    found = [
        json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout) for _ in range(tries)
    ]
    return {
        name: max(one[name] for one in found) if name == "memory_kib" else min(one[name] for one in found)
        for name in found[0]
    }


def machine() -> dict[str, Any]:
    """Return what the figures were measured on."""
    return {
        "cpu": platform.machine(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("maveriq", "simpy", "numpy")},
    }


def table(found: list[Figure], requests: int, tries: int) -> Table:
    """Return the figures as a table."""
    view = Table(title=f"{requests:,} requests; least time and most memory of {tries} tries", title_justify="left")
    view.add_column("what")
    view.add_column("measured", justify="right")
    view.add_column("bar", justify="right")
    view.add_column("")
    for one in found:
        bar, verdict = ("", "") if one.bar is None else (f"{one.bar:g}", "met" if one.met else "[bold red]missed")
        view.add_row(one.name, f"{one.value:,.2f} {one.unit}", bar, verdict)
    return view


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the speed and memory of maveriq.")
    parser.add_argument("--requests", type=int, default=1_000_000, help="of each large run; 100000 in a hurry")
    parser.add_argument("--tries", type=int, default=3, help="of each measurement")
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bar is missed")
    said = parser.parse_args()
    progress = Console(stderr=True)
    found = []
    for one in figures(said.requests, said.tries):
        found.append(one)
        progress.print(f"{one.name}: {one.value:,.2f} {one.unit}", highlight=False)
    if said.json:
        body = [asdict(one) | {"met": one.met} for one in found]
        print(
            json.dumps({"machine": machine(), "requests": said.requests, "figures": body}, indent=2, ensure_ascii=False)
        )
    else:
        Console().print(table(found, said.requests, said.tries))
        Console().print(", ".join(f"{what} {value}" for what, value in machine().items()), highlight=False)
    return int(said.check and not all(one.met for one in found))


if __name__ == "__main__":
    sys.exit(main())
