"""Fit the constants of vLLM 0.15 to 0.23, and those of the load sweep's engine, to the rows whose split is `fit`.

Usage: python experiments/serving/fit_constants.py DATA_DIR [--only runs|sweep] [--write]

DATA_DIR contains `serving` and `models`. Prints what is found from all models, from all but each, and the uncertainty.
`--write` puts the first into `maveriq/data/engine_presets.toml`, and all of them into `results/constants.toml`, from
which `compare_runs.py` judges models that a fit has not seen.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
import tomli_w
from load_sweep import sweep_points
from recorded_runs import RecordedRun, recorded_runs

from maveriq.calibration.serving_fit import FittedTimes, Observation, RecordedRequests, fit_times
from maveriq.estimate.engine_presets import EngineTimes, Uncertainty
from maveriq.files import data_path

PRESET = "vllm-2026"
CONSTANTS = Path(__file__).parent / "results" / "constants.toml"

FREE = ("step_us", "kernel_factor", "prefill_factor", "api_us", "api_sequence_us")
"""The five constants of engines that prepare a step while the one before runs."""

SWEEP_FREE = ("step_us", "sequence_us", "prefill_factor", "api_us", "api_token_us", "api_sequence_us")

# What was believed before: launching costs a few tenths of a millisecond, HTTP with tokenization some milliseconds.
# What the host does for each sequence is done while the step before runs, and is not seen.
_PRIOR = EngineTimes(
    step_us=150.0, sequence_us=0.0, kernel_factor=1.0, prefill_factor=1.05, api_us=6000.0, api_token_us=0.0
)
_SWEEP_PRIOR = msgspec.structs.replace(  # an older engine, and an older server
    _PRIOR, prefill_factor=1.1, api_token_us=0.5, api_sequence_us=30.0, sequence_us=10.0
)

# Parts of the runs: at 5 and at 10 requests a second where the rate changes half-way. First requests fill the cache.
_PARTS: Mapping[str, Sequence[tuple[int, int, int]]] = {
    "codegen": ((300, 450, 150), (5000, 500, 200)),
    "residency": ((0, 700, 30),),
}
_ROUNDS = 3  # the priors are near
_SWEEP_POINTS, _MOST_REQUESTS = 15, 1700


def main() -> None:
    """Fit, print and, if asked, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", choices=("runs", "sweep"))
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    found: dict[str, EngineTimes] = {}
    if options.only != "sweep":
        found |= _fit_runs(options.data)
        if options.write:
            _write_preset(found["all"])
    if options.only != "runs":
        sweep = fit_times(list(fit_points(options.data)), _SWEEP_PRIOR, SWEEP_FREE, rounds=_ROUNDS)
        _show("load sweep", sweep)
        found["sweep"] = sweep.times
    if options.write:
        write_constants(read_constants() | found if CONSTANTS.exists() else found)


def _fit_runs(data: Path) -> dict[str, EngineTimes]:
    """Return the constants from all models, with their uncertainty, and from all but each."""
    fitted = fit_times(list(fit_runs(data)), _PRIOR, FREE, rounds=_ROUNDS)
    _show("all models", fitted)
    for model, times in fitted.without.items():
        sys.stdout.write(f"without {model}: {', '.join(f'{name} = {getattr(times, name):.4g}' for name in FREE)}\n")
    times = _with_spread(fitted.times, list(fitted.without.values()))
    return {"all": times, **{f"without {model}": of for model, of in fitted.without.items()}}


def fit_runs(data: Path) -> Iterator[RecordedRequests]:
    """Yield the parts of recorded runs that are fitted to."""
    for run in recorded_runs(data / "serving", data / "models"):
        if run.split == "fit":
            yield from parts_of(run)


def parts_of(run: RecordedRun) -> Iterator[RecordedRequests]:
    """Yield the parts of a run that are fitted to."""
    parts = next(parts for name, parts in _PARTS.items() if name in run.name)
    for first, most, warm_up in parts:
        yield run.recorded(first=first, most=most, warm_up=warm_up)


def fit_points(data: Path) -> Iterator[Observation]:
    """Yield the points of the load sweep that are fitted to: fifteen, spread over shapes and loads."""
    points = [
        point
        for point in sweep_points(data / "serving")
        if point.split == "fit" and point.is_stable and point.rate is not None and len(point.requests) < _MOST_REQUESTS
    ]
    chosen = np.linspace(0, len(points) - 1, _SWEEP_POINTS).round().astype(int)
    yield from (points[index] for index in chosen)


def _with_spread(times: EngineTimes, without: Sequence[EngineTimes]) -> EngineTimes:
    """Return times whose uncertainty is at least what leaving out a model says (the jackknife)."""
    count = len(without)
    spread = {}
    for name in FREE:
        values = np.asarray([getattr(each, name) for each in without])
        jackknife = float(np.sqrt((count - 1) / count * ((values - values.mean()) ** 2).sum()))
        spread[name] = max(jackknife, getattr(times.uncertainty, name))
    return msgspec.structs.replace(times, uncertainty=Uncertainty(**spread))


def _show(title: str, fitted: FittedTimes) -> None:
    values = ", ".join(
        f"{name} = {getattr(fitted.times, name):.4g} ± {getattr(fitted.times.uncertainty, name):.2g}"
        for name in fitted.free
    )
    sys.stdout.write(f"{title}: {values}\n")
    for name, errors in fitted.errors.items():
        shown = ", ".join(f"{figure} {100 * np.expm1(error):+.1f}" for figure, error in errors.items())
        sys.stdout.write(f"    {name[:50]}: {shown}\n")
    sys.stdout.flush()


def write_constants(found: Mapping[str, EngineTimes]) -> None:
    """Write constants by what they were fitted to."""
    CONSTANTS.parent.mkdir(exist_ok=True)
    with CONSTANTS.open("wb") as file:
        tomli_w.dump({name: _rounded(msgspec.to_builtins(times)) for name, times in found.items()}, file)


def read_constants() -> dict[str, EngineTimes]:
    """Return the constants that `--write` has written, by what they were fitted to."""
    return msgspec.toml.decode(CONSTANTS.read_bytes(), type=dict[str, EngineTimes])


def _write_preset(times: EngineTimes) -> None:
    """Replace the constants of the preset in the table of presets."""
    path = data_path("engine_presets.toml")
    before, mark, section = path.read_text(encoding="utf-8").partition(f"[{PRESET}]\n")
    section, gap, after = section.partition("\n\n")
    values = _rounded(msgspec.to_builtins(times))
    uncertainty = _rounded(msgspec.to_builtins(times.uncertainty))
    del values["uncertainty"]
    listed = ", ".join(f"{name} = {uncertainty[name]:g}" for name in FREE)
    lines = [
        f"{key} = {values[key]:g}" if (key := line.partition(" = ")[0]) in values else line
        for line in section.split("\n")
        if not line.startswith("uncertainty")
    ]
    position = next(index for index, line in enumerate(lines) if re.match(r"fitted = ", line)) + 1
    lines.insert(position, f"uncertainty = {{ {listed} }}")
    path.write_text(before + mark + "\n".join(lines) + gap + after, encoding="utf-8")


def _rounded(values: Mapping[str, object]) -> dict[str, object]:
    return {
        key: _rounded(value) if isinstance(value, Mapping) else float(f"{value:.4g}") for key, value in values.items()
    }


if __name__ == "__main__":
    main()
