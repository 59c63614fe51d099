"""Derives maveriq/data/operators from public measurements of kernels, and tells how well they answer for other shapes.

    python scripts/derive_operators.py                  # writes the tables
    python scripts/derive_operators.py --held-out       # prints errors on shapes left out of the fit; writes nothing

Needs MAVERIQ_DATA, the folder of measured data (serving/ops_aic_*.csv.gz, from ai-dynamo/aiconfigurator, Apache-2.0).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from itertools import product

import msgspec
import numpy as np
import pandas as pd

from maveriq.calibration.expert_routing import measured_routing
from maveriq.calibration.operator_tables import (
    DECODE_ATTENTION,
    EXPERTS,
    GEMM,
    PREFILL_ATTENTION,
    Table,
    fit_corrections,
    fit_expert_kernel,
)
from maveriq.domain.gpu_kinds import GpuSheet, NumberFormat, gpu_sheet
from maveriq.estimate.experts import USUAL_KERNEL, ExpertKernel, ExpertLoad, experts_formula
from maveriq.estimate.kernel_bounds import BYTES_PER_WEIGHT, KERNEL_US, Formula
from maveriq.estimate.log_grid import Array, LogGrid
from maveriq.estimate.operators import (
    Heads,
    decode_attention_formula,
    gemm_formula,
    operators_of,
    prefill_attention_formula,
)
from maveriq.estimate.step_time import MANY_CHUNKS
from maveriq.files import data_path, measured_data_path

SOURCE = "ai-dynamo/aiconfigurator 095f58a (Apache-2.0), kernels as vLLM runs them"
SYSTEMS = {
    "a100_sxm": "A100-80GB-SXM", "h100_sxm": "H100-SXM", "h200_sxm": "H200-SXM", "l40s": "L40S", "b200_sxm": "B200-SXM",
}  # fmt: skip
# Block-scaled products are not fitted: their tables hold launch floors that today's engines do not show (operators.py).
GEMM_FORMATS = (NumberFormat.BFLOAT16, NumberFormat.FP8, NumberFormat.NVFP4)
EXPERT_FORMATS = {
    "bfloat16": NumberFormat.BFLOAT16, "fp8": NumberFormat.FP8, "fp8_block": NumberFormat.FP8_BLOCK,
    "nvfp4": NumberFormat.NVFP4, "int4_wo": NumberFormat.INT4, "w4a16_mxfp4": NumberFormat.MXFP4,
}  # fmt: skip
# Models without gated experts: Nemotron 3 Nano, Super and Ultra, by hidden size, width and experts of a token.
UNGATED = {(2688, 1856, 6), (1024, 2688, 22), (2048, 5120, 22)}
KV_FORMATS = ("bfloat16", "fp8")
HEAD_SIZES = (64, 128, 192, 256, 512)
_STEP_TOKENS = 16384  # of the largest usual step
HeldOut = tuple[str, Array, int]
"""Operator and format, errors of rows left out, and the number of rows that beat the GPU."""


def main() -> None:
    """Write the tables, or print errors on shapes left out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--held-out", action="store_true", help="print errors on shapes left out; write nothing")
    parser.add_argument("--only", choices=list(HELD_OUT), help="print errors of these operators only")
    arguments = parser.parse_args()
    if arguments.held_out:
        _print_held_out(arguments.only)
    else:
        _write_tables()


@cache
def _table(name: str) -> pd.DataFrame:
    data = measured_data_path()
    if data is None:
        raise SystemExit("derive_operators: set MAVERIQ_DATA to the folder of measured data")
    frame = pd.read_csv(data / "serving" / f"ops_aic_{name}.csv.gz", low_memory=False)
    return frame[(frame.latency_ms > 0) & frame.system.isin(SYSTEMS)]


def _gemm_rows(system: str, number_format: NumberFormat) -> pd.DataFrame:
    rows = _table("gemm")
    return rows[
        (rows.system == system) & (rows.gemm_dtype == number_format.value) & (rows.n >= 128) & (rows.k >= 128)
    ].drop_duplicates(["m", "n", "k"])


def _gemm_formula(gpu: GpuSheet, number_format: NumberFormat, rows: pd.DataFrame) -> Formula:
    return gemm_formula(gpu, number_format, *_floats(rows, "m", "n", "k"))


def _attention_rows(name: str, system: str, kv: str, head_size: int, *, windowed: bool) -> pd.DataFrame:
    """Return rows with or without a sliding window, for which FlashAttention 2 has kernels of different speed."""
    rows = _table(f"{name}_attention")
    rows = rows[(rows.system == system) & (rows.kv_cache_dtype == kv) & (rows.head_dim == head_size)].copy()
    rows["window"] = rows.window_size.fillna(0).replace(0, np.inf)
    rows["tokens"] = rows.isl + (rows.step if name == "generation" else 0)
    return rows[np.isfinite(rows.window) == windowed]


