"""Temporary folders of this process, which a later process removes if this one is killed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

_LOCK = ".lock"


class ScratchFolder:
    """A private folder (mode 700) with a file that stays locked as long as its owner lives.

    Creating one removes those of the same prefix whose owner is gone.

    Args:
        prefix: of its name.
        parent: the folder to create it in; None for the system's folder of temporary files.

    Raises:
        OSError: it cannot be created.
    """

    def __init__(self, prefix: str, parent: Path | None = None) -> None:
        remove_abandoned(prefix, parent)
        self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        unlocked = self.path / f"{_LOCK}-new"
        self._lock = os.open(unlocked, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        with contextlib.suppress(OSError):  # a file system without locks: the folder is never taken for abandoned
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            unlocked.rename(self.path / _LOCK)  # under this name the file is always locked

    def cleanup(self) -> None:
        """Remove the folder. It may be called twice."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cleanup()


def remove_abandoned(prefix: str, parent: Path | None = None) -> None:
    """Remove this user's scratch folders of a prefix whose owner is gone."""
    for folder in _own_folders(prefix, parent or Path(tempfile.gettempdir())):
        with contextlib.suppress(OSError):  # no lock file, or it is locked
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _own_folders(prefix: str, parent: Path) -> Iterator[Path]:
    with contextlib.suppress(OSError), os.scandir(parent) as entries:
        for entry in entries:
            if not entry.name.startswith(prefix) or not entry.is_dir(follow_symlinks=False):
                continue
            status = entry.stat(follow_symlinks=False)
            if status.st_uid == os.getuid() and stat.S_IMODE(status.st_mode) == 0o700:
                yield Path(entry.path)
