"""`maveriq.run`: the same in a script and in an event loop, and its folder is read back whole."""

import asyncio
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from python_environments import environment_with

import maveriq


@pytest.fixture
def workload(tmp_path: Path) -> dict[str, Any]:
    """A model that loads at once, and two requests."""
    trace, models = tmp_path / "requests.csv", tmp_path / "models.toml"
    trace.write_text("arrival_s,endpoint,prompt_tokens,output_tokens\n30,1,40,20\n31,1,200,20\n", encoding="utf-8")
    models.write_text('name = "one"\n\n[[models]]\nmodel = "llama-2-7b"\nload_at = 0\n', encoding="utf-8")
    return {"trace": trace, "models": models, "load_s": 5}


def test_a_run_in_a_notebooks_event_loop_is_read_back_whole(workload: dict[str, Any], tmp_path: Path) -> None:
    async def cell() -> maveriq.Run:  # a notebook runs its cells in an event loop
        return maveriq.run(backend="emulated", time_scale=0.05, out=tmp_path / "run", **workload)

    run = asyncio.run(cell())
    assert len(run.requests) == 2  # completed, or refused where this machine is slow to start an engine
    assert any((tmp_path / "run" / "engines").iterdir())
    loaded = maveriq.load_run(tmp_path / "run")
    for table in ("requests", "deployments", "gpus"):
        pd.testing.assert_frame_equal(getattr(loaded, table), getattr(run, table))
    assert loaded.engine_processes_csv == run.engine_processes_csv
    assert not loaded.interrupted
    with pytest.raises(maveriq.errors.InputError, match="exists already"):
        maveriq.run(backend="emulated", time_scale=0.05, out=tmp_path / "run", **workload)
    loaded.save(tmp_path / "copy")
    assert (tmp_path / "copy" / "engine_processes.csv").read_bytes() == (
        tmp_path / "run" / "engine_processes.csv"
    ).read_bytes()


def test_engines_run_in_the_interpreter_that_is_named(workload: dict[str, Any], tmp_path: Path) -> None:
    """One that shows its arguments in a file, and then runs Python with msgspec and nothing else."""
    bare = environment_with(tmp_path / "environment", "msgspec")
    python, started = tmp_path / "python", tmp_path / "started"
    python.write_text(f'#!/bin/sh\necho "$@" >> {started}\nexec {bare} "$@"\n')
    python.chmod(0o755)
    pythons = {"emulated": python, "trtllm": "/not/started/here"}
    run = maveriq.run(backend="emulated", time_scale=0.05, out=tmp_path / "run", engine_python=pythons, **workload)
    assert "maveriq.exec.engine_server" in started.read_text()
    assert any((tmp_path / "run" / "engines").iterdir())
    version = ".".join(map(str, sys.version_info[:3]))
    assert run.meta["engines"]["python"] == f"{python} ({version})"
    assert run.meta["engines"]["engine_python"] == (f"emulated={python}", "trtllm=/not/started/here")
    assert [deployment.status for deployment in run.record.deployments] != ["down"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "choose an engine: --backend emulated"),
        ({"backend": "emulatd"}, "did you mean 'emulated'"),
        ({"backend": "emulated", "time_scale": "x"}, "time_scale must be float, not 'x'"),
        ({"backend": "emulated", "out": 3}, "out must be a path, not 3"),
    ],
)
def test_wrong_options_of_a_run_are_input_errors(
    workload: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(maveriq.errors.InputError, match=message):
        maveriq.run(**options, **workload)
