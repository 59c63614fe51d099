"""The quickstart notebook runs from its first cell to its last, and stays short."""

import json
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt

NOTEBOOK = Path(__file__).parents[2] / "docs" / "examples" / "quickstart.ipynb"


def test_the_quickstart_runs_and_is_short() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(cells) < 25
    assert all(len(source.splitlines()) <= 8 for source in sources)
    names: dict[str, object] = {}
    with mpl.rc_context({"backend": "agg"}):
        for source in sources:
            exec(compile(source, str(NOTEBOOK), "exec"), names)  # noqa: S102  (the project's own cells)
        plt.close("all")


def test_the_committed_quickstart_shows_two_plots() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    shown = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
    assert sum("image/png" in data for data in shown) >= 2
