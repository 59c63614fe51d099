"""`maveriq serve` and `maveriq console` as a user runs them, with real engine processes."""

import asyncio
import contextlib
import importlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
from fakes import FakeCluster
from python_environments import environment_with
from running import MODEL, TIMEOUT_S, until

from maveriq.cli.app import app
from maveriq.cli.error_handler import extra, run_command
from maveriq.errors import InputError, MaveriqError
from maveriq.scenario.system import ServingSystem

SERVE = ["serve", "--backend", "emulated", "--time-scale", "0.001", "--port", "0"]


@contextlib.contextmanager
def serving(folder: Path, *more: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Give a running `maveriq serve`, and its URL."""
    command = [sys.executable, "-m", "maveriq", *SERVE, "--state", str(folder / "s.db"), *more]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=clean_environment())
    try:
        assert server.stderr is not None
        yield server, re.findall(r"http://\S+(?=;)", server.stderr.readline())[0]
    finally:
        server.kill()
        server.communicate()


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "MAVERIQ_TOKEN"}


def engines_of(pid: int) -> list[int]:
    """Return the processes whose parent is `pid`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # gone meanwhile
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(path.parent.name))
    return found


def sample(http: httpx.Client, name: str) -> float:
    [line] = [line for line in http.get("/metrics").text.splitlines() if line.startswith(name)]
    return float(line.rpartition(" ")[2])


@pytest.mark.heavy
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_serve_kill_engine_stop_and_restart(tmp_path: Path) -> None:
    log = tmp_path / "access.log"
    with (
        serving(tmp_path, "--access-log", str(log)) as (server, url),
        httpx.Client(base_url=url, timeout=TIMEOUT_S) as http,
    ):
        assert http.post("/endpoints", json={"model": MODEL}).status_code == 201
        until(lambda: http.get("/endpoints/1").json()["status"] == "up")
        answer = http.post("/v1/completions", json={"model": MODEL, "prompt": "Hello", "max_tokens": 7})
        assert (answer.status_code, answer.json()["usage"]["completion_tokens"]) == (200, 7)
        [engine] = engines_of(server.pid)
        os.kill(engine, signal.SIGKILL)
        until(lambda: sample(http, "maveriq_engine_restarts_total") == 1)
        until(lambda: http.get("/endpoints/1").json()["status"] == "up")
        [again] = engines_of(server.pid)
        server.send_signal(signal.SIGTERM)
        assert server.wait(TIMEOUT_S) == 0
        assert not Path(f"/proc/{again}").exists(), "no engine outlives the server"
    assert '"POST /v1/completions" 200' in log.read_text()
    with serving(tmp_path) as (server, url), httpx.Client(base_url=url, timeout=TIMEOUT_S) as http:
        until(lambda: http.get("/endpoints/1").json()["status"] == "up")
        assert [row["status"] for row in http.get("/requests").json()] == ["completed"]
        server.send_signal(signal.SIGINT)
        assert server.wait(TIMEOUT_S) == 0


