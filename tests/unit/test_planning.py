"""`maveriq plan`: SLOs, prices, engines, accuracy, and what it says where nothing fits."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from maveriq.domain.gpu_kinds import gpu_sheets
from maveriq.domain.models import KvType, WeightType, known_models
from maveriq.errors import InputError
from maveriq.estimate import physics
from maveriq.estimate.estimator import Basis
from maveriq.estimate.step_time import StepModel
from maveriq.planning import PlanOptions, RankedPlan, rank_configurations
from maveriq.report.plan_figures import figures_of
from maveriq.report.plans import ranking_table
from maveriq.report.view import natural_width

TODAY = {"gpus": "4xH100-SXM", "engine": "vllm", "prompt_tokens": 1024, "output_tokens": 256, "batch_size": 32}


@cache
def plan(model: str, **options: object) -> RankedPlan:
    return rank_configurations(model, PlanOptions(**options))  # type: ignore[arg-type]


def test_slos_of_first_and_further_tokens_filter() -> None:
    everything = plan("qwen3-32b", **TODAY).ranking.candidates
    some = plan("qwen3-32b", **TODAY, slo_ttft_ms=80, slo_tpot_ms=13).ranking
    services = [candidate.service for candidate in everything]
    meeting = [service for service in services if service.first_token_s <= 0.08 and service.tpot_s <= 0.013]
    assert 0 < len(some.candidates) == len(meeting) < len(services)
    reasons = {rejected.reason for rejected in some.rejected}
    assert {"above the TTFT SLO of 80 ms", "above the TPOT SLO of 13 ms"} <= reasons


def test_slos_that_nothing_meets_name_the_best_there_is() -> None:
    alone = plan("qwen3-32b", **TODAY, slo_tpot_ms=1)
    assert alone.failure.startswith("misses its TPOT SLO of 1 ms: the fastest that fits takes ")
    both = plan("qwen3-32b", **TODAY, slo_ttft_ms=1, slo_tpot_ms=1)
    assert "meets its SLOs of TTFT 1 ms and TPOT 1 ms together" in both.failure
    with pytest.raises(InputError, match="TTFT SLO must be a positive number"):
        plan("qwen3-32b", slo_ttft_ms=-1, gpus="8xH100")


def test_prices_are_those_of_the_gpus_or_the_users() -> None:
    listed, own = plan("llama-3.1-8b", **TODAY), plan("llama-3.1-8b", **TODAY, usd_per_hour=1.0)
    best = own.ranking.candidates[0]
    figures = figures_of(best, own.endpoint, own.cluster)
    assert figures.usd_per_hour == best.configuration.gpus
    assert figures.output_tokens_per_s == pytest.approx(32 * 256 / best.service.latency_s)
    per_token = best.configuration.gpus / 3600 / figures.output_tokens_per_s
    assert figures.usd_per_million_tokens == pytest.approx(1e6 * per_token)
    assert figures.usd_per_1000_requests == pytest.approx(1000 * 256 * per_token)
    assert figures.deployments == 4 // best.configuration.gpus
    first = listed.to_dict()["candidates"][0]
    assert first["usd_per_hour"] == pytest.approx(2.99 * first["tp"] * first["pp"])


def test_each_estimate_says_what_it_rests_on() -> None:
    assert {candidate.service.basis for candidate in plan("llama-3.1-8b", gpus="8xH100").ranking.candidates} == {
        Basis.OPERATORS
    }
    assert plan("llama-3.1-8b", gpus="2xMI300X").ranking.candidates[0].service.basis is Basis.DATA_SHEET
    measured = plan("llama-2-7b")
    assert measured.ranking.candidates[0].service.basis is Basis.MEASURED
    assert "rests on measured models" in measured.summary


def test_one_line_answers() -> None:
    ranked = plan("qwen3-32b", **TODAY, slo_ttft_ms=500, slo_tpot_ms=40)
    assert ranked.failure == ""
    words = ("4xH100-SXM: qwen3-32b as TP ", "first token", "TPOT", "90 % within", "$", "rests on measured operators")
    assert [word for word in words if word not in ranked.summary] == []
    assert "\n" not in ranked.summary


def test_rows_without_a_difference_are_one() -> None:
    ranked = plan("llama-3.1-8b", **TODAY)
    table = ranking_table(ranked.endpoint, ranked.ranking, ranked.cluster, top=1000)
    assert len(table.rows) < len(ranked.ranking.candidates)
    assert any("int4/int4_gptq+kvfp8/kv8" in str(row) for row in table.rows)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("qwen3-32b", {**TODAY, "gpus": "16xH100", "slo_ttft_ms": 500.0}),
        ("gpt-oss-120b", {**TODAY, "gpus": "16xH100", "slo_ttft_ms": 500.0}),
        ("llama-2-7b", {}),
        ("llama-2-7b", {"intent": "min-memory"}),
    ],
)
@pytest.mark.parametrize("width", [80, 120])
def test_rows_fit_a_terminal_in_at_most_two_lines(model: str, options: dict[str, object], width: int) -> None:
    ranked = plan(model, **options)
    table = ranking_table(ranked.endpoint, ranked.ranking, ranked.cluster, top=50, width=width)
    assert natural_width(table) <= width
    headers = [column.header for column in table.columns]
    assert {"90 % of\nlatencies", "latency\ns"} < set(headers)
    for shown in table.rows:
        configuration = str(shown.cells[headers.index("\nconfiguration")])
        assert configuration.count("\n") <= 1
        assert not re.search(r"PP 1\b", configuration)


def test_a_second_plan_evaluates_no_operator_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(physics, "StepModel", lambda *at, **how: made.append(at) or StepModel(*at, **how))
    first = plan("qwen3-14b", **{**TODAY, "gpus": "2xH200", "prompt_tokens": 100})
    assert made
    made.clear()
    second = plan("qwen3-14b", **{**TODAY, "gpus": "2xH200", "prompt_tokens": 900})
    assert made == []
    assert first.ranking.candidates[0].service.latency_s < second.ranking.candidates[0].service.latency_s


def test_engines_belong_to_physics() -> None:
    old, new = (plan("llama-3.1-8b", **{**TODAY, "engine": engine}) for engine in ("vllm-0.10.0", "vllm-0.23.0"))
    assert new.ranking.candidates[0].service.tpot_s < old.ranking.candidates[0].service.tpot_s
    formats = [(at.weights, at.kv) for at in (found.configuration for found in old.ranking.candidates)]
    assert KvType.INT8 not in {kv for _, kv in formats}
    assert any(rejected.reason == "vllm-2025 keeps no int8 KV cache" for rejected in old.ranking.rejected)
    with pytest.raises(InputError, match=r"--engine vllm: what estimator 'calibrated' knows was measured"):
        plan("llama-2-7b", engine="vllm")
    with pytest.raises(InputError, match="vllm-1x"):
        plan("llama-2-7b", engine="vllm-1x", gpus="8xH100")


def test_accuracy_is_never_assumed(tmp_path: Path) -> None:
    unknown = plan("qwen3-32b", gpus="8xH100", min_accuracy=98.0)
    assert {candidate.configuration.weights for candidate in unknown.ranking.candidates} == {WeightType.FLOAT16}
    assert {candidate.configuration.kv for candidate in unknown.ranking.candidates} == {KvType.NATIVE}
    assert "was never measured in all formats; --accuracy FILE" in unknown.note
    stored = plan("deepseek-v3", gpus="8xB200", min_accuracy=98.0)
    assert stored.ranking.candidates == ()
    assert "the accuracy of deepseek-v3 was never measured" in stored.failure
    table = tmp_path / "accuracy.csv"
    table.write_text("model,weights,kv,percent\nqwen3-32b,fp8,native,99.5\nqwen3-32b,int4,native,96\n")
    known = plan("qwen3-32b", gpus="8xH100", min_accuracy=98.0, accuracy=str(table))
    weights = {candidate.configuration.weights for candidate in known.ranking.candidates}
    assert weights == {WeightType.FLOAT16, WeightType.FP8}
    table.write_text("model,weights,kv,percent\nqwen3-32b,fp8,native,199\n")
    with pytest.raises(InputError, match="percent must be at most 100, not 199"):
        plan("qwen3-32b", gpus="8xH100", accuracy=str(table))


@pytest.mark.parametrize(
    ("model", "gpus", "needed"),
    [("deepseek-v3", "8xH100", "it would take 9 H100-SXM"), ("llama-3.1-405b", "1xL4", "it would take 12 L4")],
)
def test_too_few_gpus_say_how_many_it_takes(model: str, gpus: str, needed: str) -> None:
    ranked = plan(model, gpus=gpus)
    assert ranked.ranking.candidates == ()
    assert needed in ranked.failure
    enough = int(needed.split()[3])
    kind = needed.split()[4]
    assert plan(model, gpus=f"{enough}x{kind}").ranking.candidates
    assert not plan(model, gpus=f"{enough - 1}x{kind}").ranking.candidates


def test_how_many_it_takes_counts_the_memory_that_the_cluster_says(tmp_path: Path) -> None:
    file = tmp_path / "small.toml"
    text = 'name = "small"\ngpu = "H100-SXM"\ncount = {}\nmemory_gib = 16\n'
    file.write_text(text.format(1), encoding="utf-8")
    failure = plan("qwen3-32b", gpus=str(file)).failure
    found = re.search(r"it would take (\d+) H100-SXM", failure)
    assert found is not None
    assert int(found[1]) > 1
    file.write_text(text.format(found[1]), encoding="utf-8")
    assert rank_configurations("qwen3-32b", PlanOptions(gpus=str(file))).ranking.candidates


@pytest.mark.heavy
@pytest.mark.parametrize("kind", gpu_sheets())
def test_any_model_on_any_gpu_gets_a_ranking_or_one_clear_reason(kind: str) -> None:
    for name in known_models():
        options = PlanOptions(gpus=f"4x{kind}", prompt_tokens=64, output_tokens=64, batch_size=4, estimator="physics")
        ranked = rank_configurations(name, options)
        assert bool(ranked.ranking.candidates) != bool(ranked.failure)
        assert "\n" not in ranked.failure
        for candidate in ranked.ranking.candidates:
            assert 0 < candidate.service.tpot_s < 10
            assert candidate.memory_bytes > candidate.configuration.gpus * 1e8


def test_tensor_parallelism_is_bounded_by_the_nodes_of_the_cluster(tmp_path: Path) -> None:
    """Not by the usual node of the kind: sixteen H100 behind one switch share layers, as do three of a small node."""
    for count, repeat, most in ((16, 1, 16), (4, 4, 4), (3, 2, 2)):
        path = tmp_path / f"{count}x{repeat}.toml"
        path.write_text(f'name = "mine"\n[[nodes]]\ngpu = "H100-SXM"\ncount = {count}\nrepeat = {repeat}\n')
        candidates = plan("llama-3.1-70b", gpus=str(path), engine="vllm").ranking.candidates
        assert max(candidate.configuration.tp for candidate in candidates) == most
