"""Defaults that depend on the cluster: the published system on its testbed, better ones elsewhere."""

from dataclasses import fields, replace
from enum import StrEnum

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from maveriq.control.controller import OnFailure, OnLoss
from maveriq.control.queues import QueueDiscipline
from maveriq.control.routing_policies import RoutingRule
from maveriq.domain.cluster import ClusterState
from maveriq.domain.deployments import EndpointSpec, Intent, Objective
from maveriq.domain.models import load_model
from maveriq.errors import UnknownNameError
from maveriq.estimate.cluster_spec import cluster_from
from maveriq.estimate.hardware_profile import load_profile
from maveriq.estimate.registry import make_estimator
from maveriq.files import traces_path
from maveriq.policy.maveriq import MaverIQ, TieBreak
from maveriq.policy.policy import Deploy
from maveriq.policy.registry import make_policy
from maveriq.scenario.build import build_live_system, build_system
from maveriq.scenario.defaults import with_cluster_defaults
from maveriq.scenario.options import Options

PROFILE = load_profile("a6000-short")
PAPER = make_estimator("paper", PROFILE)
MODELS = ("gptj-6b", "falcon-7b", "llama-2-7b", "llama-2-13b", "falcon-40b", "llama-2-70b")


def defaults(gpus: str, **options) -> tuple[str | None, str | None, str | None]:
    chosen = with_cluster_defaults(Options(**options), PROFILE, cluster_from(gpus))
    return chosen.policy, chosen.queue, chosen.tie_break


def test_the_published_testbed_keeps_the_published_scheduling() -> None:
    published = ("hybrid", "fifo", "gpu-id")
    assert defaults("8xA6000") == published
    assert defaults(str(traces_path("cluster-8xA6000.toml"))) == published
    system = build_system(Options(scale=0.1))
    assert isinstance(system.policy, MaverIQ)
    assert (system.policy.name, system.settings.discipline) == ("hybrid", QueueDiscipline.FIFO)
    assert system.policy.tie_break is TieBreak.GPU_ID


@pytest.mark.parametrize("gpus", ["16xA6000", "4xA6000"])
def test_other_clusters_queue_per_model_and_spread(gpus: str) -> None:
    assert defaults(gpus) == ("llf", "fifo-per-model", "free-memory")
    assert defaults(gpus, policy="packing", queue="edf", tie_break="gpu-id") == ("packing", "edf", "gpu-id")
    system = build_system(Options(gpus=gpus, scale=0.1))
    assert system.settings.discipline is QueueDiscipline.FIFO_PER_MODEL
    assert system.options is not None
    assert (system.options.policy, system.options.tie_break) == ("llf", "free-memory")


def test_a_shared_testbed_is_another_cluster(tmp_path) -> None:
    path = tmp_path / "shared.toml"
    path.write_text('name = "shared"\ngpu = "A6000"\ncount = 8\nused_gib = [1, 0, 0, 0, 0, 0, 0, 0]\n')
    assert defaults(str(path))[1] == "fifo-per-model"


def test_a_service_never_shares_one_queue_by_default() -> None:
    system, policy = build_live_system(Options())
    assert system.settings.discipline is QueueDiscipline.FIFO_PER_MODEL
    assert isinstance(policy.default, MaverIQ)
    assert (policy.name, policy.default.tie_break) == ("llf", TieBreak.FREE_MEMORY)
    assert build_live_system(Options(queue="fifo"))[0].settings.discipline is QueueDiscipline.FIFO


def test_an_unknown_tie_break_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="unknown tie break 'memory'"):
        build_system(Options(tie_break="memory", scale=0.1))


def test_ties_go_to_free_memory_then_tenants_then_id() -> None:
    state = ClusterState(cluster_from("4xA6000"))
    state.reserve(1, {0: 1000, 1: 500})
    state.reserve(2, {1: 500})
    assert [gpu.tenants for gpu in state.view([0.0] * 4).gpus] == [1, 2, 0, 0]
    view = state.view([0.0] * 4)
    assert [gpu.gpu_id for gpu in TieBreak.FREE_MEMORY.order(view.gpus)] == [2, 3, 0, 1]
    assert [gpu.gpu_id for gpu in TieBreak.GPU_ID.order(view.gpus)] == [0, 1, 2, 3]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(MODELS), st.sampled_from(Objective), st.booleans(), st.floats(0, 1), st.integers(10, 900)
        ),
        min_size=1,
        max_size=10,
    )
)
@settings(max_examples=30, deadline=None)
def test_nothing_lands_beside_a_busy_model_while_eight_of_sixteen_gpus_are_empty(asked) -> None:
    """Models come one after the other, each with a load of its own from then on, and with any intent."""
    cluster = cluster_from("16xA6000")
    options = with_cluster_defaults(Options(), PROFILE, cluster)
    policy = make_policy(
        str(options.policy),
        estimator=PAPER,
        accuracy=PROFILE.accuracy,
        packing_threshold=options.packing_threshold,
        tie_break=TieBreak(str(options.tie_break)),
    )
    state, loads = ClusterState(cluster), [0.0] * 16
    for number, (model, objective, float16_only, load, tokens) in enumerate(asked, start=1):
        view = state.view(loads)
        empty = {gpu.gpu_id for gpu in view.gpus if not gpu.tenants}
        decision = policy.decide(
            EndpointSpec(
                endpoint_id=number,
                model=load_model(model),
                intent=Intent(objective=objective, float16_only=float16_only),
                requested_us=0,
                prompt_tokens=10,
                output_tokens=tokens,
            ),
            view,
        )
        if not isinstance(decision, Deploy):
            continue
        (plan,) = decision.plans
        if len(empty) >= max(8, len(plan.gpu_ids)):
            busy = {gpu.gpu_id for gpu in view.gpus if gpu.tenants and gpu.load > 0}
            assert not busy & set(plan.gpu_ids)
        state.reserve(number, dict(zip(plan.gpu_ids, plan.gpu_bytes, strict=True)))
        for gpu_id in plan.gpu_ids:
            loads[gpu_id] = min(1.0, loads[gpu_id] + load)


def test_on_sixteen_gpus_the_large_set_shares_none() -> None:
    from maveriq.sim.simulator import simulate

    record = simulate(build_system(replace(Options(), gpus="16xA6000", scale=0.05)))
    used = [gpu for deployment in record.deployments if deployment.plan for gpu in deployment.plan.gpu_ids]
    assert len(used) == len(set(used)) > 4


@pytest.mark.parametrize(
    ("option", "kind"),
    [
        ("queue", QueueDiscipline),
        ("router", RoutingRule),
        ("tie_break", TieBreak),
        ("on_failure", OnFailure),
        ("on_loss", OnLoss),
    ],
)
def test_help_and_completion_of_an_option_know_every_member(option: str, kind: type[StrEnum]) -> None:
    [field] = [field for field in fields(Options) if field.name == option]
    assert field.metadata["choices"] == tuple(member.value for member in kind)
    for member in kind:
        assert member.value in field.metadata["help"]
