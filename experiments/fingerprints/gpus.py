"""Predict whole models on H100 and H200 from their fingerprints, measured with torch, blended with physics.

Usage: python experiments/fingerprints/gpus.py [--out DIR] [--page FILE]

experiments/h100/results has steps of models with one layer, with two and with all: prefill and decoding, captured in
CUDA graphs, by batch and length, in 16 bits and int8. Each whole model is predicted by physics alone, and blended with
the first 1, 4 and 16 measurements of fingerprints that a plan would choose, and with all. The scales of corrections
were chosen on the H100; the H200 only judges them. Results go to results/gpus.csv, a table to docs/profiling.md.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from maveriq.domain.gpu_kinds import gpu_sheet
from maveriq.domain.models import ModelSpec, WeightType, known_models
from maveriq.domain.parallel import ParallelConfig
from maveriq.estimate.blended import TIME_SCALES
from maveriq.estimate.blending import Blend, Computed, Measured
from maveriq.estimate.computed_parts import ComputedParts
from maveriq.estimate.engine_presets import engine_preset
from maveriq.estimate.observations import Batch, with_layers
from maveriq.estimate.physics import PhysicsEstimator
from maveriq.estimate.sheet_profile import sheet_profile
from maveriq.profiling.plan import best_first

_HERE = Path(__file__).parent
_PAGE = _HERE.parents[1] / "docs" / "profiling.md"
_START, _END = "<!-- written by experiments/fingerprints/gpus.py -->", "<!-- end -->"
_RECORDS = _HERE.parent / "h100" / "results"
_GPUS = {"H100-SXM": "h100", "H200-SXM": "h200"}
_ENGINE, _NOISE = "torch", 0.005
_COUNTS = (0, 1, 4, 16, None)
_PHASES = ("prefill", "decode")
_CUT = {"mixtral-8-layers": ("mixtral-8x7b", 8)}
"""Models that were measured with fewer layers than they have: these count as whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A measured step: what it is computed as, and the seconds."""

    computed: Computed
    seconds: float
    phase: str
    layers: int
    is_whole: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A step of a whole model, predicted with so many measurements of fingerprints; None for all."""

    gpu: str
    model: str
    phase: str
    measurements: int | None
    measured_s: float
    predicted_s: float
    in_interval: bool

    @property
    def error_percent(self) -> float:
        """How far the prediction is off."""
        return 100 * abs(self.predicted_s / self.measured_s - 1)


def main(arguments: list[str]) -> int:
    """Predict, compare, write; return 1 unless errors fall with measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=_HERE / "results", metavar="DIR")
    parser.add_argument("--page", type=Path, default=_PAGE, metavar="FILE", help="page with the table")
    options = parser.parse_args(arguments)
    rows = [row for gpu, folder in _GPUS.items() for row in predictions(gpu, _RECORDS / folder / "records.csv")]
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "gpus.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["gpu", "model", "phase", "measurements", "measured_s", "predicted_s", "error_percent"])
        for row in rows:
            times = (f"{row.measured_s:.6g}", f"{row.predicted_s:.6g}", f"{row.error_percent:.2f}")
            table.writerow([row.gpu, row.model, row.phase, _name(row.measurements), *times])
    text = "\n".join(table_lines(rows))
    sys.stdout.write(text + "\n")
    before, found, rest = options.page.read_text(encoding="utf-8").partition(_START)
    if found:
        options.page.write_text(f"{before}{_START}\n\n{text}\n\n{_END}{rest.partition(_END)[2]}", encoding="utf-8")
    falling = [[median(_errors(rows, gpu, count)) for count in _COUNTS] for gpu in _GPUS]
    return int(any(errors != sorted(errors, reverse=True) for errors in falling))


def predictions(gpu: str, records: Path) -> Iterator[Row]:
    """Yield the predictions of all whole models on a GPU."""
    parts = ComputedParts(PhysicsEstimator(sheet_profile(gpu_sheet(gpu)), engine_preset(_ENGINE)))
    for model, steps in read_steps(records, parts).items():
        fingerprints = [step for step in steps if not step.is_whole]
        whole = [step for step in steps if step.is_whole]
        order = best_first(
            [step.computed for step in fingerprints], [step.computed for step in whole], most=max(filter(None, _COUNTS))
        )
        order += [number for number in range(len(fingerprints)) if number not in order]
        for count in _COUNTS:
            chosen = [fingerprints[number] for number in order[:count]]
            blend = Blend([Measured(step.computed, step.seconds, _NOISE) for step in chosen], TIME_SCALES)
            for step in whole:
                corrected = blend.corrected(step.computed)
                interval = corrected._replace(deviation=math.hypot(corrected.deviation, _NOISE)).interval
                yield Row(
                    gpu=gpu,
                    model=model,
                    phase=step.phase,
                    measurements=count,
                    measured_s=step.seconds,
                    predicted_s=corrected.value,
                    in_interval=interval.holds(corrected.value, step.seconds),
                )


def read_steps(records: Path, parts: ComputedParts) -> Mapping[str, Sequence[Step]]:
    """Return the measured steps of each model that were captured in graphs."""
    found: dict[str, list[Step]] = {}
    with records.open(encoding="utf-8", newline="") as file:
        for record in csv.DictReader(file):
            if (record["status"], record["mode"]) == ("measured", "graph"):
                found.setdefault(record["model"], []).append(_step(record, parts))
    return found


def _step(record: Mapping[str, str], parts: ComputedParts) -> Step:
    layers, whole = int(record["layers"]), _whole(record["model"])
    weights = WeightType.INT8 if record["weights"] == "int8" else WeightType.FLOAT16
    times = parts.times(
        whole if layers == whole.layers else with_layers(whole, tuple(range(layers))),
        ParallelConfig(tp=1, pp=1, weights=weights),
        Batch(int(record["batch"]), int(record["tokens_each"]), 1),
    )
    return Step(
        computed=times[_PHASES.index(record["kind"])],
        seconds=float(record["seconds"]),
        phase=record["kind"],
        layers=layers,
        is_whole=layers == whole.layers,
    )


def _whole(name: str) -> ModelSpec:
    known, layers = _CUT.get(name, (name, None))
    model = known_models()[known]
    return model if layers is None else with_layers(model, tuple(range(layers)))


def table_lines(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the table of the page."""
    phases = [f"{phase}: median %, worst %" for phase in _PHASES]
    yield f"| GPU | measurements of fingerprints | median % | p90 % | {' | '.join(phases)} | in 90 % interval |"
    yield "|---|---|---|---|---|---|---|"
    for gpu in _GPUS:
        for count in _COUNTS:
            errors = _errors(rows, gpu, count)
            cells = [_cell(_errors(rows, gpu, count, phase)) for phase in _PHASES]
            held = [row.in_interval for row in rows if (row.gpu, row.measurements) == (gpu, count)]
            covered = f"{100 * sum(held) / len(held):.0f} %"
            name = {0: "none: physics alone", None: "all"}.get(count, str(count))
            p90 = f"{np.percentile(errors, 90):.1f}"
            yield f"| {gpu} | {name} | {median(errors):.1f} | {p90} | {' | '.join(cells)} | {covered} |"


def _errors(rows: Sequence[Row], gpu: str, count: int | None, phase: str = "") -> list[float]:
    return [
        row.error_percent for row in rows if (row.gpu, row.measurements) == (gpu, count) and phase in ("", row.phase)
    ]


def _cell(errors: Sequence[float]) -> str:
    return f"{median(errors):.1f}, {max(errors):.1f}"


def _name(count: int | None) -> str:
    return "all" if count is None else str(count)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
