"""What held a run back: GPUs never used, waiting beside idle GPUs, and the change that is advised."""

import io
from dataclasses import replace

import pytest
from fixtures import arrivals, scenario
from record_fixtures import deployment, run_record, table

from maveriq.control.controller import ControllerSettings
from maveriq.control.queues import QueueDiscipline
from maveriq.domain.deployments import Batching
from maveriq.domain.records import GpuSample, RunRecord
from maveriq.report.bottlenecks import Bottlenecks, IdleWait, find_bottlenecks
from maveriq.report.results import saturation_panel
from maveriq.report.saturation import assess_saturation
from maveriq.report.terminal import to_rich
from maveriq.scenario.options import Options
from maveriq.sim.simulator import simulate
from maveriq.units import micros

FIFO = Options(policy="hybrid", queue="fifo", tie_break="gpu-id")
PER_MODEL = Options(policy="llf", queue="fifo-per-model", tie_break="free-memory")


def rows(*requests: tuple[int, float, float, float]) -> list[list[int]]:
    """Rows of completed requests: deployment, arrival, start and finish in seconds; endpoint = deployment."""
    return [
        [number, which, which, micros(arrival), micros(start), micros(start), micros(finish), 2, 0, 5, 5, 0]
        for number, (which, arrival, start, finish) in enumerate(requests, start=1)
    ]


def two_models(*requests: tuple[int, float, float, float], gpus: int = 4) -> RunRecord:
    return run_record(
        table(rows(*requests)),
        deployments=[
            deployment(1, model="big", gpu_ids=(0, 1)),
            deployment(2, model="small", endpoint_id=2, gpu_ids=(2,)),
        ],
        gpu_samples=[GpuSample(time_us=0, gpu_id=gpu, memory_bytes=0, busy_share=0.0) for gpu in range(gpus)],
        models={1: "big", 2: "small"},
    )


def test_waiting_beside_idle_gpus_is_found_and_measured() -> None:
    # "small" arrives at 2 and starts at 10, when "big" ends, on a GPU of its own; at 11 it waits for itself.
    run = two_models((1, 0, 0, 10), (2, 2, 10, 12), (2, 11, 12, 14))
    found = find_bottlenecks(run, FIFO, keeps_up=True)
    assert found.idle_waits == (IdleWait(endpoint="small", mean_s=4.0, share=8 / 9),)
    assert found.unused_gpus == (3,)
    assert found.advice.startswith("--queue fifo-per-model")
    first, second, last = found.sentences()
    assert first == "GPU 3 served no request."
    assert second.startswith("small waited 4.00 s on average while its own GPUs were idle (88.9 % of its waiting).")
    assert last.startswith("Most likely to help: --queue fifo-per-model")


def test_waiting_for_a_busy_gpu_is_no_finding() -> None:
    run = two_models((1, 0, 0, 10), (1, 1, 10, 20), (2, 3, 3, 4), gpus=3)
    assert find_bottlenecks(run, FIFO, keeps_up=True) == Bottlenecks()


def test_executions_of_others_on_the_same_gpus_count_as_busy() -> None:
    run = two_models((1, 0, 0, 10), (2, 2, 10, 12))
    together = replace(run, deployments=(run.deployments[0], replace(run.deployments[1], plan=deployment(
        2, model="small", gpu_ids=(0,)).plan)))  # fmt: skip
    assert find_bottlenecks(together, FIFO, keeps_up=True).idle_waits == ()


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        (FIFO, "--batch-size 4"),
        (replace(FIFO, batch_size=4), "--policy alpaserve"),
        (PER_MODEL, "--batch-size 4"),
        (None, ""),
    ],
)
def test_an_overloaded_run_is_advised_by_what_its_options_leave(options: Options | None, advice: str) -> None:
    run = two_models((1, 0, 0, 10), (1, 1, 10, 20))
    assert find_bottlenecks(run, options, keeps_up=False).advice.startswith(advice)
    assert find_bottlenecks(run, options, keeps_up=True).advice == ""


@pytest.mark.parametrize(("gpus", "advice"), [(4, "more replicas"), (3, "more GPUs")])
def test_engines_that_batch_continuously_are_not_advised_to_batch(gpus: int, advice: str) -> None:
    run = two_models((1, 0, 0, 10), (1, 1, 10, 20), (2, 1, 1, 2), gpus=gpus)
    continuous = tuple(
        replace(each, endpoint=replace(each.endpoint, batching=Batching.CONTINUOUS)) for each in run.deployments
    )
    found = find_bottlenecks(replace(run, deployments=continuous), PER_MODEL, keeps_up=False)
    assert found.advice.startswith(advice)


def test_models_that_share_gpus_beside_unused_ones_are_to_be_spread() -> None:
    run = two_models((1, 0, 0, 10), (1, 1, 10, 20))
    small = replace(run.deployments[1], plan=deployment(2, model="small", gpu_ids=(1,)).plan)
    shared = replace(run, deployments=(run.deployments[0], small))
    assert find_bottlenecks(shared, FIFO, keeps_up=False).advice.startswith("--policy llf --tie-break free-memory")
    assert "llf" not in find_bottlenecks(shared, PER_MODEL, keeps_up=False).advice


def test_the_advice_on_queues_helps() -> None:
    """A model alone on its GPU waits behind a busy one under `fifo`, and no longer once the advice is followed."""
    # The load time is 1 µs, so the first requests arrive after it.
    rows = sorted([*((second * 1_000_000 + 10, 1, 2000) for second in range(40)), (20_500_000, 2, 100)])
    requests = arrivals(*map(list, zip(*rows, strict=True)))
    means = {}
    for discipline in (QueueDiscipline.FIFO, QueueDiscipline.FIFO_PER_MODEL):
        record = simulate(
            scenario(requests, {1: [(0,)], 2: [(1,)]}, settings=ControllerSettings(discipline=discipline))
        )
        alone = record.requests.endpoint_id == 2
        means[discipline] = float((record.requests.finish_us - record.requests.arrival_us)[alone].mean()) / 1e6
        sentences = list(
            assess_saturation(record, options=replace(FIFO, queue=discipline.value)).bottlenecks.sentences()
        )
        assert any("--queue fifo-per-model" in sentence for sentence in sentences) == (
            discipline is QueueDiscipline.FIFO
        )
    assert means[QueueDiscipline.FIFO] > 15
    assert means[QueueDiscipline.FIFO_PER_MODEL] == pytest.approx(0.1, abs=0.01)


def test_the_panel_shows_what_was_found() -> None:
    from rich.console import Console

    from maveriq.report.metrics import summarise

    run = two_models((1, 0, 0, 10), (2, 2, 10, 12))
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(to_rich(saturation_panel(assess_saturation(run, options=FIFO), summarise(run), width=80)))
    text = " ".join(console.export_text().split())
    assert "GPU 3 served no request." in text
    assert "Most likely to help:" in text
