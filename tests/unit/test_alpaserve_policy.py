"""AlpaServe and AlpaServe* as policies of a simulated run."""

import json

import pytest

from maveriq.cli.app import main
from maveriq.domain.records import RunRecord
from maveriq.domain.requests import RequestStatus
from maveriq.errors import InputError, UnknownNameError
from maveriq.scenario.build import build_system
from maveriq.scenario.options import Options
from maveriq.scenario.system import ReplaySystem
from maveriq.sim.simulator import simulate

SHORT = {"scale": 0.1, "slo_scale": 5.0}


def built(policy: str = "alpaserve", **options) -> ReplaySystem:
    return build_system(Options(policy=policy, **SHORT | options))


def groups_of(run: RunRecord) -> dict[tuple[int, ...], tuple[int, int, list[int]]]:
    """Return TP, PP and the endpoints of each set of GPUs."""
    groups: dict[tuple[int, ...], tuple[int, int, list[int]]] = {}
    for deployment in run.deployments:
        if deployment.plan:
            configuration = deployment.plan.configuration
            group = groups.setdefault(deployment.plan.gpu_ids, (configuration.tp, configuration.pp, []))
            group[2].append(deployment.endpoint.endpoint_id)
    return groups


def test_as_published_deploys_the_published_placement_and_refuses_other_models() -> None:
    """large, code 0.1, SLO 5: two groups of TP 4, without llama-2-70b (published_placements.json)."""
    scenario = built(alpaserve_as_published=True)
    run = simulate(scenario)
    assert groups_of(run) == {(0, 1, 2, 3): (4, 1, [2, 3]), (4, 5, 6, 7): (4, 1, [3, 4])}
    assert run.deployments[0].reason == "alpaserve's placement leaves it out"
    refused = run.requests.status == RequestStatus.REFUSED
    assert set(run.requests.endpoint_id[refused].tolist()) == {1}
    reasons = {run.requests.reasons[index] for index in run.requests.reason[refused]}
    assert reasons == {"deployment 1 (llama-2-70b) was rejected"}
    assert any("as published" in note and "defect" in note for note in scenario.notes)


def test_repaired_keeps_every_model_without_a_notice() -> None:
    scenario = built(alpaserve_profile="published")
    run = simulate(scenario)
    assert groups_of(run) == {tuple(range(8)): (4, 2, [1, 2, 3, 4])}
    assert run.requests.counts()[RequestStatus.REFUSED] == 0
    assert not any("defect" in note for note in scenario.notes)


def test_alpaserve_star_deploys_every_model_or_none() -> None:
    keeps = groups_of(simulate(built("alpaserve-star", alpaserve_profile="published")))
    assert keeps == {tuple(range(8)): (4, 2, [1, 2, 3, 4])}
    run = simulate(built("alpaserve-star", models="twentyone", trace="conversation"))
    assert {deployment.status for deployment in run.deployments} == {"rejected"}
    assert run.requests.counts()[RequestStatus.REFUSED] == len(run.requests)


def test_a_replicated_model_shares_its_requests_evenly() -> None:
    run = simulate(built(alpaserve_as_published=True))
    replicas = [deployment.deployment_id for deployment in run.deployments if deployment.endpoint.endpoint_id == 3]
    served = [int((run.requests.deployment_id == replica).sum()) for replica in replicas]
    assert len(served) == 2
    assert abs(served[0] - served[1]) < 4 * sum(served) ** 0.5


def test_memory_is_of_the_whole_batch() -> None:
    single, four = (simulate(built(batch_size=batch)).deployments[0].plan for batch in (1, 4))
    assert single is not None
    assert four is not None
    assert four.configuration.batch_size == 4
    per_gpu = [plan.memory_bytes for plan in (single, four) if plan.configuration.gpus == single.configuration.gpus]
    assert per_gpu == sorted(set(per_gpu))  # grows with the batch for equal shapes


def test_the_policy_uses_the_forecast_of_its_own_run() -> None:
    """Another seed gives other requests, and the policy plans for the requests of its own run."""
    run, other = built(seed=1), built(seed=2)
    assert len(run.workload.arrivals) == len(other.workload.arrivals)
    assert run.policy.solution.best != other.policy.solution.best


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"alpaserve_profile": "publishd"}, UnknownNameError, "did you mean 'published'"),
        ({"alpaserve_star_rule": "D"}, UnknownNameError, "unknown AlpaServe\\* rule 'D'"),
        ({"policy": "hybrid", "alpaserve_as_published": True}, InputError, "applies to alpaserve and alpaserve-star"),
        ({"policy": "llf", "alpaserve_star_rule": "Z"}, InputError, "--alpaserve-star-rule applies to alpaserve and"),
        ({"float16_only": True}, InputError, "--float16-only applies to policies that go by intents"),
        (
            {"alpaserve_as_published": True, "trace": "poisson"},
            InputError,
            "needs published arrivals, which 'poisson' does not have",
        ),
        ({"router": "randomly"}, UnknownNameError, "unknown router 'randomly'; did you mean 'random'"),
    ],
)
def test_contradictory_options_are_refused(options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        built(**options)


def test_the_summary_names_the_published_variant(tmp_path, monkeypatch, capsys) -> None:
    arguments = ["sim", "--policy", "alpaserve", "--alpaserve-as-published", "--scale", "0.05", "--json"]
    monkeypatch.setattr("sys.argv", ["maveriq", *arguments, "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (0, None)
    printed = json.loads(capsys.readouterr().out)
    assert any("as published" in note for note in printed["notes"])
    assert json.loads((tmp_path / "run" / "run.json").read_text())["notes"] == printed["notes"]
