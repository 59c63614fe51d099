"""What `min-cost` counts: dollars of the GPUs held on any cluster, latency x memory on the published testbed alone."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import maveriq
from maveriq.domain.cluster import Cluster
from maveriq.planning import PlanOptions, RankedPlan, rank_configurations
from maveriq.policy.configuration import Candidate
from maveriq.policy.scores import ScoreUnit
from maveriq.report.plan_figures import figures_of
from maveriq.report.plans import ranking_table
from maveriq.units import gib

SLOS = {"slo_ttft_ms": 500.0, "slo_tpot_ms": 40.0}
TODAY = {"engine": "vllm", "prompt_tokens": 1024, "output_tokens": 64, "batch_size": 16}
PRICES = st.floats(0.001, 1000)


def plan(model: str = "qwen3-8b", **options) -> RankedPlan:
    return rank_configurations(model, PlanOptions(**{"gpus": "4xH100", **TODAY, **options}))


def places(ranked: RankedPlan) -> list[str]:
    return [str(candidate.configuration) for candidate in ranked.ranking.candidates]


def mixed(folder: Path, h100_usd: float | None = None, l40s_usd: float | None = None) -> str:
    lines = ['name = "mixed"']
    for gpu, usd in (("H100-SXM", h100_usd), ("L40S", l40s_usd)):
        lines += ["[[nodes]]", f'gpu = "{gpu}"', "count = 2", *([] if usd is None else [f"usd_per_hour = {usd}"])]
    path = folder / "mixed.toml"
    path.write_text("\n".join(lines))
    return str(path)


def dollars(candidate: Candidate, output_tokens: int, usd_per_gpu_hour: float) -> float:
    """Return dollars for a million output tokens, from the definition: price x GPUs held x time of a token."""
    tokens = candidate.configuration.batch_size * output_tokens
    return usd_per_gpu_hour / 3600 * candidate.configuration.gpus * candidate.service.latency_s / tokens * 1e6


@pytest.mark.parametrize("model", ["qwen3-8b", "qwen3-30b-a3b"])
def test_the_first_row_costs_least_of_those_that_meet_the_slos(model: str) -> None:
    ranked, every = plan(model, **SLOS, usd_per_hour=3.0), plan(model, intent="min-latency", usd_per_hour=3.0)
    meeting = [
        candidate
        for candidate in every.ranking.candidates
        if candidate.service.first_token_s <= 0.5 and candidate.service.tpot_s <= 0.04
    ]
    assert len(meeting) == len(ranked.ranking.candidates)
    costs = [dollars(candidate, 64, 3.0) for candidate in meeting]
    best = ranked.ranking.candidates[0]
    assert dollars(best, 64, 3.0) == pytest.approx(min(costs))
    assert best.score == pytest.approx(min(costs))
    assert ranked.ranking.score_unit is ScoreUnit.USD_PER_MILLION_TOKENS
    assert figures_of(best, ranked.endpoint, ranked.cluster).usd_per_million_tokens == best.score


@given(usd=PRICES)
@settings(deadline=None, max_examples=6)
def test_the_price_of_one_kind_never_changes_the_order(usd: float) -> None:
    listed = plan()
    assert places(plan(usd_per_hour=usd)) == places(listed)
    assert places(plan(usd_per_hour=0.0)) == places(listed)
    assert places(plan(intent="min-gpu-cost")) == places(listed)


@given(h100_usd=PRICES, l40s_usd=PRICES)
@settings(deadline=None, max_examples=6)
def test_prices_of_several_kinds_keep_the_order_within_each(
    tmp_path_factory: pytest.TempPathFactory, h100_usd: float, l40s_usd: float
) -> None:
    folder = tmp_path_factory.mktemp("prices")
    listed, priced = (plan(gpus=mixed(folder, *usd)) for usd in ((None, None), (h100_usd, l40s_usd)))
    for kind in ("H100-SXM", "L40S"):
        orders = [
            [str(found.configuration) for found in ranked.ranking.candidates if found.configuration.gpu == kind]
            for ranked in (listed, priced)
        ]
        assert orders[0] == orders[1]
    scores = [candidate.score for candidate in priced.ranking.candidates]
    assert scores == sorted(scores)


def test_a_kind_that_becomes_cheap_enough_wins(tmp_path: Path) -> None:
    kinds = [
        plan(gpus=mixed(tmp_path, *usd)).ranking.candidates[0].configuration.gpu for usd in ((0.01, 10), (10, 0.01))
    ]
    assert kinds == ["H100-SXM", "L40S"]


def test_of_equal_nodes_the_cheaper_one_is_priced(tmp_path: Path) -> None:
    nodes = [f'[[nodes]]\ngpu = "H100-SXM"\ncount = 2\nusd_per_hour = {usd}\n' for usd in (4.0, 1.0)]
    path = tmp_path / "two.toml"
    path.write_text('name = "two"\n' + "".join(nodes))
    best = plan(gpus=str(path)).ranking.candidates[0]
    assert best.usd_per_hour == best.configuration.gpus * 1.0


def test_without_a_price_the_time_of_gpus_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cluster, "usd_per_hour", lambda *_: None)
    ranked = plan()
    assert ranked.ranking.score_unit is ScoreUnit.GPU_SECONDS
    best = ranked.ranking.candidates[0]
    assert best.score == best.service.latency_s * best.configuration.gpus
    assert best.score == min(found.service.latency_s * found.configuration.gpus for found in ranked.ranking.candidates)


def test_the_published_profile_keeps_its_rule() -> None:
    ranked = rank_configurations("llama-2-7b", PlanOptions())
    assert ranked.ranking.score_unit is ScoreUnit.GIB_SECONDS
    for candidate in ranked.ranking.candidates:
        assert candidate.score == candidate.service.latency_s * gib(candidate.memory_bytes)
    title = ranking_table(ranked.endpoint, ranked.ranking, ranked.cluster, top=1).title
    assert "least GiB s" in title
    elsewhere = plan()
    assert "least $" in ranking_table(elsewhere.endpoint, elsewhere.ranking, elsewhere.cluster, top=1).title


def test_runs_deploy_what_plan_ranks_first(tmp_path: Path) -> None:
    trace, models = tmp_path / "requests.csv", tmp_path / "models.toml"
    trace.write_text("arrival_s,endpoint,prompt_tokens,output_tokens\n300,1,512,20\n")
    models.write_text('name = "one"\n[[models]]\nmodel = "qwen3-32b"\nload_at = 0\n')
    run = maveriq.simulate(gpus="8xH100", trace=str(trace), models=str(models), load_s=5)
    at = rank_configurations("qwen3-32b", PlanOptions(gpus="8xH100")).ranking.candidates[0].configuration
    assert [deployment.plan.configuration for deployment in run.record.deployments] == [replace(at, layer_split=())]
