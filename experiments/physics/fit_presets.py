"""Print the fields of engine presets as they are fitted to measured times.

Usage: python experiments/physics/fit_presets.py DATA_DIR

DATA_DIR contains `serving`, `a6000` and `models`. `maveriq/data/engine_presets.toml` holds the rounded figures.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fits import FITS, fitted


def main() -> None:
    """Fit each preset, and print its fields."""
    data = Path(sys.argv[1])
    for name, fit in FITS.items():
        found = fitted(name, list(fit.read(data)))
        fields = ", ".join(f"{field} = {getattr(found, field):.4g}" for field in fit.free)
        sys.stdout.write(f"[{name}] {fields}\n")


if __name__ == "__main__":
    main()
