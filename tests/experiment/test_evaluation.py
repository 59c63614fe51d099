"""Experiments: points, improvements, what differs and why; no simulation."""

import json
import re
from dataclasses import replace
from pathlib import Path

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given

from maveriq.errors import InputError, UnknownNameError
from maveriq.experiment.comparison import UNEXPLAINED, figure_rows, improvements
from maveriq.experiment.definition import Catalog, Compare, Definition, Load, Loads, Point, Reason, points_of
from maveriq.experiment.evaluation import Evaluation, Outcome
from maveriq.experiment.measures import MEASURES, measure_of
from maveriq.experiment.recorded import Recorded, shipped_runs
from maveriq.experiment.results import FILES, result_of, to_json, write, write_files
from maveriq.sweeps.local_pool import LocalPool
from maveriq.sweeps.worker import CellResult

CATALOG = Catalog()
EVALUATION = Evaluation(CATALOG)
LATENCY = "latency_mean_s"


class CountingPool:
    """Answers each cell at once, with figures that follow from its number (mutable)."""

    def __init__(self, failing=()):
        self.simulated, self.failing = [], set(failing)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def results(self, tasks):
        for task in tasks:
            self.simulated.append(task.number)
            if task.number in self.failing:
                yield CellResult(number=task.number, error="no memory")
            else:
                row = dict.fromkeys(MEASURES, float(task.number)) | {"requests": 4.0, "completed": 3.0}
                del row["completed_share"]
                yield CellResult(number=task.number, saturation="stable", rows={"all": row})


def test_every_experiment_names_known_systems_and_figures():
    for name in CATALOG.names:
        definition = CATALOG.read(name)
        served = {point.system for point in points_of(definition)}
        for compare in definition.compare:
            assert {*compare.ours, *compare.against} <= served, name
        for figure in (*definition.figures, *definition.drawn, *(by for each in definition.compare for by in each.by)):
            assert measure_of(figure).name == figure


def test_the_page_counts_the_runs_of_each_experiment():
    text = (Path(__file__).parents[2] / "docs" / "experiments.md").read_text(encoding="utf-8")
    table = text.partition("| experiment | runs |")[2].partition("\n\n")[0]
    stated = {}
    for names, counts in re.findall(r"^\| (`[^|]+) \| ([\d, –]+) \|", table, re.MULTILINE):
        found = re.findall(r"`([\w-]+)`", names)
        stated |= dict(zip(found, counts.split(", ") * (1 if "," in counts else len(found)), strict=True))
    assert stated == {name: str(len(list(points_of(CATALOG.read(name)))) or "–") for name in CATALOG.names}


def test_an_unknown_experiment_is_refused_by_name():
    with pytest.raises(UnknownNameError, match=r"unknown experiment 'larg'; did you mean 'large'\?"):
        CATALOG.read("larg")


def test_the_published_evaluation_has_73_runs_and_each_recording_is_one_of_them():
    points = list(points_of(CATALOG.read("published")))
    keys = {CATALOG.key(point) for point in points}
    assert len(points) == len(keys) == 73
    assert {run.key for run in shipped_runs()} <= keys
    assert len(shipped_runs()) == 22


def test_runs_with_a_recording_take_service_times_that_were_fitted_without_it():
    by_key = {run.key: run.run for run in shipped_runs()}
    for point in points_of(CATALOG.read("published")):
        options = EVALUATION.spec.runs[next(iter(EVALUATION.numbers([point]))) - 1]
        assert options.get("exclude_run") == by_key.get(CATALOG.key(point))


def test_experiments_share_runs_and_simulate_none_twice(tmp_path: Path):
    first, second = CountingPool(), CountingPool()
    published, intents = CATALOG.read("published"), CATALOG.read("intents")
    EVALUATION.simulate([published], tmp_path, pool=first)
    assert len(first.simulated) == len(set(first.simulated)) == 73
    result = EVALUATION.simulate([intents], tmp_path, pool=second)
    assert second.simulated == []  # all of its runs are published ones
    outcomes = EVALUATION.outcomes(intents, result, {})
    assert [outcome.point for outcome in outcomes] == list(points_of(intents))
    assert all({outcome.figures[LATENCY]} == EVALUATION.numbers([outcome.point]) for outcome in outcomes)
    assert {outcome.figures["completed_share"] for outcome in outcomes} == {0.75}


def test_a_run_that_fails_is_named(tmp_path: Path):
    stress = CATALOG.read("stress")
    point = list(points_of(stress))[1]
    result = EVALUATION.simulate([stress], tmp_path, pool=CountingPool(EVALUATION.numbers([point])))
    with pytest.raises(InputError, match=r"^MaverIQ min-cost, twentyone conversation 0\.2: no memory$"):
        EVALUATION.outcomes(stress, result, {})


@given(ours=st.floats(0.01, 1e6), theirs=st.floats(0.01, 1e6))
def test_improvements_have_the_sign_of_the_better_one(ours, theirs):
    for measure in MEASURES.values():
        found = measure.improvement(ours, theirs)
        better = ours > theirs if measure.more_is_better else ours < theirs
        assert (found > 0) == better or found == 0


