"""Where the tables that come with maveriq lie.

Facts about models and GPUs are in `maveriq/data`. Workload tables are in `traces/`, which lies
beside the package in a clone and inside it in a wheel.
"""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).parent


def data_path(*parts: str) -> Path:
    """Return the path of a file or folder in the package's `data`."""
    return _PACKAGE.joinpath("data", *parts)


def traces_path(*parts: str) -> Path:
    """Return the path of a file or folder in `traces`."""
    inside = _PACKAGE / "traces"
    return (inside if inside.is_dir() else _PACKAGE.parent / "traces").joinpath(*parts)


def measured_data_path() -> Path | None:
    """Return the folder of measured data of others, None where there is none.

    It is named by `MAVERIQ_DATA`, else it is `../shared/data` beside a clone.
    """
    named = os.environ.get("MAVERIQ_DATA")
    folder = Path(named) if named else _PACKAGE.parent.parent / "shared" / "data"
    return folder if folder.is_dir() else None
