"""Sweeps end to end: equal to single runs, resumed after any end, and cells that fail alone."""

import json
import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest

import maveriq
from maveriq.errors import InputError
from maveriq.sweeps.folder import open_folder
from maveriq.sweeps.local_pool import LocalPool
from maveriq.sweeps.run import run_sweep
from maveriq.sweeps.spec import read_sweep
from maveriq.sweeps.worker import CellResult, simulate_cell

SMALL = {"options": {"limit": 20}, "grid": {"policy": ["llf", "packing"], "seed": [1, 2]}}
FIGURES = ["requests", "completed", "latency_mean_s", "gpu_hours"]


class Here:
    """Simulates cells in this process, and counts them."""

    def __init__(self, stop_after=None):
        self.simulated = []
        self._stop_after = stop_after

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def results(self, tasks):
        for task in tasks:
            if self._stop_after is not None and len(self.simulated) >= self._stop_after:
                raise KeyboardInterrupt
            self.simulated.append(task.number)
            yield simulate_cell(task)


def test_a_sweep_equals_its_single_runs(tmp_path):
    found = maveriq.sweep(SMALL, out=tmp_path / "sweep", workers=2)
    for number, (policy, seed) in enumerate([("llf", 1), ("llf", 2), ("packing", 1), ("packing", 2)], start=1):
        alone = maveriq.simulate(limit=20, policy=policy, seed=seed).metrics.loc["all"]
        row = found[(found.run == number) & (found.model == "all")].iloc[0]
        assert (row.policy, row.seed) == (policy, seed)
        assert row[FIGURES].tolist() == alone[FIGURES].tolist()
    for name in ("cells.csv", "cells.parquet"):
        read = getattr(pd, f"read_{name.partition('.')[2]}")(tmp_path / "sweep" / name)
        assert read["latency_mean_s"].tolist() == pytest.approx(found["latency_mean_s"].tolist(), nan_ok=True)


def test_an_interrupted_sweep_goes_on(tmp_path):
    spec, first, rest = read_sweep(SMALL), Here(stop_after=3), Here()
    with pytest.raises(KeyboardInterrupt):
        run_sweep(spec, tmp_path, pool=first)
    with (tmp_path / "cells.jsonl").open("ab") as log:
        log.write(b'{"number":4,"rows":{"al')  # the end of a process in the middle of a line
    resumed = run_sweep(spec, tmp_path, pool=rest)
    assert (first.simulated, rest.simulated) == ([1, 2, 3], [4])
    whole = run_sweep(spec, None, pool=Here())
    assert resumed.cells[FIGURES].equals(whole.cells[FIGURES])


def test_a_cell_that_fails_is_reported_and_tried_again(tmp_path):
    spec = read_sweep({"options": {"limit": 20}, "grid": {"trace": ["code", str(tmp_path / "missing.csv")]}})
    for _ in range(2):
        pool = Here()
        found = run_sweep(spec, tmp_path / "sweep", pool=pool)
        assert [(cell.number, "does not exist" in reason) for cell, reason in found.failed] == [(2, True)]
        assert found.cells.set_index("run").loc[1, "completed"].max() == 20
        assert pool.simulated[-1] == 2
    assert pool.simulated == [2]


@pytest.mark.heavy
def test_a_worker_that_dies_fails_its_cell_alone(tmp_path):
    (tmp_path / "rule.py").write_text("import os\ndef rule(*_):\n    os.kill(os.getpid(), 9)\n")
    spec = read_sweep({"options": {"limit": 20}, "grid": {"policy": [f"{tmp_path}/rule.py:rule", "llf"]}})
    with LocalPool(1) as pool:
        found = run_sweep(spec, None, pool=pool)
    assert [(cell.number, reason) for cell, reason in found.failed] == [
        (1, "the process that simulates it died twice (signal 9)")
    ]
    assert found.cells.set_index("run").loc[2, "completed"].max() == 20


def test_two_sweeps_do_not_share_a_folder(tmp_path):
    spec = read_sweep(SMALL)
    with open_folder(tmp_path, spec, overwrite=False), pytest.raises(InputError, match="in use by another sweep"):
        run_sweep(spec, tmp_path, pool=Here())


def test_another_sweep_replaces_nothing_unasked(tmp_path):
    run_sweep(read_sweep(SMALL), tmp_path, pool=Here())
    other = read_sweep(SMALL | {"options": {"limit": 10}})
    with pytest.raises(InputError, match="exists already"):
        run_sweep(other, tmp_path, pool=Here())
    assert run_sweep(other, tmp_path, pool=Here(), overwrite=True).cells["requests"].max() == 10


@pytest.mark.parametrize("damage", [b"{", b'{"number": 1}\nnonsense\n'])
def test_a_folder_of_something_else_is_left_alone(tmp_path, damage):
    (tmp_path / "precious").write_bytes(damage)
    with pytest.raises(InputError, match="holds files that are no sweep"):
        run_sweep(read_sweep(SMALL), tmp_path, pool=Here())
    assert [path.name for path in tmp_path.iterdir() if path.name != ".lock"] == ["precious"]


def test_a_damaged_log_is_named(tmp_path):
    run_sweep(read_sweep(SMALL), tmp_path, pool=Here())
    (tmp_path / "cells.jsonl").write_bytes(b"nonsense\n")
    with pytest.raises(InputError, match=r"line 1 of cells\.jsonl is damaged"):
        run_sweep(read_sweep(SMALL), tmp_path, pool=Here())


def test_kept_runs_are_run_folders(tmp_path):
    run_sweep(read_sweep(SMALL), tmp_path, pool=Here(), keep_runs=True)
    kept = maveriq.load_run(tmp_path / "runs" / "00003")
    assert (kept.options.policy, kept.options.seed) == ("packing", 1)


@pytest.mark.heavy
def test_a_killed_sweep_loses_only_the_cells_under_way(tmp_path):
    (tmp_path / "sweep.toml").write_text(
        'name = "killed"\n[options]\nlimit = 2000\n[grid]\nseed = [1, 2, 3, 4, 5, 6, 7, 8]\n'
    )
    command = [sys.executable, "-m", "maveriq", "sweep", "sweep.toml", "--out", "out", "--workers", "2", "--json"]
    log = tmp_path / "out" / "cells.jsonl"
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, start_new_session=True)
    while not (log.exists() and log.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = [json.loads(line)["number"] for line in log.read_bytes().splitlines()]
    assert len(kept) >= 3
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True)
    assert {row["run"] for row in json.loads(done.stdout)["cells"]} == set(range(1, 9))
    numbers = [json.loads(line)["number"] for line in log.read_bytes().splitlines()]
    assert numbers[: len(kept)] == kept
    assert sorted(numbers) == list(range(1, 9))


def test_results_of_workers_are_bounded_lines():
    result = simulate_cell_with_error("x\n" * 5_000)
    assert len(result.error) <= 1_000
    assert "\n" not in result.error


def simulate_cell_with_error(text):
    from maveriq.sweeps.worker import CellTask

    result = simulate_cell(CellTask(number=1, options={"trace": text}))
    assert isinstance(result, CellResult)
    return result
