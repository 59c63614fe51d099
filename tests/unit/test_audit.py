"""`make audit`: what was not looked up never counts as harmless. The bounds of dependencies admit what is tested."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import audit
import pytest
from packaging.requirements import Requirement

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REQUIREMENTS = list(itertools.chain(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()))
BY_CALENDAR = {"packaging", "pyarrow", "nvidia-ml-py"}

FINE = {"name": "good", "version": "1", "vulns": []}
BAD = {"name": "bad", "version": "1", "vulns": [{"id": "CVE-1", "fix_versions": ["2"]}]}
UNKNOWN = {"name": "lost", "skip_reason": "Dependency not found on PyPI and could not be audited: lost (1)"}
OWN = {"name": "maveriq", "skip_reason": "distribution marked as editable"}


@pytest.mark.parametrize(
    ("dependencies", "code", "words"),
    [
        ([FINE, OWN], 0, "1 packages checked, 0 with known"),
        ([FINE, BAD], 1, "bad 1: CVE-1, fixed in 2"),
        ([BAD, UNKNOWN], 1, "NOT CHECKED: 1 packages"),
        ([FINE, UNKNOWN], 2, "does not answer for (lost)"),
        ([UNKNOWN], 2, "0 packages checked"),
        ([], 2, "0 packages checked"),
    ],
)
def test_verdict(dependencies: list[dict[str, Any]], code: int, words: str) -> None:
    lines, found = audit.verdict(dependencies)
    assert found == code
    assert words in "\n".join(lines)


@pytest.mark.parametrize(
    ("out", "err", "words"),
    [
        ("", "ERROR:pip_audit._cli:Could not connect to PyPI's vulnerability feed", "Could not connect"),
        ("", "", "it printed nothing"),
        ("null", "No module named pip_audit", "No module named pip_audit"),
        (json.dumps({"dependencies": [UNKNOWN]}), "", "NOT CHECKED: 1 packages"),
    ],
)
def test_a_missing_answer_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], out: str, err: str, words: str
) -> None:
    ended = subprocess.CompletedProcess([], 1, stdout=out, stderr=err)
    monkeypatch.setattr(audit.subprocess, "run", lambda *_, **__: ended)
    assert audit.main() == 2
    printed = capsys.readouterr().out
    assert printed.startswith("NOT CHECKED")
    assert words in printed


@pytest.mark.parametrize("text", REQUIREMENTS)
def test_a_dependency_has_both_bounds_and_admits_what_is_installed(text: str) -> None:
    need = Requirement(text)
    operators = {bound.operator for bound in need.specifier}
    assert operators == ({">="} if need.name in BY_CALENDAR else {">=", "<"})
    try:
        installed = importlib.metadata.version(need.name)
    except importlib.metadata.PackageNotFoundError:
        return  # an engine of another environment
    assert need.specifier.contains(installed, prereleases=True)
