"""Recorded tables as run records, and their replay."""

from pathlib import Path

import numpy as np
import pytest
from testbed_fixtures import BASELINE, RUN, put_testbed

from maveriq.domain.deployments import Objective
from maveriq.domain.records import NOT_YET, RunRecord
from maveriq.domain.requests import RequestStatus
from maveriq.errors import InputError, UnknownNameError
from maveriq.estimate.hardware_profile import load_profile
from maveriq.testbed.recordings import find_testbed, pick_runs, read_completed, read_requests, read_runs, read_scheduled
from maveriq.testbed.replay import options_of, replay
from maveriq.testbed.run_records import run_record
from maveriq.units import gib

S = 1_000_000
PROFILE = load_profile("a6000-short")


def record(testbed: Path, name: str = RUN) -> RunRecord:
    [run] = pick_runs(read_runs(testbed), [name])
    return run_record(run, read_scheduled(testbed)[name], read_completed(testbed)[name], PROFILE)


@pytest.fixture
def recorded(tmp_path: Path) -> RunRecord:
    return record(put_testbed(tmp_path))


def test_every_request_of_the_schedule_ends_in_one_status(recorded: RunRecord) -> None:
    assert recorded.requests.request_id.tolist() == [1, 2, 3, 4, 5]
    assert recorded.requests.status.tolist() == [
        RequestStatus.REFUSED,
        *[RequestStatus.COMPLETED] * 3,
        RequestStatus.UNFINISHED,
    ]
    reasons = [recorded.requests.reasons[index] for index in recorded.requests.reason]
    assert reasons == ["its model was never deployed", "", "", "", "the run ended first"]
    assert sum(recorded.requests.counts().values()) == 5


def test_times_are_those_of_the_table(recorded: RunRecord) -> None:
    table = recorded.requests
    assert table.arrival_us.tolist() == [100 * S, 330_050_000, 599_950_000, 600_050_000, 601 * S]
    assert table.start_us.tolist() == [NOT_YET, 330_060_000, 599_960_000, 600_460_000, NOT_YET]
    assert table.finish_us.tolist() == [NOT_YET, 331_550_000, 600_460_000, 600_960_000, NOT_YET]
    assert set(table.first_token_us.tolist()) == {NOT_YET}
    assert recorded.ended_us == (601 + 300) * S  # unfinished requests remained, so the run lasted for the drain time
    assert table.prompt_tokens.tolist() == [10, 100, 1, 20, 10]


def test_a_model_without_deployment_is_named_by_its_model_set(recorded: RunRecord) -> None:
    assert recorded.models == {1: "llama-2-70b", 2: "falcon-40b", 3: "llama-2-7b"}
    assert recorded.requests.deployment_id.tolist() == [0, 1, 2, 2, 1]


def test_slos_are_those_of_the_profile(recorded: RunRecord) -> None:
    slo_s = PROFILE.slo_s("llama-2-7b", 20)
    assert slo_s is not None
    assert recorded.requests.slo_us[2] == pytest.approx(5 * slo_s * S, abs=1)
    assert recorded.deployments[1].endpoint.intent.slo_s == pytest.approx(5 * slo_s)


def test_plans_have_measured_memory_and_name_the_estimate(recorded: RunRecord) -> None:
    falcon, llama = recorded.deployments
    assert falcon.plan is not None
    assert llama.plan is not None
    assert (falcon.plan.gpu_ids, falcon.plan.layer_split) == ((3, 0, 1, 2), (32, 28))
    assert [gib(amount) for amount in falcon.plan.gpu_bytes] == pytest.approx([10.0] * 4)
    assert gib(falcon.plan.est_memory_bytes) == pytest.approx(38.0)
    assert [gib(amount) for amount in llama.plan.gpu_bytes] == pytest.approx([4.0])
    assert (falcon.ready_us, llama.ready_us) == (NOT_YET, 530_250_000)


def test_a_baseline_has_no_intent_and_no_estimate(tmp_path: Path) -> None:
    baseline = record(put_testbed(tmp_path), BASELINE)
    [deployment] = baseline.deployments
    assert deployment.endpoint.intent.objective is Objective.MIN_COST
    assert deployment.plan is not None
    assert deployment.plan.est_memory_bytes == 0
    assert baseline.ended_us == 101_510_000  # no request remained, so the run ended with the last one
    assert not baseline.requests.slo_us.any()


