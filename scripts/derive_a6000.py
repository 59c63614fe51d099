"""Derive the embedded A6000 data from the fingerprints published with the MaverIQ paper.

Usage: python scripts/derive_a6000.py DATA_DIR [--out FOLDER]

DATA_DIR contains fingerprint_short_prompt.csv, fingerprint_long_prompt.csv and full_model_long_prompt.csv. The script
writes to maveriq/data/a6000: fingerprints-short.csv and fingerprints-long.csv (constants of SPEC 3, one row per model,
weights, KV, TP, PP and batch), full_models.csv (latencies relative to the first configuration of the same model and
types) and load_fit.toml. Equal input gives equal files.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import astuple
from pathlib import Path

import numpy as np

from maveriq.domain.models import KvType, WeightType, load_model
from maveriq.domain.parallel import ParallelConfig
from maveriq.estimate.fingerprints import (
    COLUMNS,
    derive,
    parallel_memory_gib,
    read_fingerprints,
)
from maveriq.estimate.full_models import COLUMNS as RELATIVE_COLUMNS
from maveriq.estimate.hardware_profile import ModelConfig, Range, read_load_times
from maveriq.files import data_path
from maveriq.tables import choice, read_csv

MEASURED_COLUMNS = (
    "model", "tp", "pp", "layer_split", "weight_dtype", "int8_kv", "output_tokens", "batch_size", "latency_s",
    "memory_before_run_gib", "memory_after_run_gib", "fingerprint_build_s", "engine_build_s", "profile_run_s",
)  # fmt: skip
FULL_MODEL_COLUMNS = tuple(column for column in MEASURED_COLUMNS if column != "fingerprint_build_s")
FULL_MODEL_PROMPT_TOKENS, FULL_MODEL_OUTPUT_TOKENS = 923, 20

MEMORY_AT_OUTPUT_TOKENS = 10
"""Memory comes from the runs with this many output tokens."""


def derive_fingerprints(measured: Path, out: Path) -> None:
    """Write the constants of every group of measured fingerprints, in the order of the file."""
    latency: dict[tuple[str, ParallelConfig], dict[tuple[int, int], float]] = {}
    memory: dict[tuple[str, ParallelConfig], dict[int, float]] = {}
    for row in read_csv(measured, MEASURED_COLUMNS, what="measured fingerprints"):
        configuration = ParallelConfig(
            tp=row.count("tp"),
            pp=row.count("pp"),
            weights=choice(row, "weight_dtype", WeightType),
            kv=KvType.INT8 if row.count("int8_kv") else KvType.NATIVE,
            batch_size=row.count("batch_size"),
        )
        key = row.text("model"), configuration
        layers, output_tokens = sum(map(int, row.text("layer_split").split())), row.count("output_tokens")
        latency.setdefault(key, {})[layers, output_tokens] = row.number("latency_s")
        if output_tokens == MEMORY_AT_OUTPUT_TOKENS:
            memory.setdefault(key, {})[layers] = row.number("memory_after_run_gib")
    lines = [",".join(COLUMNS)]
    for (model, at), latency_s in latency.items():
        constants = astuple(derive(latency_s, memory[model, at]))
        key_cells = [model, at.weights, at.kv, str(at.tp), str(at.pp), str(at.batch_size)]
        lines.append(",".join([*key_cells, *map(repr, constants)]))
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def derive_full_models(measured: Path, out: Path) -> None:
    """Write the latency of each measured whole model relative to the first one of its model and types."""
    lines, first_s = [",".join(RELATIVE_COLUMNS)], dict[tuple[str, str, str], float]()
    for row in read_csv(measured, FULL_MODEL_COLUMNS, what="measured full models"):
        if row.count("output_tokens") != FULL_MODEL_OUTPUT_TOKENS or row.count("batch_size") != 1:
            continue
        kv = KvType.INT8 if row.count("int8_kv") else KvType.NATIVE
        types = row.text("model"), choice(row, "weight_dtype", WeightType).value, kv.value
        relative = row.number("latency_s") / first_s.setdefault(types, row.number("latency_s"))
        degrees = (str(row.count("tp")), str(row.count("pp")))
        lengths = (str(FULL_MODEL_PROMPT_TOKENS), str(FULL_MODEL_OUTPUT_TOKENS))
        lines.append(",".join([*types, *degrees, *lengths, f"{relative:.4f}"]))
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def fit_load_times(measured: dict[ModelConfig, Range], fingerprints: Path) -> str:
    """Return load_fit.toml: nonnegative least squares of load seconds on [1, GPUs, GiB per GPU].

    Seconds are the middles of the measured ranges, GiB the paper's estimate for an even split.
    """
    sizes = [_gib_per_gpu(model, configuration, fingerprints) for model, configuration in measured]
    inputs = np.array(
        [[1.0, configuration.gpus, size] for (_, configuration), size in zip(measured, sizes, strict=True)]
    )
    seconds = np.array([seen.middle for seen in measured.values()])
    coefficients = nonnegative_least_squares(inputs, seconds).round(4)
    residuals = seconds - inputs @ coefficients
    mean, scatter = np.abs(residuals).mean(), seconds.std()
    compared = [
        f"#   {model} {at.weights} {at.tp}x{at.pp}, {size:.1f} GiB per GPU: {took:.1f} s, {off:+.1f} s"
        for (model, at), size, took, off in zip(measured, sizes, seconds, residuals, strict=True)
    ]
    names = ("fixed_s", "per_gpu_s", "per_gib_s")
    lines = [
        "# Written by scripts/derive_a6000.py: the seconds to load an engine that was never measured are",
        "# fixed_s + per_gpu_s * GPUs + per_gib_s * GiB per GPU, fitted to load_times.csv (nonnegative least squares).",
        f"# Its {len(seconds)} rows scatter by {scatter:.1f} s, the fit misses them by {mean:.1f} s in the mean.",
        "# Model, weights, TP x PP and size; measured; measured less fitted:",
        *compared,
        *(f"{name} = {value}" for name, value in zip(names, coefficients.tolist(), strict=True)),
    ]
    return "\n".join(lines) + "\n"


def _gib_per_gpu(model_name: str, configuration: ParallelConfig, fingerprints: Path) -> float:
    layers, of_model = load_model(model_name).layers, read_fingerprints(fingerprints)[model_name]
    single, tp2, pp2 = (of_model[configuration.at(tp, pp)].memory_gib(layers) for tp, pp in ((1, 1), (2, 1), (1, 2)))
    memory_gib = parallel_memory_gib(single, tp2, pp2, tp=configuration.tp, pp=configuration.pp)
    return memory_gib / configuration.gpus


def nonnegative_least_squares(inputs: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the nonnegative coefficients with the least sum of squared residuals.

    With few columns, it is simplest to solve for every subset of columns and keep the best solution.
    """
    columns = inputs.shape[1]
    best, minimum = np.zeros(columns), float(wanted @ wanted)
    for size in range(1, columns + 1):
        for subset in itertools.combinations(range(columns), size):
            solution = np.zeros(columns)
            solution[list(subset)] = np.linalg.lstsq(inputs[:, subset], wanted, rcond=None)[0]
            left = float(((wanted - inputs @ solution) ** 2).sum())
            if solution.min() >= 0 and left < minimum:
                best, minimum = solution, left
    return best


def main() -> None:
    """Write all derived files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path, help="folder of the published fingerprints")
    parser.add_argument("--out", type=Path, default=data_path("a6000"), help="output folder (default: the package)")
    arguments = parser.parse_args()
    for prompt in ("short", "long"):
        measured = arguments.data_dir / f"fingerprint_{prompt}_prompt.csv"
        derive_fingerprints(measured, arguments.out / f"fingerprints-{prompt}.csv")
    derive_full_models(arguments.data_dir / "full_model_long_prompt.csv", arguments.out / "full_models.csv")
    # The live system plans with the short prompt, so its "GiB per GPU" is that of the short prompt.
    fitted = fit_load_times(
        read_load_times(data_path("a6000", "load_times.csv")), arguments.out / "fingerprints-short.csv"
    )
    (arguments.out / "load_fit.toml").write_text(fitted, encoding="utf-8")


if __name__ == "__main__":
    main()
