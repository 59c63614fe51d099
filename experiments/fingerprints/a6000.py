"""Blend the published fingerprints of an A6000 with physics, and compare with measured whole models.

Usage: python experiments/fingerprints/a6000.py DATA_DIR [--out DIR] [--page FILE]

DATA_DIR contains `a6000` (the published measurements: fingerprints of one and two layers with prompts of 923 tokens,
and whole models). Each whole model's latency and memory are estimated by physics alone, by the paper's formula, and by
physics blended with the model's own fingerprints on one GPU, and on one and two. The constants of the engine were
fitted to whole models of this table, so physics with them is not blind. With those of the engine's next generation,
which were fitted on other GPUs, it stands for an engine without measurements on these. Results go to
results/a6000.csv (medians by model, TP, PP and weights), a table to docs/profiling.md. It takes about two minutes.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np

from maveriq.calibration.measurements import Measurement, read_measurements
from maveriq.domain.models import ModelSpec, known_models
from maveriq.estimate.blended import BlendedEstimator
from maveriq.estimate.engine_presets import engine_preset
from maveriq.estimate.estimator import Estimator, LengthAwareMemory
from maveriq.estimate.hardware_profile import HardwareProfile, load_profile
from maveriq.estimate.observations import Batch, Observation, with_layers
from maveriq.estimate.paper import PaperEstimator
from maveriq.estimate.physics import PhysicsEstimator
from maveriq.units import BYTES_PER_GIB

_HERE = Path(__file__).parent
_PAGE = _HERE.parents[1] / "docs" / "profiling.md"
_START, _END = "<!-- written by experiments/fingerprints/a6000.py -->", "<!-- end -->"
_PROMPT_TOKENS, _PROFILE = 923, "a6000-long"
_SHORT, _LONG = 10, 20  # tokens of the two outputs of each fingerprint
_OTHER_ENGINE = "trtllm-2024"
_RUN_NOISE = 0.004  # of a single run
_TP = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A measured whole model, and an estimate of it."""

    estimator: str
    model: str
    tp: int
    pp: int
    weights: str
    latency_error_percent: float
    memory_error_percent: float
    in_interval: bool | None


