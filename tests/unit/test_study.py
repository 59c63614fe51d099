"""Studies: definitions, costs, the formulas solved for a few configurations, and plots."""

import csv
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from maveriq.calibration.measurements import Measurement, MeasurementCost
from maveriq.cli.app import app
from maveriq.domain.models import WeightType
from maveriq.domain.parallel import ParallelConfig
from maveriq.errors import InputError, UnknownNameError
from maveriq.estimate.fingerprints import Exponents, Line, ParallelLatency, parallel_memory_gib
from maveriq.study.analyses import Compared, check_definition
from maveriq.study.definition import PublishedFigure, known_studies, read_definition
from maveriq.study.few_configurations import solve
from maveriq.study.folder import STUDY_FILES, fill
from maveriq.study.profiling_cost import cost_of, fewest_gpus
from maveriq.study.result import Mark, Panel, Series, StudyResult, StudyTable

ROOT = Path(__file__).parents[2]
COST = MeasurementCost(model_build_s=100.0, engine_build_s=200.0, run_s=30.0)


def run(tp: int = 1, pp: int = 1, **changed: object) -> Measurement:
    made = Measurement(
        where="",
        model_name="m",
        layers=8,
        configuration=ParallelConfig(tp=tp, pp=pp, weights=WeightType.FLOAT16),
        output_tokens=10,
        latency_s=1.0,
        memory_gib=float(tp * pp),
        layer_split=(8,),
        cost=COST,
    )
    return replace(made, **changed)


@pytest.mark.parametrize("name", known_studies())
def test_every_study_that_comes_with_maveriq_can_be_carried_out(name: str) -> None:
    _, definition = read_definition(name)
    analysis = check_definition(definition)
    assert definition.from_data is None or set(definition.from_data.tables) == set(analysis.parts)


def test_the_cost_of_an_engine_counts_once_and_a_run_keeps_all_gpus() -> None:
    cost = cost_of([run(2, 2), run(2, 2, output_tokens=20)])
    assert cost.engines == 1
    assert cost.hours == pytest.approx((100 + 200 + 30 + 30) / 3600)
    assert cost.gpu_hours == pytest.approx((100 + 200 + 4 * 60) / 3600)
    assert cost.peak_gib == 4


def test_a_run_without_its_cost_is_refused_by_its_place() -> None:
    with pytest.raises(InputError, match=r"t\.csv, line 2: no columns engine_build_s"):
        cost_of([run(where="t.csv, line 2", cost=None)])


def test_the_fewest_gpus_come_first() -> None:
    assert fewest_gpus([run(2, 2), run(1, 3), run(8), run(1, 4), run(1, 5)]) == ((1, 3), (1, 4), (2, 2))


@given(
    st.floats(0.1, 100),
    st.floats(0, 50),
    st.tuples(st.floats(1, 100), st.floats(0.01, 9), st.floats(0.01, 9)),
    st.sampled_from([((1, 1), (1, 2), (2, 1)), ((1, 3), (1, 4), (2, 2)), ((1, 2), (2, 1), (4, 2))]),
)
def test_three_exact_configurations_determine_all(
    single_s: float, beyond_s: float, memory: tuple[float, float, float], chosen: tuple[tuple[int, int], ...]
) -> None:
    exponents = Exponents(a=0.05, b=0.69, c=0.19, d=0.57)
    single, tp2 = Line(ttft_s=single_s, tpot_s=0.0), Line(ttft_s=single_s / 2 + beyond_s, tpot_s=0.0)
    first_gib, tp2_gib, pp2_gib = memory

    def latency_s(at: tuple[int, int]) -> float:
        return ParallelLatency.scaled(single, tp2, exponents, tp=at[0], pp=at[1]).at(1)

    def memory_gib(at: tuple[int, int]) -> float:
        return parallel_memory_gib(first_gib, first_gib + tp2_gib, first_gib + pp2_gib, tp=at[0], pp=at[1])

    found = solve({at: latency_s(at) for at in chosen}, {at: memory_gib(at) for at in chosen}, exponents)
    for at in ((1, 1), (1, 8), (2, 4), (8, 1), (4, 2)):
        assert found.latency_s(at) == pytest.approx(latency_s(at), rel=1e-6)
        assert found.memory_gib(at) == pytest.approx(memory_gib(at), rel=1e-6)


