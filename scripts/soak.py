"""Plays many simulated runs under faults, or one again: `python scripts/soak.py [--count N] [--lives --seed N]`.

Runs are of a body with its users (tests/dst/drama.py) and, a tenth as many, of a service that is killed and started
again (tests/dst/lives.py). Exit code 1 where a seed fails; its number is all that is needed to see it again.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

_TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(_TESTS), str(_TESTS / "dst")]

from drama import Ended, play  # noqa: E402  (they lie beside the tests)
from lives import live  # noqa: E402

_CHUNK = 100
_PLAYS: dict[str, Callable[[int], Ended]] = {"drama": play, "lives": live}


def main() -> int:
    """Do what the command line says and return the exit code."""
    parser = argparse.ArgumentParser(description="Run controller, supervision and service under random faults.")
    parser.add_argument("--count", type=int, default=10_000, help="how many seeds (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="the first of them (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="play this one alone and say what was seen")
    parser.add_argument(
        "--lives", action="store_true", help="with --seed: of a service that is killed and started again"
    )
    said = parser.parse_args()
    if said.seed is not None:
        print(_PLAYS["lives" if said.lives else "drama"](said.seed))
        return 0
    bad = soak("drama", said.first, said.count) + soak("lives", said.first, max(1, said.count // 10))
    return 1 if bad else 0


def soak(name: str, first: int, count: int) -> int:
    """Play seeds on all cores, say what was seen, and return how many failed."""
    started_s = time.monotonic()
    statuses: Counter[str] = Counter()
    engines, simulated_s, bad = 0, 0.0, 0
    chunks = [range(start, min(start + _CHUNK, first + count)) for start in range(first, first + count, _CHUNK)]
    with ProcessPoolExecutor() as pool:
        for seen, failed in pool.map(partial(_play_all, name), chunks):
            for one in seen:
                statuses += one.statuses
                engines += one.engines
                simulated_s += one.simulated_s
            for seed, told in failed:
                print(f"{name}, seed {seed}:\n{told}")
            bad += len(failed)
    requests = ", ".join(f"{status} {n:,}" for status, n in sorted(statuses.items()))
    print(
        f"{name}: {count:,} seeds in {time.monotonic() - started_s:.0f} s, {simulated_s / 3600:,.0f} simulated hours, "
        f"{engines:,} engines, {statuses.total():,} requests ({requests}); {bad} seeds failed"
    )
    return bad


def _play_all(name: str, seeds: range) -> tuple[list[Ended], list[tuple[int, str]]]:
    logging.disable()  # a service says much of its misfortunes
    seen, failed = [], []
    for seed in seeds:
        try:
            seen.append(_PLAYS[name](seed))
        except BaseException:
            failed.append((seed, traceback.format_exc(limit=-4)))
    return seen, failed


if __name__ == "__main__":
    sys.exit(main())
