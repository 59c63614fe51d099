"""Tolerances on a comparison, as a user writes them: `mean=10%,p95=15%,slo=3pt`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from maveriq.errors import InputError, UnknownNameError
from maveriq.report.compare import PERCENT, POINTS, QUANTITIES, Comparison

_KS, _REQUEST = "ks", "request"
UNITS = {one.name: one.unit for one in QUANTITIES} | {_KS: POINTS, _REQUEST: PERCENT}
"""The unit of every error that can be bounded; `ks` is a distance (0 to 100 points), `request` the
median error over requests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """The largest error allowed of one quantity, either way; in percent or points."""

    name: str
    limit: float

    @property
    def unit(self) -> str:
        """PERCENT or POINTS."""
        return UNITS[self.name]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A tolerance and the error of the whole run; `error` is None where there is none to judge.

    It is met where neither run has such a figure (no SLO, say), and missed where only one has it.
    """

    name: str
    limit: float
    unit: str
    error: float | None
    met: bool


def parse_tolerances(text: str) -> tuple[Tolerance, ...]:
    """Return tolerances from a text such as `mean=10%,p95=15%,slo=3pt`; `%` and `pt` may be left out.

    Raises:
        InputError: not that form, a unit that does not fit, a limit that is negative, a name twice.
        UnknownNameError: no such quantity.
    """
    found = [_tolerance(part.strip()) for part in text.split(",")]
    names = [one.name for one in found]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"tolerance on {name} stands twice in {text!r}; leave one")
    return tuple(found)


def _tolerance(part: str) -> Tolerance:
    name, equals, said = (piece.strip() for piece in part.partition("="))
    if not equals:
        raise InputError(f"tolerance must be written as NAME=LIMIT, for example mean=10%, not {part!r}")
    name = name.replace("_", "-")
    if name not in UNITS:
        raise UnknownNameError("tolerance", name, UNITS)
    number = re.fullmatch(r"([0-9.eE+-]+) *(%|pt)?", said)
    try:
        limit = float(number[1]) if number else math.nan
    except ValueError:
        limit = math.nan
    if number is None or not math.isfinite(limit) or limit < 0:
        raise InputError(f"tolerance on {name} must be a number from 0 with {UNITS[name]}, not {said!r}")
    if number[2] not in (None, UNITS[name]):
        raise InputError(f"tolerance on {name} must be in {UNITS[name]}, not in {number[2]}")
    return Tolerance(name=name, limit=limit)


def check(comparison: Comparison, tolerances: Iterable[Tolerance]) -> tuple[Check, ...]:
    """Return how the errors of the whole run stand against tolerances."""
    return tuple(_check(comparison, one) for one in tolerances)


def _check(comparison: Comparison, tolerance: Tolerance) -> Check:
    error, applies = _error(comparison, tolerance.name)
    met = not applies if error is None else abs(error) <= tolerance.limit
    return Check(name=tolerance.name, limit=tolerance.limit, unit=tolerance.unit, error=error, met=met)


def _error(comparison: Comparison, name: str) -> tuple[float | None, bool]:
    """Return an error of the whole run, and whether at least one of the runs has such a figure."""
    overall = comparison.overall
    if name == _KS:
        return (None if overall.ks is None else 100 * overall.ks), bool(overall.sim_completed or overall.real_completed)
    if name == _REQUEST:
        return overall.request_error, True
    difference = overall.differences[name]
    return difference.error, difference.sim is not None or difference.real is not None
