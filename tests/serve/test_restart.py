"""A server that ends, in order or not: what it was told survives, and nothing accepted is without a status."""

import asyncio
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from running import MODEL, running, until

from maveriq.errors import InputError
from maveriq.serve.store import INTERRUPTED, Store

LIVE = Path(__file__).with_name("live.py")
CLIENTS = 8


@contextmanager
def process(state: Path, *, step: float, grace_period_s: float = 5) -> Iterator[tuple[subprocess.Popen[str], str]]:
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


def load(url: str, seen: dict[str, str], number: int) -> None:
    """Send requests until the server goes away, and note what each came to."""
    with httpx.Client(base_url=url, timeout=20) as http:
        for count in range(10_000):
            name = f"c{number}-{count}"
            seen[name] = "sent"
            try:
                answer = http.post(
                    "/v1/completions",
                    json={"model": MODEL, "prompt": "a", "max_tokens": 5},
                    headers={"X-Request-Id": name},
                )
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
        thread.join(20)
        assert not thread.is_alive()


def up(url: str) -> None:
    with httpx.Client(base_url=url, timeout=20) as http:
        http.post("/endpoints", json={"model": MODEL})
        until(lambda: http.get("/endpoints/1").json()["status"] == "up")


def test_killed_in_the_middle_of_load(state: Path) -> None:
    with process(state, step=0.002) as (server, url):
        up(url)
        with clients(url) as seen:
            until(lambda: sum(one == "completed" for one in list(seen.values())) > 25)
            server.kill()
    with process(state, step=0.002) as (_, url), httpx.Client(base_url=url, timeout=20) as http:
        rows = {row["id"]: row for row in http.get("/requests", params={"limit": 1000}).json()}
        assert {row["status"] for row in rows.values()} == {"completed", "failed"}
        assert {row["reason"] for row in rows.values()} == {"", INTERRUPTED}
        for name, came_to in seen.items():
            if came_to == "completed":
                assert rows[name]["status"] == "completed", "what a client was told is what is remembered"
        lost = [name for name, row in rows.items() if row["status"] == "failed"]
        assert 1 <= len(lost) <= CLIENTS
        assert all(seen[name] == "sent" for name in lost)
        until(lambda: http.get("/endpoints/1").json()["status"] == "up")
        answer = http.post("/v1/completions", json={"model": MODEL, "prompt": "a", "max_tokens": 1})
        assert answer.status_code == 200, "and it serves as before"


def test_told_to_stop_it_finishes_what_it_took_in(state: Path) -> None:
    with process(state, step=0.002) as (server, url):
        up(url)
        with clients(url) as seen:
            until(lambda: sum(one == "completed" for one in list(seen.values())) > 20)
            server.send_signal(signal.SIGTERM)
        assert server.wait(10) == 0
    store = Store(state)
    rows = {row.request_id: row for row in asyncio.run(store.requests(status=None, limit=1000))}
    store.close()
    assert {row.status for row in rows.values()} == {"completed"}
    assert sum(one == "completed" for one in seen.values()) == len(rows)


@pytest.mark.parametrize("twice", [False, True])
def test_what_does_not_end_in_time_is_ended(state: Path, *, twice: bool) -> None:
    with process(state, step=0.5, grace_period_s=30 if twice else 0.3) as (server, url):
        up(url)
        with clients(url) as seen:
            with httpx.Client(base_url=url) as http:
                until(lambda: http.get("/health").json()["in_flight"] == CLIENTS)
            begun_s = time.monotonic()
            server.send_signal(signal.SIGINT)
            if twice:
                time.sleep(0.2)
                server.send_signal(signal.SIGINT)
        assert server.wait(10) == 0
        assert time.monotonic() - begun_s < 5
    assert set(seen.values()) <= {"503", "sent"}, "told so, or cut off where the user was in a hurry"
    store = Store(state)
    rows = asyncio.run(store.requests(status=None, limit=1000))
    store.close()
    assert Counter(row.status for row in rows) == {"unfinished": CLIENTS}


def test_deployments_come_back_where_they_were(state: Path) -> None:
    with running(state) as server, server.client() as http:
        for placement in ("last", None, "first"):
            server.deploy(placement=placement, slo_ms=900, batch_size=2)
        http.delete("/endpoints/2")
        before = http.get("/endpoints").json()
    with running(state) as server, server.client() as http:
        until(lambda: all(one["status"] == "up" for one in http.get("/endpoints").json()))
        after = http.get("/endpoints").json()
        assert [one["deployments"][0]["gpus"] for one in after] == [one["deployments"][0]["gpus"] for one in before]
        same = [key for key in before[0] if key not in ("deployments", "status", "completed")]
        assert [[one[key] for key in same] for one in after] == [[one[key] for key in same] for one in before]
        assert server.deploy() == 4, "a number is never given twice"
        assert [model["name"] for model in http.get("/models").json()] == [MODEL]


def test_two_servers_do_not_share_a_state(state: Path) -> None:
    with running(state), pytest.raises(InputError, match="in use by another maveriq serve"):
        Store(state)


@pytest.mark.parametrize("content", [b"not a database at all, but long enough to be one" * 30, b""])
def test_a_file_that_is_no_state(state: Path, content: bytes) -> None:
    state.write_bytes(content)
    if content:
        with pytest.raises(InputError, match=r"state\.db"):
            Store(state)
    else:
        Store(state).close()  # an empty file is an empty state
    assert not content or state.read_bytes() == content


def test_a_state_in_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be opened"):
        Store(tmp_path / "nowhere" / "state.db")


@pytest.mark.parametrize("user_version", [0, 1, 99])
def test_a_state_file_of_another_program_or_version_is_refused(state: Path, user_version: int) -> None:
    other = sqlite3.connect(state)
    other.execute("CREATE TABLE deployments (a)")
    other.execute(f"PRAGMA user_version = {user_version}")
    other.close()
    with pytest.raises(InputError, match="another version"):
        Store(state)
