"""Files: the package's data, the workload tables in `traces/`, and files written whole or not at all.

`traces/` is beside the package in a clone and inside it in a wheel.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from maveriq.errors import InputError, cannot_write


@contextlib.contextmanager
def written_whole(path: Path, *, what: str) -> Iterator[Path]:
    """Give a name beside `path` to write to; the file then takes the place of `path`, unless an error came.

    Args:
        path: the file to make or replace; its folder must be there.
        what: what the file is, for messages.

    Raises:
        InputError: the place cannot be written to.
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
    """Return the folder of measured data of others, None where there is none.

    It is named by `MAVERIQ_DATA`, else it is `../shared/data` beside a clone.
    """
    named = os.environ.get("MAVERIQ_DATA")
    folder = Path(named) if named else _PACKAGE.parent.parent / "shared" / "data"
    return folder if folder.is_dir() else None


def exists(path: Path) -> bool:
    """Say whether a file or folder is there; a name that no file can have (too long, say) is not."""
    return os.path.exists(path)  # noqa: PTH110  (Path.exists raises for such a name)


def is_folder(path: Path) -> bool:
    """Say whether a folder is there, for any name as `exists`."""
    return os.path.isdir(path)  # noqa: PTH112  (as above)
