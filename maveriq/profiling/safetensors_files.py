"""Reads single tensors of a checkpoint, and writes one, as bytes, without torch.

The format is that of https://github.com/huggingface/safetensors#format: the length of a JSON object in eight bytes, the
object (type, shape and place of each tensor), then the tensors. Files of others are not trusted: all sizes are checked
against each other and against the file before anything is allocated or read.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maveriq.errors import InputError
from maveriq.exec.model_files import check_inside, check_weights, read_model_file, safetensors_header
from maveriq.files import exists, open_regular_file
from maveriq.units import Bytes

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "C64": 64,
}  # fmt: skip
_CHUNK_BYTES = 16 << 20
_SHARD_BYTES = 4 << 30
_LENGTH_BYTES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor in a safetensors file, without its values.

    Args:
        name: its name.
        dtype: its type, as the file names it ("BF16").
        shape: its sizes.
        file: the file.
        start: where in the file it begins, in bytes.
        size: its bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    size: Bytes

    def chunks(self) -> Iterator[bytes]:
        """Yield its bytes, at most 16 MiB at a time.

        Raises:
            InputError: the file has become shorter.
        """
        yield from self._read([(0, self.size)])

    def slice_chunks(self, axis: int, parts: int, chosen: Sequence[int]) -> Iterator[bytes]:
        """Yield the bytes of the tensor that keeps some of the equal parts in which an axis is divided.

        Args:
            axis: the axis.
            parts: how many parts it is divided in.
            chosen: the parts to keep, in order.

        Raises:
            InputError: the file has become shorter.
        """
        rows = math.prod(self.shape[:axis])
        row_bytes = self.size // rows
        part_bytes = row_bytes // parts
        if rows == 1:
            yield from self._read([(part * part_bytes, part_bytes) for part in chosen])
            return
        at_once = max(1, _CHUNK_BYTES // row_bytes)
        for first in range(0, rows, at_once):
            count = min(at_once, rows - first)
            block = memoryview(b"".join(self._read([(first * row_bytes, count * row_bytes)])))
            yield b"".join(
                block[row * row_bytes + part * part_bytes : row * row_bytes + (part + 1) * part_bytes]
                for row in range(count)
                for part in chosen
            )

    def _read(self, ranges: Sequence[tuple[int, Bytes]]) -> Iterator[bytes]:
        """Yield ranges of its bytes, each a start within the tensor and a size."""
        with open_regular_file(self.file, what="weights") as file:
            for start, size in ranges:
                file.seek(self.start + start)
                left = size
                while left:
                    chunk = file.read(min(left, _CHUNK_BYTES))
                    if not chunk:
                        raise InputError(f"weights {str(self.file)!r} ended while {self.name} was read; try again")
                    left -= len(chunk)
                    yield chunk


@dataclass(frozen=True, slots=True, kw_only=True)
class NewTensor:
    """A tensor to be written.

    Args:
        name: its name.
        dtype: its type, as safetensors files name it.
        shape: its sizes.
        chunks: yields its bytes in pieces.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[bytes]]

    @property
    def size(self) -> Bytes:
        """Its bytes."""
        return bytes_of(self.dtype, self.shape)


def bytes_of(dtype: str, shape: Sequence[int]) -> Bytes:
    """Return the bytes of a tensor of a type that safetensors files name."""
    return math.prod(shape) * _BITS[dtype] // 8


