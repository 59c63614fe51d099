"""Several replicas of a model with continuous engines, simulated: what routers do to queues, tails and caches."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from clocked_engines import SmallEngines, system
from fixtures import arrivals, run

from maveriq.control.controller import ControllerSettings
from maveriq.control.routing_policies import RoutingRule
from maveriq.domain.records import RequestTable
from maveriq.domain.requests import RequestStatus
from maveriq.sim.simulator import simulate
from maveriq.workload.requests import Arrivals

ENGINES = SmallEngines({"kind": "vllm", "max_num_seqs": 8, "max_num_batched_tokens": 512}, blocks=264)
CONTINUOUS = [rule for rule in RoutingRule if not rule.predicts_service_time]


def load(count: int, *, gap_us: float, prompts: int = 0, prompt_tokens: int = 64, seed: int = 7) -> Arrivals:
    """Return requests at random times, with random outputs; `prompts` is how many prompts there are, 0 for unknown."""
    draw = np.random.default_rng(seed)
    times_us = np.cumsum(draw.exponential(gap_us, count)).astype(np.int64)
    made = arrivals(times_us.tolist(), [1] * count, draw.geometric(1 / 40, count).clip(1, 800).tolist())
    return replace(
        made,
        prompt_tokens=np.full(count, prompt_tokens, dtype=np.int64),
        prompt_id=draw.integers(1, prompts + 1, count) if prompts else None,
    )


def simulated(
    rule: RoutingRule | None, requests: Arrivals, *, replicas: int, engines: SmallEngines = ENGINES
) -> RequestTable:
    gpus_of = {1: [(gpu,) for gpu in range(replicas)]}
    settings = ControllerSettings(router=rule, refuse_beyond_context=False)
    return simulate(system(requests, gpus_of, gpus=replicas, engines=engines, settings=settings)).requests


@pytest.mark.parametrize("rule", CONTINUOUS)
def test_every_request_completes_once_on_one_of_the_replicas(rule):
    requests = load(200, gap_us=400, prompts=9)
    table = simulated(rule, requests, replicas=4)
    assert (table.status == RequestStatus.COMPLETED.value).all()
    assert set(table.deployment_id.tolist()) <= {1, 2, 3, 4}
    assert (table.output_tokens == requests.output_tokens).all()
    again = simulated(rule, requests, replicas=4)
    assert (table.finish_us == again.finish_us).all()


@pytest.mark.parametrize("rule", [None, *CONTINUOUS])
def test_with_one_replica_all_routers_are_alike(rule):
    requests = load(60, gap_us=2_000, prompts=4)
    alone = simulated(RoutingRule.RANDOM, requests, replicas=1)
    assert (simulated(rule, requests, replicas=1).finish_us == alone.finish_us).all()


def latency_us(table: RequestTable, percent: float) -> float:
    return float(np.percentile(table.finish_us - table.arrival_us, percent))


def test_two_choices_have_a_shorter_tail_than_one_and_least_outstanding_as_short_a_one():
    requests = load(1_200, gap_us=900)
    tail = {}
    for rule in (RoutingRule.RANDOM, RoutingRule.POWER_OF_TWO, RoutingRule.LEAST_OUTSTANDING):
        table = simulated(rule, requests, replicas=8)
        tail[rule] = float(np.percentile(table.first_token_us - table.arrival_us, 99))
    assert tail[RoutingRule.POWER_OF_TWO] < 0.3 * tail[RoutingRule.RANDOM]
    assert tail[RoutingRule.LEAST_OUTSTANDING] < 1.1 * tail[RoutingRule.POWER_OF_TWO]


def test_prefixes_are_found_more_often_where_the_router_knows_them():
    """Each cache holds about a quarter of the prompts."""
    requests = load(300, gap_us=3_000, prompts=24, prompt_tokens=480)
    cached = {
        rule: int(simulated(rule, requests, replicas=4).cached_tokens.sum())
        for rule in (RoutingRule.ROUND_ROBIN, RoutingRule.PREFIX_AWARE)
    }
    assert cached[RoutingRule.PREFIX_AWARE] > 1.5 * cached[RoutingRule.ROUND_ROBIN]


def test_a_popular_prefix_does_not_overload_one_replica():
    requests = load(400, gap_us=300, prompts=1, prompt_tokens=256)
    table = simulated(RoutingRule.PREFIX_AWARE, requests, replicas=4)
    counts = Counter(table.deployment_id.tolist())
    assert min(counts[number] for number in (1, 2, 3, 4)) > 60
    even = simulated(RoutingRule.LEAST_OUTSTANDING, requests, replicas=4)
    assert latency_us(table, 99) < 1.3 * latency_us(even, 99)


def test_sessions_stay_on_their_replica():
    count = 120
    session_id = np.arange(count, dtype=np.int64) % 12 + 1
    # The client sends a turn when the one before has ended, so that rows are in another order; lengths tell sessions.
    requests = replace(load(count, gap_us=1_000), session_id=session_id, prompt_tokens=64 + session_id)
    table = simulated(RoutingRule.SESSION, requests, replicas=4)
    for session in range(1, 13):
        assert len(set(table.deployment_id[table.prompt_tokens == 64 + session].tolist())) == 1
    assert len(set(table.deployment_id.tolist())) > 1


def test_routers_that_need_no_kv_cache_route_to_exclusive_engines():
    for rule in (RoutingRule.ROUND_ROBIN, RoutingRule.LEAST_OUTSTANDING):
        settings = ControllerSettings(router=rule)
        table = run(
            arrivals(list(range(10, 16)), [1] * 6, [5] * 6), {1: [(0,), (1,), (2,)]}, settings=settings
        ).requests
        assert sorted(Counter(table.deployment_id.tolist()).values()) == [2, 2, 2]
