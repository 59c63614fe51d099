"""Fit what launching a layer's kernels takes in steps that hold prefill, for engines whose graphs only decode.

Usage: python experiments/physics/fit_launches.py DATA_DIR

TensorRT-LLM and SGLang launch such steps kernel by kernel. Measured closed loops whose split is `fit` say how long that
takes: a factor of their times between tokens may be wrong (that of kernels, which three points would find), so that
what counts is how far rows of one model, format, GPU and version lie from their median. Prints that for several times,
for each model, and the best time for all models but it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import msgspec
import pandas as pd
from closed_loops import closed_loops, compared_loops

_LAUNCHES_US = (0, 100, 200, 300, 400, 500, 600, 900, 1200)
_ENGINES = ("trtllm-2026", "sglang-2026")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    rows = pd.DataFrame(_errors(parser.parse_args().data))
    rows["deviation %"] = 100 * (rows["error"] - rows.groupby(["group", "us"])["error"].transform("median")).abs()
    for engine, of_engine in rows.groupby("engine"):
        table = of_engine.pivot_table(index="model", columns="us", values="deviation %", aggfunc="mean")
        sys.stdout.write(f"\n{engine}: mean deviation of TPOT in %, by µs a layer\n")
        sys.stdout.write(f"{table.to_string(float_format=lambda value: f'{value:.2f}')}\n")
        sys.stdout.write(f"best: {table.mean().idxmin()}\n")
        for model in table.index:
            sys.stdout.write(f"best without {model}: {table.drop(index=model).mean().idxmin()}\n")


def _errors(data: Path) -> list[dict[str, object]]:
    """Return the error of each row of the engines for each time."""
    return [
        {
            "engine": case.preset.name,
            "model": case.labels["model"],
            "group": " ".join(case.labels[name] for name in ("model", "format", "GPU")) + case.preset.version,
            "us": launch_us,
            "error": loop.log_error(msgspec.structs.replace(case.preset, prefill_layer_us=float(launch_us))),
        }
        for case, loop in compared_loops(list(closed_loops(data)))
        if case.split == "fit" and case.preset.name in _ENGINES
        for launch_us in _LAUNCHES_US
    ]


if __name__ == "__main__":
    main()
