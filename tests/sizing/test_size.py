"""Sizing by simulations: the answer of an exhaustive search, and one clear line for each mistake."""

import io
import json

import pytest
from rich.console import Console

import maveriq
from maveriq.cli.app import main
from maveriq.errors import InputError
from maveriq.scenario.options import Options
from maveriq.sizing.size import SizeRequest, size_cluster
from maveriq.sizing.view import size_json, size_view
from maveriq.sweeps.worker import simulate_cell

SET = """
name = "two"
[[models]]
model = "llama-3.1-8b"
expected_rps = 2.0
float16_only = true
[models.engine]
kind = "vllm"
[[models]]
model = "qwen3-14b"
expected_rps = 1.0
float16_only = true
[models.engine]
kind = "vllm"
"""


def text_of(result):
    console = Console(width=500, file=io.StringIO())
    console.print(size_view(result))
    return console.file.getvalue()


class Here:
    """Simulates in this process, and remembers the options."""

    def __init__(self):
        self.tasks = []

    def results(self, tasks):
        for task in tasks:
            self.tasks.append(task)
            yield simulate_cell(task)


@pytest.fixture
def request_of(tmp_path):
    (tmp_path / "set.toml").write_text(SET)

    def make(rate=6.0, **changes):
        options = Options(
            models=str(tmp_path / "set.toml"),
            trace="synthetic",
            rate=rate,
            duration_s=8.0,
            prompt_tokens="500",
            output_tokens="100",
            service_times="physics",
        )
        values = {"kinds": ("L40S",), "attainment": 0.95, "slo_ttft_ms": 500.0, "slo_tpot_ms": 60.0}
        return SizeRequest(options=options, **values | {"max_gpus": 8, "seeds": 2, "max_seeds": 4} | changes)

    return make


def test_the_answer_is_that_of_an_exhaustive_search(request_of):
    request = request_of(rate=3.0)
    answer = size_cluster(request, pool=Here()).kinds[0].sizes.answer
    assert answer is not None
    for gpus in (answer - 1, answer):
        runs = [
            maveriq.simulate(request.options, gpus=f"{gpus}xL40S", seed=seed, slo_ttft_ms=500.0, slo_tpot_ms=60.0)
            for seed in (42, 43)
        ]
        assert (sum(run.summary.overall.goodput.share for run in runs) / 2 >= 0.95) == (gpus == answer)


@pytest.mark.heavy
def test_policies_plan_for_the_rate_that_comes(request_of):
    """A set that expects 3 requests/s, sized for 12, is planned for 12: its replicas are enough."""
    found = size_cluster(request_of(rate=12.0), pool=Here()).kinds[0]
    slow = size_cluster(request_of(rate=3.0), pool=Here()).kinds[0]
    assert found.sizes.answer >= slow.sizes.answer
    assert found.sizes.points[-1].mean >= 0.95


def test_more_requests_and_slower_engines_need_no_fewer_gpus(request_of):
    found = size_cluster(request_of(), pool=Here()).kinds[0]
    assert found.when_slower is None or found.when_slower >= found.sizes.answer


def test_no_answer_is_named(request_of, tmp_path):
    result = size_cluster(request_of(slo_ttft_ms=0.1, max_gpus=2), pool=Here())
    assert result.best is None
    assert "No cluster of up to 2 x L40S meets the SLOs" in text_of(result)
    assert size_json(result)["kinds"][0]["gpus"] is None
    pytest.importorskip("bokeh")
    written = result.to_html(tmp_path / "size.html").read_text(encoding="utf-8")
    assert "No cluster of up to 2 x L40S meets the SLOs" in written


@pytest.mark.heavy
def test_kinds_are_compared_by_price(request_of):
    result = size_cluster(request_of(kinds=("L40S", "H100-SXM")), pool=Here())
    prices = {kind.kind: kind.cluster_usd_per_hour for kind in result.kinds}
    assert result.best.cluster_usd_per_hour == min(prices.values())
    assert f"Cheapest: {result.best.sizes.answer} x {result.best.kind}" in text_of(result)
    assert result.fewest.sizes.answer == min(kind.sizes.answer for kind in result.kinds)
    assert f"Fewest GPUs: {result.fewest.sizes.answer} x {result.fewest.kind}" in text_of(result)
    json.dumps(size_json(result), allow_nan=False)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kinds": ("H100-SXN",)}, "unknown kind of GPU 'H100-SXN'; did you mean 'H100-SXM'?"),
        ({"kinds": ("8xL40S",)}, "give the kind alone (L40S)"),
        ({"kinds": ()}, "--gpus names no kind of GPU"),
        ({"slo_ttft_ms": None, "slo_tpot_ms": None}, "a size needs SLOs to meet"),
        ({"attainment": 1.5}, "--attainment must be above 0 and at most 100 (percent), not 150"),
        ({"max_gpus": 0}, "--max-gpus must be from 1 to"),
        ({"seeds": 1}, "--seeds must be at least 2 and at most --max-seeds (4), not 1"),
    ],
)
def test_mistakes_are_named(request_of, changes, says):
    with pytest.raises(InputError) as refused:
        size_cluster(request_of(**changes), pool=Here())
    assert says in str(refused.value)


def test_the_command_names_a_mistake_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["maveriq", "size", "--gpus", "4xL40S", "--rate", "1"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
