"""Derives maveriq/data/operators from public measurements of kernels, and tells how well they answer for other shapes.

    python scripts/derive_operators.py                  # writes the tables
    python scripts/derive_operators.py --held-out       # prints errors on shapes left out of the fit; writes nothing

Needs MAVERIQ_DATA, the folder of measured data (serving/ops_aic_*.csv.gz, from ai-dynamo/aiconfigurator, Apache-2.0).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from functools import cache

import numpy as np
import pandas as pd

from maveriq.calibration.operator_tables import (
    DECODE_ATTENTION,
    EXPERTS,
    GEMM,
    PREFILL_ATTENTION,
    Table,
    fit_corrections,
)
from maveriq.domain.gpu_kinds import GpuSheet, NumberFormat, gpu_sheet
from maveriq.estimate.log_grid import Array, LogGrid
from maveriq.estimate.operators import (
    BYTES_PER_WEIGHT,
    ExpertLoad,
    Formula,
    Heads,
    decode_attention_formula,
    experts_formula,
    experts_hit,
    gemm_formula,
    prefill_attention_formula,
)
from maveriq.files import data_path, measured_data_path

SOURCE = "ai-dynamo/aiconfigurator 095f58a (Apache-2.0), kernels as vLLM runs them"
SYSTEMS = {
    "a100_sxm": "A100-80GB-SXM", "h100_sxm": "H100-SXM", "h200_sxm": "H200-SXM", "l40s": "L40S", "b200_sxm": "B200-SXM",
}  # fmt: skip
# Block-scaled products are not fitted: their tables hold launch floors that engines do not show (see operators.py).
GEMM_FORMATS = (NumberFormat.BFLOAT16, NumberFormat.FP8, NumberFormat.NVFP4)
EXPERT_FORMATS = {
    "bfloat16": NumberFormat.BFLOAT16, "fp8": NumberFormat.FP8, "fp8_block": NumberFormat.FP8_BLOCK,
    "nvfp4": NumberFormat.NVFP4, "int4_wo": NumberFormat.INT4, "w4a16_mxfp4": NumberFormat.MXFP4,
}  # fmt: skip
HEAD_SIZES = (64, 128, 192, 256, 512)
Row = tuple[str, Array]


def main() -> None:
    """Write the tables, or print errors on shapes left out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--held-out", action="store_true", help="print errors on shapes left out; write nothing")
    if parser.parse_args().held_out:
        _print_held_out()
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


def _attention_rows(name: str, system: str, kv: str, head_size: int) -> pd.DataFrame:
    rows = _table(f"{name}_attention")
    rows = rows[(rows.system == system) & (rows.kv_cache_dtype == kv) & (rows.head_dim == head_size)].copy()
    rows["window"] = rows.window_size.fillna(0).replace(0, np.inf)
    rows["tokens"] = rows.isl + (rows.step if name == "generation" else 0)
    return rows


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


def _expert_rows(system: str, dtype: str) -> pd.DataFrame:
    """Return the rows of the kernel that most rows of this system and format were measured with."""
    rows = _table("moe")
    rows = rows[(rows.system == system) & (rows.moe_dtype == dtype)]
    if rows.empty:
        return rows
    rows = rows[rows.kernel_source == rows.kernel_source.value_counts().idxmax()].copy()
    shapes = rows[["num_experts", "topk", "num_tokens"]].drop_duplicates().copy()
    hit = [float(experts_hit(e, k, np.asarray([t]))[0]) for e, k, t in shapes.itertuples(index=False)]
    return rows.merge(shapes.assign(hit_of_all=hit), on=["num_experts", "topk", "num_tokens"])


def _expert_load(rows: pd.DataFrame) -> ExpertLoad:
    tokens, size, width, per_token, experts, tp, ep, hit = _floats(
        rows,
        "num_tokens",
        "hidden_size",
        "inter_size",
        "topk",
        "num_experts",
        "moe_tp_size",
        "moe_ep_size",
        "hit_of_all",
    )
    pairs = tokens * per_token / ep
    return ExpertLoad(
        rows=pairs, hit=np.minimum(hit / ep, pairs), experts=experts / ep, inner_size=size, width=width / tp
    )


