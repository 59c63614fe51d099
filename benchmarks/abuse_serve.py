"""Abuse `maveriq serve` in many ways beside well-behaved clients, and check that these are served as before.

Usage: python benchmarks/abuse_serve.py [--seconds 60] [--clients 20] [--time-scale 1]

The script starts a server with a token on emulated engines, and well-behaved clients that stream completions. The first
third of the time is quiet. In the rest a second process holds idle connections, sends heads byte by byte, and floods
the server with requests, all without the token. With the token it sends bodies byte by byte, bodies in a
million chunks, prompts of 1 MiB and junk, aborts completions, registers models with odd names and broken files, and
chats with models whose files are hostile: chat templates that loop without end or make a text of 3 GB, a tokenizer
whose regular expression backtracks, and tokenizers that are endless, or links to a device or out of the folder.

The script prints the results as JSON, and exits with 1 if a well-behaved client gets an error other than 429, the 99th
percentile of its queueing (until its execution starts, from /metrics) at least doubles, that of the probes of /health
exceeds 250 ms, the memory of the server grows by more than 50 MiB, or its log by more than 1 MB. The time to first
token, over HTTP, is printed beside. `--seconds 1800` takes half an hour.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import httpx

MODELS = ("llama-2-7b", "gptj-6b", "falcon-7b")
HOSTILE_WHEN_USED = ("endless-template", "large-template", "backtracking-tokenizer")
HOSTILE_WHEN_REGISTERED = ("link-to-device", "link-out", "endless-tokenizer")
QUIET_SHARE = 1 / 3
WARM_UP_S = 5.0  # not measured
SETTLE_S = 2.0  # after the beginning of the abuse, not measured
THINK_S = 0.2
PROBE_EVERY_S = 0.1
ATTACKER_NICENESS = 10
MAX_P99_GROWTH = 2.0
MAX_PROBE_MS = 250.0
MAX_MEMORY_GROWTH_MIB = 50.0

Connection: TypeAlias = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass(slots=True)
class Phase:
    """What was measured in one phase."""

    statuses: Counter[str] = field(default_factory=Counter)
    first_token_ms: list[float] = field(default_factory=list)  # over HTTP
    probe_ms: list[float] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the figures of the phase."""
        return {
            "statuses": dict(self.statuses),
            "first_token_ms": {"p50": percentile(self.first_token_ms, 50), "p99": percentile(self.first_token_ms, 99)},
            "health_ms": {"p99": percentile(self.probe_ms, 99), "max": percentile(self.probe_ms, 100)},
        }


def percentile(values: list[float], share: float) -> float:
    return round(sorted(values)[int(share / 100 * (len(values) - 1))], 1) if values else float("nan")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of both phases (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=20, help="well-behaved clients (default: %(default)s)")
    parser.add_argument("--time-scale", type=float, default=1.0, help="as of `maveriq serve` (default: %(default)s)")
    parser.add_argument("--attack", metavar="URL", help=argparse.SUPPRESS)  # the second process
    options = parser.parse_args()
    if options.attack:
        asyncio.run(attack(options.attack, os.environ["MAVERIQ_TOKEN"]))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        results = measure(Path(folder), options.seconds, options.clients, options.time_scale)
    faults = faults_of(results)
    print(json.dumps(results | {"faults": faults}, indent=2))
    return 1 if faults else 0


def measure(folder: Path, seconds: float, clients: int, time_scale: float) -> dict[str, Any]:
    """Start the server and the second process, and return what was measured."""
    broken_models(folder / "models")
    hostile_models(folder / "models")
    environment = os.environ | {"MAVERIQ_TOKEN": secrets.token_urlsafe()}
    command = [
        sys.executable, "-m", "maveriq", "serve", "--backend", "emulated", "--port", "0", "--models-folder",
        str(folder / "models"), "--time-scale", str(time_scale), "--state", str(folder / "abuse.db"),
    ]  # fmt: skip
    errors = folder / "errors.txt"
    with errors.open("w") as stderr:
        server = subprocess.Popen(command, stderr=stderr, env=environment)
    try:
        url = url_in(errors)
        results = asyncio.run(load(url, environment, server.pid, seconds, clients))
        server.terminate()
        results["exit_code"] = server.wait(60)
    finally:
        server.kill()
        server.wait()
    return results | {"log_bytes": errors.stat().st_size}


