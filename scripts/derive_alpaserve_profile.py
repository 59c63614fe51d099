"""Derive the embedded AlpaServe profile from the published table.

Usage: python scripts/derive_alpaserve_profile.py profiles_float16.json [--out FILE.csv]

The published table is that of the AlpaServe placements of the MaverIQ paper (SC '25): float16, batch 1, A6000. All
stages of a shape are equal in it, so a row needs one latency and one weight. The script writes
maveriq/data/alpaserve/profile-float16.csv. Equal input gives equal files.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from maveriq.errors import InputError
from maveriq.files import data_path
from maveriq.policy.alpaserve.profiles import PUBLISHED_COLUMNS


def derive_profile(published: Path) -> str:
    """Return the table as CSV, in the order of the file.

    Raises:
        InputError: the stages of a shape differ, which the CSV table cannot express.
    """
    lines = [",".join(PUBLISHED_COLUMNS)]
    for model, entries in json.loads(published.read_text(encoding="utf-8"))["profiles"].items():
        for entry in entries:
            figures = [entry["stage_latency_s"], entry["stage_weight_bytes"]]
            if any(len(set(stages)) != 1 or len(stages) != entry["pp"] for stages in figures):
                raise InputError(f"{published}: the stages of {model}, tp {entry['tp']}, pp {entry['pp']} differ")
            cells = [model, entry["tp"], entry["pp"], *(repr(float(stages[0])) for stages in figures)]
            lines.append(",".join(map(str, cells)))
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("published", type=Path, help="profiles_float16.json")
    default = data_path("alpaserve", "profile-float16.csv")
    parser.add_argument("--out", type=Path, default=default, help="output file (default: in the package)")
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(derive_profile(arguments.published), encoding="utf-8")


if __name__ == "__main__":
    main()