def _decode_formula(gpu: GpuSheet, kv: str, rows: pd.DataFrame) -> Formula:
    sequences, tokens, window = _floats(rows, "batch_size", "tokens", "window")
    value_bytes = BYTES_PER_WEIGHT[NumberFormat(kv)]
    return decode_attention_formula(gpu, value_bytes, sequences, np.minimum(tokens, window), _heads(rows))


def _prefill_formula(gpu: GpuSheet, kv: str, rows: pd.DataFrame) -> Formula:  # noqa: ARG001 - new keys are read in 16 bits
    sequences, tokens, window = _floats(rows, "batch_size", "tokens", "window")
    return prefill_attention_formula(gpu, sequences, tokens, 0.0, _heads(rows), window=window)


ATTENTION = {
    "decode_attention": ("generation", DECODE_ATTENTION, _decode_formula),
    "prefill_attention": ("context", PREFILL_ATTENTION, _prefill_formula),
}


def _heads(rows: pd.DataFrame) -> Heads:
    heads, kv_heads, head_size = _floats(rows, "num_heads", "num_key_value_heads", "head_dim")
    return Heads(heads=heads, kv_heads=kv_heads, head_size=head_size)


def _expert_rows(system: str, dtype: str, *, whole: bool) -> pd.DataFrame:
    """Return the rows of the kernel that most rows of this system, format and way of sharing were measured with."""
    rows = _table("moe")
    rows = rows[(rows.system == system) & (rows.moe_dtype == dtype) & ((rows.moe_ep_size > 1) == whole)]
    if rows.empty:
        return rows
    rows = rows[rows.kernel_source == rows.kernel_source.value_counts().idxmax()]
    settings = rows[["distribution", "num_experts", "topk", "num_tokens", "moe_ep_size"]].drop_duplicates()
    routed = [
        measured_routing(distribution, experts=experts, per_token=per_token, tokens=tokens, groups=groups)
        for distribution, experts, per_token, tokens, groups in settings.itertuples(index=False)
    ]
    settings = settings.assign(rows=[pairs for pairs, _ in routed], hit=[hit for _, hit in routed])
    return rows.merge(settings, on=list(settings.columns[:5]))


def _expert_load(rows: pd.DataFrame) -> ExpertLoad:
    tokens, size, width, per_token, tp = _floats(rows, "num_tokens", "hidden_size", "inter_size", "topk", "moe_tp_size")
    shapes = zip(rows.hidden_size, rows.inter_size, rows.topk, strict=True)
    # vLLM 0.14 (A100) was measured with gated experts in any model.
    ungated = [shape in UNGATED and system != "a100_sxm" for shape, system in zip(shapes, rows.system, strict=True)]
    pairs, hit = _floats(rows, "rows", "hit")
    return ExpertLoad(
        pairs=tokens * per_token, rows=pairs, hit=hit, inner_size=size, width=width / tp,
        matrices=np.where(ungated, 2.0, 3.0), whole=bool((rows.moe_ep_size > 1).any()),
    )  # fmt: skip


def _fit_experts(gpu: GpuSheet, number_format: NumberFormat, rows: pd.DataFrame) -> tuple[ExpertKernel, LogGrid]:
    load = _expert_load(rows)
    kernel = fit_expert_kernel(gpu, number_format, load, _time_us(rows))
    return kernel, _fit(EXPERTS, experts_formula(gpu, number_format, kernel, load), rows)


def _least_experts(gpu: GpuSheet, number_format: NumberFormat, rows: pd.DataFrame) -> Formula:
    """Return a formula of whatever kernel, for the time that none can beat."""
    return experts_formula(gpu, number_format, USUAL_KERNEL, _expert_load(rows))


