"""A long load on `maveriq serve` by an outside client: is anything lost, does memory grow, do the metrics hold?

    python benchmarks/soak_serve.py [--requests 20000] [--clients 24] [--time-scale 0.01]

Starts a server on emulated engines as a process of its own and deploys three models. Every fourth request
goes through the `openai` package (in turn whole and streamed), the others are plain HTTP. Prints what was
measured as JSON; exits with 1 if a request was lost, a metric differs from what the clients saw, or the
server's memory grew.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
from prometheus_client.parser import text_string_to_metric_families

MODELS = ("llama-2-7b", "gptj-6b", "falcon-7b")
LENGTHS = (1, 5, 20, 33)
PROMPT = "The quick brown fox jumps over the lazy dog. "
WARM_UP = 0.25  # share of the requests after which memory must be steady
MAX_GROWTH_MIB = 8.0
SAMPLE_EVERY_S = 0.5


@dataclass(slots=True)
class Seen:
    """What the clients saw."""

    statuses: Counter[str] = field(default_factory=Counter)
    by_model: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    ids: set[str] = field(default_factory=set)
    latency_s: list[float] = field(default_factory=list)
    memory: list[tuple[int, float]] = field(default_factory=list)  # requests done, MiB

    @property
    def done(self) -> int:
        """Requests that have come to an end."""
        return sum(self.statuses.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--time-scale", type=float, default=0.01)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = subprocess.Popen(
            [
                sys.executable, "-m", "maveriq", "serve", "--backend", "emulated", "--port", "0",
                "--time-scale", str(options.time_scale), "--state", str(Path(folder) / "soak.db"),
            ],
            stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        try:
            assert server.stderr is not None
            line = server.stderr.readline()
            [url] = re.findall(r"http://\S+(?=;)", line) or [sys.exit(line)]
            results = asyncio.run(soak(url, options.requests, options.clients))
            server.terminate()
            results["exit_code"] = server.wait(60)
        finally:
            server.kill()
            server.communicate()
    faults = faults_of(results)
    print(json.dumps(results | {"faults": faults}, indent=2))
    return 1 if faults else 0


async def soak(url: str, requests: int, clients: int) -> dict[str, Any]:
    """Load the server and return what was measured."""
    seen, work = Seen(), iter(range(requests))
    limits = httpx.Limits(max_connections=clients + 2)
    async with (
        httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as plain,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as official,
    ):
        await deploy(plain)
        begun_s = time.perf_counter()
        watching = asyncio.create_task(watch(plain, seen))
        await asyncio.gather(*(client(work, plain, official, seen) for _ in range(clients)))
        took_s = time.perf_counter() - begun_s
        watching.cancel()
        metrics = (await plain.get("/metrics")).text
        remembered = await statuses_of(plain, list(seen.ids)[:200])
    return report(seen, metrics, requests=requests, took_s=took_s) | {"remembered": remembered}


async def deploy(plain: httpx.AsyncClient) -> None:
    for model in MODELS:
        answer = await plain.post("/endpoints", json={"model": model, "intent": "min-cost"})
        answer.raise_for_status()
    while any(one["status"] != "up" for one in (await plain.get("/endpoints")).json()):
        await asyncio.sleep(0.1)


async def client(work: Any, plain: httpx.AsyncClient, official: openai.AsyncOpenAI, seen: Seen) -> None:
    """Send one request after the other until there are none left."""
    for number in work:
        model, tokens = MODELS[number % len(MODELS)], LENGTHS[number // 3 % len(LENGTHS)]
        prompt = PROMPT * (1 + number % 7)
        begun_s = time.perf_counter()
        try:
            if number % 8 == 0:
                request_id, got = await by_openai(official, model, prompt, tokens)
            elif number % 8 == 4:
                request_id, got = await by_openai_stream(official, model, prompt, tokens)
            else:
                request_id, got = await by_http(plain, model, prompt, tokens)
        except (openai.OpenAIError, httpx.HTTPError) as error:
            seen.statuses[f"{type(error).__name__}: {error}"[:100]] += 1
            continue
        seen.latency_s.append(time.perf_counter() - begun_s)
        seen.statuses["completed" if got == tokens else "short"] += 1
        seen.by_model[model] += 1
        seen.tokens[model] += got
        seen.ids.add(request_id)


async def by_openai(official: openai.AsyncOpenAI, model: str, prompt: str, tokens: int) -> tuple[str, int]:
    answer = await official.completions.create(model=model, prompt=prompt, max_tokens=tokens)
    assert answer.usage is not None
    return answer.id, answer.usage.completion_tokens


async def by_openai_stream(official: openai.AsyncOpenAI, model: str, prompt: str, tokens: int) -> tuple[str, int]:
    stream = await official.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": prompt}],
        max_tokens=tokens,
        stream=True,
        stream_options={"include_usage": True},
    )
    request_id, got = "", 0
    async for chunk in stream:
        request_id = chunk.id
        got = chunk.usage.completion_tokens if chunk.usage else got
    return request_id, got


async def by_http(plain: httpx.AsyncClient, model: str, prompt: str, tokens: int) -> tuple[str, int]:
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "slo_ms": 1e6}
    answer = (await plain.post("/v1/completions", json=body)).raise_for_status().json()
    return answer["id"], answer["usage"]["completion_tokens"]


async def watch(plain: httpx.AsyncClient, seen: Seen) -> None:
    """Note the server's memory as it says itself."""
    while True:
        samples = samples_of((await plain.get("/metrics")).text)
        seen.memory.append((seen.done, samples["process_resident_memory_bytes", ()] / 2**20))
        await asyncio.sleep(SAMPLE_EVERY_S)


