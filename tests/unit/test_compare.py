"""Comparisons of runs: matching of requests and plans, and tolerances."""

from dataclasses import replace

import numpy as np
import pytest
from record_fixtures import deployment, rejected, run_record, single_server, table

from maveriq.domain.records import RunRecord
from maveriq.errors import InputError
from maveriq.report.compare import Comparison, check, compare, parse_tolerances

S = 1_000_000


def served(*latencies_s: float, slo_s: float = 0, endpoint_id: int = 1) -> RunRecord:
    """Return a run whose requests arrive each 100 s, wait for half of their latency and run for the other."""
    rows = [
        [i, endpoint_id, 1, i * 100 * S, i * 100 * S + int(latency_s * S / 2), -1, i * 100 * S + int(latency_s * S), 2,
         0, 10, 20, int(slo_s * S)]
        for i, latency_s in enumerate(latencies_s, start=1)
    ]  # fmt: skip
    return run_record(table(rows), models={1: "tiny", 2: "other"}, ended_us=1000 * S)


def shifted(run: RunRecord, **columns: np.ndarray) -> RunRecord:
    return replace(run, requests=replace(run.requests, **columns))


def test_figures_of_a_small_pair_of_runs() -> None:
    found = compare(served(2, 4, 6, slo_s=5), served(2, 2, 2, slo_s=5)).overall
    assert found.differences["mean"].sim == pytest.approx(4)
    assert found.differences["mean"].error == pytest.approx(100)
    assert found.differences["queue-mean"].error == pytest.approx(100)
    assert found.differences["service-p50"].error == pytest.approx(100)
    assert found.differences["slo"].error == pytest.approx(-100 / 3)
    assert found.differences["gpu-hours"].error == pytest.approx(100)
    assert found.ks == pytest.approx(2 / 3)
    assert found.request_error == pytest.approx(100)  # of 0, 100 and 200 %


def test_figures_of_only_one_run_have_no_error() -> None:
    found = compare(served(2, slo_s=5), served(2)).overall.differences["slo"]
    assert (found.sim, found.real, found.error) == (1.0, None, None)


def test_a_queueing_delay_of_zero_has_no_percentage_error() -> None:
    idle, waits = single_server(np.full(9, 10.0), np.full(9, 1.0)), served(*[2.0] * 9)
    assert compare(waits, idle).overall.differences["queue-mean"].error is None
    assert compare(idle, idle).overall.differences["queue-mean"].error == 0


def test_equal_requests_are_matched() -> None:
    run = served(1, 2, 3)
    late = shifted(run, arrival_us=run.requests.arrival_us + S // 10)
    assert compare(late, run).unmatched == ""
    for other, why in (
        (served(1, 2), "3 requests against 2"),
        (shifted(run, request_id=run.requests.request_id + 1), "their ids differ"),
        (served(1, 2, 3, endpoint_id=2), "they ask for other models"),
        (shifted(run, arrival_us=run.requests.arrival_us - 2 * S), "they arrive at other times"),
    ):
        found = compare(run, other)
        assert found.unmatched == why
        assert found.overall.request_error is None
        assert found.overall.ks is not None


def test_only_requests_completed_in_both_runs_are_compared() -> None:
    run = served(1, 2, 3)
    lost = shifted(
        run, status=np.array([2, 5, 5]), start_us=np.array([150 * S, -1, -1]), finish_us=np.array([102 * S, -1, -1])
    )
    found = compare(lost, run).overall
    assert (found.sim_completed, found.real_completed) == (1, 3)
    assert found.request_error == pytest.approx(100)  # of the first; the others have no latency here


def test_the_order_of_rows_does_not_matter() -> None:
    run, other = served(1, 2, 3), served(3, 3, 3)
    turned = shifted(
        run, **{name: getattr(run.requests, name)[::-1] for name in run.requests.__slots__ if name != "reasons"}
    )
    assert compare(turned, other) == compare(run, other)


def test_figures_of_each_model() -> None:
    both = served(1, 2, 3, 4)
    both = shifted(both, endpoint_id=np.array([1, 2, 1, 2]))
    found = compare(both, both)
    assert {name: model.real_completed for name, model in found.models.items()} == {
        "tiny": 2,
        "other": 2,
    }
    assert found.models["other"].differences["mean"].real == pytest.approx(3)
    alone = compare(served(1, 2), both)
    assert alone.models["other"].differences["mean"].sim is None
    assert alone.models["other"].ks is None


def test_plans_side_by_side() -> None:
    def run(*deployments: object) -> RunRecord:
        return replace(served(1), deployments=deployments)

    found = compare(
        run(deployment(1), deployment(2, gpu_ids=(3, 2)), deployment(3, endpoint_id=2), deployment(4, endpoint_id=3)),
        run(
            deployment(1),
            deployment(2, gpu_ids=(2, 3)),
            deployment(3, endpoint_id=2, gpu_ids=(5,)),
            rejected(4, model="tiny", endpoint_id=3, reason="full"),
        ),
    ).deployments
    assert [(plan.endpoint_id, plan.same_configuration, plan.same_gpus) for plan in found] == [
        (1, True, True),
        (1, True, True),
        (2, False, False),
        (3, False, False),
    ]
    assert found[3].real is None


def test_another_layer_split_is_another_configuration() -> None:
    record = deployment(1)
    assert record.plan is not None
    shape = replace(record.plan.configuration, tp=1, pp=2)
    even, uneven = (
        replace(
            served(1),
            deployments=(replace(record, plan=replace(record.plan, configuration=replace(shape, layer_split=split))),),
        )
        for split in ((2, 2), (3, 1))
    )
    [found] = compare(even, uneven).deployments
    assert (found.same_configuration, found.same_gpus) == (False, True)


def pair() -> Comparison:
    return compare(served(1.1, 2.2), served(1, 2))


@pytest.mark.parametrize(
    ("text", "met"),
    [
        ("mean=10.001%,p95=15", [True, True]),
        ("mean=9%,p50=20%", [False, True]),
        (" queue_mean = 11 % , ks=50pt", [True, True]),
        ("ks=49", [False]),
        ("request=10.01%", [True]),
        ("slo=0pt", [True]),  # neither has an SLO
    ],
)
def test_tolerances(text: str, met: list[bool]) -> None:
    assert [outcome.met for outcome in check(pair(), parse_tolerances(text))] == met


def test_a_tolerance_on_a_missing_figure_is_missed() -> None:
    [found] = check(compare(served(1, slo_s=2), served(1)), parse_tolerances("slo=50"))
    assert (found.error, found.met) == (None, False)
    [found] = check(compare(served(1, 2), served(1)), parse_tolerances("request=50"))
    assert not found.met


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "must be written as NAME=LIMIT"),
        ("mean", "must be written as NAME=LIMIT"),
        ("mean=10%,", "must be written as NAME=LIMIT"),
        ("men=10%", "did you mean 'mean'?"),
        ("mean=ten", "must be a number from 0 with %, not 'ten'"),
        ("mean=-1%", "must be a number from 0 with %"),
        ("mean=nan", "must be a number from 0 with %"),
        ("mean=1e999", "must be a number from 0 with %"),
        ("mean=1e5e5", "must be a number from 0 with %"),
        ("mean=3pt", "must be in %, not in pt"),
        ("slo=3%", "must be in pt, not in %"),
        ("mean=1,mean=2", "stands twice"),
    ],
)
def test_invalid_tolerances(text: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_tolerances(text)
    assert words in str(caught.value)
