"""maveriq chooses the configurations that the recorded system chose (SPEC 4)."""

from collections.abc import Sequence

import pytest
from configurations import Compared, compare

from maveriq.domain.models import KvType, WeightType
from maveriq.domain.parallel import ParallelConfig
from maveriq.testbed.recordings import RecordedDeployment, RecordedPlan, RecordedRun
from maveriq.units import micros

LEAST_EQUAL_FREE = 0.95
MAX_GIB_ERROR = 1e-3
IDLE_GIB, FULL_GIB = (0.465,) * 8, (47.9,) * 8


def listed(different: Sequence[Compared]) -> str:
    return "\n".join([f"{len(different)} differ:", *map(str, different)])


@pytest.mark.heavy
@pytest.mark.data
def test_every_deployment_of_maveriq_is_compared(compared: Sequence[Compared]) -> None:
    assert len(compared) == 61
    assert len({comparison.run for comparison in compared}) == 11


@pytest.mark.data
def test_given_the_recorded_memory_every_configuration_equals_the_recorded_one(compared: Sequence[Compared]) -> None:
    different = [comparison for comparison in compared if comparison.given_memory != comparison.recorded]
    assert not different, listed(different)


@pytest.mark.data
def test_estimated_memory_of_each_gpu_equals_the_recorded_estimate(compared: Sequence[Compared]) -> None:
    different = [
        comparison
        for comparison in compared
        if comparison.memory_error_gib is None or comparison.memory_error_gib > MAX_GIB_ERROR
    ]
    assert not different, listed(different)


@pytest.mark.data
def test_in_simulation_nearly_every_configuration_equals_the_recorded_one(compared: Sequence[Compared]) -> None:
    different = [comparison for comparison in compared if comparison.free != comparison.recorded]
    assert len(different) <= (1 - LEAST_EQUAL_FREE) * len(compared), listed(different)


def recorded_plan(configuration: ParallelConfig, gib_per_gpu: float) -> RecordedPlan:
    gpu_ids = tuple(range(configuration.gpus))
    return RecordedPlan(
        configuration=configuration,
        gpu_ids=gpu_ids,
        gib_per_gpu=(gib_per_gpu,) * len(gpu_ids),
    )


def recorded_deployment(
    endpoint_id: int, model_name: str, came_up_as: RecordedPlan | None, used_gib_after: tuple[float, ...]
) -> RecordedDeployment:
    return RecordedDeployment(
        endpoint_id=endpoint_id,
        model_name=model_name,
        requested_us=micros(240.0 * (endpoint_id - 1)),
        registered_us=None,
        plan=came_up_as,
        used_gib_after=used_gib_after,
    )


def test_a_comparison_reports_differences_and_skips_failed_deploys() -> None:
    chosen = ParallelConfig(tp=4, pp=1, weights=WeightType.INT4, kv=KvType.INT8)
    other = ParallelConfig(tp=8, pp=1, weights=WeightType.FLOAT16)
    run = RecordedRun(
        name="made up",
        policy="MaverIQ",
        model_set="large",
        intent="min_cost",
        trace="code",
        scale=0.05,
        slo_scale=0.0,
        deployments=(
            recorded_deployment(1, "llama-2-70b", recorded_plan(chosen, 10.8691), IDLE_GIB),
            recorded_deployment(2, "falcon-40b", recorded_plan(other, 1.0), IDLE_GIB),
            recorded_deployment(3, "llama-2-7b", None, FULL_GIB),
            recorded_deployment(4, "falcon-40b", recorded_plan(other, 1.0), FULL_GIB),
        ),
    )
    first, second, fourth = compare(run)
    assert first.given_memory == first.free == first.recorded == chosen
    assert first.memory_error_gib == pytest.approx(0, abs=MAX_GIB_ERROR)
    assert second.endpoint_id == 2
    assert second.given_memory != second.recorded
    assert second.memory_error_gib is None
    assert fourth.endpoint_id == 4
    assert isinstance(fourth.given_memory, str)
    assert "does not fit the free memory" in fourth.given_memory
    assert isinstance(fourth.free, ParallelConfig)