def _experts_formula(gpu: GpuSheet, number_format: NumberFormat, rows: pd.DataFrame) -> Formula:
    return experts_formula(gpu, number_format, _expert_load(rows))


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
        found: dict[str, dict[str, object]] = {
            "gemm": {},
            "decode_attention": {},
            "prefill_attention": {},
            "experts": {},
        }
        for number_format in GEMM_FORMATS:
            rows = _gemm_rows(system, number_format)
            if len(rows):
                found["gemm"][number_format] = _stored(_fit(GEMM, _gemm_formula(gpu, number_format, rows), rows), rows)
        for operator, (kind, table, formula) in ATTENTION.items():
            for kv in ("bfloat16", "fp8"):
                for head_size in HEAD_SIZES:
                    rows = _attention_rows(kind, system, kv, head_size)
                    if len(rows):
                        fitted = _fit(table, formula(gpu, kv, rows), rows)
                        found[operator][f"{kv}/{head_size}"] = _stored(fitted, rows)
        for dtype, number_format in EXPERT_FORMATS.items():
            rows = _expert_rows(system, dtype)
            if len(rows):
                fitted = _fit(EXPERTS, _experts_formula(gpu, number_format, rows), rows)
                found["experts"][number_format] = _stored(fitted, rows)
        curves = {str(gpus): _all_reduce_curve(system, gpus) for gpus in (2, 4, 8)}
        path = data_path("operators", f"{name}.json")
        path.parent.mkdir(exist_ok=True)
        text = json.dumps({"gpu": name, "source": SOURCE, **found, "all_reduce": curves}, separators=(",", ":"))
        path.write_text(text.replace('},"', '},\n"') + "\n", encoding="utf-8")
        print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB")


def _print_held_out() -> None:
    """Fit on every second shape and print the errors on the others."""
    print("| operator | GPU | format | rows | median % | p90 % | bias % |\n|---|---|---|---|---|---|---|")
    for system, name in SYSTEMS.items():
        gpu = gpu_sheet(name)
        for rows_of in (_held_out_gemm, _held_out_attention, _held_out_experts):
            for label, errors in rows_of(system, gpu):
                signed = 100 * errors
                print(
                    f"| {label.replace('|', f'| {name} |')} | {len(errors)} | {np.median(abs(signed)):.1f} | "
                    f"{np.percentile(abs(signed), 90):.0f} | {np.median(signed):+.1f} |",
                    flush=True,
                )


def _held_out_gemm(system: str, gpu: GpuSheet) -> Iterator[Row]:
    for number_format in GEMM_FORMATS:
        rows = _gemm_rows(system, number_format)
        if rows.empty:
            continue
        seen_n, seen_k = sorted(rows.n.unique())[::2], sorted(rows.k.unique())[::2]
        seen = rows[rows.n.isin(seen_n) & rows.k.isin(seen_k)]
        other = rows[~rows.n.isin(seen_n) & ~rows.k.isin(seen_k) & (rows.n >= 256) & (rows.k >= 256)]
        grid = _fit(GEMM, _gemm_formula(gpu, number_format, seen), seen)
        yield f"GEMM | {number_format}", _errors(_gemm_formula(gpu, number_format, other), grid, other)


def _held_out_attention(system: str, gpu: GpuSheet) -> Iterator[Row]:
    for operator, (kind, table, formula) in ATTENTION.items():
        for kv in ("bfloat16", "fp8"):
            errors = []
            for head_size in HEAD_SIZES:
                rows = _attention_rows(kind, system, kv, head_size)
                if rows.empty:
                    continue
                is_seen = rows.num_heads.isin(sorted(rows.num_heads.unique())[::2])
                seen, other = rows[is_seen], rows[~is_seen]
                grid = _fit(table, formula(gpu, kv, seen), seen)
                errors.append(_errors(formula(gpu, kv, other), grid, other))
            if errors:
                yield f"{operator.replace('_', ' ')} | {kv} KV", np.concatenate(errors)


def _held_out_experts(system: str, gpu: GpuSheet) -> Iterator[Row]:
    for dtype, number_format in EXPERT_FORMATS.items():
        rows = _expert_rows(system, dtype)
        if rows.empty:
            continue
        family = rows.hidden_size.astype(str) + "/" + rows.num_experts.astype(str)
        if family.nunique() < 2:
            continue
        errors = []
        for left_out in sorted(family.unique()):
            seen, other = rows[family != left_out], rows[family == left_out]
            grid = _fit(EXPERTS, _experts_formula(gpu, number_format, seen), seen)
            errors.append(_errors(_experts_formula(gpu, number_format, other), grid, other))
        yield f"experts, a family left out | {dtype}", np.concatenate(errors)


if __name__ == "__main__":
    main()