async def statuses_of(plain: httpx.AsyncClient, ids: list[str]) -> dict[str, int]:
    """Return how often the server remembers which status of some requests."""
    return dict(Counter([(await plain.get(f"/requests/{one}")).json()["status"] for one in ids]))


def samples_of(metrics: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(metrics)
        for sample in family.samples
    }


def report(seen: Seen, metrics: str, *, requests: int, took_s: float) -> dict[str, Any]:
    samples = samples_of(metrics)

    def counted(name: str, **labels: str) -> dict[str, int]:
        return {
            model: int(samples.get((f"maveriq_{name}", tuple(sorted({"model": model, **labels}.items()))), 0))
            for model in MODELS
        }

    steady = [mib for done, mib in seen.memory if done >= WARM_UP * requests]
    latency_s = sorted(seen.latency_s)
    return {
        "requests": requests,
        "took_s": round(took_s, 1),
        "per_s": round(requests / took_s, 1),
        "statuses": dict(seen.statuses),
        "distinct_ids": len(seen.ids),
        "client": {"completed": dict(seen.by_model), "tokens": dict(seen.tokens)},
        "server": {
            "accepted": counted("requests_accepted_total"),
            "completed": counted("requests_total", status="completed"),
            "failed": counted("requests_total", status="failed"),
            "refused": counted("requests_total", status="refused"),
            "unfinished": counted("requests_total", status="unfinished"),
            "latencies": counted("request_latency_seconds_count"),
            "first_tokens": counted("time_to_first_token_seconds_count"),
            "tokens": counted("generated_tokens_total"),
            "in_flight": samples["maveriq_requests_in_flight", ()],
        },
        "client_latency_ms": {
            f"p{share}": round(latency_s[int(share / 100 * (len(latency_s) - 1))] * 1e3, 1) for share in (50, 95, 99)
        },
        "memory_mib": {
            "first": round(seen.memory[0][1], 1),
            "steady_first": round(steady[0], 1),
            "steady_last": round(steady[-1], 1),
            "most": round(max(mib for _, mib in seen.memory), 1),
        },
    }


def faults_of(results: dict[str, Any]) -> list[str]:
    """Return what is not as it must be."""
    client, server, memory = results["client"], results["server"], results["memory_mib"]
    nothing = dict.fromkeys(MODELS, 0)
    checks = {
        "every request completed": results["statuses"] == {"completed": results["requests"]},
        "every id is its own": results["distinct_ids"] == results["requests"],
        "accepted is what clients sent": server["accepted"] == client["completed"],
        "completed is what clients saw": server["completed"] == client["completed"],
        "each has a latency": server["latencies"] == server["first_tokens"] == client["completed"],
        "tokens are what clients got": server["tokens"] == client["tokens"],
        "nothing else happened": server["failed"] == server["refused"] == server["unfinished"] == nothing,
        "nothing is left": server["in_flight"] == 0,
        "all are remembered": set(results["remembered"]) == {"completed"},
        "memory is flat": memory["steady_last"] - memory["steady_first"] <= MAX_GROWTH_MIB,
        "it ended in order": results["exit_code"] == 0,
    }
    return [name for name, holds in checks.items() if not holds]


if __name__ == "__main__":
    sys.exit(main())
