"""Studies of the published measurements give the published figures, or say why not."""

import csv
from functools import cache
from pathlib import Path

import pytest

from maveriq.study.analyses import Compared, study_published
from maveriq.study.definition import known_studies, read_definition
from maveriq.study.result import StudyResult

pytestmark = pytest.mark.data


@cache
def carried_out(name: str, data: Path) -> tuple[StudyResult, tuple[Compared, ...]]:
    _, definition = read_definition(name)
    return study_published(name, definition, data)


def test_memory_of_profiling_is_as_published(measured_data: Path) -> None:
    _, compared = carried_out("profiling-cost", measured_data)
    as_printed = {found.published.figure for found in compared if found.is_equal}
    assert {"memory-ratio-least", "memory-ratio-most"} <= as_printed


def test_time_and_gpu_hours_of_profiling_lie_in_the_range_of_every_choice_of_three(measured_data: Path) -> None:
    result, _ = carried_out("profiling-cost", measured_data)
    for figure, published in (("time-ratio", 2.5), ("gpu-hours-ratio", 3.8)):
        least, mean, most = (result.figures[f"{figure}-{at} llama-2-70b"] for at in ("least", "mean", "most"))
        assert least < published < most
        assert abs(mean / published - 1) < 0.07
        assert abs(result.figures[f"{figure} llama-2-70b"] / published - 1) < 0.08


def test_every_configuration_is_the_dearest_and_fingerprints_take_the_least_memory(measured_data: Path) -> None:
    result, _ = carried_out("profiling-cost", measured_data)
    costs = {tuple(row[:3]): row[4:7] for row in result.table.rows}
    for (types, model, _), cost in costs.items():
        every = costs[types, model, "every configuration"]
        assert all(a >= b for a, b in zip(every, cost, strict=True))
        assert cost[2] >= costs[types, model, "fingerprints"][2]


def test_the_calibrated_estimator_is_nearer_than_the_papers_formula(measured_data: Path) -> None:
    result, _ = carried_out("profiling-cost", measured_data)
    errors = {(row[0], row[1], row[2]): row[7] for row in result.table.rows}
    for (types, model, plan), error in errors.items():
        if plan == "fingerprints, calibrated":
            assert error < errors[types, model, "fingerprints"]


RESULTS = Path(__file__).parents[2] / "experiments" / "study" / "results"


@pytest.mark.parametrize("name", known_studies())
def test_committed_tables_are_those_that_the_study_gives(name: str, measured_data: Path) -> None:
    result, _ = carried_out(name, measured_data)
    with (RESULTS / name / "table.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert tuple(header) == result.table.columns
    assert len(rows) == len(result.table.rows)
    for committed, computed in zip(rows, result.table.rows, strict=True):
        for text, cell in zip(committed, computed, strict=True):
            if isinstance(cell, float):
                assert float(text) == pytest.approx(cell, rel=0.02, abs=0.02)
            else:
                assert text == ("" if cell is None else str(cell))


def test_two_layers_tell_the_latency_of_thirty_two_within_a_percent(measured_data: Path) -> None:
    figures = carried_out("layer-scaling", measured_data)[0].figures
    assert abs(figures["latency-error llama-2-7b TP 1 x PP 1 from 1 and 2 layers"]) < 1


def test_masks_do_not_make_dense_kernels_faster(measured_data: Path) -> None:
    figures = carried_out("pruning", measured_data)[0].figures
    ratios = [value for name, value in figures.items() if name.startswith("latency-ratio ")]
    assert len(ratios) == 4
    assert all(0.99 < ratio < 1.01 for ratio in ratios)


def test_uneven_splits_cost_little(measured_data: Path) -> None:
    assert carried_out("uneven-splits", measured_data)[0].figures["latency-change-median"] < 0.5


def test_a_descent_over_every_point_beats_the_published_exponents(measured_data: Path) -> None:
    figures = carried_out("exponents", measured_data)[0].figures
    assert figures["latency-mean descent, every point"] < figures["latency-mean published"]
    assert figures["latency-median robust least squares"] < figures["latency-median published"]


def test_every_difference_from_a_published_figure_has_a_reason(measured_data: Path) -> None:
    for name in known_studies():
        for found in carried_out(name, measured_data)[1]:
            assert found.is_equal != bool(found.published.why), found
