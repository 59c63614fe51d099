"""The examples of the docs do what the docs describe."""

from dataclasses import replace
from pathlib import Path

import pytest

from maveriq.domain.cluster import ClusterView, GpuView
from maveriq.domain.deployments import EndpointSpec, Intent, Objective
from maveriq.domain.models import WeightType, load_model
from maveriq.domain.parallel import ParallelConfig
from maveriq.domain.records import RunRecord
from maveriq.domain.requests import RequestStatus
from maveriq.estimate.hardware_profile import load_profile
from maveriq.estimate.registry import make_estimator
from maveriq.policy.policy import Deploy, Rejection
from maveriq.scenario.build import build_system
from maveriq.scenario.options import Options
from maveriq.scenario.service_times import EstimatedServiceTimes
from maveriq.sim.simulator import simulate
from maveriq.units import BYTES_PER_GIB

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
BEST_FIT = f"{EXAMPLES / 'best_fit.py'}:best_fit"
MAX_LINES = 60


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


def run(policy: str) -> RunRecord:
    return simulate(build_system(Options(policy=policy)))


def gpus_of(record: RunRecord) -> list[set[int]]:
    return [set(deployment.plan.gpu_ids) for deployment in record.deployments if deployment.plan]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < MAX_LINES


def test_best_fit_uses_fewer_gpus_than_hybrid() -> None:
    best, hybrid = run(BEST_FIT), run("hybrid")
    assert gpus_of(best) != gpus_of(hybrid)
    assert set.union(*gpus_of(best)) < set.union(*gpus_of(hybrid))
    # Configurations are chosen before placement, and both runs have enough free memory.
    assert [deployment.plan.configuration for deployment in best.deployments] == [
        deployment.plan.configuration for deployment in hybrid.deployments
    ]


def test_best_fit_takes_the_fullest_gpu_that_still_fits() -> None:
    from best_fit import best_fit

    free_gib = (30, 2, 10, 10)
    view = [
        GpuView(gpu_id=i, node=0, capacity_bytes=48 * BYTES_PER_GIB, free_bytes=gib * BYTES_PER_GIB, load=0.0)
        for i, gib in enumerate(free_gib)
    ]
    assert [gpu.gpu_id for gpu in best_fit(view)] == [1, 2, 3, 0]


def test_a_faster_gpu_shortens_the_times_and_keeps_the_memory() -> None:
    from faster_gpu import FasterGpu

    paper = make_estimator("paper", load_profile("a6000-short"))
    twice = FasterGpu(base=paper, speedup=2.0)
    model, configuration = load_model("llama-2-7b"), ParallelConfig(tp=2, pp=2, weights=WeightType.INT8)
    size = {"prompt_tokens": 10, "output_tokens": 20, "batch": 1}
    slow, fast = paper.service(model, configuration, **size), twice.service(model, configuration, **size)
    assert fast.latency_s == pytest.approx(slow.latency_s / 2)
    assert twice.memory(model, configuration) == paper.memory(model, configuration)
    assert twice.name == "paper x 2"
    assert twice.why_not(model, replace(configuration, weights=WeightType.INT4_GPTQ)) == paper.why_not(
        model, replace(configuration, weights=WeightType.INT4_GPTQ)
    )


def test_a_run_with_a_custom_estimator() -> None:
    """As in docs/extending.md: plan with one estimator, serve with another."""
    from faster_gpu import FasterGpu

    faster = FasterGpu(base=make_estimator("calibrated", load_profile("a6000-short")), speedup=2.0)
    system = build_system(Options(scale=0.1))
    slow = simulate(system).requests
    fast = simulate(replace(system, service_times=EstimatedServiceTimes(faster))).requests
    done = (slow.status == RequestStatus.COMPLETED) & (fast.status == RequestStatus.COMPLETED)
    assert done.all()
    slow_us, fast_us = (slow.finish_us - slow.start_us)[done], (fast.finish_us - fast.start_us)[done]
    assert abs(2 * fast_us - slow_us).max() <= 2  # durations are rounded up to whole microseconds


def test_a_custom_policy_decides() -> None:
    from one_gpu_each import OneGpuEach

    paper = make_estimator("paper", load_profile("a6000-short"))
    policy = OneGpuEach(estimator=paper)
    record = simulate(replace(build_system(Options(scale=0.1)), policy=policy))
    plans = [deployment.plan for deployment in record.deployments]
    # Two of the four models have no float16 engine on one GPU of this kind.
    assert [plan.configuration.gpus for plan in plans if plan] == [1]
    assert [plan.model.name for plan in plans if plan] == ["llama-2-7b"]
    assert all(deployment.reason for deployment in record.deployments if deployment.plan is None)


def test_a_custom_policy_fits_or_rejects() -> None:
    from one_gpu_each import OneGpuEach

    policy = OneGpuEach(estimator=make_estimator("paper", load_profile("a6000-short")))
    endpoint = EndpointSpec(
        endpoint_id=1,
        model=load_model("llama-2-13b"),
        intent=Intent(objective=Objective.MIN_COST),
        requested_us=0,
        prompt_tokens=10,
        output_tokens=20,
    )

    def decide(*free_gib: float) -> Deploy | Rejection:
        gpus = (
            GpuView(gpu_id=i, node=0, capacity_bytes=48 * BYTES_PER_GIB, free_bytes=int(gib * BYTES_PER_GIB), load=0.0)
            for i, gib in enumerate(free_gib)
        )
        return policy.decide(endpoint, ClusterView(gpus=tuple(gpus)))

    chosen = decide(30, 40, 20)
    assert isinstance(chosen, Deploy)
    assert chosen.plans[0].gpu_ids == (1,)
    assert isinstance(decide(8, 20), Rejection)
    assert isinstance(decide(), Rejection)
