"""Laws of clusters with several nodes and kinds of GPU."""

from dataclasses import dataclass, replace
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

import maveriq
from maveriq.control.deployment_manager import DeploymentManager
from maveriq.domain.cluster import ClusterView, GpuView, LoadWindow
from maveriq.domain.deployments import EndpointSpec, Intent, Objective
from maveriq.domain.gpu_kinds import gpu_sheet, gpu_sheets
from maveriq.domain.models import ModelSpec, WeightType, load_model
from maveriq.domain.parallel import DeploymentPlan, ParallelConfig, network_hops
from maveriq.domain.requests import RequestStatus
from maveriq.errors import InputError, InvariantError
from maveriq.estimate.cluster_estimator import ClusterEstimator, KindEstimator, estimator_for
from maveriq.estimate.cluster_profiles import profiles_for
from maveriq.estimate.cluster_spec import cluster_from
from maveriq.estimate.estimator import ServiceEstimate
from maveriq.estimate.hand_over import Channel, network_channel, node_channel
from maveriq.planning import PlanOptions, rank_configurations
from maveriq.policy.configuration import rank
from maveriq.policy.maveriq import MaverIQ, TieBreak, least_loaded_first, packing
from maveriq.policy.policy import Deploy, Rejection
from maveriq.scenario.build import cluster_for
from maveriq.units import BYTES_PER_GIB

MODEL = load_model("llama-2-7b")
RULES = (None, least_loaded_first, packing)


@dataclass(frozen=True)
class Ideal:
    """Latency falls with every GPU; memory is shared without loss."""

    gib: float
    seconds: float = 1.0
    name: str = "ideal"

    def why_not(self, model: ModelSpec, configuration: ParallelConfig) -> str | None:
        return None

    def service(
        self, model: ModelSpec, configuration: ParallelConfig, *, prompt_tokens: int, output_tokens: int, batch: int
    ) -> ServiceEstimate:
        return ServiceEstimate(ttft_s=0.0, tpot_s=self.seconds / configuration.gpus, output_tokens=output_tokens)

    def memory(self, model: ModelSpec, configuration: ParallelConfig) -> int:
        return round(self.gib * BYTES_PER_GIB)


def endpoint(objective: Objective = Objective.MIN_LATENCY) -> EndpointSpec:
    return EndpointSpec(
        endpoint_id=1, model=MODEL, intent=Intent(objective=objective), requested_us=0, prompt_tokens=10,
        output_tokens=20,
    )  # fmt: skip


@st.composite
def views(draw: st.DrawFn) -> ClusterView:
    """Draw up to four nodes, each of one of two kinds, with GPUs of any load and free memory."""
    gpus: list[GpuView] = []
    for node in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(("fast", "slow")))
        for _ in range(draw(st.integers(1, 4))):
            free_gib, load = draw(st.sampled_from((1, 4, 9, 20, 40))), draw(st.sampled_from((0.0, 0.3, 0.9, 1.0)))
            gpus.append(
                GpuView(
                    gpu_id=len(gpus), node=node, kind=kind, capacity_bytes=40 * BYTES_PER_GIB,
                    free_bytes=free_gib * BYTES_PER_GIB, load=load,
                )
            )  # fmt: skip
    return ClusterView(gpus=tuple(gpus))


@given(views(), st.sampled_from(RULES), st.sampled_from((5.0, 30.0, 70.0, 200.0)), st.sampled_from(TieBreak))
@settings(deadline=None, max_examples=25)
def test_stages_stay_on_a_node_and_deployments_on_a_kind(view, rule, gib: float, tie_break: TieBreak) -> None:
    kinds = {
        kind: KindEstimator(estimator=Ideal(gib, seconds), node=Channel(0, 1), network=Channel(9e3, 0.5))
        for kind, seconds in (("fast", 1.0), ("slow", 2.0))
    }
    estimator = ClusterEstimator(kinds=kinds, node_gpu_ids=[0] * len(view.gpus))
    policy = MaverIQ(name="x", estimator=estimator, accuracy=lambda *_: None, rule=rule, tie_break=tie_break)
    decision = policy.decide(endpoint(), view)
    if isinstance(decision, Rejection):
        assert gib > 5 or max(gpu.free_bytes for gpu in view.gpus) < 5 * BYTES_PER_GIB
        return
    (plan,) = decision.plans
    configuration, chosen = plan.configuration, [view.gpus[gpu_id] for gpu_id in plan.gpu_ids]
    assert {gpu.kind for gpu in chosen} == {configuration.gpu}
    for first in range(0, len(chosen), configuration.tp):
        assert len({gpu.node for gpu in chosen[first : first + configuration.tp]}) == 1
    assert configuration.network_hops == network_hops([gpu.node for gpu in chosen], configuration.tp)
    for gpu, amount in zip(chosen, plan.gpu_bytes, strict=True):
        assert amount <= gpu.free_bytes


