"""The policy with per-endpoint overrides: pinned plans and placements by name."""

import dataclasses

import pytest
from fakes import GIB, OneGpu, gpus, placements

from maveriq.domain.cluster import ClusterState, ClusterView
from maveriq.domain.deployments import EndpointSpec, Intent, Objective
from maveriq.domain.models import load_model
from maveriq.errors import MaveriqError, UnknownNameError
from maveriq.policy.pinned import PinnedPlacementPolicy, Plans
from maveriq.policy.policy import Decision, Deploy, Rejection

ENDPOINT = EndpointSpec(
    endpoint_id=5, model=load_model("llama-2-7b"), intent=Intent(objective=Objective.MIN_COST), requested_us=0,
    prompt_tokens=8, output_tokens=20,
)  # fmt: skip


def empty() -> ClusterState:
    return ClusterState(gpus())


def view(state: ClusterState) -> ClusterView:
    return state.view([0.0] * 4)


def elsewhere() -> Plans:
    """Plans that the default policy would not make."""
    decision = OneGpu(last=True).decide(ENDPOINT, view(empty()))
    assert isinstance(decision, Deploy)
    return decision.plans


def test_pinned_plans_are_kept_and_new_decisions_are_reported() -> None:
    decided: list[tuple[int, Plans]] = []
    policy = placements()
    policy.on_decision(lambda endpoint_id, plans: decided.append((endpoint_id, plans)))
    policy.pin(5, elsewhere())
    assert policy.decide(ENDPOINT, view(empty())) == Deploy(plans=elsewhere())
    assert decided == []
    other = dataclasses.replace(ENDPOINT, endpoint_id=6)
    decision = policy.decide(other, view(empty()))
    assert decision == OneGpu().decide(other, view(empty()))
    assert isinstance(decision, Deploy)
    assert decided == [(6, decision.plans)]
    assert policy.name == "one-gpu"


def full() -> ClusterState:
    state = empty()
    state.reserve(1, {3: 40 * GIB})
    return state


def down() -> ClusterState:
    state = empty()
    state.set_down(3, down=True)
    return state


@pytest.mark.parametrize("state", [full(), down()])
def test_plans_that_no_longer_fit_are_replaced(state: ClusterState) -> None:
    policy = placements()
    policy.pin(5, elsewhere())
    decision = policy.decide(ENDPOINT, view(state))
    assert isinstance(decision, Deploy)
    assert decision.plans[0].gpu_ids == (0,)


def test_two_replicas_on_one_gpu_need_room_for_both() -> None:
    policy = placements()
    [plan] = elsewhere()
    half = dataclasses.replace(plan, gpu_bytes=(30 * GIB,))
    policy.pin(5, (half, half))
    decision = policy.decide(ENDPOINT, view(empty()))
    assert isinstance(decision, Deploy)
    assert len(decision.plans) == 1


@pytest.mark.parametrize(
    "endpoint",
    [dataclasses.replace(ENDPOINT, model=load_model("gptj-6b")), dataclasses.replace(ENDPOINT, batch_size=2)],
)
def test_plans_of_another_model_or_batch_size_are_ignored(endpoint: EndpointSpec) -> None:
    policy = placements()
    policy.pin(5, elsewhere())
    decision = policy.decide(endpoint, view(empty()))
    assert decision == OneGpu().decide(endpoint, view(empty()))


def test_placement_rules_by_name() -> None:
    policy = placements()
    policy.place_by(5, "last")
    assert policy.decide(ENDPOINT, view(empty())) == Deploy(plans=elsewhere())
    policy.forget(5)
    assert policy.decide(ENDPOINT, view(empty())) == OneGpu().decide(ENDPOINT, view(empty()))
    with pytest.raises(UnknownNameError, match="did you mean 'last'"):
        policy.place_by(5, "lst")


class Broken:
    name = "broken"

    def decide(self, endpoint: EndpointSpec, view: ClusterView) -> Decision:
        raise MaveriqError("policy 'broken' failed: it must return GPUs")


def test_an_error_of_a_policy_is_a_rejection() -> None:
    decision = PinnedPlacementPolicy(default=Broken()).decide(ENDPOINT, view(empty()))
    assert decision == Rejection(reason="policy 'broken' failed: it must return GPUs")
