"""Plays many simulated runs, or one again: `python scripts/soak.py [--count 10000] [--first 0] [--seed N]`.

Exit code 1 where a seed fails; its number is all that is needed to see it again.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

_TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(_TESTS), str(_TESTS / "dst")]

from drama import Ended, play  # noqa: E402  (it lies beside the tests)

_CHUNK = 100


def main() -> int:
    """Do what the command line says and return the exit code."""
    parser = argparse.ArgumentParser(description="Run controller and supervision under random faults.")
    parser.add_argument("--count", type=int, default=10_000, help="how many seeds (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="the first of them (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="play this one alone and say what was seen")
    said = parser.parse_args()
    if said.seed is not None:
        print(play(said.seed))
        return 0
    return soak(said.first, said.count)


def soak(first: int, count: int) -> int:
    """Play seeds in all cores and say what was seen; returns the exit code."""
    started_s = time.monotonic()
    statuses: Counter[str] = Counter()
    engines, simulated_s, bad = 0, 0.0, []
    with ProcessPoolExecutor() as pool:
        chunks = [range(start, min(start + _CHUNK, first + count)) for start in range(first, first + count, _CHUNK)]
        for seen, failed in pool.map(_play_all, chunks):
            bad += failed
            for one in seen:
                statuses += one.statuses
                engines += one.engines
                simulated_s += one.simulated_s
            for seed, told in failed:
                print(f"seed {seed}:\n{told}")
    took_s = time.monotonic() - started_s
    print(
        f"{count:,} seeds in {took_s:.0f} s: {simulated_s / 3600:,.0f} simulated hours, {engines:,} engines, "
        f"{statuses.total():,} requests ({', '.join(f'{name} {n:,}' for name, n in sorted(statuses.items()))}); "
        f"{len(bad)} seeds failed"
    )
    return 1 if bad else 0


def _play_all(seeds: range) -> tuple[list[Ended], list[tuple[int, str]]]:
    seen, failed = [], []
    for seed in seeds:
        try:
            seen.append(play(seed))
        except BaseException:
            failed.append((seed, traceback.format_exc(limit=-4)))
    return seen, failed


if __name__ == "__main__":
    sys.exit(main())