def hostile_models(folder: Path) -> None:
    """Write models that can be deployed as far as their configuration goes, with hostile tokenizers and templates."""
    from maveriq.domain.models import load_model
    from maveriq.exec.model_files import hf_config_json

    shape = json.loads(hf_config_json(load_model(MODELS[0])))
    for name in (*HOSTILE_WHEN_USED, *HOSTILE_WHEN_REGISTERED):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(shape | {"_name_or_path": name}))
    loops = "".join(f"{{% for {name} in range(90000) %}}" for name in "abc") + "{% endfor %}" * 3
    for name, template, pattern in (
        ("endless-template", loops, r"\s+"),
        ("large-template", "{{ 'a' * 3000000000 }}", r"\s+"),
        ("backtracking-tokenizer", "{{ messages[0]['content'] }}", "(a|a|aa)+$"),
    ):
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        vocabulary = {"type": "WordLevel", "vocab": {"<unk>": 0, "a": 1, "b": 2}, "unk_token": "<unk>"}
        (folder / name / "tokenizer.json").write_text(json.dumps({"pre_tokenizer": split, "model": vocabulary}))
        (folder / name / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    secret = folder.parent / "secret.json"
    secret.write_text("{}")
    (folder / "link-to-device" / "tokenizer.json").symlink_to("/dev/zero")
    (folder / "link-out" / "tokenizer.json").symlink_to(secret)
    with (folder / "endless-tokenizer" / "tokenizer.json").open("wb") as file:
        file.truncate(2**40)  # zeros that the disk does not hold


def broken_models(folder: Path) -> None:
    """Write the configurations of models that cannot be registered."""
    for name, text in (
        ("empty", ""),
        ("list", "[]"),
        ("deep", "[" * 100_000),
        ("long", '{"a": "' + "a" * 10**7 + '"}'),
    ):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(text)
    (folder / "pipe").mkdir()
    os.mkfifo(folder / "pipe" / "config.json")


def url_in(errors: Path) -> str:
    latest_s = time.monotonic() + 60
    while time.monotonic() < latest_s:
        if urls := re.findall(r"http://\S+(?=;)", errors.read_text()):
            return str(urls[0])
        time.sleep(0.1)
    sys.exit(errors.read_text() or "the server did not start")


async def load(url: str, environment: dict[str, str], pid: int, seconds: float, clients: int) -> dict[str, Any]:
    """Run the well-behaved clients through a quiet phase and one with abuse."""
    quiet, abused, ignored = Phase(), Phase(), Phase()
    phases = [ignored]  # the last one is measured
    headers = {"Authorization": f"Bearer {environment['MAVERIQ_TOKEN']}"}
    limits = httpx.Limits(max_connections=clients + 4)
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=60, limits=limits) as http:
        await deploy(http)
        tasks = [asyncio.create_task(client(http, number, phases)) for number in range(clients)]
        tasks.append(asyncio.create_task(probe(http, phases)))
        await asyncio.sleep(WARM_UP_S)
        phases.append(quiet)
        quiet_server = await watch(http, QUIET_SHARE * seconds)
        memory_before_mib = memory_mib(pid)
        phases.append(ignored)
        command = [sys.executable, __file__, "--attack", url]
        attacker = await asyncio.create_subprocess_exec(*command, env=environment, stdout=asyncio.subprocess.PIPE)
        await asyncio.sleep(SETTLE_S)
        phases.append(abused)
        abused_server = await watch(http, (1 - QUIET_SHARE) * seconds)
        phases.append(ignored)
        memory_after_mib = memory_mib(pid)
        attacker.terminate()
        attacks, _ = await attacker.communicate()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return {
        "seconds": seconds,
        "clients": clients,
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "attacks": json.loads(attacks),
        "quiet": quiet.to_json() | quiet_server,
        "abused": abused.to_json() | abused_server,
        "memory_mib": {"before": memory_before_mib, "after": memory_after_mib},
    }


async def deploy(http: httpx.AsyncClient) -> None:
    for model in MODELS:
        (await http.post("/endpoints", json={"model": model, "intent": "min-cost"})).raise_for_status()
    while any(endpoint["status"] != "up" for endpoint in (await http.get("/endpoints")).json()):
        await asyncio.sleep(0.1)


async def client(http: httpx.AsyncClient, number: int, phases: list[Phase]) -> None:
    """Stream one completion after the other."""
    body = {"model": MODELS[number % len(MODELS)], "prompt": "Once upon a time", "max_tokens": 8, "stream": True}
    while True:
        begun_s = time.monotonic()
        try:
            async with http.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code == 429:
                    phases[-1].statuses["429"] += 1
                    await asyncio.sleep(int(response.headers["Retry-After"]))
                    continue
                lines = response.aiter_lines()
                await anext(lines)
                first_s = time.monotonic()
                done = [line async for line in lines if line == "data: [DONE]"]
            phases[-1].statuses["completed" if response.is_success and done else str(response.status_code)] += 1
            phases[-1].first_token_ms.append((first_s - begun_s) * 1e3)
        except httpx.HTTPError as error:
            phases[-1].statuses[f"{type(error).__name__}: {error}"[:100]] += 1
        await asyncio.sleep(THINK_S)


