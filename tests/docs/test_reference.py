"""docs/reference is what the code says."""

import dataclasses
from pathlib import Path

import pytest
from render_reference import pages

from maveriq.cli.app import COMMANDS
from maveriq.report.metrics import METRIC_MEANINGS, Metrics
from maveriq.runs import METRIC_COLUMNS

FOLDER = Path(__file__).parents[2] / "docs" / "reference"


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    return pages()


@pytest.mark.heavy  # it imports every command and the service
def test_the_pages_are_those_of_the_code(made: dict[str, str]) -> None:
    for name, text in made.items():
        assert (FOLDER / name).read_text(encoding="utf-8") == text, "run python scripts/render_reference.py"
    assert {path.name for path in FOLDER.iterdir()} == set(made)


@pytest.mark.heavy
def test_every_command_has_a_section(made: dict[str, str]) -> None:
    for name in COMMANDS:
        assert f"\n## maveriq {name}\n" in made["cli.md"]


def test_every_metric_has_a_meaning() -> None:
    assert list(METRIC_MEANINGS) == [field.name for field in dataclasses.fields(Metrics)]
    assert set(METRIC_COLUMNS.values()) <= set(METRIC_MEANINGS)
