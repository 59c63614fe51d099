"""Emulated continuous engines under the executor do what simulated ones do, when the clock has no lag."""

from dataclasses import replace

import numpy as np
import pytest
from clocked_engines import SmallEngines, system
from fault_injection import FaultRates, RandomDraws
from fixtures import arrivals
from simulated_engines import Machine
from virtual_time import run_virtually

from maveriq.control.controller import ControllerSettings
from maveriq.domain.faults import Fault, FaultTarget
from maveriq.domain.requests import RequestStatus
from maveriq.exec.replay import ReplayResult, ReplaySettings, execute
from maveriq.scenario.system import ReplaySystem
from maveriq.sim.simulator import simulate

ENGINES = SmallEngines({"kind": "vllm", "max_num_seqs": 4, "max_num_batched_tokens": 64}, blocks=24, context=256)
REQUESTS = 40


def small_system(gpus_of: tuple[int, int] = (0, 1), **options: object) -> ReplaySystem:
    draws = np.random.default_rng(7)
    times_us = np.sort(draws.integers(0, 200_000, REQUESTS)).tolist()
    requests = arrivals(times_us, [1] * REQUESTS, draws.integers(1, 120, REQUESTS).tolist())
    requests = replace(requests, prompt_tokens=draws.integers(1, 120, REQUESTS))
    settings = ControllerSettings(refuse_beyond_context=False)
    made = system(requests, {1: [(gpu,) for gpu in gpus_of]}, gpus=2, engines=ENGINES, settings=settings, **options)
    endpoints = tuple(replace(endpoint, ready_at_start=True) for endpoint in made.workload.endpoints)
    return replace(made, sample_us=50_000, workload=replace(made.workload, endpoints=endpoints))


def emulated(scenario: ReplaySystem) -> ReplayResult:
    """Replay a scenario on emulated engines whose processes are simulated, and so is the clock."""

    async def replay() -> ReplayResult:
        machine = Machine(RandomDraws(1), FaultRates(until_s=0.0, ignores_sigterm=0.0))
        return await execute(scenario, machine, ReplaySettings(planned_times=True))

    return run_virtually(replay(), longest_s=10_000.0)


@pytest.mark.parametrize("gpus_of", [(0, 1), (0, 0)], ids=["two GPUs", "one GPU"])
def test_an_emulated_run_is_the_simulated_one_but_for_the_rounding_of_the_clock(gpus_of):
    scenario = small_system(gpus_of)
    simulated, result = simulate(scenario), emulated(scenario)
    ours, theirs = result.record.requests, simulated.requests
    assert (ours.status == RequestStatus.COMPLETED.value).all()
    for name in ("deployment_id", "output_tokens", "preemptions", "steps"):
        assert getattr(ours, name).tolist() == getattr(theirs, name).tolist(), name
    assert theirs.preemptions.sum() > 0
    for name in ("arrival_us", "start_us", "first_token_us", "finish_us"):
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name), abs=3), name
    assert result.lag is not None
    assert result.lag.execution_p99_s < 1e-5


def test_an_emulated_run_records_engines_over_time():
    scenario = small_system()
    simulated, record = simulate(scenario), emulated(scenario).record
    assert record.engines is not None
    assert simulated.engines is not None
    for name in ("deployment_id", "running", "waiting", "kv_use", "busy_share"):
        ours, theirs = getattr(record.engines, name), getattr(simulated.engines, name)
        assert ours == pytest.approx(theirs, abs=0.01), name
    assert record.itl is not None
    assert int(record.itl.tokens.sum()) == int((record.requests.output_tokens - 1).sum())


def test_requests_of_an_engine_that_is_killed_go_to_the_other():
    fault = Fault(target=FaultTarget.DEPLOYMENT, target_id=1, at_us=60_000, for_us=None)
    record = emulated(replace(small_system(), faults=(fault,))).record
    done = record.requests.status == RequestStatus.COMPLETED.value
    assert done.all()
    assert (record.requests.deployment_id[record.requests.arrival_us > 60_000] == 2).all()