@given(views(), st.sampled_from((5.0, 30.0, 70.0)))
@settings(deadline=None, max_examples=25)
def test_what_a_node_can_hold_does_not_cross_nodes(view: ClusterView, gib: float) -> None:
    """As many stages as a deployment has fit the emptiest node: no hop."""
    view = ClusterView(gpus=tuple(replace(gpu, kind="", free_bytes=40 * BYTES_PER_GIB) for gpu in view.gpus))
    largest = max(sum(other.node == gpu.node for other in view.gpus) for gpu in view.gpus)
    ranking = rank(endpoint(), view, Ideal(gib), lambda *_: None)
    for candidate in ranking.candidates:
        if candidate.configuration.gpus <= largest:
            assert candidate.configuration.network_hops == 0


@pytest.mark.parametrize("objective", Objective)
@given(view=views(), gib=st.sampled_from((5.0, 30.0, 70.0)))
@settings(deadline=None, max_examples=12)
def test_another_kind_of_gpu_never_makes_the_answer_worse(objective: Objective, view: ClusterView, gib: float) -> None:
    kinds = {
        kind: KindEstimator(estimator=Ideal(gib, seconds), node=Channel(0, 1), network=Channel(0, 1))
        for kind, seconds in (("fast", 1.0), ("slow", 2.0))
    }
    estimator = ClusterEstimator(kinds=kinds, node_gpu_ids=[0] * len(view.gpus))

    def best(gpus: tuple[GpuView, ...]) -> float:
        if not gpus:
            return float("inf")
        candidates = rank(endpoint(objective), ClusterView(gpus=gpus), estimator, lambda *_: None).candidates
        return candidates[0].score if candidates else float("inf")

    each = [best(tuple(gpu for gpu in view.gpus if gpu.kind == kind)) for kind in ("fast", "slow")]
    assert best(view.gpus) == min(each)


def nodes(folder: Path, *tables: str, name: str = "mixed") -> str:
    path = folder / f"{name}.toml"
    path.write_text(f'name = "{name}"\n' + "".join(f"[[nodes]]\n{table}\n" for table in tables))
    return str(path)


def workload(folder: Path, *models: str) -> dict[str, object]:
    trace, listed = folder / "requests.csv", folder / "models.toml"
    rows = [f"{300 + number},{1 + number % len(models)},{40 + number},20" for number in range(40)]
    trace.write_text("\n".join(("arrival_s,endpoint,prompt_tokens,output_tokens", *rows, "")))
    listed.write_text('name = "two"\n' + "".join(f'[[models]]\nmodel = "{model}"\nload_at = 0\n' for model in models))
    return {"trace": trace, "models": listed, "load_s": 5}


L4S = 'gpu = "L4"\ncount = 2'
L40S = 'gpu = "L40S"\ncount = 1'


def test_plans_of_the_worse_kind_alone_lose(tmp_path: Path) -> None:
    both = nodes(tmp_path, L40S, L4S)
    for intent in ("min-gpu-cost", "min-latency"):
        alone, mixed = (
            rank_configurations("llama-3.2-1b", PlanOptions(gpus=gpus, intent=intent)).ranking.candidates
            for gpus in ("1xL40S", both)
        )
        assert mixed[0].score == alone[0].score
        assert mixed[0].configuration == replace(alone[0].configuration, gpu="L40S")
        assert {candidate.configuration.gpu for candidate in mixed} == {"L40S", "L4"}


@pytest.mark.heavy
def test_equal_nodes_give_the_records_of_the_short_form(tmp_path: Path) -> None:
    same = nodes(tmp_path, 'gpu = "A10"\ncount = 4', 'gpu = "A10"\ncount = 1', name="5xA10")
    options = workload(tmp_path, "llama-3.2-1b", "llama-2-7b")
    for number, gpus in enumerate(("5xA10", same)):
        maveriq.simulate(gpus=gpus, **options).save(tmp_path / str(number))
    for table in ("requests.csv", "deployments.csv", "gpus.csv"):
        assert (tmp_path / "0" / table).read_bytes() == (tmp_path / "1" / table).read_bytes()