def _cold(formula: Callable[[pd.DataFrame], Formula], rows: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """Return the rows that the GPU's memory and speed allow, and the number of the others.

    The tool repeats a kernel on the same data. What fits into the cache of the GPU is then read from there, which no
    engine sees: L40S, with 96 MiB, reads weights and KV caches at up to three times its memory's bandwidth.
    """
    if rows.empty:
        return rows, 0
    cold = rows[_time_us(rows) > KERNEL_US + formula(rows).least_us / 0.95]
    return cold, len(rows) - len(cold)


def _time_us(rows: pd.DataFrame) -> Array:
    return 1e3 * _floats(rows, "latency_ms")[0]


def _fit(table: Table, formula: Formula, rows: pd.DataFrame) -> LogGrid:
    return fit_corrections(table, formula, _time_us(rows))


def _errors(formula: Formula, grid: LogGrid, rows: pd.DataFrame) -> Array:
    return np.asarray(np.log(formula.corrected_us(grid) / _time_us(rows)))


def _all_reduce_curve(system: str, gpus: int) -> dict[str, list[float]]:
    """Return the times of vLLM's all-reduce of 16-bit values in a CUDA graph, by bytes.

    The table of NCCL beside it mixes four collectives without naming them, so it is not used.
    """
    rows = _table("allreduce")
    rows = rows[(rows.system == system) & (rows.num_gpus == gpus) & (rows.backend == "vllm_graph")]
    least = rows.groupby("message_size").latency_ms.min()
    return {
        "message_bytes": [float(2 * size) for size in least.index],
        "time_us": [float(f"{1e3 * value:.4g}") for value in least],
    }


def _floats(rows: pd.DataFrame, *columns: str) -> list[Array]:
    return [rows[column].to_numpy(dtype=np.float64) for column in columns]


def _stored(grid: LogGrid, rows: pd.DataFrame) -> dict[str, object]:
    return {
        "axes": [axis.tolist() for axis in grid.axes],
        "log_percent": np.rint(100 * grid.log_ratios).astype(int).ravel().tolist(),
        "kernel": str(rows.kernel_source.value_counts().idxmax()),
        "rows": len(rows),
    }


def _write_tables() -> None:
    for system, name in SYSTEMS.items():
        gpu = gpu_sheet(name)
        found = {
            "gpu": name,
            "source": SOURCE,
            "gemm": _gemm_tables(system, gpu),
            **{operator: _attention_tables(operator, system, gpu) for operator in ATTENTION},
            "experts": _expert_tables(system, gpu),
            "all_reduce": {str(gpus): _all_reduce_curve(system, gpus) for gpus in (2, 4, 8)},
        }
        path = data_path("operators", f"{name}.json")
        path.parent.mkdir(exist_ok=True)
        text = json.dumps(found, separators=(",", ":"))
        path.write_text(text.replace('},"', '},\n"') + "\n", encoding="utf-8")
        print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB", flush=True)


def _gemm_tables(system: str, gpu: GpuSheet) -> dict[str, object]:
    tables: dict[str, object] = {}
    for number_format in GEMM_FORMATS:
        rows, _ = _cold(partial(_gemm_formula, gpu, number_format), _gemm_rows(system, number_format))
        if len(rows):
            tables[number_format] = _stored(_fit(GEMM, _gemm_formula(gpu, number_format, rows), rows), rows)
    return tables


def _attention_tables(operator: str, system: str, gpu: GpuSheet) -> dict[str, object]:
    kind, table, formula = ATTENTION[operator]
    tables: dict[str, object] = {}
    for kv, head_size, windowed in product(KV_FORMATS, HEAD_SIZES, (False, True)):
        rows, _ = _cold(partial(formula, gpu, kv), _attention_rows(kind, system, kv, head_size, windowed=windowed))
        if len(rows):
            key = f"{kv}/{head_size}/window" if windowed else f"{kv}/{head_size}"
            tables[key] = _stored(_fit(table, formula(gpu, kv, rows), rows), rows)
    return tables


def _expert_tables(system: str, gpu: GpuSheet) -> dict[str, object]:
    tables: dict[str, object] = {}
    for (dtype, number_format), whole in product(EXPERT_FORMATS.items(), (False, True)):
        rows, _ = _cold(partial(_least_experts, gpu, number_format), _expert_rows(system, dtype, whole=whole))
        if len(rows):
            kernel, grid = _fit_experts(gpu, number_format, rows)
            rounded = {key: float(f"{value:.4g}") for key, value in msgspec.structs.asdict(kernel).items()}
            key = f"{number_format}/whole" if whole else f"{number_format}"
            tables[key] = {"formula": rounded, "corrections": _stored(grid, rows)}
    return tables


def _print_held_out(only: str | None) -> None:
    """Fit on every second shape and print the errors on the others; `cached` rows beat the GPU and are not used."""
    print("| operator | GPU | format | rows | cached | median % | p90 % | bias % |\n|---|---|---|---|---|---|---|---|")
    for system, name in SYSTEMS.items():
        gpu = gpu_sheet(name)
        for kind, rows_of in HELD_OUT.items():
            if only not in (None, kind):
                continue
            for label, errors, cached in rows_of(system, gpu):
                signed = 100 * errors
                row = f"| {label.replace('|', f'| {name} |')} | {len(errors)} | {cached} | {np.median(abs(signed)):.1f}"
                print(f"{row} | {np.percentile(abs(signed), 90):.0f} | {np.median(signed):+.1f} |", flush=True)


def _held_out_gemm(system: str, gpu: GpuSheet) -> Iterator[HeldOut]:
    for number_format in GEMM_FORMATS:
        formula = partial(_gemm_formula, gpu, number_format)
        rows, cached = _cold(formula, _gemm_rows(system, number_format))
        if rows.empty:
            continue
        seen_n, seen_k = sorted(rows.n.unique())[::2], sorted(rows.k.unique())[::2]
        seen = rows[rows.n.isin(seen_n) & rows.k.isin(seen_k)]
        other = rows[~rows.n.isin(seen_n) & ~rows.k.isin(seen_k) & (rows.n >= 256) & (rows.k >= 256)]
        yield f"GEMM | {number_format}", _errors(formula(other), _fit(GEMM, formula(seen), seen), other), cached


def _held_out_attention(system: str, gpu: GpuSheet) -> Iterator[HeldOut]:
    for operator, (kind, table, formula_of) in ATTENTION.items():
        for kv in KV_FORMATS:
            formula = partial(formula_of, gpu, kv)
            errors, all_cached = [], 0
            for head_size, windowed in product(HEAD_SIZES, (False, True)):
                rows, cached = _cold(formula, _attention_rows(kind, system, kv, head_size, windowed=windowed))
                if rows.empty:
                    continue
                is_seen = rows.num_heads.isin(sorted(rows.num_heads.unique())[::2])
                seen, other = rows[is_seen], rows[~is_seen]
                errors.append(_errors(formula(other), _fit(table, formula(seen), seen), other))
                all_cached += cached
            if errors:
                yield f"{operator.replace('_', ' ')} | {kv} KV", np.concatenate(errors), all_cached


def _held_out_experts(system: str, gpu: GpuSheet) -> Iterator[HeldOut]:
    """Leave out a family of experts, by size and number; where there is only one, a way to share them."""
    for dtype, number_format in EXPERT_FORMATS.items():
        for whole in (False, True):
            rows, cached = _cold(partial(_least_experts, gpu, number_format), _expert_rows(system, dtype, whole=whole))
            if rows.empty:
                continue
            columns = ["hidden_size", "num_experts"]
            if len(rows[columns].drop_duplicates()) == 1:
                columns = ["moe_tp_size", "moe_ep_size"]
            family = rows.groupby(columns).ngroup()
            errors = []
            for left_out in range(family.max() + 1):
                seen, other = rows[family != left_out], rows[family == left_out]
                kernel, grid = _fit_experts(gpu, number_format, seen)
                formula = experts_formula(gpu, number_format, kernel, _expert_load(other))
                errors.append(_errors(formula, grid, other))
            kinds = f"{left_out + 1} {'families' if columns[0] == 'hidden_size' else 'shardings of one family'}"
            sharing = "whole experts" if whole else "parts of experts"
            yield f"{sharing}, {kinds} | {number_format}", np.concatenate(errors), cached


def _held_out_all_reduce(system: str, gpu: GpuSheet) -> Iterator[HeldOut]:  # noqa: ARG001 - measured without its sheet
    """Leave out every second message size between the smallest and the largest."""
    for gpus in (2, 4, 8):
        curve = _all_reduce_curve(system, gpus)
        size, time_us = np.log(curve["message_bytes"]), np.log(curve["time_us"])
        if len(size):
            yield (
                f"all-reduce of {gpus} | bfloat16",
                np.interp(size[1:-1:2], size[::2], time_us[::2]) - time_us[1:-1:2],
                0,
            )


def _several_chunks(system: str, gpu: GpuSheet) -> Iterator[HeldOut]:
    """Compare launches of several equal prompts with the sum of single ones, and with what a step counts."""
    rows = _attention_rows("context", system, "bfloat16", 128, windowed=False)
    rows = rows[(rows.batch_size > 1) & (rows.batch_size * rows.isl <= _STEP_TOKENS)]
    prompts, tokens = _floats(rows, "batch_size", "isl")
    launch_us = partial(
        operators_of(gpu).prefill_attention_us, NumberFormat.BFLOAT16, past=0.0, of=replace(_heads(rows), head_size=128)
    )
    alone_us = launch_us(tokens)
    each_us = np.clip((launch_us(tokens, chunks=MANY_CHUNKS) - launch_us(1.0)) / MANY_CHUNKS, 0.0, alone_us)
    yield "several prompts, sum | bfloat16 KV", np.log(prompts * alone_us / _time_us(rows)), 0
    yield "several prompts, step | bfloat16 KV", np.log((alone_us + (prompts - 1) * each_us) / _time_us(rows)), 0


HELD_OUT: dict[str, Callable[[str, GpuSheet], Iterator[HeldOut]]] = {
    "gemm": _held_out_gemm,
    "attention": _held_out_attention,
    "experts": _held_out_experts,
    "all-reduce": _held_out_all_reduce,
    "chunks": _several_chunks,
}


if __name__ == "__main__":
    main()