async def probe(http: httpx.AsyncClient, phases: list[Phase]) -> None:
    """Measure how long /health takes."""
    while True:
        begun_s = time.monotonic()
        try:
            (await http.get("/health")).raise_for_status()
            phases[-1].probe_ms.append((time.monotonic() - begun_s) * 1e3)
        except httpx.HTTPError as error:
            phases[-1].statuses[f"/health: {type(error).__name__}"] += 1
        await asyncio.sleep(PROBE_EVERY_S)


async def watch(http: httpx.AsyncClient, seconds: float) -> dict[str, Any]:
    """Wait, and return what the metrics of the server say of this time: cores in use, and queueing."""
    before, begun_s = (await http.get("/metrics")).text, time.monotonic()
    await asyncio.sleep(seconds)
    after, ended_s = (await http.get("/metrics")).text, time.monotonic()
    cpu_s = cpu_seconds(after) - cpu_seconds(before)
    counts = Counter(queueing_counts(after))
    counts.subtract(queueing_counts(before))
    return {
        "server_cpu_cores": round(cpu_s / (ended_s - begun_s), 2),
        "queueing_cluster_s": {"p50": histogram_percentile(counts, 50), "p99": histogram_percentile(counts, 99)},
    }


def cpu_seconds(metrics: str) -> float:
    return float(re.findall(r"^process_cpu_seconds_total (\S+)", metrics, re.MULTILINE)[0])


def queueing_counts(metrics: str) -> Counter[float]:
    """Return how many requests of the well-behaved clients' models waited at most so long, in the cluster's seconds."""
    counts: Counter[float] = Counter()
    for bound, model, count in re.findall(
        r'^maveriq_request_queue_seconds_bucket{le="(\S+?)",model="(\S+?)"} (\S+)', metrics, re.MULTILINE
    ):
        counts[float(bound)] += int(float(count)) if model in MODELS else 0
    return counts


def histogram_percentile(counts: Counter[float], share: float) -> float:
    """Return a percentile from cumulative counts, linear within a bucket, as Prometheus does."""
    bounds = sorted(counts)
    rank = share / 100 * counts[bounds[-1]]
    low_s, below = 0.0, 0
    for bound_s in bounds:
        if counts[bound_s] >= rank and counts[bound_s] > below:
            return round(low_s + (bound_s - low_s) * (rank - below) / (counts[bound_s] - below), 3)
        low_s, below = bound_s, counts[bound_s]
    return float("nan")


def memory_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return round(int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) / 1024, 1)


# The second process


async def attack(url: str, token: str) -> None:
    """Attack a server until this process is terminated; print how often each attack was carried out."""
    os.nice(ATTACKER_NICENESS)  # an attacker elsewhere takes no CPU time from the server's machine
    host, _, port = url.removeprefix("http://").partition(":")
    head = f"Host: localhost\r\nAuthorization: Bearer {token}\r\nContent-Type: application/json\r\n"
    target = Target(host, int(port), head)
    attacks: list[tuple[Callable[[Target], Awaitable[None]], int, float]] = [
        (hold_idle, 600, 0.0),  # attack, how many at once, pause
        (send_slow_head, 200, 0.0),
        (send_slow_body, 50, 0.0),
        (flood_requests, 4, 0.02),
        (flood_connections, 4, 0.02),
        (abort_completion, 2, 0.5),
        (send_chunks, 2, 1.0),
        (send_long_prompt, 4, 1.0),
        (send_junk, 2, 0.05),
        (register_odd_models, 1, 0.5),
        (use_hostile_model, 2, 0.5),
    ]
    tasks = [asyncio.create_task(repeat(target, *each)) for each in attacks for _ in range(each[1])]
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(15, stopped.set)
    await stopped.wait()
    print(json.dumps(target.counts), flush=True)
    assert tasks
    os._exit(0)  # the connections are not closed one by one


