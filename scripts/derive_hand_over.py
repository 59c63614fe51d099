"""Prints what `maveriq/estimate/hand_over.py` rests on: collectives between two GPUs of a node.

    python scripts/derive_hand_over.py

The table holds four collectives without their names. All but the all-reduce send half of the message each way, and the
fastest stands for a send and a receive. Needs MAVERIQ_DATA (serving/ops_aic_nccl.csv.gz, from ai-dynamo/aiconfigurator,
Apache-2.0).
"""

from __future__ import annotations

import pandas as pd

from maveriq.domain.gpu_kinds import gpu_sheet
from maveriq.errors import InputError
from maveriq.files import measured_data_path

SYSTEMS = {"a100_sxm": "A100-80GB-SXM", "h100_sxm": "H100-SXM", "b200_sxm": "B200-SXM", "l40s": "L40S"}
VALUE_BYTES = 2


def main() -> None:
    """Print a row for each kind of GPU."""
    folder = measured_data_path()
    if folder is None:
        raise InputError("there is no folder of measured data; name one with MAVERIQ_DATA")
    rows = pd.read_csv(folder / "serving" / "ops_aic_nccl.csv.gz")
    rows = rows[(rows.num_gpus == 2) & (rows.nccl_dtype == "half")]
    print("| GPU | link | smallest message µs | largest: GB/s one way | of the link |\n|---|---|---|---|---|")
    for system, name in SYSTEMS.items():
        sheet = gpu_sheet(name)
        fastest_ms = rows[rows.system == system].groupby("message_size").latency_ms.min()
        sent_gb = VALUE_BYTES * fastest_ms.index[-1] / 2 / 1e9
        gb_per_s = sent_gb / (fastest_ms.iloc[-1] / 1e3)
        share = gb_per_s / sheet.link_gb_s
        print(f"| {name} | {sheet.link} | {1e3 * fastest_ms.iloc[0]:.1f} | {gb_per_s:.0f} | {share:.2f} |")


if __name__ == "__main__":
    main()
