"""Writing a file whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from maveriq.errors import InputError, cannot_write
from maveriq.tables import is_folder


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
