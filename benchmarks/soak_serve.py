"""Send many requests to `maveriq serve`, and check that none is lost, memory is stable, and metrics are right.

Usage: python benchmarks/soak_serve.py [--requests 20000] [--clients 24] [--time-scale 0.01]

The script starts a server process on emulated engines and deploys three models. Every fourth request uses the `openai`
package (with and without streaming), the others plain HTTP. It prints the results as JSON, and exits with 1 if a
request is lost, a metric differs from the clients' counts, or the memory of the server grows.
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
class Observed:
    """The observations of the clients."""

    statuses: Counter[str] = field(default_factory=Counter)
    by_model: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    ids: set[str] = field(default_factory=set)
    latency_s: list[float] = field(default_factory=list)
    memory: list[tuple[int, float]] = field(default_factory=list)  # requests done, MiB

    @property
    def done(self) -> int:
        """The number of ended requests."""
        return sum(self.statuses.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000, help="number of requests (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=24, help="concurrent clients (default: %(default)s)")
    parser.add_argument("--time-scale", type=float, default=0.01, help="as of `maveriq serve` (default: %(default)s)")
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
    """Send the requests and return the results."""
    observed, numbers = Observed(), iter(range(requests))
    limits = httpx.Limits(max_connections=clients + 2)
    async with (
        httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as openai_client,
    ):
        await deploy(http)
        begun_s = time.perf_counter()
        watching = asyncio.create_task(watch(http, observed))
        await asyncio.gather(*(client(numbers, http, openai_client, observed) for _ in range(clients)))
        took_s = time.perf_counter() - begun_s
        watching.cancel()
        metrics = (await http.get("/metrics")).text
        remembered = await statuses_of(http, list(observed.ids)[:200])
    return report(observed, metrics, requests=requests, took_s=took_s) | {"remembered": remembered}


async def deploy(http: httpx.AsyncClient) -> None:
    for model in MODELS:
        answer = await http.post("/endpoints", json={"model": model, "intent": "min-cost"})
        answer.raise_for_status()
    while any(endpoint["status"] != "up" for endpoint in (await http.get("/endpoints")).json()):
        await asyncio.sleep(0.1)


async def client(numbers: Any, http: httpx.AsyncClient, openai_client: openai.AsyncOpenAI, observed: Observed) -> None:
    """Send requests one after the other until none is left."""
    for number in numbers:
        model, tokens = MODELS[number % len(MODELS)], LENGTHS[number // 3 % len(LENGTHS)]
        prompt = PROMPT * (1 + number % 7)
        begun_s = time.perf_counter()
        try:
            if number % 8 == 0:
                request_id, got = await by_openai(openai_client, model, prompt, tokens)
            elif number % 8 == 4:
                request_id, got = await by_openai_stream(openai_client, model, prompt, tokens)
            else:
                request_id, got = await by_http(http, model, prompt, tokens)
        except (openai.OpenAIError, httpx.HTTPError) as error:
            observed.statuses[f"{type(error).__name__}: {error}"[:100]] += 1
            continue
        observed.latency_s.append(time.perf_counter() - begun_s)
        observed.statuses["completed" if got == tokens else "short"] += 1
        observed.by_model[model] += 1
        observed.tokens[model] += got
        observed.ids.add(request_id)


async def by_openai(openai_client: openai.AsyncOpenAI, model: str, prompt: str, tokens: int) -> tuple[str, int]:
    answer = await openai_client.completions.create(model=model, prompt=prompt, max_tokens=tokens)
    assert answer.usage is not None
    return answer.id, answer.usage.completion_tokens


async def by_openai_stream(openai_client: openai.AsyncOpenAI, model: str, prompt: str, tokens: int) -> tuple[str, int]:
    stream = await openai_client.chat.completions.create(
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


async def by_http(http: httpx.AsyncClient, model: str, prompt: str, tokens: int) -> tuple[str, int]:
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "slo_ms": 1e6}
    answer = (await http.post("/v1/completions", json=body)).raise_for_status().json()
    return answer["id"], answer["usage"]["completion_tokens"]


async def watch(http: httpx.AsyncClient, observed: Observed) -> None:
    """Record the memory that the server reports."""
    while True:
        samples = samples_of((await http.get("/metrics")).text)
        observed.memory.append((observed.done, samples["process_resident_memory_bytes", ()] / 2**20))
        await asyncio.sleep(SAMPLE_EVERY_S)


async def statuses_of(http: httpx.AsyncClient, ids: list[str]) -> dict[str, int]:
    """Return how many of some requests have which status at the server."""
    return dict(Counter([(await http.get(f"/requests/{request_id}")).json()["status"] for request_id in ids]))


def samples_of(metrics: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(metrics)
        for sample in family.samples
    }


def report(observed: Observed, metrics: str, *, requests: int, took_s: float) -> dict[str, Any]:
    samples = samples_of(metrics)

    def counted(name: str, **labels: str) -> dict[str, int]:
        return {
            model: int(samples.get((f"maveriq_{name}", tuple(sorted({"model": model, **labels}.items()))), 0))
            for model in MODELS
        }

    steady = [mib for done, mib in observed.memory if done >= WARM_UP * requests]
    latency_s = sorted(observed.latency_s)
    return {
        "requests": requests,
        "took_s": round(took_s, 1),
        "per_s": round(requests / took_s, 1),
        "statuses": dict(observed.statuses),
        "distinct_ids": len(observed.ids),
        "client": {"completed": dict(observed.by_model), "tokens": dict(observed.tokens)},
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
            "first": round(observed.memory[0][1], 1),
            "steady_first": round(steady[0], 1),
            "steady_last": round(steady[-1], 1),
            "max": round(max(mib for _, mib in observed.memory), 1),
        },
    }


def faults_of(results: dict[str, Any]) -> list[str]:
    """Return the failed checks."""
    client, server, memory = results["client"], results["server"], results["memory_mib"]
    nothing = dict.fromkeys(MODELS, 0)
    checks = {
        "every request completed": results["statuses"] == {"completed": results["requests"]},
        "ids are distinct": results["distinct_ids"] == results["requests"],
        "accepted equals sent": server["accepted"] == client["completed"],
        "completed equals received": server["completed"] == client["completed"],
        "each request has a latency": server["latencies"] == server["first_tokens"] == client["completed"],
        "tokens equal received tokens": server["tokens"] == client["tokens"],
        "no request failed": server["failed"] == server["refused"] == server["unfinished"] == nothing,
        "no request is in flight": server["in_flight"] == 0,
        "all requests are stored": set(results["remembered"]) == {"completed"},
        "memory is stable": memory["steady_last"] - memory["steady_first"] <= MAX_GROWTH_MIB,
        "the server exits with 0": results["exit_code"] == 0,
    }
    return [name for name, holds in checks.items() if not holds]


if __name__ == "__main__":
    sys.exit(main())
