"""Simulations with compiled engines give the records of those in Python, whatever happens in them."""

from dataclasses import dataclass, fields, replace

import hypothesis.strategies as st
import numpy as np
import pytest
from clocked_engines import system
from fixtures import arrivals
from hypothesis import given, settings
from test_compiled_engine import PRESET, STEPS
from test_continuous_failures import systems

from maveriq.control.controller import ControllerSettings
from maveriq.control.routing_policies import RoutingRule
from maveriq.domain.records import RunRecord
from maveriq.engine.reading import read_engine_settings
from maveriq.engine.settings import EngineHost
from maveriq.estimate.step_timer import StepTimer
from maveriq.scenario import clocked_engine
from maveriq.scenario.continuous_engines import AdmissionDelay, EngineParts
from maveriq.scenario.system import ReplaySystem
from maveriq.sim.simulator import simulate

pytestmark = pytest.mark.heavy  # compiling takes seconds, once

SCARCE = {"kind": "vllm", "version": "0.23.0", "max_num_seqs": 4, "max_num_batched_tokens": 64}


@dataclass(frozen=True)
class Engines:
    """Makes engines with step times that can be compiled."""

    settings: dict[str, object]
    blocks: int = 24

    def parts(self, endpoint, plan):
        resolved = read_engine_settings(self.settings).resolve(EngineHost(context_tokens=256))
        return EngineParts(
            engine=resolved.make_engine(self.blocks),
            timer=StepTimer(STEPS, PRESET, layers=2),
            admission_delay_us=AdmissionDelay(PRESET, resolved.max_num_seqs),
        )


def records(made: ReplaySystem, min_requests: int, monkeypatch: pytest.MonkeyPatch) -> RunRecord:
    monkeypatch.setattr(clocked_engine, "MIN_REQUESTS", min_requests)
    return simulate(made)


def assert_equal(one: RunRecord, other: RunRecord) -> None:
    assert one.ended_us == other.ended_us
    for table in ("requests", "engines", "itl"):
        first, second = getattr(one, table), getattr(other, table)
        assert (first is None) == (second is None)
        for field in fields(first) if first is not None else ():
            np.testing.assert_array_equal(getattr(first, field.name), getattr(second, field.name), err_msg=field.name)
    assert one.gpu_samples == other.gpu_samples
    assert one.deployments == other.deployments


@settings(max_examples=150, deadline=None)
@given(systems(), st.booleans(), st.sampled_from([5_000, 1_000_000]))
def test_failures_removals_and_routers_change_nothing(made, is_async, sample_us):
    made = replace(made, engines=Engines({**SCARCE, "async_scheduling": is_async}), sample_us=sample_us)
    with pytest.MonkeyPatch.context() as patch:
        assert_equal(records(made, 1 << 60, patch), records(made, 0, patch))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 1 << 30),
    st.integers(1, 6),
    st.sampled_from([None, RoutingRule.ROUND_ROBIN, RoutingRule.LEAST_KV, RoutingRule.RANDOM]),
    st.sampled_from([100, 2_000, 20_000]),
    st.sampled_from([None, 3]),
)
def test_many_requests_on_several_engines_change_nothing(seed, replicas, rule, gap_us, max_in_flight):
    draw = np.random.default_rng(seed)
    count = int(draw.integers(50, 300))
    times_us = np.cumsum(draw.exponential(gap_us, count)).astype(np.int64)
    requests = arrivals(times_us.tolist(), [1] * count, draw.integers(1, 128, count).tolist())
    requests = replace(requests, prompt_tokens=draw.integers(1, 150, count))  # some are too long
    gpus_of = {1: [(gpu,) for gpu in range(replicas)]}
    made = system(
        requests, gpus_of, gpus=replicas, engines=Engines(SCARCE), settings=ControllerSettings(
            router=rule, refuse_beyond_context=False, engine_tokens=lambda _: 255
        ),
    )  # fmt: skip
    made = replace(made, max_in_flight=max_in_flight, sample_us=50_000)
    with pytest.MonkeyPatch.context() as patch:
        assert_equal(records(made, 1 << 60, patch), records(made, 0, patch))
