"""Restarts: endpoints and final statuses survive a graceful stop and a kill."""

import asyncio
import resource
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from running import MODEL, TIMEOUT_S, running, until

from maveriq.errors import InputError
from maveriq.serve.store import INTERRUPTED, Store

LIVE = Path(__file__).with_name("live.py")
CLIENTS = 8


@contextmanager
def process(state: Path, *, step: float, grace_period_s: float = 60) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Give a server as a process of its own, and its URL."""
    server = subprocess.Popen(
        [sys.executable, str(LIVE), str(state), str(step), str(grace_period_s)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        yield server, server.stdout.readline().strip()
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


def complete(http: httpx.Client, name: str, max_tokens: int) -> httpx.Response:
    body = {"model": MODEL, "prompt": "a", "max_tokens": max_tokens}
    return http.post("/v1/completions", json=body, headers={"X-Request-Id": name})


def load(url: str, seen: dict[str, str], number: int) -> None:
    """Send requests until the server goes away; note the result of each."""
    with httpx.Client(base_url=url, timeout=TIMEOUT_S) as http:
        for count in range(10_000):
            name = f"c{number}-{count}"
            seen[name] = "sent"
            try:
                answer = complete(http, name, 5)
            except httpx.HTTPError:
                return
            seen[name] = "completed" if answer.status_code == 200 else str(answer.status_code)
            if answer.status_code != 200:
                return


@contextmanager
def clients(url: str) -> Iterator[dict[str, str]]:
    seen: dict[str, str] = {}
    threads = [threading.Thread(target=load, args=(url, seen, number)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    yield seen
    for thread in threads:
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()


def up(url: str) -> None:
    with httpx.Client(base_url=url, timeout=TIMEOUT_S) as http:
        http.post("/endpoints", json={"model": MODEL})
        until(lambda: http.get("/endpoints/1").json()["status"] == "up")


@pytest.mark.heavy
def test_kill_under_load(state: Path) -> None:
    with process(state, step=0.002) as (server, url):
        up(url)
        with clients(url) as seen:
            until(lambda: sum(result == "completed" for result in list(seen.values())) > 25)
            with httpx.Client(base_url=url, timeout=TIMEOUT_S) as http, ThreadPoolExecutor() as pool:
                # It takes 8 s or more, so it is in flight when the server is killed.
                long_request = pool.submit(complete, http, "long", 4_000)
                until(lambda: httpx.get(f"{url}/requests/long", timeout=TIMEOUT_S).status_code == 200)
                server.kill()
                assert isinstance(long_request.exception(TIMEOUT_S), httpx.HTTPError)
    with process(state, step=0.002) as (_, url), httpx.Client(base_url=url, timeout=TIMEOUT_S) as http:
        rows = {row["id"]: row for row in http.get("/requests", params={"limit": 1000}).json()}
        assert {row["status"] for row in rows.values()} == {"completed", "failed"}
        assert {row["reason"] for row in rows.values()} == {"", INTERRUPTED}
        for name, result in seen.items():
            if result == "completed":
                assert rows[name]["status"] == "completed", "the state file agrees with the responses"
        lost = {name for name, row in rows.items() if row["status"] == "failed"}
        assert "long" in lost
        assert len(lost) <= CLIENTS + 1
        assert all(seen[name] == "sent" for name in lost - {"long"})
        until(lambda: http.get("/endpoints/1").json()["status"] == "up")
        assert complete(http, "after", 1).status_code == 200, "it serves again"


@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGHUP, signal.SIGHUP]])
def test_a_graceful_stop_finishes_accepted_requests(state: Path, signals: list[signal.Signals]) -> None:
    with process(state, step=0.002) as (server, url):
        up(url)
        with clients(url) as seen:
            until(lambda: sum(result == "completed" for result in list(seen.values())) > 20)
            for number in signals:
                server.send_signal(number)
        assert server.wait(TIMEOUT_S) == 0
    store = Store(state)
    rows = {row.request_id: row for row in asyncio.run(store.requests(status=None, limit=1000))}
    store.close()
    assert {row.status for row in rows.values()} == {"completed"}
    assert sum(result == "completed" for result in seen.values()) == len(rows)


@pytest.mark.heavy
@pytest.mark.parametrize("twice", [False, True])
def test_requests_end_with_the_grace_period_or_a_second_signal(state: Path, *, twice: bool) -> None:
    with process(state, step=600, grace_period_s=600 if twice else 0.3) as (server, url):
        up(url)
        with clients(url) as seen:
            with httpx.Client(base_url=url, timeout=TIMEOUT_S) as http:
                until(lambda: http.get("/health").json()["in_flight"] == CLIENTS)
            server.send_signal(signal.SIGINT)
            if twice:
                until(lambda: not accepts_connections(url))
                server.send_signal(signal.SIGINT)
        assert server.wait(TIMEOUT_S) == 0
    assert set(seen.values()) <= {"503", "sent"}, "an error, or a broken connection if there was no grace period"
    store = Store(state)
    rows = asyncio.run(store.requests(status=None, limit=1000))
    store.close()
    assert Counter(row.status for row in rows) == {"unfinished": CLIENTS}


def accepted_requests(http: httpx.Client) -> int:
    """Return how many requests are stored as accepted."""
    lines = http.get("/metrics").text.splitlines()
    return sum(int(float(line.split()[-1])) for line in lines if line.startswith("maveriq_requests_accepted_total{"))


@contextmanager
def full_disk(server: subprocess.Popen[str]) -> Iterator[None]:
    """Let no file of a server grow: its writes fail as on a full disk."""
    before = resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
    yield
    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, before)


@pytest.mark.heavy
def test_answers_equal_the_state_after_a_full_disk_and_a_kill(state: Path) -> None:
    answers: dict[str, httpx.Response] = {}
    with process(state, step=0.05) as (server, url), ThreadPoolExecutor(CLIENTS) as pool:
        up(url)

        def send(name: str) -> None:
            with httpx.Client(base_url=url, timeout=TIMEOUT_S) as http:
                answers[name] = complete(http, name, 8)

        before = [pool.submit(send, f"before-{number}") for number in range(CLIENTS)]
        with httpx.Client(base_url=url, timeout=TIMEOUT_S) as http:
            # Not `in_flight`, which also counts requests whose acceptance is not stored yet.
            until(lambda: accepted_requests(http) == CLIENTS)
            with full_disk(server):
                assert [sent.result(TIMEOUT_S) for sent in before] == [None] * CLIENTS
                assert complete(http, "refused", 1).json()["error"]["code"] == "state_not_writable"
                assert "the state file cannot be written" in http.get("/health").json()["problems"]
            until(lambda: http.get("/health").json()["in_flight"] == 0)
            send("after")
        server.kill()
    codes = {name: answer.json()["error"]["code"] for name, answer in answers.items() if answer.status_code != 200}
    assert set(codes.values()) == {"outcome_not_stored"}
    store = Store(state)
    rows = {row.request_id: row.status for row in asyncio.run(store.requests(status=None, limit=1000))}
    store.close()
    assert rows == {name: "failed" if name in codes else "completed" for name in answers}
    assert rows["after"] == "completed"


def accepts_connections(url: str) -> bool:
    host, _, port = url.removeprefix("http://").partition(":")
    try:
        socket.create_connection((host, int(port)), timeout=TIMEOUT_S).close()
    except OSError:
        return False
    return True


def test_endpoints_are_restored_on_the_same_gpus(state: Path) -> None:
    with running(state) as server, server.client() as http:
        for placement in ("last", None, "first"):
            server.deploy(placement=placement, slo_ms=900, batch_size=2)
        http.delete("/endpoints/2")
        before = http.get("/endpoints").json()
    with running(state) as server, server.client() as http:
        until(lambda: all(endpoint["status"] == "up" for endpoint in http.get("/endpoints").json()))
        after = http.get("/endpoints").json()
        assert [endpoint["deployments"][0]["gpus"] for endpoint in after] == [
            endpoint["deployments"][0]["gpus"] for endpoint in before
        ]
        same = [key for key in before[0] if key not in ("deployments", "status", "completed")]
        assert [[endpoint[key] for key in same] for endpoint in after] == [
            [endpoint[key] for key in same] for endpoint in before
        ]
        assert server.deploy() == 4, "a number is never given twice"
        assert [model["name"] for model in http.get("/models").json()] == [MODEL]


def test_two_servers_do_not_share_a_state(state: Path) -> None:
    with running(state), pytest.raises(InputError, match="in use by another maveriq serve"):
        Store(state)


@pytest.mark.parametrize("content", [b"not a database at all, but long enough to be one" * 30, b""])
def test_file_that_is_not_a_database(state: Path, content: bytes) -> None:
    state.write_bytes(content)
    if content:
        with pytest.raises(InputError, match=r"state\.db"):
            Store(state)
    else:
        Store(state).close()  # an empty file is an empty state
    assert not content or state.read_bytes() == content


def test_state_file_in_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be opened"):
        Store(tmp_path / "nowhere" / "state.db")


def test_rows_that_point_to_nothing_are_reported(state: Path, tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    with running(state) as server:
        server.deploy()
        server.deploy("falcon-7b")
    other = sqlite3.connect(state)
    other.execute("UPDATE endpoints SET model_id = 77 WHERE endpoint_id = 1")
    other.execute("UPDATE models SET folder = ? WHERE name = 'falcon-7b'", (str(folder),))
    other.commit()
    other.close()
    with running(state) as server, server.client() as http:
        problems = http.get("/health").json()["problems"]
        assert "endpoint 1 is left out: the state file has no model 77" in problems
        assert f"model falcon-7b: its folder {str(folder)!r} is gone" in problems
        assert [endpoint["id"] for endpoint in http.get("/endpoints").json()] == [2]


def test_a_state_file_that_is_deleted_under_the_server_is_reported(state: Path) -> None:
    with running(state) as server, server.client() as http:
        server.deploy()
        state.unlink()
        answer = complete(http, "a", 1)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "state_not_writable")
        assert "was deleted while the server runs" in answer.json()["error"]["message"]
        assert any("was deleted" in problem for problem in http.get("/health").json()["problems"])


@pytest.mark.parametrize("user_version", [0, 1, 99])
def test_a_state_file_of_another_program_or_version_is_refused(state: Path, user_version: int) -> None:
    other = sqlite3.connect(state)
    other.execute("CREATE TABLE deployments (a)")
    other.execute(f"PRAGMA user_version = {user_version}")
    other.close()
    with pytest.raises(InputError, match="another version"):
        Store(state)
