"""Measure the overhead of the executor: the time from the arrival of a request to its receipt by the engine.

Usage: python benchmarks/executor.py [--rate 200] [--seconds 10] [--engines 8]

The script prints quantiles in milliseconds, as JSON. The engines are real processes on this machine that answer with
the time at which they received a request; all processes share the monotonic clock. Dispatch has no delay and
engines are mostly idle, so the measured time contains neither ticks nor queueing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from clock_engine import TOKEN_LIMIT

from maveriq.control.controller import ControllerSettings
from maveriq.control.deployment_manager import Deployment
from maveriq.domain.cluster import Cluster, ClusterView, Gpu
from maveriq.domain.deployments import EndpointSpec, Intent, Objective
from maveriq.domain.models import ModelSpec, WeightType
from maveriq.domain.parallel import DeploymentPlan, ParallelConfig
from maveriq.domain.requests import Request
from maveriq.errors import MaveriqError
from maveriq.exec.executor import Executor
from maveriq.exec.launcher import ProcessLauncher
from maveriq.exec.live_cluster import EndpointRequest, Submission
from maveriq.policy.policy import Decision, Deploy
from maveriq.scenario.system import ServingSystem
from maveriq.units import Micros

_MODEL = ModelSpec(
    name="small",
    architecture="llama",
    layers=2,
    hidden_size=64,
    attention_heads=4,
    kv_heads=4,
    intermediate_size=128,
    vocab_size=1000,
)
_GIB = 1 << 30
_PROMPT = tuple(range(100))


class _OneGpuEach:
    """A policy that places each endpoint on the GPU of its number."""

    name = "one-gpu-each"

    def decide(self, endpoint: EndpointSpec, view: ClusterView) -> Decision:  # noqa: ARG002
        return Deploy(
            plans=(
                DeploymentPlan(
                    model=endpoint.model,
                    configuration=ParallelConfig(tp=1, pp=1, weights=WeightType.FLOAT16),
                    gpu_ids=(endpoint.endpoint_id - 1,),
                    gpu_bytes=(_GIB,),
                    est_latency_s=0.0,
                    est_memory_bytes=0,
                ),
            )
        )


class _NoTime:
    """Service times of engines that take no time."""

    name = "none"
    contention = None

    def times_us(self, plan: DeploymentPlan, requests: object) -> tuple[Micros, Micros]:  # noqa: ARG002
        return 1, 1


def _predict_service_time(deployment: Deployment, request: Request) -> Micros:
    raise MaveriqError(f"FIFO needs no predicted service time ({deployment.name}, {request.request_id})")


def _no_load_time(plan: DeploymentPlan) -> Micros:  # noqa: ARG001
    return 0


async def measure(rate: float, duration_s: float, engines: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Return the overhead of each request in milliseconds."""
    gpus = (Gpu(gpu_id=number, node=0, kind="none", capacity_bytes=2 * _GIB) for number in range(engines))
    system = ServingSystem(
        cluster=Cluster(name="benchmark", gpus=tuple(gpus)),
        policy=_OneGpuEach(),
        settings=ControllerSettings(),
        predict_service_time=_predict_service_time,
        service_times=_NoTime(),
        load_time=_no_load_time,
    )
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    with (
        tempfile.TemporaryDirectory() as logs,
        ProcessLauncher(
            "clock_engine:ClockEngine", logs=Path(logs), environment=os.environ | {"PYTHONPATH": path}
        ) as launcher,
    ):
        executor = Executor(system, launcher)
        requested = EndpointRequest(model=_MODEL, intent=Intent(objective=Objective.MIN_COST), output_tokens=2)
        endpoints = [executor.deploy(requested) for _ in range(engines)]
        while any(executor.endpoint(number)[0].status != "up" for number in endpoints):
            await asyncio.sleep(0.05)
        gaps_s = np.random.default_rng(42).exponential(1 / rate, int(rate * duration_s))
        loop = asyncio.get_running_loop()
        due_s = loop.time() + np.cumsum(gaps_s)
        handles = []
        for number, at_s in enumerate(due_s):
            await asyncio.sleep(max(0.0, at_s - loop.time()))
            arrived_s = time.monotonic()
            submission = Submission(endpoint_id=1 + number % engines, prompt=_PROMPT, output_tokens=2)
            handles.append((arrived_s, executor.submit(submission)))
        overhead_ms = []
        for arrived_s, handle in handles:
            high, low = (await handle.outcome()).tokens
            overhead_ms.append((high * TOKEN_LIMIT + low) / 1e3 - arrived_s * 1e3)
        await executor.close()
    return np.array(overhead_ms)


def main() -> None:
    """Measure and print the overhead."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=200.0, help="requests per second")
    parser.add_argument("--seconds", type=float, default=10.0, help="duration")
    parser.add_argument("--engines", type=int, default=8, help="number of engines")
    options = parser.parse_args()
    overhead_ms = asyncio.run(measure(options.rate, options.seconds, options.engines))
    quantiles = {f"p{share}": round(float(np.percentile(overhead_ms, share)), 3) for share in (50, 95, 99)}
    print(json.dumps({"requests": len(overhead_ms), "rate": options.rate, "overhead_ms": quantiles}))


if __name__ == "__main__":
    main()
