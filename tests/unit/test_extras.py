"""The extras of the package: their bounds have one source, the README lists them, and they resolve."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from maveriq.exec.engine_environments import engines_with_environments
from maveriq.exec.engine_python import HOST_REQUIREMENT, NEWEST_PYTHON, OLDEST_PYTHON

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
OF_THE_EXECUTOR = "nvidia-ml-py"  # reads GPUs in the process of maveriq, not in that of an engine


def bounds(requirements: list[str]) -> dict[str, str]:
    return {need.name: str(need.specifier) for need in map(Requirement, requirements) if need.name != OF_THE_EXECUTOR}


@pytest.mark.parametrize("engine", engines_with_environments())
def test_an_extra_and_an_environment_have_the_same_bounds(engine: str) -> None:
    assert bounds(EXTRAS[engine]) == bounds(list(engines_with_environments()[engine].requirements))


def test_bounds_of_engines() -> None:
    """The releases whose arguments the adapters know; msgspec as maveriq itself needs it."""
    assert bounds(EXTRAS["vllm"]) == {"vllm": "<0.34,>=0.32"}
    tensorrt = next(need for need in map(Requirement, EXTRAS["trtllm"]) if need.name == "tensorrt-llm")
    versions = [f"{OLDEST_PYTHON[0]}.{minor}" for minor in range(OLDEST_PYTHON[1], NEWEST_PYTHON[1] + 1)]
    assert tensorrt.marker is not None
    wanted = tuple(version for version in versions if tensorrt.marker.evaluate({"python_version": version}))
    assert wanted == engines_with_environments()["trtllm"].pythons
    assert HOST_REQUIREMENT in PROJECT["dependencies"]
    assert all(set(facts.pythons) <= set(versions) for facts in engines_with_environments().values())


def test_the_readme_lists_every_extra() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [extra for extra in EXTRAS if f"maveriq[{extra}]" not in readme] == []


@pytest.mark.heavy
@pytest.mark.skipif(os.environ.get("MAVERIQ_RESOLVE_EXTRAS") != "1", reason="set MAVERIQ_RESOLVE_EXTRAS=1")
@pytest.mark.parametrize("extra", [extra for extra in EXTRAS if extra != "trtllm"])  # docs/engines.md says why
def test_an_extra_resolves(extra: str, tmp_path: Path) -> None:
    """pip finds versions of an extra and of all that it needs, beside maveriq's own requirements."""
    report = tmp_path / "report.json"
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--report", str(report)]
    subprocess.run([*pip, *PROJECT["dependencies"], *EXTRAS[extra]], check=True)
    items = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    found = {canonicalize_name(item["name"]): item["version"] for item in items}
    for need in map(Requirement, EXTRAS[extra]):
        assert need.specifier.contains(found[canonicalize_name(need.name)]), need
