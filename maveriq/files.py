"""Paths of the package's data and of the workload tables in `traces/`, and atomic file writes.

`traces/` is next to the package in a clone and inside it in a wheel.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from maveriq.errors import InputError, cannot_write


@contextlib.contextmanager
def written_whole(path: Path, *, what: str) -> Iterator[Path]:
    """Yield a temporary path in the same folder to write to; it replaces `path` unless the block raises.

    Args:
        path: the file to create or replace; its folder must exist.
        what: the kind of file, for messages.

    Raises:
        InputError: the path cannot be written to.
        MaveriqError: the disk is full.
    """
    if is_folder(path):
        raise InputError(f"{what} {str(path)!r} cannot be written: it is a folder; name a file")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        raise cannot_write(f"{what} {str(path)!r}", error) from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


_PACKAGE = Path(__file__).parent


def data_path(*parts: str) -> Path:
    """Return the path of a file or folder in the package's `data`."""
    return _PACKAGE.joinpath("data", *parts)


def traces_path(*parts: str) -> Path:
    """Return the path of a file or folder in `traces`."""
    inside = _PACKAGE / "traces"
    return (inside if inside.is_dir() else _PACKAGE.parent / "traces").joinpath(*parts)


def measured_data_path() -> Path | None:
    """Return the folder of published measurements, None if there is none.

    `MAVERIQ_DATA` names it; the default is `../shared/data` next to a clone.
    """
    named = os.environ.get("MAVERIQ_DATA")
    folder = Path(named) if named else _PACKAGE.parent.parent / "shared" / "data"
    return folder if folder.is_dir() else None


def exists(path: Path) -> bool:
    """Return whether a file or folder exists; False for a name that no file can have, such as one too long."""
    return os.path.exists(path)  # noqa: PTH110  (Path.exists raises for such a name)


def is_folder(path: Path) -> bool:
    """Return whether a folder exists; False for a name that no file can have."""
    return os.path.isdir(path)  # noqa: PTH112  (as above)
