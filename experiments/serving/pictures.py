"""Pictures of simulated against measured times."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd


def draw(tables: Mapping[str, pd.DataFrame], folder: Path) -> None:
    """Draw a picture for each part: simulated over measured, and the diagonal."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    for name, table in tables.items():
        figures = [column.removesuffix(" ms") for column in table.columns if column.endswith(" ms")]
        figures = [figure for figure in figures if "p99" not in figure]
        drawing, axes = plt.subplots(1, len(figures), figsize=(3.4 * len(figures), 3.4), squeeze=False)
        for axis, figure in zip(axes[0], figures, strict=True):
            measured = table[f"{figure} ms"]
            for split, marker in (("fit", "o"), ("validate", "x")):
                chosen = table["split"] == split
                simulated = measured * (1 + table[f"{figure} %"] / 100)
                axis.loglog(measured[chosen], simulated[chosen], marker, markersize=3, label=split)
            ends = [measured.min(), measured.max()]
            axis.loglog(ends, ends, linewidth=0.7, color="grey")
            axis.set_xlabel(f"{figure} measured, ms")
            axis.set_ylabel("simulated, ms")
        axes[0][0].legend()
        drawing.tight_layout()
        drawing.savefig(folder / f"{name}.png", dpi=90, metadata={"Software": None})
        plt.close(drawing)
