"""Kills of `maveriq serve`, its engines and their stages under load: does the state say what clients were answered?

    python benchmarks/kills_serve.py [--servers 40] [--hosts 20] [--stages 20] [--clients 8] [--seed 1]

Starts a server on emulated engines and sends requests without a pause, whole and streamed. In a random order it kills
the server (SIGKILL), the leader of an engine, or another process of an engine. Before every fourth kill of the server
the disk is full for a while: no file of the server may grow. At the end every answer is compared with the state file.
Prints what was measured as JSON; exits with 1 if an answer and the state differ or a request has no final status.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import resource
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from maveriq.streams import generator

ENDPOINTS = (
    {"model": "llama-2-7b", "intent": "min-cost"},
    {"model": "llama-2-70b", "intent": "min-cost", "float16_only": True},  # several GPUs, so several stages
)
DEADLINE_S = 90.0
BETWEEN_S = (0.3, 1.2)  # from the moment when everything works to the next kill
FULL_DISK_S = (0.5, 3.0)
FINAL = {"completed", "refused", "failed", "unfinished"}
STATUS_OF_CODE = {"engine_failed": "failed", "refused": "refused", "outcome_not_stored": "failed"}
NOT_ACCEPTED = "not accepted"
"""What a client of a refused request (429, 503 before it ran) was answered."""


@dataclass(slots=True)
class Answers:
    """What clients were answered, by request: a final status, `not accepted`, or "" if the connection broke."""

    ends: dict[str, str] = field(default_factory=dict)
    codes: Counter[str] = field(default_factory=Counter)

    @property
    def completed(self) -> int:
        """Requests that completed so far, as far as clients know."""
        return self.codes["200"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", type=int, default=40)
    parser.add_argument("--hosts", type=int, default=20)
    parser.add_argument("--stages", type=int, default=20)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "state.db"
        results = asyncio.run(Kills(state, options).run())
        results |= compare(state, results.pop("answered"))
    print(json.dumps(results, indent=2))
    return 1 if results["mismatches"] or results["without_final_status"] else 0


class Kills:
    """One run of the benchmark."""

    def __init__(self, state: Path, options: argparse.Namespace) -> None:
        self._options = options
        self._random = generator(options.seed, "kills")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._url = f"http://127.0.0.1:{port}"
        self._command = [
            sys.executable, "-m", "maveriq", "serve", "--backend", "emulated", "--time-scale", "0.01", "--load-s", "1",
            "--port", str(port), "--state", str(state), "--quiet",
        ]  # fmt: skip
        self._server: subprocess.Popen[bytes] | None = None
        self._answers = Answers()
        self._done: Counter[str] = Counter()

    async def run(self) -> dict[str, Any]:
        """Kill as often as was asked for, and return what happened."""
        kinds = ["server"] * self._options.servers + ["host"] * self._options.hosts + ["stage"] * self._options.stages
        self._random.shuffle(kinds)
        begun_s = time.monotonic()
        self._start()
        async with httpx.AsyncClient(base_url=self._url, timeout=DEADLINE_S) as http:
            await self._until(self._responds, http)
            for endpoint in ENDPOINTS:
                (await http.post("/endpoints", json=endpoint)).raise_for_status()
            clients = [asyncio.create_task(self._client(number)) for number in range(self._options.clients)]
            try:
                for kind in kinds:
                    await self._until(self._works, http)
                    await asyncio.sleep(self._random.uniform(*BETWEEN_S))
                    await self._kill(kind)
                await self._until(self._works, http)
            finally:
                for client in clients:
                    client.cancel()
                await asyncio.gather(*clients, return_exceptions=True)
                exit_code = await self._stop()
        return {
            "answered": self._answers.ends,
            "kills": dict(self._done),
            "took_s": round(time.monotonic() - begun_s, 1),
            "answers": dict(self._answers.codes),
            "exit_code": exit_code,
        }

    def _start(self) -> None:
        self._server = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)

    async def _stop(self) -> int:
        assert self._server is not None
        self._server.terminate()
        try:
            return await asyncio.to_thread(self._server.wait, DEADLINE_S)
        finally:
            self._server.kill()

    async def _kill(self, kind: str) -> None:
        assert self._server is not None
        if kind == "server":
            if self._done["server"] % 4 == 3:
                await self._fill_disk()
            self._server.kill()
            await asyncio.to_thread(self._server.wait)
            self._start()
        else:
            leaders = children_of(self._server.pid)
            groups = {leader: members_of(leader) - {leader} for leader in leaders}
            stages = [pid for members in groups.values() for pid in members]
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(self._random.choice(stages if kind == "stage" else leaders)), signal.SIGKILL)
        self._done[kind] += 1

    async def _fill_disk(self) -> None:
        """Let no file of the server grow for a while; half of the time the server is killed before there is room."""
        assert self._server is not None
        before = resource.prlimit(self._server.pid, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
        await asyncio.sleep(self._random.uniform(*FULL_DISK_S))
        self._done["full disk"] += 1
        if self._random.random() < 0.5:
            resource.prlimit(self._server.pid, resource.RLIMIT_FSIZE, before)
            await asyncio.sleep(self._random.uniform(*BETWEEN_S))

    async def _until(self, holds: Any, http: httpx.AsyncClient) -> None:
        latest_s = time.monotonic() + DEADLINE_S
        while not await holds(http):
            assert time.monotonic() < latest_s, f"{holds.__name__} never held; last health: {self._health}"
            await asyncio.sleep(0.05)

    _health: Any = None

    async def _responds(self, http: httpx.AsyncClient) -> bool:
        try:
            self._health = (await http.get("/health")).json()
        except (httpx.HTTPError, ValueError):
            return False
        return True

    async def _works(self, http: httpx.AsyncClient) -> bool:
        """Return whether both endpoints are up and a request of each completes."""
        if not await self._responds(http):
            return False
        for endpoint in ENDPOINTS:
            try:
                answer = await self._send(http, str(endpoint["model"]), stream=False)
            except httpx.HTTPError:
                return False
            if answer != "200":
                return False
        return True

    async def _client(self, number: int) -> None:
        """Send one request after the other."""
        async with httpx.AsyncClient(base_url=self._url, timeout=DEADLINE_S) as http:
            for count in range(10_000_000):
                model = str(ENDPOINTS[count % len(ENDPOINTS)]["model"])
                try:
                    answer = await self._send(http, model, stream=(count + number) % 3 == 0)
                except httpx.HTTPError:
                    self._answers.codes["broken"] += 1
                    answer = ""
                if answer != "200":
                    await asyncio.sleep(0.05)

    async def _send(self, http: httpx.AsyncClient, model: str, *, stream: bool) -> str:
        """Send a request, note the answer, and return "200" or the code of the error."""
        name = f"kill-{len(self._answers.ends)}"
        self._answers.ends[name] = ""
        body = {"model": model, "prompt": "a", "max_tokens": 20, "stream": stream}
        answer = await http.post("/v1/completions", json=body, headers={"X-Request-Id": name})
        text = answer.text
        if answer.status_code == 200 and stream:
            last = text.rstrip().rpartition("\n\n")[2].removeprefix("data: ")
            error = None if last == "[DONE]" else json.loads(last)["error"]
        else:
            error = None if answer.status_code == 200 else answer.json()["error"]
        code = "200" if error is None else str(error["code"])
        self._answers.codes[code] += 1
        # A server that stops refuses some requests before and ends others after they were accepted.
        accepted_id = answer.headers.get("X-Request-Id")
        ended = "unfinished" if accepted_id else NOT_ACCEPTED
        self._answers.ends[name] = "completed" if error is None else STATUS_OF_CODE.get(code, ended)
        return code


def children_of(pid: int) -> list[int]:
    """Return the leaders of the engines of a server: children that lead a session of their own."""
    found = [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in _children(task)]
    return [child for child in found if members_of(child)]


def _children(task: Path) -> list[str]:
    try:
        return (task / "children").read_text().split()
    except OSError:
        return []


def members_of(group: int) -> set[int]:
    """Return the processes of a process group."""
    members = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _parent, group_of = path.read_text().rpartition(")")[2].split()[:3]
            if int(group_of) == group and state != "Z":
                members.add(int(path.parent.name))
    return members


def compare(state: Path, answers: dict[str, str]) -> dict[str, Any]:
    """Compare what clients were answered with the state file."""
    database = sqlite3.connect(state)
    rows = dict(database.execute("SELECT request_id, status FROM requests"))
    database.close()
    mismatches = [
        {"request": name, "answered": end, "stored": rows.get(name, "")}
        for name, end in answers.items()
        if not _agree(end, rows.get(name, ""))
    ]
    return {
        "requests": len(answers),
        "stored": dict(Counter(rows.values())),
        "without_final_status": sum(status not in FINAL for status in rows.values()),
        "mismatches": len(mismatches),
        "first_mismatches": mismatches[:5],
    }


def _agree(answer: str, stored: str) -> bool:
    if answer == "":  # the connection broke: it may have ended in any way
        return True
    if answer == NOT_ACCEPTED:
        return stored != "completed"
    return stored == answer


if __name__ == "__main__":
    sys.exit(main())
