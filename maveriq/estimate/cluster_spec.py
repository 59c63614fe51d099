"""Reads the cluster that a user names: `8xA6000`, or a TOML file (example: traces/cluster-8xA6000.toml)."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

import msgspec

from maveriq.domain.cluster import Cluster, Gpu
from maveriq.errors import InputError
from maveriq.estimate.hardware_profile import GpuKind, load_gpu_kind
from maveriq.tables import read_toml
from maveriq.units import Bytes, bytes_from_gib

MAX_GPUS = 10_000
"""Larger counts are rejected as typing errors."""

_SHORT = re.compile(r"(\d{1,9})x([^/\\.]+)")
_Gib = Annotated[float, msgspec.Meta(ge=0, le=1e6)]


class _ClusterFile(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    name: str
    gpu: str
    count: Annotated[int, msgspec.Meta(ge=1, le=MAX_GPUS)]
    gpus_per_node: Annotated[int, msgspec.Meta(ge=1)] | None = None
    memory_gib: _Gib | None = None
    used_gib: list[_Gib] | None = None


def cluster_from(text_or_path: str, own: GpuKind | None = None) -> Cluster:
    """Return the cluster that a user names.

    Args:
        text_or_path: COUNTxKIND, all in one node, such as `8xA6000`; or the path of a TOML file.
        own: a kind of GPU from the user's own profile, in addition to those that come with maveriq.

    Raises:
        InputError: neither of them, an unknown kind of GPU, no GPU, or an invalid file.
    """
    short = _SHORT.fullmatch(text_or_path)
    if short:
        return _from_short(text_or_path, int(short[1]), _kind(short[2], own))
    if _names_file(text_or_path):
        return _from_file(Path(text_or_path), own)
    raise InputError(
        f"GPUs {text_or_path!r}: write count and kind, such as 8xA6000, or give the path of a cluster's TOML file"
    )


def gpu_kind_in(text_or_path: str) -> str | None:
    """Return the kind of GPU of a cluster as the user wrote it; None where it is not written, as in `local`.

    Raises:
        InputError: an invalid file.
    """
    short = _SHORT.fullmatch(text_or_path)
    if short:
        return short[2]
    return _read(Path(text_or_path)).gpu if _names_file(text_or_path) else None


def _names_file(text: str) -> bool:
    return text.endswith(".toml") or os.sep in text


def _read(path: Path) -> _ClusterFile:
    return read_toml(path, _ClusterFile, what="cluster")


def _kind(name: str, own: GpuKind | None) -> GpuKind:
    return own if own and own.name.casefold() == name.casefold() else load_gpu_kind(name)


def _from_short(text: str, count: int, kind: GpuKind) -> Cluster:
    if not 1 <= count <= MAX_GPUS:
        raise InputError(f"GPUs {text!r}: the count must lie between 1 and {MAX_GPUS}")
    # Use the catalogue's spelling of the kind, so that 8xa6000 and 8xA6000 are the same cluster.
    return _cluster(f"{count}x{kind.name}", kind, gpus_per_node=count, used_bytes=[0] * count)


def _from_file(path: Path, own: GpuKind | None) -> Cluster:
    read = _read(path)
    kind = _kind(read.gpu, own)
    if read.memory_gib is not None:
        kind = GpuKind(name=kind.name, capacity_bytes=bytes_from_gib(read.memory_gib), idle_bytes=kind.idle_bytes)
    used_gib = [0.0] * read.count if read.used_gib is None else read.used_gib
    if len(used_gib) != read.count:
        raise InputError(
            f"cluster {str(path)!r}: used_gib has {len(used_gib)} numbers for {read.count} GPUs; give one for each"
        )
    used_bytes = [bytes_from_gib(amount) for amount in used_gib]
    try:
        return _cluster(read.name, kind, gpus_per_node=read.gpus_per_node or read.count, used_bytes=used_bytes)
    except InputError as error:
        raise InputError(f"cluster {str(path)!r}: {error}; lower used_gib or raise memory_gib") from None


def _cluster(name: str, kind: GpuKind, *, gpus_per_node: int, used_bytes: list[Bytes]) -> Cluster:
    return Cluster(
        name=name,
        gpus=tuple(
            Gpu(
                gpu_id=gpu_id,
                node=gpu_id // gpus_per_node,
                kind=kind.name,
                capacity_bytes=kind.capacity_bytes,
                idle_bytes=kind.idle_bytes + used,
            )
            for gpu_id, used in enumerate(used_bytes)
        ),
    )
