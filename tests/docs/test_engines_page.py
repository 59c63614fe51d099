"""The capability table of docs/engines.md is that of the data."""

import runpy
from pathlib import Path

from maveriq.exec.capabilities import Status, known_engines
from maveriq.report.capability_table import REFUSED, capability_markdown

ROOT = Path(__file__).parents[2]


def test_the_page_has_the_table_of_the_data() -> None:
    page = (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")
    rendered = runpy.run_path(str(ROOT / "scripts" / "render_capability_table.py"))["rendered"]
    assert page == rendered(page), "run python scripts/render_capability_table.py"


def test_a_cell_says_ran_listed_or_refused_and_nothing_else() -> None:
    cells = [
        cell.strip()
        for line in capability_markdown(known_engines()).splitlines()
        if line.startswith("| ") and not line.startswith("|  |") and "---" not in line
        for cell in line.split("|")[2:-1]
    ]
    rows = [row for facts in known_engines().values() for row in facts.can]
    ran = {f"ran ({row.version}, {row.date})" for row in rows if row.status is Status.RAN}
    listed = {f"listed ({row.file}, {row.version})" for row in rows if row.status is Status.LISTED}
    assert set(cells) == ran | listed | {REFUSED}


def test_what_ran_it_exists() -> None:
    for facts in known_engines().values():
        for row in facts.can:
            if row.status is Status.RAN:
                assert all((ROOT / name.strip()).is_file() for name in row.file.split(","))
