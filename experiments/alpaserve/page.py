"""Replace the tables of a Markdown page: the text between two markers."""

from __future__ import annotations

import re
from collections.abc import Iterable

from grids import Grid

from maveriq.errors import InputError

_MARKED = re.compile(r"<!-- table: (?P<name>[^>]+) -->\n.*?<!-- end of table -->", re.DOTALL)


def filled(text: str, grids: Iterable[Grid]) -> str:
    """Return a page with each marked table replaced by the grid of that name.

    Raises:
        InputError: a marker names no grid.
    """
    known = {grid.name: grid for grid in grids}

    def replaced(found: re.Match[str]) -> str:
        name = found["name"]
        if name not in known:
            raise InputError(f"page: no table {name!r}; there are {', '.join(known)}")
        return f"<!-- table: {name} -->\n{known[name].markdown()}\n<!-- end of table -->"

    return _MARKED.sub(replaced, text)
