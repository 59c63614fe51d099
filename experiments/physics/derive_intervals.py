"""Derive the 90 % intervals of step times from errors of predictions that no fit had seen, and print their coverage.

Usage: python experiments/physics/derive_intervals.py DATA_DIR [--write]

DATA_DIR contains `serving`, `a6000` and `models`. Rows whose split is `fit` give the 5th and 95th percentile of
measured over predicted time, by engine and family. That is widened (its logarithm multiplied) until the interval from
all other models and GPUs holds 90 % of the rows of each, taken together; a group of one or two has the factor of all
engines. Engines whose settings are not known may decode speculatively where a model can: half of their rows count as
that much slower. On a data sheet alone the interval also covers that with measured operators, and all engines of the
family together. `--write` replaces maveriq/data/physics_intervals.toml and the table of coverage in docs/step-time.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from closed_loops import closed_loops, compared_loops
from document import STEP_TIME, write_between_marks
from fits import FITS, left_out
from step_cases import Case

from maveriq.estimate.engine_presets import EnginePreset
from maveriq.estimate.intervals import ANY_ENGINE, Family, Interval, group_of, interval_of

_PERCENTILES = (5, 95)
_COVERED = 0.9
_FEWEST = 3  # models and GPUs of which each can be left out
_FACTORS = np.arange(1.0, 4.01, 0.05)
_SPECULATION_GAIN = 1.8
"""Times the tokens a second that DeepSeek-V3 makes with its layer for a further token (its technical report, 5.4.3)."""
_TABLE = Path(__file__).parent.parent.parent / "maveriq" / "data" / "physics_intervals.toml"
_HEAD = """\
# 90 % intervals of step times: factors of the estimate, by what it rests on. Written by
# experiments/physics/derive_intervals.py from errors of predictions with the model left out, or with nothing fitted,
# and widened for models and GPUs that are not among these.
#   measured  whether the operators of the GPU were measured; else its data sheet answers
#   engine    a preset of engine_presets.toml; "not fitted": all whose host times were never fitted; "any": all
#   rows, models  measured times behind it
"""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A prediction that no fit had seen."""

    engine: EnginePreset
    family: Family
    model: str
    gpu: str
    split: str
    measured: bool
    log_error: float

    @property
    def ratio(self) -> float:
        """Measured over predicted time."""
        return float(np.exp(-self.log_error))


def held_out(data: Path, *, measured: bool) -> Iterator[HeldOut]:
    """Yield the predictions of all tables."""
    for name, fit in FITS.items():
        for case, error in left_out(name, list(fit.read(data, measured=measured))):
            if case.family is not None and not case.beyond and (not measured or case.source != "A6000"):
                yield _held_out(case, case.family, error, measured=measured)
    for case, sample in compared_loops(list(closed_loops(data, measured=measured))):
        if case.family is not None:
            yield _held_out(case, case.family, sample.log_error(case.preset), measured=measured)


def _held_out(case: Case, family: Family, error: float, *, measured: bool) -> HeldOut:
    gpu = case.labels.get("GPU", case.source)
    return HeldOut(case.preset, family, case.labels["model"], gpu, case.split, measured, error)


def derive(found: Sequence[HeldOut]) -> Mapping[tuple[bool, str, Family], tuple[Interval, int, int]]:
    """Return the interval, the rows and the models of each group."""
    groups: dict[tuple[bool, str, Family], list[HeldOut]] = {}
    for one in found:
        if one.split == "fit":
            for engine in (group_of(one.engine), ANY_ENGINE):
                groups.setdefault((one.measured, engine, one.family), []).append(one)
    factors = {key: _factor(members) for key, members in groups.items()}
    intervals = {
        key: _interval(members).widened(factors[key] or factors[key[0], ANY_ENGINE, key[2]] or 1.0)
        for key, members in groups.items()
    }
    return {
        key: (
            intervals[key] if key[0] else _hull(intervals, key),
            len(members),
            len({member.model for member in members}),
        )
        for key, members in groups.items()
    }


def _interval(members: Sequence[HeldOut]) -> Interval:
    ratios = [member.ratio for member in members]
    ratios += [member.ratio / _SPECULATION_GAIN if _may_speculate(member) else member.ratio for member in members]
    low, high = np.percentile(ratios, _PERCENTILES)
    return Interval(min(1.0, float(low)), max(1.0, float(high)))


def _may_speculate(member: HeldOut) -> bool:
    """Return whether its engine may decode speculatively without our knowing it: DeepSeek's can, and engines vary."""
    return member.family is Family.LATENT and not member.engine.fitted


def _factor(members: Sequence[HeldOut]) -> float | None:
    """Return how much wider an interval must be for other models and GPUs; None where too few say it."""
    parts: dict[tuple[str, str, str], list[HeldOut]] = {}
    for member in members:
        parts.setdefault((member.engine.name, member.model, member.gpu), []).append(member)
    if len(parts) < _FEWEST:
        return None
    others = {
        part: _interval([member for other, found in parts.items() if other != part for member in found])
        for part in parts
    }

    def covered(factor: float) -> float:
        held = [
            others[part].widened(factor).holds(1.0, member.ratio) for part, found in parts.items() for member in found
        ]
        return float(np.mean(held))

    return next((float(factor) for factor in _FACTORS if covered(factor) >= _COVERED), float(_FACTORS[-1]))


def _hull(intervals: Mapping[tuple[bool, str, Family], Interval], key: tuple[bool, str, Family]) -> Interval:
    _, engine, family = key
    parts = [key, (True, engine, family), (False, ANY_ENGINE, family)]
    known = [intervals[part] for part in parts if part in intervals]
    return Interval(min(part.low for part in known), max(part.high for part in known))


def table(found: Sequence[HeldOut]) -> str:
    """Return the text of the table of intervals."""
    rows = [
        f'[[interval]]\nmeasured = {str(measured).lower()}\nengine = "{engine}"\nfamily = "{family}"\n'
        f"low = {interval.low:.3f}\nhigh = {interval.high:.3f}\nrows = {number}\nmodels = {models}\n"
        for (measured, engine, family), (interval, number, models) in sorted(derive(found).items())
    ]
    return _HEAD + "\n" + "\n".join(rows)


def coverage_of(found: Sequence[HeldOut]) -> Mapping[str, tuple[int, float]]:
    """Return the rows and the coverage in percent of the stored intervals, on rows whose split is `validate`."""
    groups: dict[str, list[bool]] = {}
    for one in found:
        if one.split == "validate":
            inside = interval_of(one.engine, one.family, measured=one.measured).holds(1.0, one.ratio)
            rests_on = "operators" if one.measured else "data sheet"
            groups.setdefault(f"{rests_on} | {one.engine.engine} | {one.family}", []).append(inside)
    return {name: (len(groups[name]), float(100 * np.mean(groups[name]))) for name in sorted(groups)}


def main() -> None:
    """Write the table if asked to, and print the coverage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path, help="folder that contains serving, a6000 and models")
    parser.add_argument("--write", action="store_true", help="replace the table of intervals")
    arguments = parser.parse_args()
    found = [one for measured in (True, False) for one in held_out(arguments.data_dir, measured=measured)]
    if arguments.write:
        _TABLE.write_text(table(found), encoding="utf-8")
    head = ["| rests on | engine | family | validate rows | in 90 % interval % |", "|---|---|---|---|---|"]
    lines = [*head, *(f"| {name} | {rows} | {percent:.1f} |" for name, (rows, percent) in coverage_of(found).items())]
    if arguments.write:
        write_between_marks(STEP_TIME, "experiments/physics/derive_intervals.py", lines)
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