def test_every_request_ends_on_a_mixed_cluster(tmp_path: Path) -> None:
    gpus = nodes(tmp_path, L4S, L40S + "\nused_gib = [41]")
    models = ("llama-3.2-1b", "llama-3.2-3b", "llama-2-7b")
    run = maveriq.simulate(gpus=gpus, intent="min-latency", **workload(tmp_path, *models))
    assert sum(run.record.requests.counts().values()) == 40
    assert run.record.requests.counts()[RequestStatus.COMPLETED] == 40
    kinds = ["L4", "L4", "L40S"]
    for deployment in run.record.deployments:
        assert deployment.plan is not None
        assert {kinds[gpu_id] for gpu_id in deployment.plan.gpu_ids} == {deployment.plan.configuration.gpu}
    assert {deployment.plan.configuration.gpu for deployment in run.record.deployments} == {"L4", "L40S"}
    assert any("2 x L4 on 1 node, 1 x L40S on 1 node" in note for note in run.notes)
    saved = maveriq.load_run(run.save(tmp_path / "run"))
    assert saved.record.deployments == run.record.deployments


def test_each_kind_is_estimated_by_its_own_profile(tmp_path: Path) -> None:
    gpus = nodes(tmp_path, 'gpu = "A6000"\ncount = 2', L40S)
    profiles = profiles_for("a6000-short", gpus)
    estimator = estimator_for(cluster_for(gpus, profiles), profiles)
    assert estimator.name == "calibrated+physics"
    lengths = {"prompt_tokens": 100, "output_tokens": 20, "batch": 1}
    for kind, alone in (("A6000", "2xA6000"), ("L40S", "1xL40S")):
        own = profiles_for("a6000-short", alone)
        at = rank_configurations("llama-2-7b", PlanOptions(gpus=alone)).ranking.candidates[0].configuration
        one_kind = estimator_for(cluster_for(alone, own), own)
        assert estimator.service(MODEL, replace(at, gpu=kind), **lengths) == one_kind.service(MODEL, at, **lengths)
        assert estimator.memory(MODEL, replace(at, gpu=kind)) == one_kind.memory(MODEL, at)
    assert estimator.why_not(MODEL, at) == "it does not say on which kind of GPU it runs: A6000, L40S"
    with pytest.raises(InputError, match="does not say on which kind"):
        estimator.memory(MODEL, at)
    assert estimator.why_not(MODEL, replace(at, gpu="L4")) == "the cluster has no L4"
    same = estimator_for(cluster_for(gpus, profiles), profiles, estimator.name)  # as in the options of a saved run
    assert same.service(MODEL, replace(at, gpu="L40S"), **lengths) == one_kind.service(MODEL, at, **lengths)
    assert estimator_for(cluster_for(gpus, profiles), profiles, "physics").name == "physics"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("calibrated+fysics", "unknown estimator 'fysics'.*did you mean 'physics'"),
        ("physics+physics+physics", "has 3 names, and the cluster 2 kinds of GPU .A6000, L40S."),
        ("physics+calibrated", "data sheet of L40S.* has no calibration"),
    ],
)
def test_wrong_names_of_estimators_are_refused(tmp_path: Path, name: str, message: str) -> None:
    gpus = nodes(tmp_path, 'gpu = "A6000"\ncount = 2', L40S)
    for option in ("estimator", "service_times"):
        with pytest.raises(InputError, match=message):
            maveriq.simulate(gpus=gpus, **{option: name}, **workload(tmp_path, "llama-2-7b"))
    with pytest.raises(InputError, match=message):
        rank_configurations("llama-2-7b", PlanOptions(gpus=gpus, estimator=name))


@pytest.mark.parametrize("policy", ["alpaserve", "alpaserve-star"])
def test_alpaserve_refuses_several_kinds_by_name(tmp_path: Path, policy: str) -> None:
    gpus = nodes(tmp_path, L4S, L40S)
    with pytest.raises(InputError, match=f"has L4, L40S, and {policy} places models on GPUs of one kind"):
        maveriq.simulate(gpus=gpus, policy=policy, **workload(tmp_path, "llama-3.2-1b"))


