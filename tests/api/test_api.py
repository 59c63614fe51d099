"""The Python API: same results as the command line, errors, pickling, and objects instead of names."""

import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

import maveriq
from maveriq.__main__ import main
from maveriq.errors import InputError
from maveriq.estimate.hardware_profile import load_profile
from maveriq.estimate.registry import make_estimator

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


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
        ({"policy": dict}, "must be a name or an object with name, decide, or a placement rule"),
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
    assert small.plot()._repr_png_().startswith(b"\x89PNG")
    assert "<table" in small._repr_html_()


def test_a_run_against_itself_differs_by_nothing(small) -> None:
    comparison = maveriq.compare(small, small)
    assert not comparison.unmatched
    assert all(not difference.error for difference in comparison.overall.differences.values())
    assert comparison.plot().axes
    assert comparison.plot()._repr_png_().startswith(b"\x89PNG")
    assert not {"runs", "reported"} & set(comparison.to_dict())
    assert repr(comparison).startswith("<Comparison: first (simulated) against second (simulated), mean latency 0.3")
    assert repr(maveriq.compare(small, small, small)).count("(simulated)") == 3


def test_comparisons_are_written_as_html_with_the_options_of_all_runs(small, tmp_path: Path) -> None:
    pytest.importorskip("bokeh")
    folder = small.save(tmp_path / "saved")
    for number, compared in enumerate([maveriq.compare(folder, small), maveriq.compare(folder, small, small)]):
        file = compared.to_html(tmp_path / f"{number}.html")
        text = file.read_text(encoding="utf-8")
        assert text.count("Options of") == number + 2
        assert "saved" in text
        with pytest.raises(InputError, match="exists already"):
            compared.to_html(file)


def test_a_sweep_is_read_back_and_written_as_html(tmp_path: Path) -> None:
    pytest.importorskip("bokeh")
    maveriq.sweep({"options": {"limit": 5}, "grid": {"policy": ["llf"]}}, out=tmp_path / "sweep", workers=1)
    result = maveriq.load_sweep(tmp_path / "sweep")
    assert "policy llf" in result.to_html(tmp_path / "sweep.html").read_text(encoding="utf-8")


def test_plan_ranks_best_first() -> None:
    ranking = maveriq.plan("llama-2-7b")
    assert len(ranking) > 1


def test_a_placement_rule_is_passed_as_a_function() -> None:
    def fullest_first(gpus):
        return sorted(gpus, key=lambda gpu: gpu.free_bytes)

    run = maveriq.simulate(scale=0.05, policy=fullest_first)
    named = maveriq.simulate(scale=0.05, policy=f"{EXAMPLES / 'best_fit.py'}:best_fit")
    pd.testing.assert_frame_equal(run.requests, named.requests)
    assert run.options is not None
    assert run.options.policy == "fullest_first"
    assert "objects were passed for: policy" in run.notes


def test_a_rule_that_fails_is_named() -> None:
    def broken(gpus):
        return gpus[0].no_such_field

    with pytest.raises(maveriq.errors.MaveriqError, match=r"policy 'broken' failed: AttributeError.*test_api.py, line"):
        maveriq.simulate(scale=0.05, policy=broken)


def test_a_rule_that_leaves_gpus_out_is_named() -> None:
    with pytest.raises(maveriq.errors.MaveriqError, match=r"policy '<lambda>' returned 7 of 8 GPUs"):
        maveriq.simulate(scale=0.05, policy=lambda gpus: gpus[1:])


def test_a_policy_that_returns_no_decision_is_named() -> None:
    class Undecided:
        name = "undecided"

        def decide(self, endpoint, view):
            return None

    with pytest.raises(maveriq.errors.MaveriqError, match="policy 'undecided' returned None; it must return a Deploy"):
        maveriq.simulate(scale=0.05, policy=Undecided())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: maveriq.Options(sclae=1), "unknown option 'sclae'; did you mean 'scale'?"),
        (lambda: replace(maveriq.Options(), sed=1), "unknown option 'sed'; did you mean 'seed'?"),
        (lambda: maveriq.Options("code"), "options have names; write NAME='code'"),
        (lambda: maveriq.Options(scale="x"), "scale must be None or float, not 'x'"),
        (lambda: maveriq.Options(policy=3.5), "policy must be None or str, not 3.5"),
        (lambda: maveriq.plan("llama-2-7b", slo_ms="fast"), "slo_ms must be None or float"),
        (lambda: maveriq.simulate(slo_ttft_ms="200"), "--slo-ttft-ms must be a positive number of milliseconds"),
        (lambda: maveriq.load_run(3), "path must be a path, not 3"),
        (lambda: maveriq.compare(1, 2), "path must be a path, not 1"),
        (lambda: maveriq.place(None), "problem must be a path, not None"),
    ],
)
def test_values_of_other_types_are_input_errors(make, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_options_have_their_own_types() -> None:
    options = maveriq.Options(scale=1, fail="gpu=0@900s", models=Path("traces/models.toml"))
    assert (options.scale, type(options.scale)) == (1.0, float)
    assert (options.fail, options.models) == (("gpu=0@900s",), "traces/models.toml")


def test_a_saved_run_is_replaced_only_when_asked(small: maveriq.Run, tmp_path: Path) -> None:
    other = maveriq.simulate(scale=0.05, seed=7)
    small.save(tmp_path / "run")
    with pytest.raises(maveriq.errors.InputError, match="exists already"):
        other.save(tmp_path / "run")
    assert maveriq.load_run(tmp_path / "run").requests.equals(small.requests)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert other.save(tmp_path / "run", overwrite=True) == tmp_path / "run"
    assert maveriq.load_run(tmp_path / "run").requests.equals(other.requests)


def test_an_uneven_layer_split_is_read_back(tmp_path: Path) -> None:
    cluster = tmp_path / "cluster.toml"
    cluster.write_text('name = "shared"\ngpu = "A6000"\ncount = 2\nused_gib = [0, 18]\n')
    models = tmp_path / "models.toml"
    models.write_text('name = "one"\n\n[[models]]\nmodel = "llama-2-70b"\nload_at = 0\n')
    run = maveriq.simulate(scale=0.05, gpus=cluster, models=models, min_accuracy=98.0)
    run.save(tmp_path / "run")
    loaded = maveriq.load_run(tmp_path / "run")
    [deployment] = run.record.deployments
    assert deployment.plan is not None
    assert len(set(deployment.plan.layer_split)) > 1
    assert loaded.record.deployments == run.record.deployments
    assert loaded.to_dict()["deployments"] == run.to_dict()["deployments"]


_IN_A_FRESH_INTERPRETER = """
import pickle, sys

run, options = pickle.load(open(sys.argv[1], "rb"))
assert "pandas" not in sys.modules
print(len(run.requests), run.options == options, run.summary.overall.counts.completed)
"""


def test_a_pickled_run_opens_in_a_fresh_interpreter(small, tmp_path: Path) -> None:
    path = tmp_path / "run.pickle"
    path.write_bytes(pickle.dumps((small, small.options)))
    done = subprocess.run(
        [sys.executable, "-c", _IN_A_FRESH_INTERPRETER, str(path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [
        str(len(small.requests)), "True", str(small.summary.overall.counts.completed),
    ]  # fmt: skip
