"""Derives the constants of `maveriq.estimate.operators.mixed_attention_us` from measured calls of FlashAttention 2.

    python scripts/derive_mixed_attention.py            # prints the constants and their errors

Needs MAVERIQ_DATA, the folder of measured data (serving/ops_llmservingsim_attention_mixed.csv.gz, from
casys-kaist/LLMServingSim, MIT). A call takes a chunk of a prompt and sequences that decode; both were also measured
alone.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

from maveriq.domain.gpu_kinds import gpu_sheet
from maveriq.estimate.log_grid import Array
from maveriq.estimate.operators import Heads, mixed_attention_us
from maveriq.files import measured_data_path

SOURCE = "ops_llmservingsim_attention_mixed.csv.gz"
FITTED_TO = "RTX-PRO-6000"
GPUS = {"RTXPRO6000": FITTED_TO, "RTX4090": "RTX-4090"}
HEADS = {
    "meta-llama/Llama-3.1-8B": (32, 8),
    "Qwen/Qwen3-30B-A3B-Instruct-2507": (32, 4),
    "Qwen/Qwen3-32B": (64, 8),
}
"""Query and KV heads of the measured models; each head has 128 values."""


def main() -> None:
    """Fit the constants to one GPU and print errors on both."""
    rows = _rows()
    fitted = rows[rows.gpu == FITTED_TO]
    sample = fitted.sample(8000, random_state=0)
    found = least_squares(
        lambda shares: _errors(sample, *shares), [0.5, 0.8], loss="soft_l1", f_scale=0.1, bounds=(0.05, 1.0)
    ).x
    print(f"share of the speed {found[0]:.2f}, of the bandwidth {found[1]:.2f}, fitted to {FITTED_TO}")
    for gpu, of_gpu in rows.groupby("gpu"):
        alone = 100 * np.log((of_gpu.chunk_us + of_gpu.decode_us) / of_gpu.time_us).to_numpy()
        mixed = 100 * _errors(of_gpu, *np.round(found, 2))
        print(
            f"| {gpu} | {len(of_gpu)} | {np.median(abs(alone)):.1f}, {np.median(alone):+.1f} | "
            f"{np.median(abs(mixed)):.1f}, {np.percentile(abs(mixed), 90):.0f}, {np.median(mixed):+.1f} |"
        )


def _rows() -> pd.DataFrame:
    """Return the mixed calls, with the times of their chunk and of their decoding sequences alone."""
    data = measured_data_path()
    if data is None:
        raise SystemExit("derive_mixed_attention: set MAVERIQ_DATA to the folder of measured data")
    rows = pd.read_csv(data / "serving" / SOURCE)
    rows["gpu"] = rows.gpu.map(GPUS)
    setting, chunk, decode = ["gpu", "model", "tp"], ["prefill_chunk", "kv_prefill"], ["n_decode", "kv_decode"]
    chunk_us = rows[rows.n_decode == 0].set_index(setting + chunk).time_us.rename("chunk_us")
    decode_us = rows[rows.prefill_chunk == 0].set_index(setting + decode).time_us.rename("decode_us")
    mixed = rows[(rows.n_decode > 0) & (rows.prefill_chunk > 0)]
    return mixed.join(chunk_us, on=setting + chunk).join(decode_us, on=setting + decode).dropna()


def _errors(rows: pd.DataFrame, speed_share: float, bandwidth_share: float) -> Array:
    """Return the logarithms of estimated over measured time."""
    parts = []
    for (gpu, model, tp), alike in rows.groupby(["gpu", "model", "tp"]):
        heads, kv_heads = (count / tp for count in HEADS[str(model)])
        added_us = mixed_attention_us(
            gpu_sheet(str(gpu)), 2.0, alike.n_decode.to_numpy(float), alike.kv_decode.to_numpy(float) + 1,
            Heads(heads=heads, kv_heads=kv_heads, head_size=128),
            speed_share=speed_share, bandwidth_share=bandwidth_share,
        )  # fmt: skip
        parts.append(np.log((alike.chunk_us + added_us) / alike.time_us).to_numpy())
    return np.concatenate(parts)


if __name__ == "__main__":
    main()