def test_improvements_are_percent_of_theirs_or_points():
    assert MEASURES[LATENCY].improvement(1.0, 4.0) == 75
    assert MEASURES["throughput_per_s"].improvement(3.0, 2.0) == 50
    assert MEASURES["slo_attainment"].improvement(0.9, 0.4) == pytest.approx(50)
    assert MEASURES["gpu_hours"].improvement(1.0, 0.0) is None


LOAD = Load("large", "code", 0.4)
PAIR = Definition(
    title="t", question="q", source="s", systems=("A", "B"), figures=(LATENCY,),
    loads=(Loads(models="large", trace="code", scales=(0.4,)),),
    compare=(Compare(ours=("A",), against=("B",), by=(LATENCY,)),),
)  # fmt: skip


def outcome(system: str, simulated: float, recorded: float, *, saturation="stable", recorded_saturation="stable"):
    run = Recorded(
        run=system, key=(system, "", "large", "code", 0.4, 0.0), saturation=recorded_saturation,
        figures={LATENCY: recorded, "completed": 1.0, "requests": 1.0},
    )  # fmt: skip
    return Outcome(
        point=Point(system, LOAD), figures={LATENCY: simulated}, saturation=saturation, recorded=run, blind=True
    )


def test_agreement_within_the_bar_needs_no_reason():
    [found] = improvements(PAIR, [outcome("A", 1.0, 1.04), outcome("B", 2.0, 2.0)])
    assert (found.simulated, found.published) == (50, pytest.approx(48))
    assert found.within is True
    assert found.same_direction is True
    assert found.why == ""


def test_a_difference_is_explained_by_saturation_or_by_the_definition_or_not_at_all():
    ours, theirs = outcome("A", 1.0, 1.0), outcome("B", 2.0, 4.0)
    [unexplained] = improvements(PAIR, [ours, theirs])
    assert unexplained.within is False
    assert unexplained.why == UNEXPLAINED
    reasoned = Definition(
        title="t", question="q", source="s", loads=PAIR.loads, compare=PAIR.compare, figures=PAIR.figures,
        reasons=(Reason(why="B waits", systems=("B",), figures=(LATENCY,)), Reason(why="no", systems=("C",))),
    )  # fmt: skip
    [found] = improvements(reasoned, [ours, theirs])
    assert found.why == "B waits"
    [saturated] = improvements(PAIR, [ours, outcome("B", 2.0, 4.0, recorded_saturation="overloaded")])
    assert saturated.saturated == "B overloaded (recorded)"
    assert saturated.why.startswith("B overloaded (recorded): ")


def test_the_verdict_counts_directions_and_those_below_saturation():
    agrees = result_of("x", PAIR, [outcome("A", 1.0, 1.0), outcome("B", 2.0, 2.0)]).verdict
    opposite = result_of("x", PAIR, [outcome("A", 1.0, 3.0), outcome("B", 2.0, 2.0, saturation="backlogged")]).verdict
    assert (agrees.compared, agrees.same_direction, agrees.within, agrees.within_below) == (1, 1, 1, 1)
    assert (opposite.compared, opposite.same_direction, opposite.within, opposite.below_saturation) == (1, 0, 0, 0)


def test_a_run_without_a_recording_has_no_published_figure():
    found = replace(outcome("A", 1.0, 1.0), recorded=None)
    [row] = figure_rows(PAIR, [found])
    assert (row.published, row.difference, row.differs) == (None, None, False)
    assert json.loads(json.dumps(to_json(result_of("x", PAIR, [found]))))["figures"][0]["published"] is None


def test_files_that_would_change_are_refused_and_unchanged_ones_stay(tmp_path: Path):
    write_files(tmp_path, {"a.csv": b"1", "b.csv": b"2"}, overwrite=False)
    write_files(tmp_path, {"a.csv": b"1", "c.csv": b"3"}, overwrite=False)
    with pytest.raises(InputError, match=r"c\.csv.*--overwrite"):
        write_files(tmp_path, {"c.csv": b"4", "b.csv": b"5"}, overwrite=False)
    assert (tmp_path / "c.csv").read_bytes() == b"3"
    write_files(tmp_path, {"b.csv": b"5"}, overwrite=True)
    assert (tmp_path / "b.csv").read_bytes() == b"5"


@pytest.mark.heavy
def test_published_improvements_come_out_within_five_points(tmp_path: Path):
    """MaverIQ at minimal latency against AlpaServe and AlpaServe*, large, code 0.1: all were below saturation."""
    large = CATALOG.read("large")
    loads = Loads(
        models="large", trace="code", scales=(0.1,), systems=("MaverIQ min-latency", "AlpaServe", "AlpaServe*")
    )
    part = msgspec.structs.replace(large, loads=(loads,))
    with LocalPool(1) as pool:
        simulated = EVALUATION.simulate([part], tmp_path, pool=pool)
    result = result_of("part", part, EVALUATION.outcomes(part, simulated, {run.key: run for run in shipped_runs()}))
    write(result, tmp_path / "part", overwrite=False)
    assert {path.name for path in (tmp_path / "part").iterdir()} == set(FILES)
    assert result.verdict.same_direction == result.verdict.compared == result.verdict.below_saturation == 10
    for found in result.improvements:
        assert found.within or found.measure.name == "memory_mean_gib", found
        assert found.within or found.why.startswith("the simulation holds the memory"), found
