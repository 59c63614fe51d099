"""Search for failures with random seeds.

Usage: python scripts/soak.py [--count N] [--rounds N] [--seed N [--restarts]]

The script simulates the executor under random faults (tests/dst/cluster_sim.py), simulates a service that is killed and
restarted (tests/dst/restart_sim.py, a tenth as many seeds), and runs the hypothesis tests on random examples. It prints
failing seeds, appends them to soak-failures.txt, and exits with 1 if anything failed. Hypothesis keeps failing examples
in .hypothesis.
"""

from __future__ import annotations

import argparse
import logging
import secrets
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

_ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(_ROOT / "tests"), str(_ROOT / "tests" / "dst")]

from cluster_sim import RunSummary, simulate_cluster  # noqa: E402  (in tests/dst)
from restart_sim import simulate_restarts  # noqa: E402

_CHUNK = 100
_SIMULATIONS: dict[str, Callable[[int], RunSummary]] = {"cluster": simulate_cluster, "restarts": simulate_restarts}
_FAILURES = _ROOT / "soak-failures.txt"


def main() -> int:
    """Run the soak test or a single seed, and return the exit code."""
    parser = argparse.ArgumentParser(description="Run controller, supervision and service under random faults.")
    parser.add_argument("--count", type=int, default=10_000, help="number of seeds (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="the first seed (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the hypothesis tests (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="run this seed alone and print its summary")
    parser.add_argument(
        "--restarts", action="store_true", help="with --seed: simulate a service that is killed and restarted"
    )
    options = parser.parse_args()
    if options.seed is not None:
        print(_SIMULATIONS["restarts" if options.restarts else "cluster"](options.seed))
        return 0
    failures = soak("cluster", options.first, options.count)
    failures += soak("restarts", options.first, max(1, options.count // 10))
    failures += sum(not hypothesis_round() for _ in range(options.rounds))
    return 1 if failures else 0


def soak(name: str, first: int, count: int) -> int:
    """Simulate seeds on all cores, print a summary, and return how many failed."""
    started_s = time.monotonic()
    statuses: Counter[str] = Counter()
    engines, simulated_s, failures = 0, 0.0, 0
    chunks = [range(start, min(start + _CHUNK, first + count)) for start in range(first, first + count, _CHUNK)]
    with ProcessPoolExecutor() as pool:
        for summaries, failed in pool.map(partial(_run_seeds, name), chunks):
            for summary in summaries:
                statuses += summary.statuses
                engines += summary.engines
                simulated_s += summary.simulated_s
            for seed, trace in failed:
                print(f"{name}, seed {seed}:\n{trace}")
                _record(f"python scripts/soak.py --seed {seed}{' --restarts' if name == 'restarts' else ''}")
            failures += len(failed)
    requests = ", ".join(f"{status} {number:,}" for status, number in sorted(statuses.items()))
    print(
        f"{name}: {count:,} seeds in {time.monotonic() - started_s:.0f} s, {simulated_s / 3600:,.0f} simulated hours, "
        f"{engines:,} engines, {statuses.total():,} requests ({requests}); {failures} seeds failed"
    )
    return failures


def hypothesis_round() -> bool:
    """Run the hypothesis tests on random examples of a new seed; return whether they passed."""
    arguments = ["-m", "hypothesis", "--hypothesis-profile=soak", f"--hypothesis-seed={secrets.randbelow(2**32)}"]
    command = [sys.executable, "-m", "pytest", "-n", "auto", *arguments, "tests"]
    print(" ".join(["pytest", *arguments]), flush=True)
    passed = subprocess.run(command, cwd=_ROOT, check=False).returncode == 0  # noqa: S603  (the tree's own tests)
    if not passed:
        _record(" ".join(["pytest", *arguments]))
    return passed


def _record(command: str) -> None:
    """Append the command that repeats a failure to soak-failures.txt."""
    with _FAILURES.open("a", encoding="utf-8") as file:
        file.write(f"{command}\n")


def _run_seeds(name: str, seeds: range) -> tuple[list[RunSummary], list[tuple[int, str]]]:
    logging.disable()  # the service logs every fault
    summaries, failed = [], []
    for seed in seeds:
        try:
            summaries.append(_SIMULATIONS[name](seed))
        except BaseException:
            failed.append((seed, traceback.format_exc(limit=-4)))
    return summaries, failed


if __name__ == "__main__":
    sys.exit(main())
