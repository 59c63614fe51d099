"""From options to a scenario: what a user does to a run besides sending requests."""

import pytest

from maveriq.domain.requests import RequestStatus
from maveriq.errors import InputError
from maveriq.scenario.build import build_scenario
from maveriq.scenario.options import Options
from maveriq.sim.engine import simulate
from maveriq.units import micros

ONE_MODEL = 'name = "one"\n[[models]]\nmodel = "llama-2-7b"\nload_at = 0\n'


@pytest.fixture
def replay(tmp_path):
    """Run a schedule of one model on one GPU."""

    def run(rows: str, columns: str = "arrival_s,endpoint,prompt_tokens,output_tokens", **options):
        (tmp_path / "one.toml").write_text(ONE_MODEL)
        (tmp_path / "requests.csv").write_text(f"{columns}\n{rows}\n")
        return simulate(
            build_scenario(
                Options(
                    trace=str(tmp_path / "requests.csv"),
                    models=str(tmp_path / "one.toml"),
                    gpus="1xA6000",
                    ideal=True,
                    **options,
                )
            )
        )

    return run


def test_a_priority_request_of_a_schedule_overtakes(replay) -> None:
    rows = "100,1,9,20,0\n100.01,1,9,20,0\n100.02,1,9,20,1"
    starts = replay(rows, "arrival_s,endpoint,prompt_tokens,output_tokens,priority").requests.start_us
    assert starts[0] < starts[2] < starts[1]


def test_an_endpoint_is_taken_away(replay) -> None:
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
def test_what_can_hit_nothing_is_refused(replay, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        replay("100,1,9,20", **options)


def test_a_fault_before_its_deployment_is_asked_for_is_refused() -> None:
    with pytest.raises(InputError, match="fault of deployment 2 at 100 s: it is not asked for before 270 s"):
        build_scenario(Options(fail=("deployment=2@100s",)))


def test_when_every_gpu_is_down_the_rejection_says_so(replay) -> None:
    record = replay("100,1,9,20", fail=("gpu=0@0s",))
    assert record.deployments[0].reason == "every GPU is down"