def test_gpus_hold_memory_from_the_deploy_and_are_busy_while_serving(recorded: RunRecord) -> None:
    held = {(sample.time_us, sample.gpu_id): gib(sample.memory_bytes) for sample in recorded.gpu_samples}
    assert held[269 * S, 1] == pytest.approx(0.465)
    assert held[270 * S, 1] == pytest.approx(10.465)
    assert held[510 * S, 1] == pytest.approx(14.465)
    assert held[600 * S, 4] == pytest.approx(0.465)
    busy = {(sample.time_us, sample.gpu_id): sample.busy_share for sample in recorded.gpu_samples}
    assert busy[331 * S, 3] == pytest.approx(0.94)
    assert busy[332 * S, 3] == pytest.approx(0.55)
    assert busy[601 * S, 1] == pytest.approx(0.96)
    assert busy[601 * S, 3] == 0


def test_options_describe_the_run(tmp_path: Path) -> None:
    run, baseline = map(options_of, read_runs(put_testbed(tmp_path)))
    assert (run.policy, run.intent, run.slo_scale, run.scale, run.models) == ("hybrid", "min-cost", 5.0, 0.1, "large")
    assert (baseline.policy, baseline.intent) == ("alpaserve", "min-cost")


def test_a_replay_changes_only_dispatch_times(recorded: RunRecord) -> None:
    again = replay(recorded, PROFILE)
    done = recorded.requests.status == RequestStatus.COMPLETED
    service_us, recorded_us = ((run.requests.finish_us - run.requests.start_us)[done] for run in (again, recorded))
    assert np.array_equal(service_us, recorded_us)
    assert np.abs((again.requests.start_us - recorded.requests.start_us)[done]).max() < 20_000  # two ticks
    assert np.array_equal(again.requests.start_us[~done], recorded.requests.start_us[~done])
    for name in ("request_id", "arrival_us", "status", "deployment_id", "slo_us"):
        assert np.array_equal(getattr(again.requests, name), getattr(recorded.requests, name)), name
    assert again.deployments == recorded.deployments
    assert [sample.memory_bytes for sample in again.gpu_samples] == [
        sample.memory_bytes for sample in recorded.gpu_samples
    ]


def test_a_replay_waits_ten_seconds_after_registration(tmp_path: Path) -> None:
    late = record(put_testbed(tmp_path, deployments=("530.25", "595.0")))
    third = replay(late, PROFILE).requests.start_us[2]
    assert 605 * S <= third <= 605 * S + 11_000


def test_a_request_completed_before_its_deployment_is_refused(tmp_path: Path) -> None:
    impossible = record(put_testbed(tmp_path, deployments=("530.25", "600.0")))
    with pytest.raises(InputError, match=r"request 3 was completed, which cannot be .* still loading"):
        replay(impossible, PROFILE)


@pytest.mark.parametrize(
    ("table", "old", "new", "words"),
    [
        ("completed", "1,2,330.05", "1,3,330.05", "completed by model 3 but scheduled for 2"),
        ("completed", "3,3,600.05", "2,3,600.05", "completed twice, or was never scheduled"),
        ("completed", "3,3,600.05", "9,3,600.05", "completed twice, or was never scheduled"),
        ("completed", "0.51", "nan", "latency_s must be a finite number"),
        ("completed", "1.49", "0", "service_s must be a finite number"),
        ("scheduled", "330.0", "1e300", "scheduled_s must be a finite number from 0 to 1e+09"),
        ("scheduled", "400", "many", "prompt_chars must be a whole number"),
        ("deployments", "3 0 1 2", "3 0 1 8", "gpus must be numbers from 0 to 7"),
        ("deployments", "3 0 1 2", "3 0 1", "needs 4 different GPUs"),
        ("deployments", "10.465", "nan", "used_gib_after must be numbers"),
        ("deployments", "10.465 10.465", "10.465", "the memory of 8 GPUs"),
        ("deployments", "9.5", "x", "est_gib_per_gpu must be numbers"),
        ("deployments", "int4", "int5", "weight_dtype must be one of"),
        ("deployments", "falcon-40b", "falcon-41b", "unknown model 'falcon-41b'"),
        ("runs", "min_cost", "min_cots", "unknown intent"),
        ("runs", RUN, "../x", "run must be a name that a folder can have"),
    ],
)
def test_contradictory_tables_are_refused(tmp_path: Path, table: str, old: str, new: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        record(put_testbed(tmp_path, **{table: (old, new)}))
    assert words in str(caught.value)


def test_a_missing_run(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=f"did you mean '{RUN}'"):
        pick_runs(read_runs(put_testbed(tmp_path)), ["MaverIQ_tin"])
    with pytest.raises(InputError, match="holds no recordings"):
        find_testbed(tmp_path / "elsewhere")
    assert find_testbed(tmp_path) == tmp_path


def test_a_run_that_completed_nothing_is_named(tmp_path: Path) -> None:
    testbed = put_testbed(tmp_path)
    assert {len(found) for found in read_requests(testbed, [RUN])} == {1}
    with pytest.raises(InputError, match="recorded run 'never' has no scheduled or no completed requests"):
        read_requests(testbed, [RUN, "never"])
