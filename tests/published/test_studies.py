"""Studies of the published measurements give the published figures, or say why not."""

from functools import cache
from pathlib import Path

import pytest

from maveriq.study.analyses import Compared, study_published
from maveriq.study.definition import read_definition
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