@given(st.sampled_from(sorted(gpu_sheets())), st.integers(1, 100_000), st.floats(1, 400), st.sampled_from((768, 8192)))
def test_hand_overs_grow_with_the_message_and_shrink_with_the_link(
    kind: str, tokens: int, gbps: float, hidden: int
) -> None:
    node, network = node_channel(gpu_sheet(kind)), network_channel(gbps)
    for channel in (node, network):
        assert 0 < channel.hand_over_us(tokens, hidden) < channel.hand_over_us(tokens + 1, hidden)
    assert network_channel(2 * gbps).hand_over_us(tokens, hidden) < network.hand_over_us(tokens, hidden)
    # 400 Gbit/s are 50 GB/s: more than PCIe 4 gives one way, less than any NVLink.
    if gpu_sheet(kind).link == "nvlink":
        assert node.hand_over_us(tokens, hidden) < network.hand_over_us(tokens, hidden)


def test_a_pipeline_across_nodes_takes_longer_by_its_hand_overs() -> None:
    profiles = profiles_for("a6000-short", "16xH100")
    estimator = estimator_for(cluster_for("16xH100", profiles), profiles)
    within = rank_configurations("llama-3.2-1b", PlanOptions(gpus="2xH100")).ranking.candidates
    at = next(candidate.configuration for candidate in within if candidate.configuration.pp == 2)
    model, lengths = load_model("llama-3.2-1b"), {"prompt_tokens": 1000, "output_tokens": 21, "batch": 4}
    near, far = (estimator.service(model, replace(at, network_hops=hops), **lengths) for hops in (0, 1))
    node, network = node_channel(gpu_sheet("H100")), network_channel(100)
    for got, tokens in ((far.tpot_s - near.tpot_s, 4), (far.first_token_s - near.first_token_s, 4000)):
        hop_us = network.hand_over_us(tokens, model.hidden_size) - node.hand_over_us(tokens, model.hidden_size)
        assert got * 1e6 == pytest.approx(hop_us, rel=1e-6)
    assert estimator.memory(model, replace(at, network_hops=1)) == estimator.memory(model, at)


@pytest.mark.heavy
def test_a_model_too_large_for_a_node_crosses_nodes() -> None:
    options = PlanOptions(gpus="8xA10", float16_only=True, intent="min-latency")
    ranking = rank_configurations("llama-2-70b", options).ranking
    assert ranking.candidates
    assert all(candidate.configuration.network_hops for candidate in ranking.candidates)
    assert str(ranking.candidates[0].configuration) == "TP 4 x PP 2 float16+kv8 across nodes"
    assert any("TP 8" in rejected.reason and "node" in rejected.reason for rejected in ranking.rejected)


@dataclass(frozen=True)
class OnGpus:
    """A policy of a user's own: these GPUs, whatever their kind."""

    gpu_ids: tuple[int, ...]
    tp: int = 1
    name: str = "mine"

    def decide(self, endpoint: EndpointSpec, view: ClusterView) -> Deploy:
        count = len(self.gpu_ids)
        at = ParallelConfig(tp=self.tp, pp=count // self.tp, weights=WeightType.FLOAT16)
        plan = DeploymentPlan(
            model=endpoint.model, configuration=at, gpu_ids=self.gpu_ids, gpu_bytes=(1,) * count, est_latency_s=0.0,
            est_memory_bytes=0,
        )  # fmt: skip
        return Deploy(plans=(plan,))


def deployed(gpus: str, policy: OnGpus) -> ParallelConfig:
    manager = DeploymentManager(cluster_from(gpus), policy, LoadWindow(), seed=1)
    (deployment,) = manager.deploy(endpoint(), 0)
    return deployment.required_plan.configuration


def test_plans_of_any_policy_say_where_they_are(tmp_path: Path) -> None:
    mixed = nodes(tmp_path, L4S, L4S, L40S)
    assert deployed(mixed, OnGpus((4,))).gpu == "L40S"
    assert deployed(mixed, OnGpus((0, 1, 3))).network_hops == 1
    assert deployed(mixed, OnGpus((0, 3, 1))).network_hops == 2
    across = deployed("16xA6000", OnGpus((6, 7, 8, 9), tp=2))
    assert (across.gpu, across.network_hops) == ("", 1)
    for gpus, policy, message in (
        (mixed, OnGpus((1, 4)), "several kinds .L4, L40S."),
        (mixed, OnGpus((1, 2), tp=2), "share a node"),
        ("16xA6000", OnGpus((7, 8), tp=2), "share a node"),
    ):
        with pytest.raises(InvariantError, match=message):
            deployed(gpus, policy)
    assert deployed("8xA6000", OnGpus((6, 7), tp=2)).network_hops == 0
