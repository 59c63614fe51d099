"""`maveriq engines check` as a command: its lines, table, JSON, exit codes, and Ctrl-C."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from command_results import Maveriq

from maveriq.exec.checks.runner import CheckResult, failed, passed

TIMEOUT_S = 240.0
COMMAND = [sys.executable, "-m", "maveriq", "engines", "check", "--backend"]


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")


def test_emulated_engines_pass(maveriq: Maveriq) -> None:
    ended = maveriq("engines check --backend emulated --gpus 0-3 --json")
    assert ended.code == 0
    report = json.loads(ended.out)
    assert (report["backend"], report["gpus"], report["passed"]) == ("emulated", [0, 1, 2, 3], True)
    names = {result: [c["name"] for c in report["checks"] if c["result"] == result] for result in ("failed", "skipped")}
    assert names["failed"] == []
    assert {"too large", "parameter bytes", "layers per stage", "memory returned"} == set(names["skipped"])
    assert "start TP 2 x PP 2 float16 (3+1 layers)" in {check["name"] for check in report["checks"]}
    assert len(ended.err.splitlines()) == len(report["checks"]), "a line a check, on stderr"


@pytest.mark.heavy
@pytest.mark.skipif(find_spec("torch") is None, reason="needs maveriq[torch]")
def test_torch_engines_pass(maveriq: Maveriq) -> None:
    ended = maveriq("engines check --backend torch --json")
    report = json.loads(ended.out)
    results = {check["name"]: check["result"] for check in report["checks"]}
    assert [name for name, result in results.items() if result == "failed"] == [], ended.out
    assert ended.code == 0
    for name in ("too large", "parameter bytes", "layers per stage", "tokens of splits", "killed worker"):
        assert results[name] == "passed"


Reporter = Callable[..., Awaitable[None]]


def reporting(*results: CheckResult) -> Reporter:
    async def report(*_: Any, on_result: Callable[[CheckResult], None], **__: Any) -> None:
        for result in results:
            on_result(result)

    return report


GOOD = CheckResult(name="first", proves="one thing", outcome=passed("seen [bold]"), seconds=1.0)
BAD = CheckResult(name="second", proves="another", outcome=failed("not seen"), seconds=2.5)


def test_a_failed_check_fails_the_command(maveriq: Maveriq, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maveriq.cli.engine_check.check_engines", reporting(GOOD, BAD))
    ended = maveriq("engines check --backend emulated")
    assert (ended.code, ended.err) == (1, "maveriq: 1 of 2 checks of emulated failed: second\n")
    lines = ended.out.splitlines()
    assert "passed" in lines[0]
    assert "seen [bold]" in lines[0]
    assert "not seen" in lines[1]
    assert "1 passed, 1 failed, 0 skipped" in " ".join(ended.out.split())
    assert "another" in lines[-1]


def test_json_of_a_failed_check(maveriq: Maveriq, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maveriq.cli.engine_check.check_engines", reporting(GOOD, BAD))
    ended = maveriq("engines check --backend emulated --json")
    assert ended.code == 1
    assert json.loads(ended.out)["passed"] is False


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("", ("--backend",)),
        ("--backend trtlm", ("trtlm", "trtllm")),
        ("--backend emulated --gpus 0-x", ("--gpus", "0-7")),
        ("--backend torch --engine-python torch=/no/such/python", ("--engine-python", "/no/such/python")),
        ("--backend emulated --gpus 5000", ("--gpus", "1023")),
    ],
)
def test_bad_options_get_one_line(maveriq: Maveriq, options: str, words: tuple[str, ...]) -> None:
    ended = maveriq(f"engines check {options}")
    assert ended.code == 2
    assert [word for word in words if word not in ended.only_line] == []


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_an_interrupt_ends_it_in_order(number: signal.Signals) -> None:
    process = subprocess.Popen(
        [*COMMAND, "emulated"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    )
    assert process.stdout is not None
    first = process.stdout.readline()
    children = children_of(process.pid)
    process.send_signal(number)
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert first.startswith("passed")
    assert process.returncode == 130
    assert err == "maveriq: stopped; no file is left half-written\n"
    assert "Engines of emulated:" in out, "a table of what was checked so far"
    assert children
    assert [pid for pid in children if Path(f"/proc/{pid}").exists()] == []


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