def main(arguments: list[str]) -> int:
    """Estimate, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA_DIR", help="folder with a6000")
    parser.add_argument("--out", type=Path, default=_HERE / "results", metavar="DIR")
    parser.add_argument("--page", type=Path, default=_PAGE, metavar="FILE", help="page with the table")
    options = parser.parse_args(arguments)
    data = options.data / "a6000"
    seen = read_fingerprints(data / "fingerprint_long_prompt.csv")
    whole = [*read_measurements(data / "full_model_long_prompt.csv")]
    rows = list(compare(whole, seen, load_profile(_PROFILE)))
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "a6000.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(
            ["estimator", "model", "tp", "pp", "weights", "rows", "latency_error_percent", "memory_error_percent"]
        )
        groups: dict[tuple[str, str, int, int, str], list[Row]] = {}
        for row in rows:
            groups.setdefault((row.estimator, row.model, row.tp, row.pp, row.weights), []).append(row)
        for key, group in groups.items():
            errors = [(row.latency_error_percent, row.memory_error_percent) for row in group]
            table.writerow([*key, len(group), *(f"{median(each):.2f}" for each in zip(*errors, strict=True))])
    text = "\n".join(table_lines(rows))
    sys.stdout.write(text + "\n")
    page = options.page.read_text(encoding="utf-8")
    before, found, rest = page.partition(_START)
    if found:
        options.page.write_text(f"{before}{_START}\n\n{text}\n\n{_END}{rest.partition(_END)[2]}", encoding="utf-8")
    return 0


def read_fingerprints(path: Path) -> list[Observation]:
    """Return the fingerprints of one and two layers on one GPU and two, as a profile has them."""
    by_output: dict[tuple[str, int, object], dict[int, Measurement]] = {}
    for row in read_measurements(path):
        by_output.setdefault((row.model_name, row.layers, row.configuration), {})[row.output_tokens] = row
    return [
        observation(runs[_SHORT], runs[_LONG])
        for runs in by_output.values()
        if {_SHORT, _LONG} <= runs.keys() and runs[_LONG].configuration.pp == 1
    ]


def observation(short: Measurement, long: Measurement) -> Observation:
    """Return what two runs with outputs of different lengths say: the time of a token is their difference."""
    steps = long.output_tokens - short.output_tokens
    tpot_s = (long.latency_s - short.latency_s) / steps
    first_s = short.latency_s - (short.output_tokens - 1) * tpot_s
    share = (short.output_tokens - 1) / steps
    first_noise = _RUN_NOISE * math.hypot((1 + share) * short.latency_s, share * long.latency_s) / first_s
    token_noise = _RUN_NOISE * math.hypot(short.latency_s, long.latency_s) / (steps * tpot_s)
    return Observation(
        model=with_layers(known_models()[long.model_name], tuple(range(long.layers))),
        configuration=long.configuration,
        batch=Batch(1, _PROMPT_TOKENS, long.output_tokens),
        first_token_s=first_s,
        tpot_s=tpot_s,
        first_token_noise=first_noise,
        tpot_noise=token_noise,
        memory_bytes=round(long.memory_gib * BYTES_PER_GIB),
    )


def compare(whole: Sequence[Measurement], seen: Sequence[Observation], profile: HardwareProfile) -> Iterator[Row]:
    """Yield an estimate of each whole model by each estimator."""
    for name in sorted({row.model_name for row in whole}):
        model, own = known_models()[name], [each for each in seen if each.model.name == name]
        for label, estimator in estimators(model, own, profile).items():
            for row in whole:
                if row.model_name == name and estimator.why_not(model, row.configuration) is None:
                    yield estimated(label, estimator, model, row)


def estimators(model: ModelSpec, own: Sequence[Observation], profile: HardwareProfile) -> Mapping[str, Estimator]:
    """Return the estimators of a model by what they rest on."""

    def blended(largest_tp: int, physics: PhysicsEstimator) -> Estimator:
        observed = tuple(each for each in own if each.configuration.tp <= largest_tp)
        return BlendedEstimator(replace(profile, observed=observed, models={model.name: model}), physics)

    fitted, other = PhysicsEstimator(profile), PhysicsEstimator(profile, engine_preset(_OTHER_ENGINE))
    return {
        "the paper's formula": PaperEstimator(profile),
        "physics with the engine's constants": fitted,
        "that and fingerprints of one GPU": blended(1, fitted),
        "that and fingerprints of one GPU and two": blended(2, fitted),
        f"physics with the constants of {_OTHER_ENGINE}": other,
        f"{_OTHER_ENGINE} and fingerprints of one GPU": blended(1, other),
        f"{_OTHER_ENGINE} and fingerprints of one GPU and two": blended(2, other),
    }


def estimated(label: str, estimator: Estimator, model: ModelSpec, row: Measurement) -> Row:
    """Return how far an estimate is off."""
    lengths = {"prompt_tokens": _PROMPT_TOKENS, "output_tokens": row.output_tokens}
    service = estimator.service(model, row.configuration, batch=1, **lengths)
    memory = (
        estimator.memory_with(model, row.configuration, **lengths)
        if isinstance(estimator, LengthAwareMemory)
        else estimator.memory(model, row.configuration)
    )
    interval = service.interval
    return Row(
        estimator=label,
        model=model.name,
        tp=row.configuration.tp,
        pp=row.configuration.pp,
        weights=row.configuration.weights.value,
        latency_error_percent=100 * (service.latency_s / row.latency_s - 1),
        memory_error_percent=100 * (memory / BYTES_PER_GIB / row.memory_gib - 1),
        in_interval=None if interval is None else interval.holds(service.latency_s, row.latency_s),
    )


def table_lines(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the table of the page."""
    yield "| estimate | rows | median % | p90 % | TP 1, 2, 4, 8: median % | in 90 % interval | memory: median % |"
    yield "|---|---|---|---|---|---|---|"
    for label in dict.fromkeys(row.estimator for row in rows):
        own = [row for row in rows if row.estimator == label]
        errors = [abs(row.latency_error_percent) for row in own]
        by_tp = [median(abs(row.latency_error_percent) for row in own if row.tp == tp) for tp in _TP]
        held = [row.in_interval for row in own if row.in_interval is not None]
        covered = f"{100 * sum(held) / len(held):.0f} %" if held else ""
        memory = median(abs(row.memory_error_percent) for row in own)
        yield (
            f"| {label} | {len(own):,} | {median(errors):.1f} | {np.percentile(errors, 90):.1f} | "
            f"{', '.join(f'{error:.1f}' for error in by_tp)} | {covered} | {memory:.1f} |"
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
