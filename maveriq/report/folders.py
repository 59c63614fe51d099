"""Writing a folder whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path

from maveriq.errors import InputError, MaveriqError, cannot_write

RUN_FILES = ("requests.csv", "deployments.csv", "gpus.csv", "run.json")
"""What makes a folder a run folder."""


def check_writable(folder: Path, *, files: Collection[str] = RUN_FILES) -> None:
    """Check that a folder of these files can be written there, before long work; leaves nothing behind.

    Raises:
        InputError: it is a file, or a folder that holds something else, or its place cannot be
            written to.
    """
    target = _checked(folder, files)
    ancestor = next(parent for parent in target.parents if parent.exists())
    try:
        tempfile.TemporaryDirectory(prefix=".maveriq-", dir=ancestor).cleanup()
    except OSError as error:
        raise _not_writable(target, error) from None


def write_folder(folder: Path, fill: Callable[[Path], None], *, files: Collection[str] = RUN_FILES) -> None:
    """Let `fill` write into a new folder beside `folder`, then put that in its place.

    Whatever goes wrong, `folder` is left as it was. A folder that is there is replaced if it is
    empty or has all of `files`, by which its kind is known.

    Raises:
        InputError: as for `check_writable`.
        MaveriqError: the disk is full.
    """
    target = _checked(folder, files)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # One private folder beside the target holds the new folder and, for a moment, the old one.
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
            fresh = Path(scratch) / "new"
            fresh.mkdir()
            fill(fresh)
            _swap(fresh, target, Path(scratch) / "old")
    except OSError as error:
        raise _not_writable(target, error) from None


def _swap(fresh: Path, target: Path, old: Path) -> None:
    if not target.exists():
        fresh.rename(target)
        return
    shutil.copymode(target, fresh)
    target.rename(old)
    try:
        fresh.rename(target)
    except BaseException:  # Ctrl-C too must leave what was there
        old.rename(target)
        raise


def _checked(folder: Path, files: Collection[str]) -> Path:
    """Return the whole path of a folder that may be written to, as far as names tell."""
    try:
        target = folder.expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:  # no such user, links that go round
        raise InputError(
            f"output folder {str(folder)!r} leads nowhere: {str(error).rstrip('.')}; name another folder"
        ) from None
    where = f"output folder {str(target)!r}"
    try:
        if target.exists() and not target.is_dir():
            raise InputError(f"{where} is a file; name a folder")
        names = {entry.name for entry in target.iterdir()} if target.exists() else set()
        if target.is_mount():
            raise InputError(f"{where} is a mount point and cannot be replaced; name a folder inside it")
        ancestor = next(parent for parent in target.parents if parent.exists())
        if not ancestor.is_dir():
            raise InputError(f"{where} would lie in {str(ancestor)!r}, which is a file; name another folder")
    except OSError as error:
        raise _not_writable(target, error) from None
    if names and not names.issuperset(files):
        what = "run" if files == RUN_FILES else f"folder with {', '.join(files)}"
        raise InputError(f"{where} holds files that are no {what} ({min(names)}, ...); name an empty or a new folder")
    return target


def _not_writable(target: Path, error: OSError) -> MaveriqError:
    return cannot_write(f"output folder {str(target)!r}", error)
