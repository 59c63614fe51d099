"""Writes the capability table of maveriq/data/engines.toml into docs/engines.md.

Usage: python scripts/render_capability_table.py
"""

from __future__ import annotations

from pathlib import Path

from maveriq.exec.capabilities import known_engines
from maveriq.report.capability_table import capability_markdown

PAGE = Path(__file__).parents[1] / "docs" / "engines.md"
BEGIN = "<!-- made by scripts/render_capability_table.py -->\n"
END = "<!-- end of the table -->\n"


def rendered(page: str) -> str:
    """Return the page with the table between its marks."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{capability_markdown(known_engines())}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(rendered(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
