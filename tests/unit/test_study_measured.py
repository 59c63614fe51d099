"""Studies on this machine: grids, the log that lets them go on, and analyses of an engine whose times are known."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from maveriq.cli.app import app
from maveriq.domain.models import KvType, ModelSpec, WeightType, load_model
from maveriq.errors import InputError, MaveriqError
from maveriq.study.definition import Definition, known_studies, read_definition
from maveriq.study.grid import SMALL_MODEL, EngineKey, Grid, Measure, Point, dealt, points_of
from maveriq.study.measured import plan_of, study_measured
from maveriq.study.measurement_log import LOG_NAME, MeasuredPoint, MeasurementLog, Subject, open_log

SHARES = st.integers(1, 8).flatmap(
    lambda stages: st.tuples(st.integers(stages, 90), st.lists(st.integers(1, 9), min_size=stages, max_size=stages))
)


@given(SHARES)
def test_dealt_layers_add_up_and_follow_the_shares(case: tuple[int, list[int]]) -> None:
    layers, shares = case
    split = dealt(layers, shares)
    assert sum(split) == layers
    assert min(split) >= 1
    for (share, dealt_layers), (other, dealt_to_other) in product(zip(shares, split, strict=True), repeat=2):
        assert share > other or dealt_layers <= dealt_to_other + 1


def test_an_even_share_is_the_even_split() -> None:
    assert dealt(8, (1, 1, 1, 1)) == (2, 2, 2, 2)
    assert dealt(32, (1, 3)) == (8, 24)
    assert dealt(4, (1, 1, 1, 9)) == (1, 1, 1, 1)


def grid(**lists: object) -> Grid:
    return Grid(part="p", **lists)


def test_a_grid_is_every_combination_that_the_model_can_have() -> None:
    points = list(points_of(grid(tp=(1, 2), pp=(1, 4), layers=(2, 4, 9), output_tokens=(10, 20)), 8))
    engines = {(point.engine.tp, point.engine.pp, point.engine.layers) for point in points}
    assert engines == {(1, 1, 2), (2, 1, 2), (1, 1, 4), (1, 4, 4), (2, 1, 4), (2, 4, 4)}
    assert len(points) == 2 * len(engines)


@pytest.mark.parametrize(
    ("lists", "message"),
    [({"pruning": ("half",)}, "pruning 'half' is none"), ({"stage_shares": ((1, 2),)}, "are for 2 stages")],
)
def test_a_grid_that_cannot_be_is_refused(lists: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        list(points_of(grid(**lists), 8))


ENGINE = EngineKey(layer_split=(8,), tp=1, pp=1, weights=WeightType.FLOAT16, kv=KvType.NATIVE, batch=1)
SUBJECT = Subject(study="s", model="m", config_digest="d", backend="torch", machine="cpu", repeats=3)


def measured(point: Point) -> MeasuredPoint:
    """What an engine takes that computes layers and tokens at a constant speed."""
    engine = point.engine
    each_s = (0.001 * engine.layers / engine.tp + 0.002) * (1 + 0.1 * (engine.batch - 1))
    return MeasuredPoint(
        point=point,
        first_s=each_s * (1 + 0.1 * point.prompt_tokens),
        each_s=each_s,
        memory_gib=1.0 + engine.layers + 0.2 * (engine.tp * engine.pp - 1),
        model_build_s=1.0 if engine.layers < 8 else 0.0,
        engine_build_s=2.0 + engine.layers,
        run_s=0.5 * engine.layers,
    )


def a_point(output_tokens: int) -> Point:
    return Point(engine=ENGINE, prompt_tokens=8, output_tokens=output_tokens)


def test_a_log_keeps_what_was_measured_and_drops_a_line_that_was_cut_short(tmp_path: Path) -> None:
    with open_log(tmp_path, SUBJECT) as log:
        log.add([measured(a_point(10)), measured(a_point(20))])
    path = tmp_path / LOG_NAME
    path.write_bytes(path.read_bytes()[:-5])
    with open_log(tmp_path, SUBJECT) as log:
        assert set(log.points) == {a_point(10)}
        log.add([measured(a_point(20))])
    with open_log(tmp_path, SUBJECT) as log:
        assert log.points == {a_point(n): measured(a_point(n)) for n in (10, 20)}


def test_a_log_of_something_else_is_refused_by_what_differs(tmp_path: Path) -> None:
    with open_log(tmp_path, SUBJECT):
        pass
    other = Subject(study="s", model="m", config_digest="d", backend="vllm", machine="cpu", repeats=3)
    with pytest.raises(InputError, match=r"another backend \(torch, not vllm\)"), open_log(tmp_path, other):
        pass


def test_two_processes_do_not_write_one_log(tmp_path: Path) -> None:
    with open_log(tmp_path, SUBJECT), pytest.raises(InputError, match="another process"), open_log(tmp_path, SUBJECT):
        pass


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    (tmp_path / LOG_NAME).write_text(json.dumps({"version": 1}) + "\n")
    with pytest.raises(InputError, match="line 1: missing key"), open_log(tmp_path, SUBJECT):
        pass


def small_model(folder: Path) -> ModelSpec:
    path = folder / "model" / "config.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(dict(SMALL_MODEL)))
    return load_model(str(path))


@dataclass
class KnownBench:
    """Stands for a bench: an engine whose times are known; it fails after so many engines."""

    model: ModelSpec
    fails_after: int = 1000
    refused: str = ""
    started: list[EngineKey] = field(default_factory=list)

    def subject(self, study: str) -> Subject:
        return SUBJECT

    def why_not(self, engine: EngineKey) -> str | None:
        return self.refused or None

    def measure_all(self, points: Iterable[Point], log: MeasurementLog) -> None:
        missing = [point for point in points if point not in log.points]
        for engine in dict.fromkeys(point.engine for point in missing):
            if len(self.started) == self.fails_after:
                raise MaveriqError("the engine ended")
            self.started.append(engine)
            log.add([measured(point) for point in missing if point.engine == engine])


@pytest.mark.parametrize("name", [name for name in known_studies() if read_definition(name)[1].measure])
def test_every_study_that_measures_goes_on_where_it_was_interrupted(name: str, tmp_path: Path) -> None:
    _, definition = read_definition(name)
    model = small_model(tmp_path)
    whole = KnownBench(model)
    wanted = study_measured(name, definition, whole, tmp_path / "whole")
    assert len(whole.started) == len(set(whole.started)) == plan_of(name, definition, whole).engines
    first, second = KnownBench(model, fails_after=len(whole.started) // 2), KnownBench(model)
    with pytest.raises(MaveriqError, match="the engine ended"):
        study_measured(name, definition, first, tmp_path / "parts")
    assert study_measured(name, definition, second, tmp_path / "parts") == wanted
    assert [*first.started, *second.started] == whole.started
    assert wanted.table.rows


def test_two_layer_counts_predict_layers_of_constant_time(tmp_path: Path) -> None:
    _, definition = read_definition("layer-scaling")
    result = study_measured("layer-scaling", definition, KnownBench(small_model(tmp_path)), tmp_path / "out")
    assert all(abs(value) < 1e-6 for value in result.figures.values())


def test_the_formula_predicts_one_gpu_exactly_where_time_is_linear(tmp_path: Path) -> None:
    grids = (
        Grid(part="full_models", output_tokens=(10, 100)),
        Grid(part="fingerprints", layers=(1, 2), output_tokens=(10, 20)),
    )
    definition = Definition(analysis="full-models", title="t", question="q", measure=Measure(grids=grids))
    result = study_measured("mine", definition, KnownBench(small_model(tmp_path)), tmp_path / "out")
    assert result.figures["latency-median paper"] == pytest.approx(0, abs=1e-6)
    assert result.figures["memory-median paper"] == pytest.approx(0, abs=1e-6)


def test_what_cannot_run_here_is_refused_with_the_reason(tmp_path: Path) -> None:
    _, definition = read_definition("parallelism")
    bench = KnownBench(small_model(tmp_path), refused="torch cannot run it")
    with pytest.raises(InputError, match="nothing of full_models can be measured here: torch cannot run it"):
        study_measured("parallelism", definition, bench, tmp_path / "out")


def test_a_study_without_grids_says_so(tmp_path: Path) -> None:
    definition = Definition(analysis="parallelism", title="t", question="q")
    with pytest.raises(InputError, match="measures nothing; give --from-data"):
        plan_of("mine", definition, KnownBench(small_model(tmp_path)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pruning", "--from-data", "--repeats", "2"], "--from-data measures nothing"),
        (["pruning", "--data", "x"], "give --from-data, or leave --data out"),
        (["pruning", "--model", "llama-2-7c"], "unknown model 'llama-2-7c'; did you mean"),
        (["pruning", "--backend", "torhc"], "torhc"),
        (["pruning", "--backend", "emulated"], "there is nothing to measure"),
    ],
)
def test_bad_options_are_refused_before_anything_starts(arguments: list[str], message: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["study", *arguments, "--out", str(out)])
    assert isinstance(result.exception, InputError)
    assert message in str(result.exception)
    assert not out.exists()


def test_a_folder_of_measurements_is_not_replaced_by_published_results(tmp_path: Path) -> None:
    (tmp_path / LOG_NAME).write_text("")
    result = CliRunner().invoke(app, ["study", "pruning", "--from-data", "--overwrite", "--out", str(tmp_path)])
    assert "has measurements of a study" in str(result.exception)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("")
    result = CliRunner().invoke(app, ["study", "pruning", "--out", str(tmp_path)])
    assert isinstance(result.exception, InputError)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_dry_run_counts_engines_and_writes_nothing(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["study", "parallelism", "--dry-run", "--json", "--out", str(out)])
    assert json.loads(result.stdout)["parts"] == [{"part": "full_models", "engines": 9, "measurements": 9}]
    assert not out.exists()


def test_measurements_stay_where_overwrite_comes_with_a_mistake(tmp_path: Path) -> None:
    (tmp_path / LOG_NAME).write_text("kept")
    CliRunner().invoke(app, ["study", "pruning", "--overwrite", "--model", "llama-2-7c", "--out", str(tmp_path)])
    assert (tmp_path / LOG_NAME).read_text() == "kept"


TINY = """analysis = "uneven-splits"
title = "t"
question = "q"

[[measure.grids]]
part = "splits"
pp = [2]
stage_shares = [[1, 1], [1, 3]]
prompt_tokens = [4]
output_tokens = [4]
"""


@pytest.mark.heavy
def test_torch_engines_are_measured_and_the_study_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    file, out = tmp_path / "tiny.toml", tmp_path / "out"
    file.write_text(TINY)
    config = dict(SMALL_MODEL) | {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "vocab_size": 64}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    command = ["study", str(file), "--model", str(tmp_path / "model"), "--repeats", "1", "--out", str(out)]
    for _ in range(2):
        result = CliRunner().invoke(app, command)
        assert result.exception is None, result.exception
    assert len((out / LOG_NAME).read_text().splitlines()) == 3
    assert {path.name for path in out.iterdir()} == {LOG_NAME, "table.csv", "figures.csv", "plot.png", "plot.svg"}
