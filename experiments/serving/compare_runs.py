"""Simulate every recorded serving run from its description, and compare with what was measured.

Usage: python experiments/serving/compare_runs.py DATA_DIR [--only PART] [--engine NAME] [--write]

DATA_DIR contains `serving` and `models`. Parts: open-loop (requests recorded one by one), left-out (the same, each
model by constants fitted without it), load-sweep, closed-loop. An error is simulated over measured less one, in
percent. Nothing is fitted here: constants are those that `fit_constants.py` has written. `--write` replaces the tables
and pictures of these parts in `results/`, and, from all tables there, those of docs/continuous-batching.md. Runs whose
split is `validate` are judged by the bars; those of `fit` are printed too. With `--engine`, the rows of other engines
stay as they are, and so does the picture.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import closed_loop
import msgspec
import numpy as np
import pandas as pd
from fit_constants import read_constants
from load_sweep import sweep_points
from pictures import draw
from recorded_runs import RecordedRun, recorded_runs
from verdicts import bars_of

from maveriq.estimate.engine_presets import EngineTimes

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[2] / "docs" / "continuous-batching.md"
_MARK = "experiments/serving/compare_runs.py"

_FIGURES: Mapping[str, tuple[str, Callable[[np.ndarray], float]]] = {
    "TTFT p50": ("ttft_s", np.median),
    "TTFT mean": ("ttft_s", np.mean),
    "TTFT p99": ("ttft_s", lambda values: np.percentile(values, 99)),
    "TPOT mean": ("tpot_s", np.mean),
    "E2E mean": ("e2e_s", np.mean),
    "E2E p99": ("e2e_s", lambda values: np.percentile(values, 99)),
}
_FIRST_USES = 100
"""Requests at the start of a run in which an engine uses kernels for the first time, and stalls while it compiles them.

No run says when that ends: the number is the same for all, and figures without them stand beside those with them.
"""


def main() -> None:
    """Simulate, print tables and bars and, if asked, write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", choices=list(PARTS))
    parser.add_argument("--engine", choices=("vllm", "sglang", "trtllm"), help="closed loops of this engine only")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    of_engine = partial(closed_loops, engine=options.engine)
    parts: dict[str, Callable[[Path], pd.DataFrame]] = {**PARTS, "closed-loop": of_engine}
    tables = {name: part(options.data) for name, part in parts.items() if options.only in (None, name)}
    for name, table in tables.items():
        _print(f"\n{name}\n{table.to_string(index=False, float_format=lambda value: f'{value:.4g}')}\n")
    for bar in bars_of(tables):
        _print(bar.line())
    if options.write:
        RESULTS.mkdir(exist_ok=True)
        for name, table in tables.items():
            path = RESULTS / f"{name}.csv"
            errors = table.drop(columns=[column for column in table if column.endswith(" ms")])  # not others' data
            if options.engine is not None and name == "closed-loop":
                errors = with_other_engines(errors, path)
            errors.to_csv(path, index=False, float_format="%.4g")
        draw(
            {name: table for name, table in tables.items() if options.engine is None or name != "closed-loop"}, RESULTS
        )
        publish()


