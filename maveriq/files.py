"""Paths of the package's data and of the workload tables in `traces/`, and atomic file writes.

`traces/` is next to the package in a clone and inside it in a wheel.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
from collections.abc import Iterator
from os import PathLike
from pathlib import Path

from maveriq.errors import InputError, cannot_write


def as_path(path: object, name: str) -> Path:
    """Return a path that was given as an argument.

    Raises:
        InputError: neither text nor a path.
    """
    if not isinstance(path, str | PathLike):
        raise InputError(f"{name} must be a path, not {path!r:.60}")
    return Path(path)


def not_overwritten(named: str) -> InputError:
    """Return the error of output that is there already; `named` is its kind and its path."""
    return InputError(
        f"{named} exists already; name another, or replace it with --overwrite (overwrite=True in Python)"
    )


def check_file_writable(path: Path, *, what: str, overwrite: bool) -> None:
    """Check, before long work, that a file may be created or replaced, as far as names tell.

    Raises:
        InputError: it is a folder, or is there already and may not be replaced.
    """
    if is_folder(path):
        raise InputError(f"{what} {str(path)!r} cannot be written: it is a folder; name a file")
    if not overwrite and os.path.lexists(path):
        raise not_overwritten(f"{what} {str(path)!r}")


@contextlib.contextmanager
def written_whole(path: Path, *, what: str, overwrite: bool) -> Iterator[Path]:
    """Yield a temporary path in the same folder to write to; it becomes `path` unless the block raises.

    Args:
        path: the file to create or replace; its folder must exist.
        what: the kind of file, for messages.
        overwrite: replace a file that is there.

    Raises:
        InputError: as for `check_file_writable`, or the path cannot be written to.
        MaveriqError: the disk is full.
    """
    check_file_writable(path, what=what, overwrite=overwrite)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        if overwrite:
            partial.replace(path)
        else:
            _rename_to_new(partial, path)
    except FileExistsError:
        raise not_overwritten(f"{what} {str(path)!r}") from None
    except OSError as error:
        raise cannot_write(f"{what} {str(path)!r}", error) from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def _rename_to_new(partial: Path, path: Path) -> None:
    """Rename a file, unless another process has made a file of that name meanwhile.

    Raises:
        FileExistsError: it has.
    """
    try:
        path.hardlink_to(partial)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if os.path.lexists(path):
            raise FileExistsError(path) from None
        partial.rename(path)


_PACKAGE = Path(__file__).parent


def data_path(*parts: str) -> Path:
    """Return the path of a file or folder in the package's `data`."""
    return _PACKAGE.joinpath("data", *parts)


def traces_path(*parts: str) -> Path:
    """Return the path of a file or folder in `traces`."""
    inside = _PACKAGE / "traces"
    return (inside if inside.is_dir() else _PACKAGE.parent / "traces").joinpath(*parts)


def studies_path(*parts: str) -> Path:
    """Return the path of a file or folder among the definitions of studies: `experiments/study` of a clone."""
    inside = _PACKAGE / "studies"
    return (inside if inside.is_dir() else _PACKAGE.parent / "experiments" / "study").joinpath(*parts)


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


def read_regular_file(path: Path, *, what: str, max_bytes: int) -> bytes:
    """Return the content of a regular file of limited size. A FIFO or a device is neither waited for nor read.

    Args:
        path: the file.
        what: the kind of file, for messages.
        max_bytes: its largest size.

    Raises:
        InputError: it is missing, or is not such a file.
    """
    named = f"{what} {str(path)!r}"
    try:
        with open_regular_file(path, what=what) as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read(max_bytes + 1) if size <= max_bytes else b""
    except OSError as error:
        raise cannot_read(named, error) from None
    if size > max_bytes or len(data) > max_bytes:
        raise InputError(f"{named} is larger than {max_bytes >> 20} MiB, which no such file is; give another file")
    return data


def open_regular_file(path: Path, *, what: str) -> io.FileIO:
    """Open a regular file for reading, without waiting for anything.

    Raises:
        InputError: it is missing, cannot be opened, or is a folder, a FIFO, a socket or a device.
    """
    named = f"{what} {str(path)!r}"
    try:
        # Opened before it is looked at, so that it cannot be exchanged in between; a FIFO does not block.
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except FileNotFoundError:
        raise InputError(f"{named} does not exist; check the path") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise cannot_read(named, error) from None
    mode = os.fstat(number).st_mode
    if stat.S_ISREG(mode):
        return io.FileIO(number, "r")
    os.close(number)
    kind = "a folder; name a file" if stat.S_ISDIR(mode) else "not a regular file; give another file"
    raise InputError(f"{named} is {kind}")


def cannot_read(named: str, error: Exception) -> InputError:
    """Return the error of a file that the system does not read; `named` is its kind and its path."""
    reason = error.strerror if isinstance(error, OSError) else None
    return InputError(f"{named} cannot be read: {reason or error}; give another file")


def read_regular_text(path: Path, *, what: str, max_bytes: int) -> str:
    """Return the text of a regular file, as `read_regular_file`.

    Raises:
        InputError: as there, or it is not UTF-8.
    """
    try:
        return read_regular_file(path, what=what, max_bytes=max_bytes).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{what} {str(path)!r} is not a text file in UTF-8") from None
