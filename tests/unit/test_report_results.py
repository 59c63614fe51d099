"""Result tables: width and content."""

from dataclasses import replace

import numpy as np
import pytest
from record_fixtures import deployment, rejected, single_server
from rich.console import Console, RenderableType

from maveriq.domain.records import GpuSample
from maveriq.domain.requests import RequestStatus
from maveriq.report.formatting import clock, figure, gpu_list, layer_list, share
from maveriq.report.metrics import summarise
from maveriq.report.results import notices, results_view
from maveriq.report.saturation import assess_saturation

MODELS = {1: "somewhat-long-model-70b", 2: "another-40b"}


def a_run(load: float = 0.7):
    count = 400
    gaps = np.random.default_rng(1).exponential(1 / load, count)
    run = single_server(gaps, np.ones(count))
    status = np.where(np.arange(count) % 50 == 49, RequestStatus.REFUSED.value, RequestStatus.COMPLETED.value)
    endpoint = 1 + np.arange(count) % 2
    requests = replace(
        run.requests, status=status, endpoint_id=endpoint, deployment_id=endpoint, slo_us=np.full(count, 1_500_000)
    )
    return replace(
        run,
        requests=requests,
        models=MODELS,
        deployments=(
            deployment(1, model=MODELS[1], gpu_ids=(0, 1, 4, 5)),
            deployment(2, model=MODELS[2], endpoint_id=2, gpu_ids=(2,), note="misses its SLO of 0.3 s"),
            rejected(3, model="huge-180b", endpoint_id=3, reason="fits nowhere [at all]"),
        ),
        gpu_samples=(GpuSample(time_us=1_000_000, gpu_id=2, memory_bytes=2**33, busy_share=0.5),),
    )


def printed(renderable: RenderableType, width: int) -> str:
    console = Console(width=width, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(renderable)
    console.file.close()
    return console.export_text()


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_results_fit_without_cutting_anything(width):
    run = a_run()
    summary = summarise(run, slo_ttft_s=1.0, slo_tpot_s=0.1)
    text = printed(results_view(summary, assess_saturation(run), run.deployments, width=width), width)
    assert "…" not in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    for name in (*MODELS.values(), "huge-180b", "stable", "TP 4 x PP 1 int4", "0-1 4-5", "p99", "SLO met", "GPU h"):
        assert name in text, name
    assert f"{summary.overall.slo.over_scheduled:.1%}".replace("%", " %") in text


def test_without_slos_their_columns_are_not_there():
    run = a_run()
    run = replace(run, requests=replace(run.requests, slo_us=np.zeros(400, dtype=np.int64)))
    text = printed(results_view(summarise(run), assess_saturation(run), run.deployments, width=120), 120)
    assert "SLO met" not in text
    assert "put" not in text.split("latency")[0].replace("output", "")


def test_an_overloaded_run_is_labelled():
    run = a_run(load=2.0)
    assert "overloaded" in printed(results_view(summarise(run), assess_saturation(run), run.deployments, width=80), 80)


def test_notices_name_the_deployment_and_its_reason():
    missed, refused = notices(a_run().deployments)
    assert missed.plain == "note another-40b (deployment 2): misses its SLO of 0.3 s"
    assert refused.plain == "rejected huge-180b (deployment 3): fits nowhere [at all]"


def test_wording():
    values = (None, 0, 0.00012, 0.0453, 0.5, 1.234, 12.34, 1234.5)
    assert [figure(value) for value in values] == ["–", "0", "0.00012", "0.0453", "0.50", "1.23", "12.3", "1,234"]
    assert [share(value) for value in (None, 0.0, 0.0004, 0.931, 0.99999, 1.0)] == [
        "–", "0 %", "<0.1 %", "93.1 %", "99.9 %", "100 %"
    ]  # fmt: skip
    assert [clock(value) for value in (5, 245, 3845.9)] == ["0:05", "4:05", "1:04:05"]
    assert gpu_list((7, 0, 1, 2, 4)) == "0-2 4 7"
    assert [layer_list(split) for split in ((20, 20, 20, 20), (21, 19), (32,), ())] == ["4 x 20", "21 19", "32", ""]
