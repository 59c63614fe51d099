"""Measures how long whole commands take."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

_MAVERIQ = str(Path(sys.executable).with_name("maveriq"))
_HELP_TRIES = 10


def help_ratio() -> float:
    """Return the time of `maveriq --help` divided by the time to import typer and rich."""
    ours = [_MAVERIQ, "--help"]
    bare = [sys.executable, "-c", "import typer, rich"]
    times_s = [
        (_wall_s(ours), _wall_s(bare)) for _ in range(_HELP_TRIES)
    ]  # alternate, because the speed of the machine varies
    return min(ours_s for ours_s, _ in times_s) / min(bare_s for _, bare_s in times_s)


def main_job_s(tries: int) -> float:
    """Return the seconds of `maveriq sim --quiet`."""
    return _sim([], tries)[0]


def conversation_requests_per_s(tries: int) -> float:
    """Return the requests per second on the Azure conversation trace at scale 1.

    All requests complete. The time includes start, reading, simulation, metrics and files.
    """
    wall_s, requests = _sim(["--trace", "conversation", "--scale", "1", "--drain-s", "1000000"], tries)
    return requests / wall_s


def _sim(arguments: Sequence[str], tries: int) -> tuple[float, int]:
    """Return the minimum wall time of `maveriq sim` and its number of requests."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "run"
        command = [_MAVERIQ, "sim", "--quiet", "--out", str(out), "--overwrite", *arguments]
        wall_s = min(_wall_s(command) for _ in range(tries))
        with (out / "requests.csv").open(encoding="utf-8") as rows:
            return wall_s, sum(1 for _ in rows) - 1


def _wall_s(command: Sequence[str]) -> float:
    start_s = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start_s
