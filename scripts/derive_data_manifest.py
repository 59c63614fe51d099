"""Write maveriq/data/dataset-files.csv: the size and the SHA-256 of each file of the public data that maveriq reads.

Usage: python scripts/derive_data_manifest.py DIR

DIR is the folder of measured data. `maveriq data status` compares a user's folder with the table.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from maveriq.experiment.data_sets import FILE_COLUMNS, FILES_TABLE, read_data_sets, sha256_of


def main() -> None:
    """Hash the files of each data set and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DIR", help="folder of measured data")
    data: Path = parser.parse_args().data
    with FILES_TABLE.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(FILE_COLUMNS)
        for name in read_data_sets():
            for path in sorted((data / name).iterdir()):
                if path.suffix in (".csv", ".gz", ".json"):
                    table.writerow([name, path.name, path.stat().st_size, sha256_of(path)])


if __name__ == "__main__":
    main()
