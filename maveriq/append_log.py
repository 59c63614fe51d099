"""Logs of JSON lines that one process appends to, so that long work goes on after any end of that process.

A line is on the disk before the next piece of work begins. A last line that a crash cut short is dropped.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec

from maveriq.errors import InputError, cannot_write

_ENCODER = msgspec.json.Encoder()


class LogInUseError(InputError):
    """Another process writes to the log."""


class AppendLog:
    """An open log that no other process writes to (mutable).

    Args:
        path: of the file.
        file: opened to append and read, and locked.
        text: the whole lines that were there.
    """

    def __init__(self, path: Path, file: BinaryIO, text: bytes) -> None:
        self._path = path
        self._file = file
        self.text = text

    def append(self, *records: msgspec.Struct) -> None:
        """Append a line for each record; they are on the disk when this returns.

        Raises:
            MaveriqError: the disk is full.
        """
        try:
            self._file.write(b"".join(_ENCODER.encode(record) + b"\n" for record in records))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise cannot_write(f"log {str(self._path)!r}", error) from None

    def clear(self) -> None:
        """Remove all lines."""
        self._file.truncate(0)
        self.text = b""


def whole_lines(text: bytes) -> bytes:
    """Return a text without a last line that has no end."""
    return text[: text.rfind(b"\n") + 1]


@contextlib.contextmanager
def open_append_log(path: Path, *, max_bytes: int) -> Iterator[AppendLog]:
    """Open a log, which is made if it is missing, and lock it until the block ends or the process does.

    Args:
        path: of the file; its folder is made if it is missing.
        max_bytes: the largest log that is read.

    Raises:
        LogInUseError: another process writes to it.
        InputError: it is larger, or cannot be written to.
        MaveriqError: the disk is full.
    """
    named = f"log {str(path)!r}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab+")
    except OSError as error:
        raise cannot_write(named, error) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise LogInUseError(f"another process writes {str(path)!r}; wait for it, or name another folder") from None
        if os.fstat(file.fileno()).st_size > max_bytes:
            raise InputError(f"{named} is larger than any that maveriq writes; name another folder")
        file.seek(0)
        text = file.read()
        whole = whole_lines(text)
        if len(whole) < len(text):
            file.truncate(len(whole))
        yield AppendLog(path, file, whole)
