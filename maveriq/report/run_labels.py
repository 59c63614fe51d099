"""Labels of the runs in a comparison: each has a name and a kind, and a short form for tables."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

_MAX_SHORT = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class RunLabel:
    """What a run is called, and what it is.

    Args:
        name: its folder, or the name of a recorded run; "first", "second" ... where it has none.
        kind: "simulated", "run" or "recorded", as in run.json; "" where it is unknown.
    """

    name: str
    kind: str

    def __str__(self) -> str:
        return f"{self.name} ({self.kind})" if self.kind else self.name


UNNAMED = (RunLabel(name="first", kind=""), RunLabel(name="second", kind=""))
"""The labels of two runs without names."""


def short_labels(labels: Sequence[RunLabel]) -> list[str]:
    """Return a short text for each run, all different, of at most `_MAX_SHORT` characters.

    A name that stands once is kept where it is short enough; otherwise what all names begin with is cut off.
    """
    names = [os.path.basename(os.path.normpath(label.name)) or label.name for label in labels]  # noqa: PTH119
    if max(map(len, names)) > _MAX_SHORT:
        names = _without_common_start(names)
    names = [name if len(name) <= _MAX_SHORT else f"{name[:6]}..{name[-(_MAX_SHORT - 8) :]}" for name in names]
    counts = Counter(names)
    return [
        name if counts[name] == 1 else f"{name[: _MAX_SHORT - 3]} #{position}"
        for position, name in enumerate(names, start=1)
    ]


def _without_common_start(names: Sequence[str]) -> list[str]:
    """Return the names from the last word on that begins within what all have in common."""
    common = os.path.commonprefix(list(names))  # noqa: RUF071  (names are no paths)
    if common in names:  # one name is the start of another: keep its last word
        common = common.rstrip("-_")
    common = common[: max(common.rfind("-"), common.rfind("_")) + 1]
    return [name[len(common) :] for name in names]
