"""The committed results equal those of the code."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from configurations import Compared
from estimates import evaluate_all
from queue_model import QueueErrors
from schedules import redraw_all
from sheets import Sheet, configurations_sheet, estimates_sheet, queue_sheet, schedules_sheet

pytestmark = pytest.mark.data
RESULTS = Path(__file__).parents[2] / "experiments" / "published" / "results"


def assert_committed(sheet: Sheet) -> None:
    committed = (RESULTS / f"{sheet.name}.csv").read_text(encoding="utf-8")
    assert sheet.csv() == committed, "run experiments/published/reproduce.py and look at what changed"


def test_estimates(measured_data: Path) -> None:
    assert_committed(estimates_sheet(evaluate_all(measured_data)))


def test_schedules(measured_data: Path) -> None:
    redrawn = list(redraw_all(measured_data))
    assert_committed(schedules_sheet(redrawn))
    assert all(run.requests == run.from_counts == run.from_public for run in redrawn)


def test_configurations(compared: Sequence[Compared]) -> None:
    assert_committed(configurations_sheet(compared))


@pytest.mark.heavy
def test_queue_model(replayed: Mapping[str, QueueErrors]) -> None:
    assert_committed(queue_sheet(list(replayed.values())))
