"""Print the errors of the step model and of the memory of engines on measured data, group by group.

Usage: python experiments/physics/evaluate.py DATA_DIR [--detail] [--write]

DATA_DIR contains `serving`, `a6000` and `models`. Where a preset is fitted to a table, each model is predicted by a fit
without it. Nothing is fitted to closed loops, nor to the records of experiments/h100. An error is the logarithm of
predicted over measured, in percent. Rows that are not compared are counted, with the reason. `--write` replaces the
table of docs/step-time.md.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import records
import step_cases
from closed_loops import closed_loops, compared_loops
from document import STEP_TIME, write_between_marks
from fits import FITS, left_out

from maveriq.calibration.measurements import read_measurements
from maveriq.domain.models import shape_of
from maveriq.estimate.hardware_profile import load_profile
from maveriq.estimate.physics import PhysicsEstimator
from maveriq.units import gib

BARS: Mapping[str, float] = {
    "energy leaderboard: dense": 5.0,
    "energy leaderboard: MoE": 18.0,
    "Argonne vLLM: all": 6.5,
    "Argonne TensorRT-LLM: all": 8.5,
    "splitwise: all": 13.0,
    "closed loop: fit, dense": 9.0,
    "closed loop: fit, MoE": 12.0,
    "closed loop: fit, MLA": 10.0,
    "closed loop: validate, dense": 13.5,
    "closed loop: validate, MoE": 18.0,
    "closed loop: validate, MLA": 15.0,
    "A6000: TP 1": 2.5,
    "A6000: TP 2": 5.0,
    "A6000: TP 4": 12.0,
    "A6000: TP 8": 20.0,
    "A6000: all": 3.5,
    "A6000: memory": 6.0,
}
"""The medians that are asked for, in percent."""


@dataclass(frozen=True, slots=True)
class Summary:
    """Errors of a group of rows."""

    name: str
    errors: Sequence[float]

    @property
    def median(self) -> float:
        """The median of the absolute errors, in percent."""
        return float(np.median(np.abs(self.errors)) * 100)

    def line(self) -> str:
        """Return a row of a table."""
        off = 100 * np.asarray(self.errors)
        p90, bias = np.percentile(np.abs(off), 90), np.median(off)
        bar = BARS.get(self.name)
        asked = "" if bar is None else f"{bar:g}{'' if self.median <= bar else ' (missed)'}"
        return f"| {self.name} | {len(off)} | {self.median:.1f} | {p90:.1f} | {bias:+.1f} | {asked} |"


def summaries(data: Path, *, detail: bool) -> Iterator[Summary | str]:
    """Yield the groups of all tables, and in between how many rows each table leaves out."""
    for name, fit in FITS.items():
        read = list(fit.read(data))
        yield from _left_out(fit.source, read)
        found = left_out(name, read)
        groups = sorted({case.group for case, _ in found})
        for group in groups:
            yield Summary(f"{fit.source}: {group}", [error for case, error in found if case.group == group])
        if len(groups) > 1 and (not fit.groups or fit.source == "A6000"):
            yield Summary(f"{fit.source}: all", [error for _, error in found])
        if detail:
            yield from _details(found, ("model", "GPU"))
    yield from _closed_loops(data, detail=detail)
    yield from _memory(data)
    for label, errors in records.errors():
        yield Summary(f"torch on our own GPUs: {label}", errors)


def _closed_loops(data: Path, *, detail: bool) -> Iterator[Summary | str]:
    read = list(closed_loops(data))
    yield from _left_out("closed loop", read)
    loops = compared_loops(read)
    tokens = [(case, sample.log_error(case.preset)) for case, sample in loops]
    firsts = [(case, sample.first_log_error(case.preset)) for case, sample in loops]
    for title, found in (("closed loop", tokens), ("closed loop, first token", firsts)):
        for split, group in sorted({(case.split, case.group) for case, _ in found}):
            chosen = [(case, error) for case, error in found if (case.split, case.group) == (split, group)]
            yield Summary(f"{title}: {split}, {group}", [error for _, error in chosen])
            if detail:
                yield from _details(chosen, ("engine", "model", "GPU", "format"))


def _memory(data: Path) -> Iterator[Summary | str]:
    estimator = PhysicsEstimator(load_profile("a6000-long"))
    errors: dict[str, list[float]] = {"memory": []}
    reasons: Counter[str] = Counter()
    for run in read_measurements(data / "a6000" / "full_model_long_prompt.csv"):
        model = shape_of(run.model_name)
        reason = estimator.why_not(model, run.configuration) if model else "not in the catalogue"
        if model is None or reason:
            reasons[f"{run.model_name}: {reason}"] += 1
            continue
        memory = estimator.memory_with(
            model, run.configuration, prompt_tokens=step_cases.LONG_PROMPT, output_tokens=run.output_tokens
        )
        for title in ("memory", f"memory, TP {run.configuration.tp}"):
            errors.setdefault(title, []).append(float(np.log(gib(memory) / run.memory_gib)))
    for title, found in errors.items():
        yield Summary(f"A6000: {title}", found)
    for reason, rows in reasons.items():
        yield f"A6000, memory: {rows} rows left out: {reason}"


def _details(found: Iterable[tuple[step_cases.Case, float]], labels: Sequence[str]) -> Iterator[Summary]:
    groups: dict[str, list[float]] = {}
    for case, error in found:
        groups.setdefault("- " + ", ".join(case.labels[label] for label in labels if label in case.labels), []).append(
            error
        )
    for name in sorted(groups):
        yield Summary(name, groups[name])


def _left_out(source: str, read: Sequence[step_cases.Case]) -> Iterator[str]:
    for reason, rows in Counter(case.left_out for case in read if case.source == source and case.left_out).items():
        yield f"{source}: {rows} of {sum(case.source == source for case in read)} rows left out: {reason}"


def main() -> None:
    """Print the table, then what is left out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path, help="folder that contains serving, a6000 and models")
    parser.add_argument("--detail", action="store_true", help="also print the errors by model")
    parser.add_argument("--write", action="store_true", help="replace the table of docs/step-time.md")
    arguments = parser.parse_args()
    lines = ["| table: group | rows | median % | p90 % | bias % | bar |", "|---|---|---|---|---|---|"]
    notes: list[str] = []
    for found in summaries(arguments.data_dir, detail=arguments.detail):
        if isinstance(found, Summary):
            lines.append(found.line())
        else:
            notes.append(found)
    lines += ["", "Left out:", "", *(f"- {note}" for note in notes)]
    if arguments.write:
        write_between_marks(STEP_TIME, "experiments/physics/evaluate.py", lines)
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
