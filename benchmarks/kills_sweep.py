"""Kills of `maveriq sweep` and its workers at random moments: does it lose more than the cells under way?

    python benchmarks/kills_sweep.py [--kills 10] [--workers 2] [--seeds 12] [--on local|ray] [--seed 1]

The sweep has two policies, one that raises an error and one that kills its process, each with so many seeds. It is
started again and again, and each time the sweep itself or one of its workers is killed (SIGKILL), at a random moment.
Now and then a second sweep is started into the same folder. At the end the sweep runs to its end, and its table is
compared with that of an undisturbed sweep. `--on ray` needs an environment with `maveriq[ray]`.

A cell is lost if its run was written and the sweep's log does not have it. Prints what was counted as JSON; exits with
1 if a kill lost more cells than there are workers, a finished cell was lost later, a second sweep was let in, a process
was left behind, a cell failed that should not, or the tables differ.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from maveriq.streams import generator

_RULES = """
import os

def raises(*_):
    raise RuntimeError("on purpose")

def dies(*_):
    os.kill(os.getpid(), 9)
"""
_BROKEN = ("raises", "dies")
_DEADLINE_S = 600.0
_LEFT_BEHIND_AFTER_S = 60.0
_WORKER = {"local": "maveriq.sweeps.worker", "ray": "ray::simulate_encoded"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--on", choices=("local", "ray"), default="local")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counted = Kills(Path(folder), options).run()
    print(json.dumps(counted, indent=2))
    return 1 if counted["faults"] else 0


class Kills:
    """One run of the benchmark (mutable)."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self._folder, self._options = folder, options
        self._draws = generator(options.seed, "kills of sweeps")
        self._counts: Counter[str] = Counter()
        self._most_lost = 0
        self._faults: list[str] = []
        self._finished: list[int] = []  # cells of the log, in its order
        (folder / "rules.py").write_text(_RULES, encoding="utf-8")
        policies = ["llf", "packing", *(f"{folder}/rules.py:{name}" for name in _BROKEN)]
        self._cells = len(policies) * options.seeds
        self._good = {number for number in range(1, self._cells + 1) if number <= 2 * options.seeds}
        (folder / "sweep.toml").write_text(
            f'name = "kills"\n[options]\nlimit = 400\n[grid]\npolicy = {json.dumps(policies)}\n'
            f"seed = {list(range(1, options.seeds + 1))}\n",
            encoding="utf-8",
        )

    def run(self) -> dict[str, Any]:
        """Kill, look, and compare."""
        started_s = time.monotonic()
        for number in range(self._options.kills):
            self._one_kill(kills_worker=bool(number % 3 == 2), starts_second=number % 3 == 1)
        process = self._start("swept")
        self._wait(process)
        undisturbed = self._start("undisturbed")
        self._wait(undisturbed)
        self._check_end()
        return {
            "on": self._options.on,
            "cells": self._cells,
            **dict(sorted(self._counts.items())),
            "most_cells_lost_by_a_kill": self._most_lost,
            "seconds": round(time.monotonic() - started_s, 1),
            "faults": self._faults,
        }

    def _start(self, name: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "maveriq", "sweep", "sweep.toml", "--out", name, "--keep-runs", "--quiet"]
        command += ["--workers", str(self._options.workers), "--on", self._options.on]
        return subprocess.Popen(command, cwd=self._folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def _wait(self, process: subprocess.Popen[bytes]) -> str:
        """Wait for the end of a sweep, and return what it wrote to stderr."""
        try:
            _, errors = process.communicate(timeout=_DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            self._faults.append(f"a sweep did not end within {_DEADLINE_S:.0f} s")
            return ""
        return errors.decode()

    def _one_kill(self, *, kills_worker: bool, starts_second: bool) -> None:
        process = self._start("swept")
        until_s = time.monotonic() + _DEADLINE_S
        wanted = len(self._log()) + int(self._draws.integers(1, 4))
        while process.poll() is None and len(self._log()) < wanted and time.monotonic() < until_s:
            time.sleep(0.1)
        time.sleep(float(self._draws.uniform(0.0, 0.3)))
        if starts_second and process.poll() is None:
            self._counts["second_sweeps"] += 1
            errors = self._wait(self._start("swept"))
            if "in use by another sweep" not in errors and process.poll() is None:
                self._faults.append(f"a second sweep was let in: {errors!r}")
        workers = list(_workers_of(process.pid, _WORKER[self._options.on]))
        if kills_worker and workers:
            self._counts["kills_of_a_worker"] += 1
            with suppress(ProcessLookupError):
                os.kill(workers[int(self._draws.integers(len(workers)))], signal.SIGKILL)
            time.sleep(1.0)
            if process.poll() is not None and not self._is_complete():
                self._faults.append("the sweep ended when a worker was killed")
        if process.poll() is None:
            self._counts["kills_of_the_sweep"] += 1
            process.kill()
        self._wait(process)
        self._look(workers)

    def _look(self, workers: list[int]) -> None:
        """Check what the folder holds after a kill, and that no worker is left behind."""
        until_s = time.monotonic() + _LEFT_BEHIND_AFTER_S
        while (left := [pid for pid in workers if _is_alive(pid)]) and time.monotonic() < until_s:
            time.sleep(0.1)
        if left:
            self._faults.append(f"workers {left} were left behind")
        log = self._log()
        if log[: len(self._finished)] != self._finished:
            self._faults.append("the log lost cells that it had")
        written = {int(path.parent.name) for path in (self._folder / "swept" / "runs").glob("*/run.json")}
        lost = len(written - set(log))
        self._most_lost = max(self._most_lost, lost)
        if lost > self._options.workers:
            self._faults.append(f"a kill lost {lost} cells, and there were {self._options.workers} workers")
        self._finished = log

    def _log(self) -> list[int]:
        """Return the cells that the log has with a result, in its order."""
        path = self._folder / "swept" / "cells.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        return [each["number"] for line in lines if line.endswith(b"\n") and not (each := json.loads(line))["error"]]

    def _is_complete(self) -> bool:
        return set(self._log()) == self._good

    def _check_end(self) -> None:
        import pandas as pd

        log = self._log()
        if sorted(log) != sorted(self._good):
            self._faults.append(f"the log has cells {sorted(log)}, not each of {sorted(self._good)} once")
        tables = [pd.read_csv(self._folder / name / "cells.csv") for name in ("swept", "undisturbed")]
        failed = [set(table[table["error"].notna()]["run"]) for table in tables]
        if failed[0] != set(range(1, self._cells + 1)) - self._good:
            self._faults.append(f"cells {sorted(failed[0])} failed")
        figures = [
            table[table["error"].isna()].drop(columns="simulated_in_s").reset_index(drop=True) for table in tables
        ]
        if not figures[0].equals(figures[1]):
            self._faults.append("the table differs from that of an undisturbed sweep")


def _workers_of(pid: int, name: str) -> Iterator[int]:
    """Yield the descendants of a process whose command has a name."""
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                with suppress(OSError):
                    if name in Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode():
                        yield child
                yield from _workers_of(child, name)


def _is_alive(pid: int) -> bool:
    with suppress(OSError):
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    return False


if __name__ == "__main__":
    sys.exit(main())