@pytest.mark.heavy
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_serve_runs_engines_in_the_interpreter_that_is_named(tmp_path: Path) -> None:
    python = environment_with(tmp_path / "environment", "msgspec")
    with (
        serving(tmp_path, "--engine-python", f"emulated={python}") as (server, url),
        httpx.Client(base_url=url, timeout=TIMEOUT_S) as http,
    ):
        assert http.post("/endpoints", json={"model": MODEL}).status_code == 201
        until(lambda: http.get("/endpoints/1").json()["status"] == "up")
        [engine] = engines_of(server.pid)
        assert Path(f"/proc/{engine}/cmdline").read_bytes().startswith(bytes(python) + b"\0")
        answer = http.post("/v1/completions", json={"model": MODEL, "prompt": "Hello", "max_tokens": 7})
        assert (answer.status_code, answer.json()["usage"]["completion_tokens"]) == (200, 7)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("serve",), "choose an engine"),
        ((*SERVE, "--host", "0.0.0.0"), "MAVERIQ_TOKEN"),  # noqa: S104
        ((*SERVE, "--state", "nowhere/s.db"), "state file 'nowhere/s.db' cannot be opened"),
        ((*SERVE, "--models-folder", "nowhere"), "--models-folder 'nowhere' is not a folder"),
        ((*SERVE, "--token-file", "nowhere"), "token file"),
        ((*SERVE, "--access-log", "nowhere/a.log"), "--access-log 'nowhere/a.log' cannot be written: No such file"),
        ((*SERVE, "--policy", "alpaserve"), "unknown policy 'alpaserve'"),
        ((*SERVE, "--port", "70000"), "70000"),
        ((*SERVE, "--engine-python", "emulated=/bin/cat"), "--engine-python emulated=/bin/cat: /bin/cat fails as an"),
        ((*SERVE[:-1], "{taken}"), "Address already in use; choose another with --port"),
        (("console", "-c", "modles"), "did you mean 'models'"),
        (("console", "--url", "nonsense", "-c", "models"), "is not an HTTP URL"),
    ],
)
def test_bad_input_is_one_line(
    words: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MAVERIQ_TOKEN", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        typed = [word.replace("{taken}", str(taken.getsockname()[1])) for word in words]
        assert run_command(lambda: app(typed, prog_name="maveriq", standalone_mode=False)) == 2
    shown = capfd.readouterr()
    assert shown.out == ""
    [line] = shown.err.splitlines()
    assert message in line
    assert line.startswith("maveriq: ")
    assert list(tmp_path.iterdir()) == []


def test_missing_package() -> None:
    message = r"maveriq serve needs the package no_such_package; install it with pip install 'maveriq\[serve\]'"
    with pytest.raises(InputError, match=message), extra("serve", needed_by="maveriq serve"):
        importlib.import_module("no_such_package")
    with pytest.raises(ModuleNotFoundError), extra("serve", needed_by="maveriq serve"):
        importlib.import_module("maveriq.no_such_module")


def test_executor_failure_stops_the_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clusters: list[FakeCluster] = []

    @contextlib.asynccontextmanager
    async def open_broken(system: ServingSystem, **_options: object) -> AsyncIterator[FakeCluster]:
        cluster = FakeCluster(system.policy)
        cluster.internal_error = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_later(0.1, cluster.internal_error.set_exception, ZeroDivisionError("by nought"))
        clusters.append(cluster)
        yield cluster

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MAVERIQ_TOKEN", raising=False)
    monkeypatch.setattr("maveriq.exec.executor.open_executor", open_broken)
    with pytest.raises(MaveriqError, match=r"the executor failed \(ZeroDivisionError: by nought\)"):
        app(SERVE, prog_name="maveriq", standalone_mode=False)
    assert clusters[0].closed


@pytest.mark.heavy
def test_a_missed_slo_and_the_assumed_unit_reach_the_user(tmp_path: Path) -> None:
    """The note of a decision is where `plan`, `sim` and `run` show it: in the answers of the API and in the console."""
    with serving(tmp_path) as (_, url), httpx.Client(base_url=url, timeout=TIMEOUT_S) as http:
        made = http.post("/endpoints", json={"model": MODEL, "intent": "min-cost", "slo_ms": 1}).json()
        missed = r"misses its SLO of 0\.001 s: the fastest that fits takes 0\.\d+ s"
        assert re.match(missed, made["reason"])
        until(lambda: http.get("/endpoints/1").json()["status"] == "up")
        assert re.match(missed, http.get("/endpoints/1").json()["reason"])
        commands = ["-c", f"1 deploy {MODEL} 20 min-cost 2", "-c", "1 status"]
        console = subprocess.run(
            [sys.executable, "-m", "maveriq", "console", "--wait", "--url", url, *commands],
            capture_output=True,
            text=True,
            check=True,
            timeout=TIMEOUT_S,
            env=clean_environment(),
        )
        first, *lines, last = console.stdout.splitlines()
        assert first == "SLO 2 ms: no unit was given, milliseconds are assumed"
        assert re.search(r"misses its SLO of 0\.002 s: the fastest that fits takes", lines[0])
        assert lines[1].startswith(f"{MODEL} had endpoint 1 already, and has another one now")
        assert re.match(rf"endpoint 2 \({MODEL}\) up after \d+\.\d s", lines[2])
        assert "misses its SLO of 0.002 s" in last
        assert http.delete("/endpoints/1").status_code == 204
        refused = http.post("/endpoints", json={"model": MODEL, "min_accuracy": 0.98})
        assert (refused.status_code, "write 98" in refused.json()["error"]["message"]) == (400, True)
