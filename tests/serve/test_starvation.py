"""A server whose system starts no more threads or processes: 503 with Retry-After, and it recovers."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from running import MODEL, TIMEOUT_S, until
from test_hostile_models import put_model

STARVED = Path(__file__).with_name("starved.py")


class Starving:
    """A server, and what its system refuses."""

    def __init__(self, url: str, file: Path) -> None:
        self.url = url
        self._file = file

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=TIMEOUT_S)

    def of(self, what: str) -> None:
        self._file.write_text(what)

    def end(self) -> None:
        self._file.unlink()


@pytest.fixture
def starving(tmp_path: Path) -> Iterator[Starving]:
    put_model(tmp_path / "models", "mine")
    command = [
        sys.executable, str(STARVED), str(tmp_path / "starved"), "serve", "--backend", "emulated",
        "--time-scale", "0.001", "--port", "0", "--state", str(tmp_path / "s.db"),
        "--models-folder", str(tmp_path / "models"),
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "MAVERIQ_TOKEN"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as server:
        try:
            assert server.stderr is not None
            yield Starving(re.findall(r"http://\S+(?=;)", server.stderr.readline())[0], tmp_path / "starved")
        finally:
            server.kill()


@pytest.mark.parametrize("what", ["threads", "processes"])
def test_requests_are_503_until_the_system_recovers(starving: Starving, what: str) -> None:
    with starving.client() as http:
        starving.of(what)
        refused = http.post("/models", json={"model": "mine"})
        assert refused.status_code == 503, refused.text
        assert refused.headers["retry-after"] == "10"
        assert refused.json()["error"]["code"] == "not_possible_now"
        assert http.get("/health").json()["status"] == "ready"
        starving.end()
        assert http.post("/models", json={"model": "mine"}).status_code == 201


@pytest.mark.parametrize("what", ["threads", "processes"])
def test_an_engine_starts_when_the_system_recovers(starving: Starving, what: str) -> None:
    with starving.client() as http:
        assert http.post("/models", json={"model": MODEL}).status_code == 201  # its thread is kept
        starving.of(what)
        made = http.post("/endpoints", json={"model": MODEL}).json()
        path = f"/endpoints/{made['id']}"
        until(lambda: any("cannot be started" in each["reason"] for each in http.get(path).json()["deployments"]))
        assert http.get("/health").status_code == 200
        starving.end()
        until(lambda: http.get(path).json()["status"] == "up")
        answer = http.post("/v1/completions", json={"model": MODEL, "prompt": "a", "max_tokens": 3})
        assert answer.status_code == 200, answer.text
