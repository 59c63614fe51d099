"""Measure the speed of AlpaServe's placement search.

Usage: python benchmarks/alpaserve.py [--large]

The script prints CPU and wall seconds of its simulator and of whole searches on eight GPUs as published, and with
--large of a search on 64 GPUs in 8 nodes with 32 models and 200,000 requests. Compilation is not included.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np

from maveriq.domain.requests import DemandForecast
from maveriq.estimate.hardware_profile import load_profile
from maveriq.policy.alpaserve.problem import (
    Group,
    GroupShape,
    ModelProfile,
    PlacementModel,
    PlacementProblem,
    SearchSettings,
    StageProfile,
)
from maveriq.policy.alpaserve.profiles import published_profiles_of
from maveriq.policy.alpaserve.search import search
from maveriq.policy.alpaserve.simulator import simulate, warm_up
from maveriq.units import bytes_from_gib
from maveriq.workload.forecast import published_forecast
from maveriq.workload.model_sets import load_model_set
from maveriq.workload.traces import embedded_trace

SETTINGS = SearchSettings(max_tp=8)


def timed(what: str, work: Callable[[], object], *, repeats: int = 5, requests: int = 0) -> None:
    cpu_s, wall_s = [], []
    for _ in range(repeats):
        cpu, wall = time.process_time(), time.perf_counter()
        work()
        cpu_s.append(time.process_time() - cpu)
        wall_s.append(time.perf_counter() - wall)
    rate = f"  {requests / min(cpu_s) / 1e6:6.1f} M requests per CPU-second" if requests else ""
    print(f"{what:56} CPU {np.median(cpu_s):8.4f} s  wall {np.median(wall_s):8.4f} s{rate}")


def published(model_set: str, trace: str, scale: float) -> PlacementProblem:
    models, hardware = load_model_set(model_set), load_profile("a6000-short")
    forecast = published_forecast(
        embedded_trace(trace).requests_per_minute,
        models,
        scale=scale,
        slo_s=lambda name: 5 * (hardware.slo_s(name, 20) or 0.0),
        name_offset=1,
    )
    profiles = published_profiles_of([entry.model.name for entry in models.entries])
    return _problem(forecast, profiles, gpus=8)


def _problem(forecast: DemandForecast, profiles: tuple[ModelProfile, ...], *, gpus: int) -> PlacementProblem:
    return PlacementProblem(
        gpus=gpus,
        gpus_per_node=8,
        memory_bytes=bytes_from_gib(48),
        models=tuple(PlacementModel(name=n, profile=p) for n, p in zip(forecast.models, profiles, strict=True)),
        demand=forecast,
    )


def synthetic(
    sizes_gib: list[float], *, gpus: int, requests: int = 200_000, rate_per_s: float = 60.0
) -> PlacementProblem:
    stream = np.random.default_rng(0)
    shapes = [GroupShape(tp, pp) for tp in (1, 2, 4, 8) for pp in (1, 2, 4, 8)]
    profiles = tuple(
        ModelProfile(
            shapes={
                shape: StageProfile(
                    stage_latency_s=(size * 0.02 / shape.tp**0.8 / shape.pp,) * shape.pp,
                    stage_weight_bytes=(bytes_from_gib(size) * 1.02 / shape.gpus,) * shape.pp,
                )
                for shape in shapes
            }
        )
        for size in sizes_gib
    )
    forecast = DemandForecast(
        models=tuple(f"m{number}" for number in range(len(sizes_gib))),
        arrival_s=np.cumsum(stream.exponential(1 / rate_per_s, requests)),
        model_index=stream.integers(0, len(sizes_gib), requests),
        slo_s=np.full(requests, 5.0),
    )
    return _problem(forecast, profiles, gpus=gpus)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true", help="also search on 64 GPUs")
    arguments = parser.parse_args()
    warm_up()
    four = synthetic([13, 15, 27, 15], gpus=8)
    halves = (Group(GroupShape(2, 2), (0, 1, 3)), Group(GroupShape(2, 2), (0, 2, 3)))
    timed("simulator, 8 GPUs, 4 models, arrays included", lambda: simulate(four, halves), requests=200_000)
    for model_set in ("large", "regular", "twentyone"):
        for trace in ("code", "conversation"):
            problem = published(model_set, trace, 0.4)
            timed(f"search, 8 GPUs, {model_set}, {trace} 0.4", lambda problem=problem: search(problem, SETTINGS))  # type: ignore[misc]
    if arguments.large:
        sizes = [[13.0, 15.0, 27.0, 15.0, 80.0, 130.0][number % 6] for number in range(32)]
        for what, chosen in (
            ("LLMs of 13 to 130 GiB", sizes),
            ("models of 2 GiB, which fill memory slowly", [2.0] * 32),
        ):
            problem = synthetic(chosen, gpus=64)
            timed(f"64 GPUs, 32 {what}", lambda problem=problem: search(problem, SETTINGS), repeats=1)  # type: ignore[misc]


if __name__ == "__main__":
    main()
