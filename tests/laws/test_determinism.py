"""The same seed gives the same bytes in every process; another seed gives another run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = ("deployments.csv", "gpus.csv", "requests.csv", "run.json")
# Deadlines, batches and a fault cover most code whose order could depend on hashes.
SHORT_RUN = (
    *("--trace", "conversation", "--scale", "0.05", "--slo-scale", "5", "--queue", "edf"),
    *("--batch-size", "2", "--fail", "gpu=1@600s,for=60s", "--quiet"),
)


def start(folder: Path, *, seed: int, hash_seed: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "maveriq", "sim", *SHORT_RUN, "--seed", str(seed), "--out", str(folder)],
        env=os.environ | {"PYTHONHASHSEED": str(hash_seed)},
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """Three runs in parallel, each as the bytes of its files."""
    folder = tmp_path_factory.mktemp("runs")
    started = {
        "first": start(folder / "first", seed=42, hash_seed=1),
        "again": start(folder / "again", seed=42, hash_seed=2),
        "other seed": start(folder / "other seed", seed=43, hash_seed=1),
    }
    for process in started.values():
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    return {name: {path.name: path.read_bytes() for path in (folder / name).iterdir()} for name in started}


def test_a_run_leaves_its_four_files(runs: dict[str, dict[str, bytes]]) -> None:
    assert sorted(runs["first"]) == sorted(FILES)


@pytest.mark.parametrize("name", FILES)
def test_the_same_seed_gives_the_same_bytes_in_two_processes(name: str, runs: dict[str, dict[str, bytes]]) -> None:
    assert runs["first"][name] == runs["again"][name]


def test_another_seed_gives_other_requests(runs: dict[str, dict[str, bytes]]) -> None:
    assert runs["first"]["requests.csv"] != runs["other seed"]["requests.csv"]