def with_other_engines(errors: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Return the errors of some engines' closed loops, and those of the other engines from a table that may exist."""
    if not path.exists():
        return errors
    before = pd.read_csv(path)
    return pd.concat([before[~before["engine"].isin(errors["engine"].unique())], errors], ignore_index=True)


def _print(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


# Recorded requests


def open_loop(data: Path) -> pd.DataFrame:
    """Return a row for each run with recorded requests."""
    return pd.DataFrame([_compared(run, None) for run in _runs(data)])


def left_out(data: Path) -> pd.DataFrame:
    """Return the same with the constants that were fitted without the run's model."""
    constants = read_constants()
    return pd.DataFrame(
        [
            _compared(run, constants[f"without {run.model_name}"])
            for run in _runs(data)
            if f"without {run.model_name}" in constants
        ]
    )


def _runs(data: Path) -> Iterator[RecordedRun]:
    return recorded_runs(data / "serving", data / "models")


def _compared(run: RecordedRun, times: EngineTimes | None) -> dict[str, object]:
    recorded = run.recorded()
    deployment = recorded.deployment
    if not run.through_server:
        times = msgspec.structs.replace(
            times or deployment.preset.times, api_us=0.0, api_token_us=0.0, api_sequence_us=0.0
        )
    found = deployment.replay(recorded.requests, times, max_in_flight=run.max_in_flight)
    outputs = np.asarray([request.output_tokens for request in recorded.requests])
    measured = _columns(recorded.ttft_s, recorded.e2e_s, outputs)
    simulated = _columns(found.ttft_s, found.e2e_s, outputs)
    row: dict[str, object] = {
        "run": run.short_name, "split": run.split, "model": run.model_name, "rate": run.rate
    }  # fmt: skip
    for name, (column, figure) in _FIGURES.items():
        row[f"{name} ms"] = 1e3 * figure(measured[column])
        row[f"{name} %"] = 100 * (figure(simulated[column]) / figure(measured[column]) - 1)
    for name in ("TTFT p99", "E2E p99"):
        column, figure = _FIGURES[name]
        later = [figure(values[column][_FIRST_USES:]) for values in (simulated, measured)]
        row[f"{name} later %"] = 100 * (later[0] / later[1] - 1)
    sent_s = np.asarray([request.arrival_us for request in recorded.requests]) / 1e6
    ended_s, simulated_s = (sent_s + recorded.e2e_s).max(), found.finished_us.max() / 1e6
    row["throughput %"] = 100 * (ended_s / simulated_s - 1)
    return row


def _columns(ttft_s: np.ndarray, e2e_s: np.ndarray, outputs: np.ndarray) -> dict[str, np.ndarray]:
    return {"ttft_s": ttft_s, "e2e_s": e2e_s, "tpot_s": (e2e_s - ttft_s) / np.maximum(outputs - 1, 1)}


# The load sweep


def load_sweep(data: Path) -> pd.DataFrame:
    """Return a row for each point of the load sweep."""
    times = read_constants()["sweep"]
    rows = []
    for point in sweep_points(data / "serving"):
        replayed = point.replay(times)
        rows.append(
            {
                "point": point.name, "split": point.split, "open loop": point.rate is not None,
                "in flight": point.in_flight, "stable": point.is_stable, "simulated stable": replayed.is_stable,
                **{f"{name} ms": 1e3 * value for name, value in point.measured.items()},
                **{f"{name} %": 100 * (replayed.medians[name] / value - 1) for name, value in point.measured.items()},
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


# Closed loops


def closed_loops(data: Path, engine: str | None = None) -> pd.DataFrame:
    """Return a row for each point of the closed loops, of one engine or of all, that can be replayed."""
    points = (point for point in closed_loop.loop_points(data) if not point.left_out)
    chosen = (point for point in points if engine in (None, point.preset.engine))
    return calibrated(pd.DataFrame([loop_row(point, closed_loop.replay(point, data)) for point in chosen]))


def loop_row(point: closed_loop.LoopPoint, found: closed_loop.LoopTimes) -> dict[str, object]:
    """Return the row of a point that was replayed."""
    model, number_format, gpu, engine, version = point.group
    return {
        "model": model, "format": number_format or "bfloat16", "gpu": gpu, "engine": engine,
        "preset": point.preset.name, "version": version, "family": str(point.family),
        "tp": int(point.row["tp_size"]), "prompt": point.prompt_tokens, "output": point.output_tokens,
        "clients": point.clients, "split": point.row["split"],
        "impossible": _impossible(point, found), "TTFT ms": 1e3 * point.ttft_s, "TPOT ms": 1e3 * point.tpot_s,
        "TTFT %": 100 * (found.ttft_s / point.ttft_s - 1), "TPOT %": 100 * (found.tpot_s / point.tpot_s - 1),
        "first token late, TPOTs": (point.ttft_s - found.ttft_s) / point.tpot_s,
    }  # fmt: skip


def _impossible(point: closed_loop.LoopPoint, found: closed_loop.LoopTimes) -> bool:
    """Return whether other settings held than the row states: it has half the time that any engine would need."""
    measured_s, simulated_s = (times.ttft_s + point.output_tokens * times.tpot_s for times in (point, found))
    return measured_s < simulated_s / 2


def calibrated(table: pd.DataFrame) -> pd.DataFrame:
    """Add the error of TPOT after a calibration with three points of one model, format, GPU, engine and version.

    The three are those of the least, the middle and the most clients; they have no such error themselves.
    """
    column = pd.Series(np.nan, index=table.index)
    for _, group in table.groupby(["model", "format", "gpu", "engine", "version"], dropna=False):
        if len(group) < 4:
            continue
        ordered = group.sort_values(["clients", "prompt", "output", "tp"], kind="stable")
        chosen = ordered.iloc[[0, len(ordered) // 2, -1]]
        scale = float(np.exp(-np.log1p(chosen["TPOT %"] / 100).mean()))
        others = ordered.drop(chosen.index)
        column[others.index] = 100 * ((1 + others["TPOT %"] / 100) * scale - 1)
    return table.assign(**{"TPOT calibrated %": column})


PARTS: Mapping[str, Callable[[Path], pd.DataFrame]] = {
    "open-loop": open_loop,
    "left-out": left_out,
    "load-sweep": load_sweep,
    "closed-loop": closed_loops,
}


# Results


def publish() -> None:
    """Write the bars and the tables of the page from the errors in `results/`."""
    from document import write_between_marks

    tables = {name: pd.read_csv(path) for name in PARTS if (path := RESULTS / f"{name}.csv").exists()}
    bars = list(bars_of(tables))
    found = {bar.name: {"found": round(bar.found, 2), "bar": bar.most, "met": bar.is_met} for bar in bars}
    (RESULTS / "bars.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    lines = ["| figure | rows | % | bar |  |", "|---|---|---|---|---|", *(bar.line() for bar in bars)]
    write_between_marks(PAGE, _MARK, lines)
    write_between_marks(PAGE, f"{_MARK} --only open-loop", list(_run_lines(tables["open-loop"])))
    write_between_marks(PAGE, f"{_MARK} --only closed-loop", list(_loop_lines(tables["closed-loop"])))


def _run_lines(table: pd.DataFrame) -> Iterator[str]:
    """Yield a table of runs with their errors."""
    figures = [column for column in table.columns if column.endswith(" %")]
    yield f"| run | split | {' | '.join(figures)} |"
    yield "|---" * (len(figures) + 2) + "|"
    for row in table.to_dict("records"):
        errors = " | ".join(f"{row[figure]:+.1f}" for figure in figures)
        yield f"| {row['run']} | {row['split']} | {errors} |"


def _loop_lines(table: pd.DataFrame) -> Iterator[str]:
    """Yield a table of closed loops by engine, version, model, format and GPU, with the quartiles of lateness."""
    keys = ["engine", "version", "model", "format", "gpu", "split"]
    yield "| engine | model | GPU | split | rows | TPOT % | by three points % | TTFT % | first token late by, TPOTs |"
    yield "|---" * 9 + "|"
    for names, rows in table[~table["impossible"]].groupby(keys, dropna=False):
        engine, version, model, number_format, gpu, split = names
        off = {name: rows[name].abs().median() for name in ("TPOT %", "TPOT calibrated %", "TTFT %")}
        shown = " | ".join("" if np.isnan(value) else f"{value:.1f}" for value in off.values())
        late = ", ".join(f"{value:.0f}" for value in rows["first token late, TPOTs"].quantile([0.25, 0.5, 0.75]))
        known = engine if pd.isna(version) or not version else f"{engine} {version}"
        name = str(model).rpartition("/")[2]
        yield f"| {known} | {name} {number_format} | {gpu} | {split} | {len(rows)} | {shown} | {late} |"


if __name__ == "__main__":
    main()
