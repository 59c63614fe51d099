"""Systems built from options: priorities, removals, faults, estimators."""

import pytest
from profile_fixtures import write_profile

from maveriq.domain.models import WeightType
from maveriq.domain.parallel import ParallelConfig
from maveriq.domain.requests import RequestStatus
from maveriq.errors import InputError
from maveriq.files import data_path
from maveriq.scenario.build import build_system
from maveriq.scenario.options import Options
from maveriq.sim.simulator import simulate
from maveriq.units import micros

ONE_MODEL = 'name = "one"\n[[models]]\nmodel = "llama-2-7b"\nload_at = 0\n'


@pytest.fixture
def replay(tmp_path):
    """Run a schedule of one model on one GPU."""

    def run(rows: str, columns: str = "arrival_s,endpoint,prompt_tokens,output_tokens", **options):
        (tmp_path / "one.toml").write_text(ONE_MODEL)
        (tmp_path / "requests.csv").write_text(f"{columns}\n{rows}\n")
        return simulate(
            build_system(
                Options(
                    trace=str(tmp_path / "requests.csv"),
                    models=str(tmp_path / "one.toml"),
                    gpus="1xA6000",
                    no_dispatch_overhead=True,
                    **options,
                )
            )
        )

    return run


def test_a_priority_request_of_a_schedule_overtakes(replay) -> None:
    rows = "100,1,9,20,0\n100.01,1,9,20,0\n100.02,1,9,20,1"
    starts = replay(rows, "arrival_s,endpoint,prompt_tokens,output_tokens,priority").requests.start_us
    assert starts[0] < starts[2] < starts[1]


def test_an_endpoint_is_removed(replay) -> None:
    record = replay("100,1,9,20\n199.95,1,9,20\n200.5,1,9,20", remove=("endpoint=1@200s",))
    completed, last = RequestStatus.COMPLETED, RequestStatus.REFUSED
    assert record.requests.status.tolist() == [completed, completed, last]
    assert record.deployments[0].status == "removed"
    assert record.deployments[0].removed_us == record.requests.finish_us[1] > micros(200)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"remove": ("endpoint=2@200s",)}, "the run has endpoints 1 to 1"),
        ({"remove": ("endpoint=1@0s",)}, "it is not asked for before 0 s"),
        ({"remove": ("deployment=1@9s",)}, "cannot read the removal"),
        ({"fail": ("gpu=0@99999s",)}, "fault of GPU 0 at 99999 s: the run ends by 400 s"),
    ],
)
def test_faults_without_a_target_are_refused(replay, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        replay("100,1,9,20", **options)


def test_a_fault_before_its_deployment_is_requested_is_refused() -> None:
    with pytest.raises(InputError, match="fault of deployment 2 at 100 s: it is not asked for before 270 s"):
        build_system(Options(fail=("deployment=2@100s",)))


def test_the_rejection_says_that_every_gpu_is_down(replay) -> None:
    record = replay("100,1,9,20", fail=("gpu=0@0s",))
    assert record.deployments[0].reason == "every GPU is down"


def profile_without_calibration(tmp_path):
    """A copy of the A6000 profile without its calibration, like the profile of a new GPU."""
    for path in data_path("a6000").iterdir():
        text = path.read_text()
        (tmp_path / path.name).write_text(text.replace('calibrated = "calibrated.toml"\n', ""))
    return str(tmp_path / "profile-short.toml")


def test_the_calibrated_estimator_is_the_default_if_there_is_one() -> None:
    scenario = build_system(Options())
    assert (scenario.estimator, scenario.service_times.name, scenario.notes) == ("calibrated", "calibrated", ())


def test_without_a_calibration_the_run_uses_and_names_the_papers_estimator(tmp_path) -> None:
    profile = profile_without_calibration(tmp_path)
    scenario = build_system(Options(profile=profile))
    assert (scenario.estimator, scenario.service_times.name) == ("paper", "paper")
    [note] = scenario.notes
    assert note.startswith("profile a6000-short has no calibration, so the estimator 'paper' stands in")
    assert build_system(Options(profile=profile, estimator="paper", service_times="paper")).notes == ()
    with pytest.raises(InputError, match="has no calibration, which the calibrated estimator needs"):
        build_system(Options(profile=profile, estimator="calibrated"))


def test_exclude_run_changes_the_service_times() -> None:
    run = "MaverIQ_large_min_cost_code_0.4_slo0"
    default, blind = (build_system(Options(scale=0.05, exclude_run=name)) for name in (None, run))
    model = default.workload.endpoints[0].model
    requested = ParallelConfig(tp=4, pp=1, weights=WeightType.INT4)
    seconds = [
        system.service_times.estimator.service(model, requested, prompt_tokens=9, output_tokens=20, batch=1).latency_s
        for system in (default, blind)
    ]
    assert seconds[0] != seconds[1] == pytest.approx(seconds[0], rel=0.02)


@pytest.mark.parametrize("name", ["paper", "recorded"])
def test_exclude_run_needs_calibrated_service_times(name: str) -> None:
    with pytest.raises(InputError, match=f"--exclude-run applies to --service-times calibrated, not to '{name}'"):
        build_system(Options(service_times=name, exclude_run="x"))


def test_a_cluster_of_another_kind_than_the_profile_is_refused_with_both_ways_out(tmp_path) -> None:
    profile = write_profile(tmp_path, "")
    with pytest.raises(
        InputError, match=r"of kind A6000; give a cluster of cpu with --gpus, or a profile of A6000 with"
    ):
        build_system(Options(profile=str(profile)))


def test_requests_longer_than_what_the_engine_keeps_are_refused_by_name(tmp_path):
    (tmp_path / "one.toml").write_text(ONE_MODEL)
    rows = "30,1,90,10\n31,1,90,11\n32,1,5000,10\n"
    (tmp_path / "requests.csv").write_text(f"arrival_s,endpoint,prompt_tokens,output_tokens\n{rows}")
    options = Options(trace=str(tmp_path / "requests.csv"), models=str(tmp_path / "one.toml"), gpus="1xA6000")
    system = build_system(options, engine_tokens=lambda _model: 100)
    run = simulate(system)
    reasons = [run.requests.reasons[reason] for reason in run.requests.reason]
    assert [RequestStatus(status).label for status in run.requests.status] == ["completed", "refused", "refused"]
    assert reasons[1] == "a sequence of 101 tokens is longer than the 100 that the engine's KV cache keeps of one"
    assert reasons[2] == "a sequence of 5010 tokens is longer than the 4096 positions of llama-2-7b"
    counted = "1 of 3 requests are longer than the 100 tokens that the engine's KV cache keeps of one, and are refused"
    assert counted in system.notes
    assert not [note for note in build_system(options).notes if "KV cache keeps" in note]
