"""Policies without intents: layers balanced over all GPUs, and one configuration for all models."""

from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given

from maveriq.domain.cluster import ClusterState, ClusterView
from maveriq.domain.deployments import EndpointSpec, Intent, Objective
from maveriq.domain.models import KvType, load_model
from maveriq.errors import InputError
from maveriq.estimate.cluster_spec import cluster_from
from maveriq.estimate.hardware_profile import load_profile
from maveriq.estimate.registry import make_estimator
from maveriq.policy.policy import Deploy, Policy, Rejection
from maveriq.policy.registry import make_policy
from maveriq.scenario.build import build_system
from maveriq.scenario.options import Options
from maveriq.units import bytes_from_gib
from maveriq.workload.model_sets import load_model_set

PROFILE = load_profile("a6000-short")
PAPER = make_estimator("paper", PROFILE)
IDLE = ClusterState(cluster_from("8xA6000")).view([0.0] * 8)


def endpoints(*models: str) -> list[EndpointSpec]:
    return [
        EndpointSpec(
            endpoint_id=number,
            model=load_model(model),
            intent=Intent(objective=Objective.MIN_COST),
            requested_us=0,
            prompt_tokens=30,
            output_tokens=20,
        )
        for number, model in enumerate(models, start=1)
    ]


def policy(name: str, *models: str):
    return make_policy(
        name, estimator=PAPER, accuracy=PROFILE.accuracy, packing_threshold=0.7, endpoints=endpoints(*models), idle=IDLE
    )


def deployed(chosen: Policy, *models: str) -> list[Deploy | Rejection]:
    view, found = IDLE, []
    for endpoint in endpoints(*models):
        decision = chosen.decide(endpoint, view)
        found.append(decision)
        if isinstance(decision, Deploy):
            for plan in decision.plans:
                view = view.with_deployment(plan.shares)
    return found


@pytest.mark.parametrize("model", ["llama-2-70b", "falcon-40b", "falcon-7b"])
def test_balanced_spreads_layers_evenly_over_all_gpus_as_the_checkpoint_stores_them(model):
    [decision] = deployed(policy("balanced"), model)
    [plan] = decision.plans
    assert (plan.configuration.tp, plan.configuration.pp) == (1, 8)
    assert (plan.configuration.weights, plan.configuration.kv) == (plan.model.unconverted, KvType.NATIVE)
    assert set(plan.gpu_ids) == set(range(8))
    assert max(plan.layer_split) - min(plan.layer_split) <= 1


@given(free_gib=st.lists(st.floats(3.0, 40.0), min_size=8, max_size=8))
def test_balanced_gives_a_full_gpu_fewer_layers_and_breaks_no_limit(free_gib):
    view = ClusterView(
        gpus=tuple(replace(gpu, free_bytes=bytes_from_gib(gib)) for gpu, gib in zip(IDLE.gpus, free_gib, strict=True))
    )
    decision = policy("balanced").decide(endpoints("llama-2-13b")[0], view)
    if isinstance(decision, Deploy):
        [plan] = decision.plans
        free = dict(enumerate(free_gib))
        assert all(size <= bytes_from_gib(free[gpu_id]) for gpu_id, size in plan.shares.items())
        by_room = sorted(zip(plan.gpu_ids, plan.layer_split, strict=True), key=lambda pair: -free[pair[0]])
        assert [layers for _, layers in by_room] == sorted(plan.layer_split, reverse=True)


@pytest.mark.parametrize("models", [["llama-2-70b", "falcon-40b", "llama-2-7b", "falcon-40b"], ["gptj-6b"]])
def test_replicas_gives_all_models_one_configuration_and_equally_many_replicas(models):
    chosen = policy("replicas", *models)
    decisions = deployed(chosen, *models)
    plans = [decision.plans for decision in decisions]
    assert len({(plan.configuration.tp, plan.configuration.pp) for group in plans for plan in group}) == 1
    assert len({len(group) for group in plans}) == 1
    assert all(plan.configuration.weights is plan.model.unconverted for group in plans for plan in group)
    more = replace(chosen, replicas=chosen.replicas + 1)
    assert any(isinstance(decision, Rejection) for decision in deployed(more, *models))


def test_replicas_hosts_as_many_models_as_one_configuration_can():
    names = [entry.model.name for entry in load_model_set("twentyone").entries]
    chosen = policy("replicas", *names)
    hosted = sum(isinstance(decision, Deploy) for decision in deployed(chosen, *names))
    for tp, pp in [(1, 1), (2, 1), (2, 2), (4, 1), (1, 8)]:
        others = deployed(replace(chosen, tp=tp, pp=pp, replicas=1), *names)
        assert sum(isinstance(decision, Deploy) for decision in others) <= hosted


@pytest.mark.parametrize("name", ["balanced", "replicas"])
def test_baselines_refuse_intents_and_options_of_alpaserve(name):
    for ignored in ({"intent": "min-latency"}, {"float16_only": True}, {"alpaserve_profile": "published"}):
        with pytest.raises(InputError, match=f"applies to .*, not to '{name}'; leave it out"):
            build_system(Options(policy=name, **ignored))


def test_replicas_needs_the_models():
    with pytest.raises(InputError, match="chooses by all models of a run"):
        make_policy("replicas", estimator=PAPER, accuracy=PROFILE.accuracy, packing_threshold=0.7)