class Checkpoint:
    """The safetensors files of a model's folder; of files that are not asked for nothing is read.

    Args:
        folder: the folder.

    Raises:
        InputError: it has no safetensors files, one is a link out of it, or its index cannot be used.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._headers: dict[Path, Mapping[str, StoredTensor]] = {}
        check_weights(folder)
        index = read_model_file(folder, INDEX_FILE, what="index of weights")
        if index is not None:
            self._files = _indexed_files(folder, index)
            return
        single = folder / SINGLE_FILE
        files = [single] if exists(single) else sorted(folder.glob("*.safetensors"))
        self._files = {}
        for file in files:
            for name in self._header(file):
                if name in self._files:
                    raise InputError(
                        f"weights in {str(folder)!r}: {self._files[name].name} and {file.name} both have {name}, and "
                        f"no {INDEX_FILE} says which counts; remove one of them"
                    )
                self._files[name] = file

    @property
    def names(self) -> Sequence[str]:
        """The names of all tensors."""
        return list(self._files)

    def tensor(self, name: str) -> StoredTensor:
        """Return a tensor by its name.

        Raises:
            InputError: its file is missing, is truncated, is no safetensors file or lacks it.
        """
        file = self._files[name]
        found = self._header(file).get(name)
        if found is None:
            raise InputError(f"weights {str(file)!r} lack {name}, which {INDEX_FILE} places there; get the file again")
        return found

    def _header(self, file: Path) -> Mapping[str, StoredTensor]:
        if file not in self._headers:
            if not exists(file):
                raise InputError(
                    f"weights {str(file)!r} do not exist, but {INDEX_FILE} names the file; get the missing file"
                )
            check_inside(file, self.folder, what="weights")
            self._headers[file] = _tensors_of(file)
        return self._headers[file]


def _indexed_files(folder: Path, index: str) -> dict[str, Path]:
    where = f"index of weights {str(folder / INDEX_FILE)!r}"
    try:
        files = json.loads(index)["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError):
        files = None
    if not isinstance(files, dict) or not files:
        raise InputError(f"{where} has no weight_map that says in which file each tensor is; get the file again")
    for name, file in files.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors") or "\0" in file:
            raise InputError(f"{where}: {name[:80]} is in {str(file)[:80]!r}, which is no name of a safetensors file")
    return {name: folder / file for name, file in files.items()}


def _tensors_of(file: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a file, from its header.

    Raises:
        InputError: the header says what cannot be.
    """
    header, data_start, file_bytes = safetensors_header(file)
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        tensor = _tensor(file, name, entry, data_start)
        if tensor is None:
            raise InputError(f"weights {str(file)!r} cannot be read: type, shape and place of {name[:80]} do not fit")
        if tensor.start + tensor.size > file_bytes:
            raise InputError(
                f"weights {str(file)!r} are truncated: {name[:80]} ends at byte {tensor.start + tensor.size:,} of "
                f"{file_bytes:,}; get the file again"
            )
        found[name] = tensor
    return found


def _tensor(file: Path, name: str, entry: Mapping[str, Any], data_start: int) -> StoredTensor | None:
    dtype, shape, place = entry["dtype"], entry["shape"], entry.get("data_offsets")
    if dtype not in _BITS or len(shape) > 16 or not isinstance(place, list) or len(place) != 2:
        return None
    if not all(
        isinstance(size, int) and not isinstance(size, bool) and 0 <= size < 1 << 48 for size in [*shape, *place]
    ):
        return None
    start, end = place
    if end - start != bytes_of(dtype, shape):
        return None
    return StoredTensor(
        name=name, dtype=dtype, shape=tuple(shape), file=file, start=data_start + start, size=end - start
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What was written: bytes of files, and the seconds that the disk took for them."""

    size: Bytes
    seconds: float


def write_checkpoint(folder: Path, tensors: Sequence[NewTensor], *, shard_bytes: Bytes = _SHARD_BYTES) -> Written:
    """Write tensors into one safetensors file, or into several with an index.

    No more than a chunk of a tensor is in memory. The time in which chunks are made does not count.

    Args:
        folder: the folder, which must exist and have no such files.
        tensors: what to write.
        shard_bytes: the bytes of tensors in a file, unless a single one is larger.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
    """
    shards = _shards(tensors, shard_bytes)
    if len(shards) == 1:
        return _write_file(folder / SINGLE_FILE, shards[0])
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    written = [_write_file(folder / name, shard) for name, shard in zip(names, shards, strict=True)]
    index = {
        "metadata": {"total_size": sum(tensor.size for tensor in tensors)},
        "weight_map": {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard},
    }
    text = json.dumps(index, indent=1)
    (folder / INDEX_FILE).write_text(text, encoding="utf-8")
    return Written(size=sum(file.size for file in written) + len(text), seconds=sum(file.seconds for file in written))


def _shards(tensors: Sequence[NewTensor], shard_bytes: Bytes) -> list[list[NewTensor]]:
    shards: list[list[NewTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.size > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.size
    return shards


def _write_file(path: Path, tensors: Sequence[NewTensor]) -> Written:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.size
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    seconds = 0.0
    with path.open("xb") as file:
        file.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
        for tensor in tensors:
            for chunk in tensor.chunks():
                started = time.perf_counter()
                file.write(chunk)
                seconds += time.perf_counter() - started
        started = time.perf_counter()
        file.flush()
        os.fsync(file.fileno())
        return Written(size=file.tell(), seconds=seconds + time.perf_counter() - started)
