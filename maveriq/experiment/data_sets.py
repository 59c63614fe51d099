"""The public data that maveriq reads but does not carry: where it comes from, and which of it a folder has."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import msgspec

from maveriq.files import cannot_read, data_path, exists
from maveriq.tables import read_csv, read_toml

FILES_TABLE = data_path("dataset-files.csv")
FILE_COLUMNS = ("dataset", "file", "bytes", "sha256")
_BLOCK = 1 << 20


class DataSet(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """A set of public files, in the folder of measured data below the set's name.

    Args:
        what: what it holds.
        used_by: what reads it.
        repository: where it is public.
        commit: the commit that its files are from, "" if it was not noted.
        where: the place in the repository.
        licence: its licence.
        note: what else a reader must know.
        unpack: commands that fetch it, with MAVERIQ_DATA set to the folder of measured data.
    """

    what: str
    used_by: str
    repository: str
    commit: str
    where: str
    licence: str
    note: str = ""
    unpack: str = ""


class _Described(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    datasets: dict[str, DataSet]


class FileState(StrEnum):
    """What a folder has of a file."""

    FOUND = "found"
    OTHER = "other content"
    MISSING = "missing"


@dataclass(frozen=True, slots=True, kw_only=True)
class FileStatus:
    """A file of a data set as a folder has it; `sha256` is what it should have."""

    path: str
    size_bytes: int
    sha256: str
    state: FileState


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSetStatus:
    """A data set as a folder has it."""

    name: str
    data_set: DataSet
    files: Sequence[FileStatus]

    def count(self, state: FileState) -> int:
        """Return how many files are in a state."""
        return sum(file.state is state for file in self.files)

    @property
    def is_complete(self) -> bool:
        """Whether no file is missing; other content is allowed, since a user may have more runs."""
        return not self.count(FileState.MISSING)


def read_data_sets() -> Mapping[str, DataSet]:
    """Return the data sets by name."""
    return read_toml(data_path("datasets.toml"), _Described, what="list of data sets").datasets


def status_of(folder: Path | None, *, only: str = "") -> list[DataSetStatus]:
    """Return what a folder of measured data has of each data set, or `only` of one; None has nothing.

    Raises:
        InputError: a file cannot be read.
    """
    files: dict[str, list[FileStatus]] = {}
    for row in read_csv(FILES_TABLE, FILE_COLUMNS, what="files of data sets"):
        name, path, sha256 = row.text("dataset"), row.text("file"), row.text("sha256")
        if only not in ("", name):
            continue
        state = FileState.MISSING if folder is None else _state(folder / name / path, sha256)
        file = FileStatus(path=f"{name}/{path}", size_bytes=row.count("bytes"), sha256=sha256, state=state)
        files.setdefault(name, []).append(file)
    return [
        DataSetStatus(name=name, data_set=data_set, files=files.get(name, []))
        for name, data_set in read_data_sets().items()
        if only in ("", name)
    ]


def _state(path: Path, sha256: str) -> FileState:
    if not exists(path):
        return FileState.MISSING
    return FileState.FOUND if sha256_of(path) == sha256 else FileState.OTHER


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal.

    Raises:
        InputError: it cannot be read.
    """
    found = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                found.update(block)
    except OSError as error:
        raise cannot_read(f"file {str(path)!r}", error) from None
    return found.hexdigest()
