"""Reads users' files within bounds: regular files only, unpacked while they are read, limited in size and line length.

gzip and zip are recognised by their first bytes, whatever the name of the file. Nothing waits for a pipe, and no
file, packed or not, takes more memory than its limit.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from maveriq.errors import InputError
from maveriq.files import cannot_read, open_regular_file

MAX_TEXT_BYTES = 64 << 20
"""The most that a file read as a whole may hold, unpacked."""

MAX_LINE_BYTES = 1 << 20
"""The longest line of a table."""

SMALLER = "give a smaller file"
"""What to do about a file that is too large."""

_MAX_ZIP_DIRECTORY_BYTES = 1 << 20
_CHUNK_BYTES = 1 << 20
_MAGIC_BYTES = 8
_START_BYTES = 1 << 16
_MAX_RATIO = 20  # tables of numbers shrink to a tenth; a file that shrank to a thousandth is made to fill memory
_ZIP_END, _ZIP_END_BYTES, _ZIP_COMMENT_BYTES = b"PK\x05\x06", 22, 1 << 16

# What is recognised by its first bytes but not read, and what to do about it.
_REFUSED = {
    b"\x28\xb5\x2f\xfd": "is packed with zstd; unpack it with zstd -d",
    b"\xfd7zXZ\x00": "is packed with xz; unpack it with xz -d",
    b"BZh": "is packed with bzip2; unpack it with bzip2 -d",
    b"7z\xbc\xaf\x27\x1c": "is packed with 7-Zip; unpack it first",
    b"PAR1": "is a Parquet file; convert it to CSV",
}

# What reading raises: the system, gzip (EOFError, zlib.error), zipfile (ValueError, BadZipFile; RuntimeError for an
# encrypted member, NotImplementedError for a method of packing that Python lacks).
_UNREADABLE = (OSError, EOFError, ValueError, zlib.error, zipfile.BadZipFile, RuntimeError, NotImplementedError)


@contextlib.contextmanager
def _open_unpacked(path: Path, *, what: str) -> Iterator[tuple[BinaryIO, int]]:
    """Open a regular file for reading in binary, unpacked if it is packed; also return the most that it may unpack to.

    Args:
        path: the file.
        what: the kind of file, for messages ("trace", "model set").

    Raises:
        InputError: the file is missing, is not a regular file, or cannot be read or unpacked; also while it is read
            within the block.
    """
    where = f"{what} {str(path)!r}"
    try:
        with io.BufferedReader(open_regular_file(path, what=what)) as file, _unpacked(file, where) as stream:
            packed_bytes = os.fstat(file.fileno()).st_size
            yield stream, sys.maxsize if stream is file else max(MAX_TEXT_BYTES, _MAX_RATIO * packed_bytes)
    except _UNREADABLE as error:
        raise cannot_read(where, error) from None


@contextlib.contextmanager
def _unpacked(file: BinaryIO, where: str) -> Iterator[BinaryIO]:
    head = file.read(_MAGIC_BYTES)
    file.seek(0)
    for magic, remedy in _REFUSED.items():
        if head.startswith(magic):
            raise InputError(f"{where} {remedy}")
    if head.startswith(b"\x1f\x8b"):
        with gzip.GzipFile(fileobj=file) as unpacked:
            yield cast("BinaryIO", unpacked)
    elif head.startswith((b"PK\x03\x04", _ZIP_END)):
        with _zip_archive(file, where) as archive, archive.open(_only_member(archive, where)) as member:
            yield cast("BinaryIO", member)
    else:
        yield file


def _zip_archive(file: BinaryIO, where: str) -> zipfile.ZipFile:
    """Open a zip archive whose directory is small, for it is read as a whole."""
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - _ZIP_END_BYTES - _ZIP_COMMENT_BYTES))
    tail = file.read()
    end = tail.rfind(_ZIP_END)
    directory_bytes = int.from_bytes(tail[end + 12 : end + 16], "little")
    if end >= 0 and directory_bytes > _MAX_ZIP_DIRECTORY_BYTES:
        raise InputError(f"{where} is a zip archive of too many files; give the one file that is meant")
    file.seek(0)
    return zipfile.ZipFile(file)


def _only_member(archive: zipfile.ZipFile, where: str) -> zipfile.ZipInfo:
    if "[Content_Types].xml" in archive.namelist():
        raise InputError(f"{where} is a spreadsheet; save it as CSV (UTF-8, separated by commas)")
    members = [
        member for member in archive.infolist() if not (member.is_dir() or member.filename.startswith("__MACOSX/"))
    ]
    if len(members) == 1 and members[0].compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise InputError(f"{where} is a zip archive that is packed in an unusual way; unpack it first")
    if len(members) != 1:
        raise InputError(f"{where} is a zip archive of {len(members)} files; give the one file that is meant")
    return members[0]


def read_text(path: Path, *, what: str, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """Return the text of a file, unpacked if it is packed.

    Args:
        path: the file.
        what: the kind of file, for messages.
        max_bytes: the most that it may hold, unpacked.

    Raises:
        InputError: the file cannot be read or unpacked, is not a regular file, is too large, or is not UTF-8.
    """
    where = f"{what} {str(path)!r}"
    data = bytearray()
    with _open_unpacked(path, what=what) as (stream, unpacked_bytes):
        limit = min(max_bytes, unpacked_bytes)
        while chunk := stream.read(_CHUNK_BYTES):
            data += chunk
            if len(data) > limit:
                raise _too_large(where, limit)
    return _decoded(data, where)


def read_chunks(path: Path, *, what: str, max_bytes: int, remedy: str = SMALLER) -> Iterator[bytes]:
    """Yield the content of a file in chunks of 1 MiB at most, unpacked if it is packed.

    Args:
        path: the file.
        what: the kind of file, for messages.
        max_bytes: the most that it may hold, unpacked.
        remedy: what to do about a larger one, for the message.

    Raises:
        InputError: the file cannot be read or unpacked, is not a regular file, or is too large.
    """
    size = 0
    with _open_unpacked(path, what=what) as (stream, unpacked_bytes):
        limit = min(max_bytes, unpacked_bytes)
        while chunk := stream.read(_CHUNK_BYTES):
            size += len(chunk)
            if size > limit:
                raise _too_large(f"{what} {str(path)!r}", limit, remedy)
            yield chunk


def read_head(path: Path, *, what: str) -> str:
    """Return the first 64 KiB of a file as text, unpacked if it is packed; what is not UTF-8 is replaced.

    Raises:
        InputError: the file cannot be read or unpacked, or is not a regular file.
    """
    with _open_unpacked(path, what=what) as (stream, _):
        return stream.read(_START_BYTES).decode("utf-8-sig", errors="replace")


def read_lines(path: Path, *, what: str, max_bytes: int, remedy: str = SMALLER) -> Iterator[str]:
    """Yield the lines of a text file with their line ends, one at a time, unpacked if the file is packed.

    Args:
        path: the file.
        what: the kind of file, for messages.
        max_bytes: the most that it may hold, unpacked.
        remedy: what to do about a larger one, for the message.

    Raises:
        InputError: the file cannot be read or unpacked, is not a regular file, is not UTF-8, or it or a line is too
            long.
    """
    where = f"{what} {str(path)!r}"
    encoding = "utf-8-sig"  # the first line may begin with a byte order mark
    rest = b""
    number, size = 1, 0
    with _open_unpacked(path, what=what) as (stream, unpacked_bytes):
        limit = min(max_bytes, unpacked_bytes)
        while chunk := stream.read(_CHUNK_BYTES):
            size += len(chunk)
            block, line_end, after = chunk.rpartition(b"\n")
            if len(rest) + (chunk.find(b"\n") if line_end else len(chunk)) > MAX_LINE_BYTES:
                raise InputError(f"{where}, line {number}: longer than {_in_mib(MAX_LINE_BYTES)}; give another file")
            if size > limit:
                raise _too_large(where, limit, remedy)
            if line_end:
                yield from io.StringIO(_decoded(rest + block + line_end, where, encoding), newline="\n")
                encoding = "utf-8"
                number += block.count(b"\n") + 1
                rest = after
            else:
                rest += after
    if rest:
        yield _decoded(rest, where, encoding)


def _decoded(data: bytes | bytearray, where: str, encoding: str = "utf-8-sig") -> str:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        utf16 = " (it looks like UTF-16; save it as UTF-8)" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else ""
        raise InputError(f"{where} is not a text file in UTF-8{utf16}") from None


def _too_large(where: str, limit: int, remedy: str = SMALLER) -> InputError:
    return InputError(f"{where} holds more than {_in_mib(limit)}; {remedy}")


def _in_mib(count: int) -> str:
    return f"{count >> 20} MiB"
