"""What measuring new models in the background does to the latency of running requests.

Starts `maveriq serve --backend emulated --profile-on-register`, deploys one model, and sends it the same Poisson
arrivals in two windows for each new model: one in which nothing else happens, and one that begins with the
registration of the new model, which is planned and measured meanwhile. Prints the percentiles of both and their ratio.

    python benchmarks/profile_while_serving.py [--concurrently] [--window-s 60] [--models qwen3-8b,qwen3-14b]
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import quantiles

import httpx

from maveriq.streams import generator

SERVED, TOKENS = "llama-2-7b", 10
ENDED = ("complete", "failed", "cancelled")


async def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--concurrently", action="store_true", help="measure beside the running engine, on one GPU")
    parser.add_argument("--window-s", type=float, default=60.0)
    parser.add_argument("--models", default="qwen3-8b,qwen3-14b")
    parser.add_argument("--rps", type=float, default=2.0)
    parser.add_argument("--port", type=int, default=8731)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "maveriq", "serve", "--backend", "emulated", "--port", str(options.port), "--quiet",
            "--gpus", "1xA6000" if options.concurrently else "4xA6000", "--state", str(Path(folder) / "state.db"),
            "--profile-on-register", "--profile-budget-s", str(options.window_s / 2),
            *(["--profile-concurrently"] if options.concurrently else []),
        ]  # fmt: skip
        server = subprocess.Popen(command)
        try:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{options.port}", timeout=300) as http:
                await compare(http, options)
        finally:
            server.terminate()
            server.wait()


async def compare(http: httpx.AsyncClient, options: argparse.Namespace) -> None:
    """Send requests in both kinds of windows, and print their latencies."""
    await up(http)
    undisturbed: list[float] = []
    beside: list[float] = []
    for number, model in enumerate(options.models.split(",")):
        undisturbed += await window(http, options, seed=number)
        begun_s = time.monotonic()
        registered = (await http.post("/models", json={"model": model})).json()
        sending = asyncio.create_task(window(http, options, seed=number))
        while (profile := (await http.get(f"/models/{registered['id']}")).json()["profile"])["status"] not in ENDED:
            await asyncio.sleep(0.5)
        under_way_s = min(time.monotonic() - begun_s, options.window_s)
        beside += await sending
        print(
            f"{model}: {profile['status']} {profile['detail']}, on GPUs for {profile['measured_s']} s, "
            f"{profile['gpu_s']} GPU-s, {profile['usd']} USD; under way in {under_way_s / options.window_s:.0%} of its "
            "window"
        )
    print(f"{'':22}{'requests':>10}{'p50 s':>10}{'p95 s':>10}")
    for name, latencies in (("nothing else", undisturbed), ("while profiling", beside)):
        cuts = quantiles(latencies, n=100)
        print(f"{name:22}{len(latencies):>10}{cuts[49]:>10.4f}{cuts[94]:>10.4f}")
    print(f"p95 while profiling / else: {quantiles(beside, n=100)[94] / quantiles(undisturbed, n=100)[94]:.3f}")


async def up(http: httpx.AsyncClient) -> None:
    """Deploy the model that is served, and wait for its engine."""
    while True:
        try:
            await http.get("/health")
            break
        except httpx.TransportError:
            await asyncio.sleep(0.2)
    endpoint = (await http.post("/endpoints", json={"model": SERVED, "output_tokens": TOKENS})).json()
    while (await http.get(f"/endpoints/{endpoint['id']}")).json()["status"] != "up":
        await asyncio.sleep(0.2)


async def window(http: httpx.AsyncClient, options: argparse.Namespace, *, seed: int) -> list[float]:
    """Send Poisson arrivals for a window, the same for the same seed, and return the latencies in seconds."""
    draw, at_s, sent = generator(seed, "arrivals"), 0.0, []
    started_s = time.monotonic()

    async def send(due_s: float) -> float:
        await asyncio.sleep(max(0.0, started_s + due_s - time.monotonic()))
        begun_s = time.monotonic()
        answer = await http.post("/v1/completions", json={"model": SERVED, "prompt": "a" * 40, "max_tokens": TOKENS})
        answer.raise_for_status()
        return time.monotonic() - begun_s

    while (at_s := at_s + draw.exponential(1 / options.rps)) < options.window_s:
        sent.append(asyncio.create_task(send(at_s)))
    return list(await asyncio.gather(*sent))


if __name__ == "__main__":
    asyncio.run(main())
