"""Tests that every placement rule and policy passes: the built-in ones and those of the docs.

A rule of your own passes by adding its place to OWN_RULES, a policy by adding it to POLICIES.
"""

import copy
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from maveriq.domain.cluster import ClusterView, GpuView
from maveriq.domain.deployments import EndpointSpec, Intent, Objective
from maveriq.domain.models import load_model
from maveriq.estimate.hardware_profile import load_profile
from maveriq.estimate.registry import make_estimator
from maveriq.policy.maveriq import MaverIQ, PlacementRule, place_shards
from maveriq.policy.policy import Deploy, Policy, Rejection
from maveriq.policy.registry import RULES, make_policy
from maveriq.units import BYTES_PER_GIB, Bytes

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
OWN_RULES = (f"{EXAMPLES / 'best_fit.py'}:best_fit",)

PROFILE = load_profile("a6000-short")
PAPER = make_estimator("paper", PROFILE)
MODELS = ("llama-2-7b", "falcon-7b", "llama-2-70b")


def policy_named(name: str) -> MaverIQ:
    policy = make_policy(name, estimator=PAPER, accuracy=PROFILE.accuracy, packing_threshold=0.7)
    assert isinstance(policy, MaverIQ)
    return policy


POLICIES: dict[str, Policy] = {name.rpartition("/")[2]: policy_named(name) for name in (*RULES, *OWN_RULES)}
RULES: dict[str, PlacementRule] = {name: policy.rule for name, policy in POLICIES.items() if policy.rule is not None}

every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
every_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


@st.composite
def views(draw, max_gpus: int = 8) -> ClusterView:
    """Draw clusters in use: GPUs in two nodes, some of them down, with equal and unequal memory and load."""
    ids = draw(st.lists(st.integers(0, max_gpus - 1), min_size=1, max_size=max_gpus, unique=True).map(sorted))
    free_gib = st.sampled_from([0, 4, 4.5, 12, 30, 47.5])
    return ClusterView(
        gpus=tuple(
            GpuView(
                gpu_id=gpu_id,
                node=gpu_id // 4,
                capacity_bytes=48 * BYTES_PER_GIB,
                free_bytes=int(draw(free_gib) * BYTES_PER_GIB),
                load=draw(st.sampled_from([0.0, 0.3, 0.7, 1.0])),
            )
            for gpu_id in ids
        )
    )


@st.composite
def endpoints(draw) -> EndpointSpec:
    return EndpointSpec(
        endpoint_id=1,
        model=load_model(draw(st.sampled_from(MODELS))),
        intent=Intent(
            objective=draw(st.sampled_from(Objective)),
            slo_s=draw(st.none() | st.sampled_from([0.05, 0.5])),
            float16_only=draw(st.booleans()),
        ),
        requested_us=0,
        prompt_tokens=10,
        output_tokens=20,
    )


shards = st.lists(st.integers(1, 48).map(lambda gib: gib * BYTES_PER_GIB), min_size=1, max_size=8)


@every_rule
@given(view=views())
@settings(max_examples=50, deadline=None)
def test_a_rule_orders_the_gpus_it_was_given(rule: PlacementRule, view: ClusterView) -> None:
    """The rule returns a permutation of the GPUs, and the same one for the same input."""
    before = copy.deepcopy(view)
    order = rule(view.gpus)
    assert sorted(order, key=lambda gpu: gpu.gpu_id) == list(view.gpus)
    assert list(rule(view.gpus)) == list(order)
    assert view == before


@every_rule
@given(view=views(), sizes=shards)
@settings(max_examples=50, deadline=None)
def test_an_existing_placement_is_found_and_fits(rule: PlacementRule, view: ClusterView, sizes: list[Bytes]) -> None:
    placed = place_shards(sizes, rule(view.gpus))
    # A placement exists exactly if the k-th largest shard fits the GPU with the k-th most free memory.
    rooms = sorted((gpu.free_bytes for gpu in view.gpus), reverse=True)
    largest_first = sorted(sizes, reverse=True)
    exists = len(sizes) <= len(rooms) and all(map(int.__le__, largest_first, rooms))
    assert (placed is not None) == exists
    if placed is not None:
        free = {gpu.gpu_id: gpu.free_bytes for gpu in view.gpus}
        assert len(set(placed)) == len(sizes)
        assert all(size <= free[gpu_id] for size, gpu_id in zip(sizes, placed, strict=True))


@every_policy
@given(endpoint=endpoints(), view=views())
@settings(max_examples=20, deadline=None)
def test_a_policy_is_pure_and_its_plans_fit(policy: Policy, endpoint: EndpointSpec, view: ClusterView) -> None:
    before = copy.deepcopy((endpoint, view))
    decision = policy.decide(endpoint, view)
    assert policy.decide(endpoint, view) == decision
    assert (endpoint, view) == before
    if isinstance(decision, Rejection):
        assert decision.reason
        return
    free = {gpu.gpu_id: gpu.free_bytes for gpu in view.gpus}
    for plan in decision.plans:
        assert plan.model == endpoint.model
        assert len(set(plan.gpu_ids)) == len(plan.gpu_ids)
        for gpu_id, amount in zip(plan.gpu_ids, plan.gpu_bytes, strict=True):
            free[gpu_id] -= amount  # plans of one decision share the memory
            assert free[gpu_id] >= 0


@every_policy
@given(endpoint=endpoints(), view=views())
@settings(max_examples=20, deadline=None)
def test_a_rule_never_loses_a_deployment_that_fits(policy: MaverIQ, endpoint: EndpointSpec, view: ClusterView) -> None:
    """A rule only places shards; the configuration, and whether there is a plan, is decided before."""
    kept, moved = POLICIES["none"].decide(endpoint, view), policy.decide(endpoint, view)
    assert isinstance(kept, Deploy) == isinstance(moved, Deploy)
    if isinstance(kept, Deploy) and isinstance(moved, Deploy):
        assert kept.plans[0].configuration == moved.plans[0].configuration
        assert kept.plans[0].gpu_bytes == moved.plans[0].gpu_bytes