@pytest.mark.parametrize(("value", "decimals"), [(18, 0), (3.8, 1), (4.39, 2), (0.049085, 6)])
def test_a_published_figure_knows_how_it_was_rounded(value: float, decimals: int) -> None:
    assert PublishedFigure(figure="f", value=value, what="w", source="s").decimals == decimals


def study(*arguments: str) -> BaseException | None:
    return CliRunner().invoke(app, ["study", *arguments]).exception


def test_an_unknown_study_names_the_nearest() -> None:
    error = study("profiling-cots")
    assert isinstance(error, UnknownNameError)
    assert "did you mean 'profiling-cost'?" in str(error)


def test_a_definition_that_is_not_there_is_named() -> None:
    assert "'mine.toml' does not exist; `maveriq study list`" in str(study("mine.toml"))


def test_missing_measurements_are_named_with_their_home(tmp_path: Path) -> None:
    error = study("profiling-cost", "--from-data", "--data", str(tmp_path), "--out", str(tmp_path / "out"))
    assert isinstance(error, InputError)
    assert "has no a6000/full_model_long_prompt.csv, a6000/fingerprint_long_prompt.csv" in str(error)
    assert "UT-SysML/MaverIQ" in str(error)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('analysis = "profiling-cots"', "unknown analysis 'profiling-cots'; did you mean 'profiling-cost'?"),
        ('analysis = "profiling-cost"\noptions = { judged_tokens = [1] }', "unknown option of profiling-cost"),
        ('analysis = "profiling-cost"\nfrom_data = { tables = { full_models = [{ file = "f", prompt_tokens = 0 }] } }',
         "prompt_tokens must be a whole number of at least 1"),
        ('analysis = "profiling-cost"\nfrom_data = { tables = { full = [{ file = "f", prompt_tokens = 1 }] } }',
         "unknown table of profiling-cost 'full' (known: fingerprints, full_models)"),
        ('analysis = "profiling-cost"\nfrom_data = { tables = { full_models = [{ file = "f", prompt_tokens = 1 }] } }',
         "lack fingerprints"),
        ('analysis = "profiling-cost"', "no published measurements answer it"),
    ],
)  # fmt: skip
def test_a_damaged_definition_is_one_clear_line(line: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(f'title = "t"\nquestion = "q"\n{line}\n')
    error = study(str(file), "--from-data", "--out", str(tmp_path / "out"))
    assert isinstance(error, InputError)
    assert message in str(error)


def test_the_list_has_every_study() -> None:
    listed = CliRunner().invoke(app, ["study", "list"], env={"COLUMNS": "200"}).output
    assert all(name in listed for name in known_studies())


def result() -> StudyResult:
    numbers = Panel(
        title="numbers",
        x_label="x",
        y_label="y",
        series=(Series(label="a", x=[1, 2], y=[1, 2]), Series(label="b", x=[1, 2], y=[2, 3], mark=Mark.POINTS)),
        log_x=True,
        level=1.0,
    )
    names = Panel(
        title="names", x_label="x", y_label="y", series=(Series(label="a", x=["p", "q"], y=[1, -2], mark=Mark.BARS),)
    )
    table = StudyTable(columns=("model", "ratio"), rows=(("m, n", 1.5), ("k", None)))
    return StudyResult(table=table, panels=(numbers, names), figures={"f": 1.23456789})


def test_a_folder_has_table_figures_and_plots_and_the_same_study_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    for folder in (first, second):
        folder.mkdir()
        fill(folder, "title", result(), ())
    assert {path.name for path in first.iterdir()} == set(STUDY_FILES)
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in STUDY_FILES)
    with (first / "table.csv").open() as file:
        assert list(csv.reader(file)) == [["model", "ratio"], ["m, n", "1.5"], ["k", ""]]


def test_a_figure_is_equal_where_it_rounds_to_the_published_one() -> None:
    printed = PublishedFigure(figure="f", value=3.8, what="w", source="s")
    assert Compared(published=printed, ours=3.757).is_equal
    assert not Compared(published=printed, ours=3.74).is_equal
    assert Compared(published=printed, ours=4.18).difference == pytest.approx(10)


def test_every_study_is_in_the_wheel() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    studies = {f"experiments/study/{name}.toml": f"maveriq/studies/{name}.toml" for name in known_studies()}
    assert {source: target for source, target in included.items() if "study" in source} == studies
