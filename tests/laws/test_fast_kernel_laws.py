"""The fast kernel gives the records of SimPy, whatever is simulated."""

from dataclasses import fields, replace
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from fixtures import TokenSeconds, arrivals, scenario
from hypothesis import given, settings
from test_simulation_laws import systems

import maveriq
from maveriq.control.controller import ControllerSettings
from maveriq.control.queues import QueueDiscipline
from maveriq.control.routing_policies import RoutingRule
from maveriq.domain.faults import Fault, FaultTarget, Removal
from maveriq.domain.records import RunRecord
from maveriq.errors import InputError
from maveriq.scenario.service_times import EstimatedServiceTimes
from maveriq.scenario.system import ReplaySystem
from maveriq.sim.fast_replay import FastReplay
from maveriq.sim.kernels import Kernel, choose_kernel, why_not_fast
from maveriq.sim.simulator import simulate


class Contending(TokenSeconds):
    """An estimator whose engines of one GPU share a process and slow each other down."""

    def shares_process(self, configuration):
        return configuration.gpus < 3

    def contention_delay_s(self, model, configuration, *, co_located):
        return 0.00037 * co_located + 0.0001 * configuration.gpus


def assert_equal(one: RunRecord, other: RunRecord) -> None:
    assert one.ended_us == other.ended_us
    for field in fields(one.requests):
        first, second = getattr(one.requests, field.name), getattr(other.requests, field.name)
        np.testing.assert_array_equal(first, second, err_msg=field.name)
    assert one.gpu_samples == other.gpu_samples
    assert one.deployments == other.deployments
    assert one.models == other.models


@st.composite
def covered(draw) -> ReplaySystem:
    """Draw a system that the fast kernel covers: some engines share a process, some requests are too long."""
    discipline = draw(st.sampled_from([QueueDiscipline.FIFO, QueueDiscipline.FIFO_PER_MODEL]))
    made = draw(systems(with_faults=False, discipline=discipline))
    limit = draw(st.sampled_from([None, 300]))
    return replace(
        made,
        settings=replace(made.settings, engine_tokens=lambda _: limit, seed=draw(st.integers(0, 3))),
        service_times=EstimatedServiceTimes(draw(st.sampled_from([TokenSeconds(), Contending()]))),
        sample_us=draw(st.sampled_from([7_000, 1_000_000])),
        workload=replace(
            made.workload,
            endpoints=tuple(
                replace(each, requested_us=draw(st.sampled_from([0, 500_000])), ready_at_start=draw(st.booleans()))
                for each in made.workload.endpoints
            ),
        ),
    )


@settings(max_examples=150, deadline=None)
@given(covered())
@pytest.mark.heavy  # machine code is loaded, once
def test_random_systems_have_the_records_of_simpy(system: ReplaySystem) -> None:
    assert_equal(FastReplay(system).run(None), simulate(system))


@pytest.mark.heavy  # machine code is loaded, once
def test_a_run_waits_for_its_last_endpoint_as_with_simpy() -> None:
    made = scenario(arrivals([0], [1], [1]), {1: [(0,)], 2: [(1,)]}, requested_us={2: 2_500_000})
    ready = tuple(replace(each, ready_at_start=True) for each in made.workload.endpoints)
    made = replace(made, workload=replace(made.workload, endpoints=ready))
    record = simulate(made)
    assert record.ended_us == 3_000_000  # at the first sample of GPUs after it
    assert_equal(FastReplay(made).run(None), record)


FAULT = Fault(target=FaultTarget.GPU, target_id=0, at_us=5, for_us=None)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"faults": (FAULT,)}, "--fail"),
        ({"removals": (Removal(endpoint_id=1, at_us=5),)}, "--remove"),
        ({"settings": ControllerSettings(discipline=QueueDiscipline.SJF)}, "--queue sjf"),
        ({"settings": ControllerSettings(router=RoutingRule.ROUND_ROBIN)}, "--router"),
        ({"max_in_flight": 3}, "--max-in-flight"),
    ],
)
def test_what_is_not_covered_is_named_and_left_to_simpy(changes, named):
    made = replace(scenario(arrivals([0], [1], [1]), {1: [(0,)]}), **changes)
    assert named in (why_not_fast(made) or "")
    assert choose_kernel(made).kernel is Kernel.SIMPY
    with pytest.raises(InputError, match=named):
        choose_kernel(made, Kernel.FAST)


def test_the_fast_kernel_is_chosen_for_many_requests_and_says_so():
    count = 30_000
    many = scenario(arrivals([0] * count, [1] * count, [1] * count), {1: [(0,)]})
    few = scenario(arrivals([0], [1], [1]), {1: [(0,)]})
    assert (choose_kernel(few).kernel, choose_kernel(few).note) == (Kernel.SIMPY, "")
    assert choose_kernel(many).kernel is Kernel.FAST
    assert "fast kernel" in choose_kernel(many).note
    assert "--fail" in choose_kernel(replace(many, faults=(FAULT,))).note
    assert choose_kernel(many, Kernel.SIMPY).kernel is Kernel.SIMPY


@pytest.mark.heavy  # machine code is loaded, once
def test_a_run_of_the_fast_kernel_in_parquet_reads_back_as_one_of_simpy_in_csv(tmp_path: Path) -> None:
    options = {"models": "twentyone", "limit": 300, "slo_scale": 5.0}
    for kernel, records in (("fast", "parquet"), ("simpy", "csv")):
        maveriq.simulate(kernel=kernel, **options).save(tmp_path / kernel, records=records)
    fast, simpy = (maveriq.load_run(tmp_path / kernel) for kernel in ("fast", "simpy"))
    assert_equal(fast.record, simpy.record)
    assert fast.to_dict() == simpy.to_dict()
    assert "fast kernel" in fast.notes[-1]
    for name in ("deployments.csv", "gpus.csv"):
        assert (tmp_path / "fast" / name).read_bytes() == (tmp_path / "simpy" / name).read_bytes()


def test_an_unknown_kernel_is_refused_before_anything_is_read():
    with pytest.raises(InputError, match="simpy"):
        maveriq.simulate(kernel="fats", trace="no-such-file.csv")
