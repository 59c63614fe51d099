"""Writes tables into a document, between two marks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

STEP_TIME = Path(__file__).parent.parent.parent / "docs" / "step-time.md"
"""The document that holds the tables."""


def write_between_marks(document: Path, script: str, lines: Sequence[str]) -> None:
    """Replace what stands between `<!-- written by SCRIPT -->` and the next `<!-- end -->`."""
    begin, end = f"<!-- written by {script} -->", "<!-- end -->"
    before, _, rest = document.read_text(encoding="utf-8").partition(begin)
    _, _, after = rest.partition(end)
    document.write_text(before + "\n".join([begin, "", *lines, "", end]) + after, encoding="utf-8")
