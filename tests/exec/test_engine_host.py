"""The process of an engine needs only msgspec and the standard library, in any Python from 3.10 on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
from engine_fixtures import ENGINES, EngineCase, alive_in_group, batch_of, run_async, started_engine, until
from engine_specs import TINY
from python_environments import environment_of, environment_with

from maveriq.exec.engine_python import check_engine_python
from maveriq.exec.engines.engine import BACKENDS
from maveriq.exec.launcher import ProcessLauncher
from maveriq.exec.messages import Finished, Stop

EMULATED = ENGINES[0]
OTHER_VERSIONS = ("3.10", "3.12", "3.13")
ENGINE_MODULES = [location.partition(":")[0] for location in BACKENDS.values()]
LIBRARIES = {"msgspec", "torch", "transformers", "safetensors", "vllm", "tensorrt_llm", "pynvml"}
"""msgspec, and what an engine imports when it loads a model."""

HEAVY = {"cli", "api", "serve", "report", "scenario", "control", "policy", "workload", "estimate", "sim"}


@cache
def modules_of_the_host() -> frozenset[str]:
    """Every module that an engine's process imports, at once or later."""
    import grimp

    graph = grimp.build_graph("maveriq", include_external_packages=True, exclude_type_checking_imports=True)
    graph.remove_import(importer="maveriq.streams", imported="numpy")  # in `generator`; engines call `pick`
    roots = ("maveriq.exec.engine_server", "maveriq.exec.engines.torch.rank", *ENGINE_MODULES)
    return frozenset(roots).union(*map(graph.find_upstream_modules, roots))


def test_the_host_imports_only_the_standard_library_msgspec_and_its_engine() -> None:
    external = {name for name in modules_of_the_host() if name.partition(".")[0] != "maveriq"}
    assert external - sys.stdlib_module_names <= LIBRARIES
    packages = {name.split(".")[1] for name in modules_of_the_host() - external if name != "maveriq"}
    assert not packages & HEAVY


LOADED_MODULES = """
import importlib, json, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules} - sys.stdlib_module_names)))
"""


def check_that_it_imports_all_engines(python: Path, folder: Path) -> None:
    """Import every engine's module in an interpreter: nothing but msgspec is loaded besides."""
    with ProcessLauncher("emulated", logs=folder, python=python) as launcher:
        path = launcher._environment["PYTHONPATH"]
        command = [str(python), "-c", LOADED_MODULES, "maveriq.exec.engine_server", *ENGINE_MODULES]
        shown = subprocess.run(command, check=False, capture_output=True, text=True, env={"PYTHONPATH": path}, cwd="/")
    assert shown.returncode == 0, shown.stderr
    loaded = set(json.loads(shown.stdout))
    assert loaded - {"__main__", "__mp_main__", "sitecustomize", "usercustomize"} == {"maveriq", "msgspec"}


def check_that_it_serves(case: EngineCase, python: Path, folder: Path) -> None:
    """Serve the same batch in another interpreter and in this one: the tokens are equal, and the whole group ends."""

    async def tokens(interpreter: Path | None) -> Finished:
        async with started_engine(case, folder, python=interpreter, pp=2, layer_split=(5, 3)) as engine:
            if interpreter is not None:
                program = Path(f"/proc/{engine.connection.pid}/cmdline").read_bytes().split(b"\0")[0]
                assert program == bytes(interpreter)
                assert len(alive_in_group(engine.connection.pid)) >= 2
            engine.send(batch_of(1, [3, 1, 4], [1, 5], tokens=5))
            finished: Finished = await engine.receive(Finished)
            engine.send(Stop())
            assert await engine.exit_code() == 0
            await until(lambda: not alive_in_group(engine.connection.pid))
        return finished

    async def check() -> None:
        assert (await tokens(python)).outputs == (await tokens(None)).outputs

    run_async(check)


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter of this version with msgspec and nothing else."""
    return environment_with(tmp_path_factory.mktemp("bare") / "environment", "msgspec")


def test_an_environment_with_msgspec_only_imports_every_engine(bare_python: Path, tmp_path: Path) -> None:
    check_that_it_imports_all_engines(bare_python, tmp_path)


def test_an_environment_with_msgspec_only_serves(bare_python: Path, tmp_path: Path) -> None:
    check_that_it_serves(EMULATED, bare_python, tmp_path)


def test_our_libraries_and_path_do_not_reach_another_interpreter(
    bare_python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the folder that holds maveriq nor PYTHONPATH: their libraries are built for this interpreter."""
    (tmp_path / "msgspec.py").write_text("raise SystemExit('not this one')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    async def check() -> None:
        async with started_engine(EMULATED, tmp_path, python=bare_python) as engine:
            environment = dict(
                entry.split(b"=", 1)
                for entry in Path(f"/proc/{engine.connection.pid}/environ").read_bytes().split(b"\0")
                if entry
            )
            (import_path,) = environment[b"PYTHONPATH"].decode().split(":")
            assert [entry.name for entry in Path(import_path).iterdir()] == ["maveriq"]
            assert environment[b"PATH"].startswith(bytes(bare_python.parent) + b":")

    run_async(check)


@pytest.mark.heavy
@pytest.mark.parametrize("version", OTHER_VERSIONS)
def test_other_versions_of_python_serve(version: str, tmp_path: Path) -> None:
    python = environment_of(version, tmp_path / "environment")
    check_that_it_imports_all_engines(python, tmp_path)
    check_that_it_serves(EMULATED, python, tmp_path)


@pytest.mark.heavy
@pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed")
def test_the_torch_engine_in_an_environment_of_its_own(tmp_path: Path) -> None:
    """With torch, safetensors, msgspec and what they need: no NumPy, and no transformers."""
    python = environment_with(tmp_path / "environment", "torch", "safetensors", "msgspec")
    for absent in ("numpy", "transformers", "pandas", "typer"):
        assert subprocess.run([python, "-c", f"import {absent}"], check=False, capture_output=True).returncode == 1
    check_that_it_serves(ENGINES[1], python, tmp_path)


VLLM_PYTHON = os.environ.get("MAVERIQ_VLLM_PYTHON", "")


@pytest.mark.heavy
@pytest.mark.skipif(not VLLM_PYTHON, reason="set MAVERIQ_VLLM_PYTHON to an interpreter with vLLM for CPUs")
def test_vllm_in_an_environment_of_its_own(tmp_path: Path) -> None:
    vllm = check_engine_python(VLLM_PYTHON, ["vllm"], source="MAVERIQ_VLLM_PYTHON")
    spec = {"config_json": json.dumps(TINY["llama"]), "layer_split": (4,)}

    async def check() -> None:
        async with started_engine(EngineCase(backend="vllm"), tmp_path, load=False, python=vllm.path, **spec) as engine:
            loaded = await engine.load()
            assert (loaded.backend, loaded.version) == ("vllm", vllm.packages["vllm"].partition(" ")[0])
            engine.send(batch_of(1, [3, 1, 4], [1, 5], tokens=5))
            finished: Finished = await engine.receive(Finished)
            assert [len(tokens) for tokens in finished.outputs] == [5, 5]

    run_async(check)
