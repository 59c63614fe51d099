"""The notebooks of docs/examples run from their first cell to their last, and stay short."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from run_notebook import run_cells

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
REDUCED = {
    "SCALES = [0.1, 0.2, 0.3, 0.4]": "SCALES = [0.1]",
    "SLO_SCALES = [2.5, 5.0, 7.5]": "SLO_SCALES = [5.0]",
}
MAX_CELLS, MAX_LINES = 25, 12


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.heavy
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_with_fewer_runs(path: Path) -> None:
    notebook = read(path)
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        for whole, part in REDUCED.items():
            source = source.replace(whole, part)
        cell["source"] = [source]
    run_cells(notebook)
    plt.close("all")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_committed_notebook_is_short_and_shows_two_plots(path: Path) -> None:
    cells = read(path)["cells"]
    assert len(cells) < MAX_CELLS
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(len("".join(cell["source"]).splitlines()) <= MAX_LINES for cell in code)
    shown = [output.get("data", {}) for cell in code for output in cell["outputs"]]
    assert sum("image/png" in data for data in shown) >= 2
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1)), "run scripts/run_notebook.py"
