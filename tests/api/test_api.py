"""The Python API: the results of the command line, errors, pickling, and objects in place of names."""

import pickle
from pathlib import Path

import pandas as pd
import pytest

import maveriq
from maveriq.__main__ import main
from maveriq.errors import InputError
from maveriq.estimate.hardware_profile import load_profile
from maveriq.estimate.registry import make_estimator


@pytest.fixture(scope="module")
def small() -> maveriq.Run:
    return maveriq.simulate(scale=0.05)


def test_the_api_and_the_command_line_write_the_same_tables(small, tmp_path: Path, monkeypatch) -> None:
    small.save(tmp_path / "api")
    monkeypatch.setattr("sys.argv", ["maveriq", "sim", "--scale", "0.05", "--quiet", "--out", str(tmp_path / "cli")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (None, 0)
    for table in ("requests.csv", "deployments.csv", "gpus.csv"):
        assert (tmp_path / "api" / table).read_bytes() == (tmp_path / "cli" / table).read_bytes()


def test_a_saved_run_loads_with_the_same_values(small, tmp_path: Path) -> None:
    small.save(tmp_path / "run")
    loaded = maveriq.load_run(tmp_path / "run")
    for table in ("requests", "deployments", "gpus"):
        pd.testing.assert_frame_equal(getattr(loaded, table), getattr(small, table))
    assert loaded.summary.to_dict()["overall"] == small.summary.to_dict()["overall"]


def test_runs_and_options_pickle(small) -> None:
    again = pickle.loads(pickle.dumps(small))  # noqa: S301  (the test's own bytes)
    pd.testing.assert_frame_equal(again.requests, small.requests)
    assert pickle.loads(pickle.dumps(maveriq.Options(scale=0.2))) == maveriq.Options(scale=0.2)  # noqa: S301


def test_an_estimator_object_plans_like_its_name() -> None:
    paper = make_estimator("paper", load_profile("a6000-short"))
    named = maveriq.simulate(scale=0.05, estimator="paper")
    given = maveriq.simulate(scale=0.05, estimator=paper)
    pd.testing.assert_frame_equal(named.requests, given.requests)


@pytest.mark.parametrize("options", [{"policy": "hybird"}, {"scale": -1.0}, {"no_such_option": 1}])
def test_wrong_options_are_input_errors(options) -> None:
    with pytest.raises(InputError):
        maveriq.simulate(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": sorted}, "must be a name or an object with name, decide.*'FILE.py:FUNCTION'"),
        ({"policy": object()}, "policy must be a name or an object with name, decide"),
        ({"estimator": 3}, "estimator must be a name or an object with name, why_not, service, memory"),
        ({"service_times": 3}, "contention, times_us or an object with name, why_not, service, memory"),
        ({"router": 3}, "router must be a name or an object with choose, committed"),
    ],
)
def test_objects_without_the_members_of_their_option_are_input_errors(options, message: str) -> None:
    with pytest.raises(InputError, match=message):
        maveriq.simulate(**options)


def test_options_are_given_by_name() -> None:
    with pytest.raises(InputError, match="give single options by name"):
        maveriq.simulate(0.1)


def test_a_run_folder_that_does_not_exist_is_named() -> None:
    with pytest.raises(InputError, match="run folder 'runs/nowhere' does not exist; check the path"):
        maveriq.load_run("runs/nowhere")


def test_a_run_plots_and_renders_as_html(small) -> None:
    assert small.plot().axes
    assert "<table" in small._repr_html_()


def test_a_run_against_itself_differs_by_nothing(small) -> None:
    comparison = maveriq.compare(small, small)
    assert not comparison.unmatched
    assert all(not difference.error for difference in comparison.overall.differences.values())
    assert comparison.plot().axes
    assert "runs" not in comparison.to_dict()


def test_plan_ranks_best_first() -> None:
    ranking = maveriq.plan("llama-2-7b")
    assert len(ranking) > 1
