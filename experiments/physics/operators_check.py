"""Check the operators of dense decode steps on GPUs that were left out, and on our own records.

Usage: python experiments/physics/operators_check.py

1. For each GPU with tables, efficiencies of the data sheet's formulas are fitted to the tables of the *other* GPUs.
   Whole decode steps by its sheet are compared with those by its own tables.
2. Decode steps and single operators that experiments/h100 recorded (torch and cuBLAS, no engine) are compared with
   tables, and with the sheet, its GPU left out. Nothing is fitted to the records.

An error is the logarithm of estimated over reference time, in percent.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import astuple, fields
from itertools import product

import numpy as np
from records import GPUS, RESULTS, decoder_of
from scipy.optimize import least_squares
from step_cases import read_rows

from maveriq.domain.gpu_kinds import NumberFormat, gpu_sheet, gpu_sheets
from maveriq.domain.models import load_model
from maveriq.estimate.log_grid import Array
from maveriq.estimate.operators import Heads, Operators, UsualEfficiencies, operators_of
from maveriq.estimate.step_time import Sharding, StepModel

MODELS = ("llama-2-7b", "llama-3.1-8b", "qwen3-14b", "qwen3-32b", "llama-2-70b")
BF16 = NumberFormat.BFLOAT16
_TOKENS = (1.0, 4.0, 16.0, 64.0, 256.0)
_CONTEXTS = (512.0, 2048.0, 8192.0)
_WIDTHS = (1024.0, 4096.0, 8192.0, 28672.0)
_LEAST, _MOST = (0.5, 0.3, 0.3, 2.0, 0.3, 0.1, 0.5), (20.0, 1.0, 1.0, 40.0, 1.0, 20.0, 1.5)


def main() -> None:
    """Print the errors."""
    sheets = {name: sheet_left_out(name) for name in measured_gpus()}
    lines = ["| steps by the sheet of | model | steps | median % | p90 % | bias % |", "|---|---|---|---|---|---|"]
    for gpu, sheet in sheets.items():
        lines += [_line(f"{gpu} | {model}", errors) for model, errors in step_errors(gpu, sheet)]
    lines += ["", "| recorded | rows | median % | p90 % | bias % |", "|---|---|---|---|---|"]
    for label, errors in sorted(record_errors(sheets).items()):
        lines.append(_line(label, errors))
    sys.stdout.write("\n".join(lines) + "\n")


def measured_gpus() -> list[str]:
    """Return the GPUs that have tables."""
    return [name for name, sheet in gpu_sheets().items() if operators_of(sheet).measured]


def sheet_left_out(gpu: str) -> Operators:
    """Return the operators of a GPU by its data sheet, with efficiencies fitted to the tables of other GPUs."""
    others = [operators_of(gpu_sheet(name)) for name in measured_gpus() if name != gpu]
    expected = np.log(np.concatenate([_operator_times(operators) for operators in others]))

    def errors(values: Array) -> Array:
        usual = _efficiencies(values)
        times = [_operator_times(Operators(gpu=operators.gpu, usual=usual)) for operators in others]
        # One or two GPUs of a generation say little about it: one more counts on which generations do not differ.
        alike = np.full_like(times[0], np.log(usual.newer_time))
        return np.concatenate([np.log(np.concatenate(times)) - expected, alike])

    start = astuple(UsualEfficiencies())
    found = least_squares(errors, start, bounds=(_LEAST, _MOST), loss="soft_l1", f_scale=0.1, x_scale=start)
    return Operators(gpu=gpu_sheet(gpu), usual=_efficiencies(found.x))


def _efficiencies(values: Array) -> UsualEfficiencies:
    names = [field.name for field in fields(UsualEfficiencies)]
    return UsualEfficiencies(**dict(zip(names, values.tolist(), strict=True)))


def _operator_times(operators: Operators) -> Array:
    """Return times of products and of attention in decode steps."""
    m, n, k = np.meshgrid(_TOKENS, _WIDTHS, _WIDTHS)
    sequences, context, kv_heads = np.meshgrid(_TOKENS, _CONTEXTS, (1.0, 2.0, 8.0))
    of = Heads(heads=4 * kv_heads, kv_heads=kv_heads, head_size=128)
    decode_us = operators.decode_attention_us(BF16, sequences, context, of)
    return np.concatenate([operators.gemm_us(BF16, m, n, k).ravel(), decode_us.ravel()])


def step_errors(gpu: str, sheet: Operators) -> Iterator[tuple[str, list[float]]]:
    """Yield each model, and the errors of its steps by the data sheet against those by tables."""
    everything: list[float] = []
    for name in MODELS:
        errors = []
        for tp in (1, 2, 4):
            models = [
                StepModel(load_model(name).decoder, operators, sharding=Sharding(tp=tp))
                for operators in (sheet, operators_of(gpu_sheet(gpu)))
            ]
            for batch, context in product((1, 4, 16, 64, 256), (512, 2048, 8192)):
                times = [model.gpu_us(decodes=batch, context_tokens=batch * context) for model in models]
                errors.append(math.log(times[0] / times[1]))
        everything += errors
        yield name, errors
    yield "all", everything


def record_errors(sheets: dict[str, Operators]) -> dict[str, list[float]]:
    """Return the errors of recorded decode steps and operators, by tables and by the sheet."""
    found: dict[str, list[float]] = {}
    for folder, kind in GPUS.items():
        for source, operators in (("tables", operators_of(gpu_sheet(kind))), ("sheet", sheets[kind])):
            for row in read_rows(RESULTS / folder / "records.csv"):
                graph = (row["status"], row["kind"], row["mode"]) == ("measured", "decode", "graph")
                if not graph or row["weights"] != "bf16":
                    continue
                model = StepModel(decoder_of(row), operators)
                batch, tokens = int(row["batch"]), int(row["tokens_each"])
                time_us = model.gpu_us(decodes=batch, context_tokens=batch * tokens)
                label = f"{kind} by {source}, step, {row['model']}"
                found.setdefault(label, []).append(math.log(time_us / (1e6 * float(row["seconds"]))))
            for name, error in _operator_errors(folder, operators):
                found.setdefault(f"{kind} by {source}, operator, {name}", []).append(error)
    return found


def _operator_errors(folder: str, operators: Operators) -> Iterator[tuple[str, float]]:
    for row in read_rows(RESULTS / folder / "operators.csv"):
        if row["status"] != "measured" or row["format"] != "bf16":
            continue
        if row["operator"] == "gemm":
            m, n, k = (float(row[size]) for size in "mnk")
            time_us = float(operators.gemm_us(BF16, m, n, k))
            name = f"gemm, {'up to' if m <= 256 else 'above'} 256 rows"
        elif row["operator"] == "decode_attention":
            of = Heads(heads=float(row["heads"]), kv_heads=float(row["kv_heads"]), head_size=float(row["head_size"]))
            time_us = float(operators.decode_attention_us(BF16, float(row["batch"]), float(row["context"]), of))
            name = "decode_attention"
        elif row["operator"] in ("add", "rms_norm", "silu_gate"):
            time_us = float(operators.elementwise_us(1, float(row["bytes_moved"])))
            name = f"{row['operator']}, {row['kernel']}"
        else:
            continue
        yield name, math.log(time_us / (1e6 * float(row["seconds"])))


def _line(label: str, errors: Sequence[float]) -> str:
    percent = 100 * np.asarray(errors)
    median, p90, bias = np.median(abs(percent)), np.percentile(abs(percent), 90), np.median(percent)
    return f"| {label} | {len(errors)} | {median:.1f} | {p90:.1f} | {bias:+.1f} |"


if __name__ == "__main__":
    main()