@dataclass(slots=True)
class Target:
    """The attacked server."""

    host: str
    port: int
    head: str  # with the token
    counts: Counter[str] = field(default_factory=Counter)
    deployed: set[str] = field(default_factory=set)

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[Connection]:
        """Give a connection, which is aborted at the end."""
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()

    async def post(self, path: str, body: bytes) -> bytes:
        """Send a request with the token, and return the start of the response."""
        async with self.connected() as (reader, writer):
            writer.write(f"POST {path} HTTP/1.1\r\n{self.head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            await writer.drain()
            return await reader.read(4_096)


async def repeat(target: Target, act: Callable[[Target], Awaitable[None]], _at_once: int, pause_s: float) -> None:
    while True:
        with contextlib.suppress(OSError, TimeoutError):
            await asyncio.wait_for(act(target), 60)
            target.counts[act.__name__] += 1
        await asyncio.sleep(pause_s or 0.5)


async def hold_idle(target: Target) -> None:
    async with target.connected() as (reader, _):
        await reader.read()


async def send_slow_head(target: Target) -> None:
    async with target.connected() as (reader, writer):
        for byte in b"GET /health HTTP/1.1\r\n" + b"X: " + b"a" * 1_000:
            writer.write(bytes((byte,)))
            with contextlib.suppress(TimeoutError):
                if not await asyncio.wait_for(reader.read(1), 1.0):
                    return


async def send_slow_body(target: Target) -> None:
    async with target.connected() as (reader, writer):
        writer.write(f"POST /v1/completions HTTP/1.1\r\n{target.head}Content-Length: 1000\r\n\r\n".encode())
        for _ in range(1_000):
            writer.write(b" ")
            with contextlib.suppress(TimeoutError):
                if not await asyncio.wait_for(reader.read(4_096), 1.0):
                    return


async def flood_requests(target: Target) -> None:
    async with target.connected() as (reader, writer):
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{}       " * 10)
        await reader.read(4_096)


async def flood_connections(target: Target) -> None:
    for _ in range(5):
        async with target.connected():
            pass


async def abort_completion(target: Target) -> None:
    async with target.connected() as (_, writer):
        body = json.dumps({"model": MODELS[0], "prompt": "a", "max_tokens": 20, "stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\n{target.head}Content-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await asyncio.sleep(0.05)


async def send_chunks(target: Target) -> None:
    async with target.connected() as (reader, writer):
        writer.write(f"POST /models HTTP/1.1\r\n{target.head}Transfer-Encoding: chunked\r\n\r\n".encode())
        for _ in range(1_000):
            writer.write(b"1\r\n \r\n" * 1_000)
            await writer.drain()
        await reader.read(4_096)


async def send_long_prompt(target: Target) -> None:
    await target.post("/v1/completions", json.dumps({"model": MODELS[1], "prompt": "a" * (2**20 - 100)}).encode())


async def send_junk(target: Target) -> None:
    bodies = (b"[" * 100_000, b"\xff" * 100_000, b'{"a":' * 10_000, b"[" + b"0," * 200_000 + b"0]", b'"\\ud800"')
    await target.post("/v1/chat/completions", secrets.choice(bodies))


async def register_odd_models(target: Target) -> None:
    names = (
        "empty",
        "list",
        "deep",
        "long",
        "pipe",
        "../../etc/passwd",
        "a" * 1_000,
        "\x1b[2J",
        "=1+1",
        "llama-2-7b@1",
        *HOSTILE_WHEN_REGISTERED,
    )
    await target.post("/models", json.dumps({"model": secrets.choice(names)}).encode())


async def use_hostile_model(target: Target) -> None:
    """Send a chat to a hostile model, which is deployed before the first one."""
    name = secrets.choice(HOSTILE_WHEN_USED)
    if name not in target.deployed:
        target.deployed.add(name)
        await target.post("/endpoints", json.dumps({"model": name, "intent": "min-cost"}).encode())
    messages = [{"role": "user", "content": "a" * 40 + "b"}]
    body = json.dumps({"model": name, "messages": messages, "max_tokens": 4}).encode()
    answer = await target.post("/v1/chat/completions", body)
    target.counts[f"{name}: {answer[9:12].decode()}"] += 1


def faults_of(results: dict[str, Any]) -> list[str]:
    """Return what is not as it must be."""
    quiet, abused, memory = results["quiet"], results["abused"], results["memory_mib"]
    checks = {
        "no error other than 429": set(abused["statuses"]) <= {"completed", "429"},
        "p99 of queueing less than doubles": abused["queueing_cluster_s"]["p99"]
        < MAX_P99_GROWTH * quiet["queueing_cluster_s"]["p99"],
        "99 % of the probes of /health within 250 ms": abused["health_ms"]["p99"] <= MAX_PROBE_MS,
        "memory is flat": memory["after"] - memory["before"] <= MAX_MEMORY_GROWTH_MIB,
        "the log is small": results["log_bytes"] < 1_000_000,
        "it stops on SIGTERM": results["exit_code"] == 0,
    }
    return [name for name, holds in checks.items() if not holds]


if __name__ == "__main__":
    sys.exit(main())
