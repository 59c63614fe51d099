"""The folder of a sweep: what it is, and a line for each finished cell, so that it can go on after any end.

`sweep.json` holds the sweep. `cells.jsonl` grows by a line for each cell, which is on the disk before the next one is
reported. Its lock keeps two sweeps out of one folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from maveriq import __version__
from maveriq.append_log import AppendLog, LogInUseError, open_append_log, whole_lines
from maveriq.errors import InputError, cannot_write
from maveriq.files import not_overwritten, read_regular_file
from maveriq.sweeps.spec import SweepSpec
from maveriq.sweeps.worker import CellResult

SPEC_FILE, CELLS_FILE, RUNS_FOLDER = "sweep.json", "cells.jsonl", "runs"
TABLE_FILES = ("cells.csv", "cells.parquet", "seeds.csv", "comparison.csv")
_MAX_BYTES = 1 << 30


class _Described(msgspec.Struct, frozen=True, kw_only=True):
    """What `sweep.json` holds."""

    maveriq: str
    sweep: SweepSpec


class SweepFolder:
    """A folder that this process alone writes to (mutable).

    Args:
        path: the folder.
        finished: the cells that were simulated before, by number.
        log: the open `cells.jsonl`.
    """

    def __init__(self, path: Path, finished: dict[int, CellResult], log: AppendLog) -> None:
        self.path = path
        self.finished: Mapping[int, CellResult] = finished
        self._log = log

    def add(self, result: CellResult) -> None:
        """Append a finished cell; it is on the disk when this returns."""
        self._log.append(result)


@contextmanager
def open_folder(path: Path, spec: SweepSpec, *, overwrite: bool) -> Iterator[SweepFolder]:
    """Yield the folder of a sweep: a new one, or one that the same sweep has begun.

    Args:
        path: the folder; it is made if it is missing.
        spec: the sweep.
        overwrite: start anew where the folder holds another sweep, or this one.

    Raises:
        InputError: it holds something else, another sweep, or results of another version of maveriq; another process
            writes to it; it cannot be written to.
    """
    named = f"sweep folder {str(path)!r}"
    foreign = InputError(f"{named} holds files that are no sweep; name an empty or a new folder")
    try:
        is_new = not (path / SPEC_FILE).exists()
        if is_new and path.exists() and any(entry.name != CELLS_FILE for entry in path.iterdir()):
            raise foreign
        with open_append_log(path / CELLS_FILE, max_bytes=_MAX_BYTES) as log:
            if is_new and log.text:
                raise foreign
            if not is_new and overwrite:
                _clear(path, log)
                is_new = True
            if is_new:
                _write_spec(path, spec)
            else:
                _check_same(path, spec, named)
            cells = _cells(log.text, named)
            finished = {number: result for number, result in cells.items() if not result.error}
            yield SweepFolder(path, finished, log)
    except LogInUseError:
        raise InputError(f"{named} is in use by another sweep; wait for it, or name another folder") from None
    except OSError as error:
        raise cannot_write(named, error) from None


def _clear(path: Path, log: AppendLog) -> None:
    """Remove what a sweep left; runs that were kept stay until their cell replaces them."""
    log.clear()
    for name in (SPEC_FILE, *TABLE_FILES):
        with suppress(FileNotFoundError):
            (path / name).unlink()


def _write_spec(path: Path, spec: SweepSpec) -> None:
    partial = path / f".{SPEC_FILE}.partial"
    partial.write_bytes(msgspec.json.format(msgspec.json.encode(_Described(maveriq=__version__, sweep=spec))) + b"\n")
    partial.replace(path / SPEC_FILE)


def _check_same(path: Path, spec: SweepSpec, named: str) -> None:
    """Check that a folder was begun by the same sweep and version."""
    found = _described(path, named)
    if found.maveriq != __version__:
        raise InputError(
            f"{named} has results of maveriq {found.maveriq}, and this is {__version__}; name another folder, or start "
            "anew with --overwrite"
        )
    if msgspec.json.encode(found.sweep) != msgspec.json.encode(spec):
        raise not_overwritten(f"another sweep, {found.sweep.name!r}, in {named}")


def read_folder(path: Path) -> tuple[SweepSpec, dict[int, CellResult]]:
    """Return a sweep and what became of its cells so far, by number; failed ones too. Nothing is written.

    Raises:
        InputError: the folder holds no sweep, or its files are damaged.
    """
    named = f"sweep folder {str(path)!r}"
    spec = _described(path, named).sweep
    data = read_regular_file(path / CELLS_FILE, what="sweep folder", max_bytes=_MAX_BYTES)
    return spec, _cells(whole_lines(data), named)


def _described(path: Path, named: str) -> _Described:
    data = read_regular_file(path / SPEC_FILE, what="sweep folder", max_bytes=_MAX_BYTES)
    try:
        return msgspec.json.decode(data, type=_Described)
    except (msgspec.DecodeError, RecursionError):
        raise InputError(f"{named}: {SPEC_FILE} is damaged; start anew with --overwrite") from None


def _cells(text: bytes, named: str) -> dict[int, CellResult]:
    """Return the cells of the log by number."""
    cells = {}
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            result = msgspec.json.decode(line, type=CellResult)
        except (msgspec.DecodeError, RecursionError):
            raise InputError(
                f"{named}: line {number} of {CELLS_FILE} is damaged; start anew with --overwrite"
            ) from None
        cells[result.number] = result
    return cells
