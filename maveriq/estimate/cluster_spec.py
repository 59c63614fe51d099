"""Reads the cluster that a user names: `16xH100`, or a TOML file (examples: traces/cluster-*.toml)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec

from maveriq.domain.cluster import DEFAULT_NETWORK_GBPS, Cluster, Gpu, Node
from maveriq.errors import InputError
from maveriq.estimate.hardware_profile import GpuKind, load_gpu_kind
from maveriq.tables import read_toml
from maveriq.units import Bytes, bytes_from_gib

MAX_GPUS = 10_000
"""Larger counts are rejected as typing errors."""

_SHORT = re.compile(r"(\d{1,9})\s*[xX]\s*([^/\\.]+)")
_Gib = Annotated[float, msgspec.Meta(ge=0, le=1e6)]
_Positive = Annotated[float, msgspec.Meta(gt=0, le=1e6)]
_Count = Annotated[int, msgspec.Meta(ge=1, le=MAX_GPUS)]


class _Gpus(msgspec.Struct, frozen=True, kw_only=True):
    """What the file says of equal GPUs."""

    gpu: str
    count: _Count
    memory_gib: _Gib | None = None
    used_gib: list[_Gib] | None = None
    network_gbps: _Positive = DEFAULT_NETWORK_GBPS
    usd_per_hour: _Positive | None = None


class _OneKindFile(_Gpus, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """A file without `[[nodes]]`: GPUs of one kind."""

    name: str
    gpus_per_node: Annotated[int, msgspec.Meta(ge=1)] | None = None


class _NodeTable(_Gpus, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """An entry of `[[nodes]]`: a node with `count` GPUs, or `repeat` such nodes."""

    repeat: _Count = 1


class _NodesFile(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    name: str
    nodes: Annotated[list[_NodeTable], msgspec.Meta(min_length=1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _NodeGpus:
    """The GPUs of one node, with the memory that is used on each, and the node."""

    kind: GpuKind
    used_bytes: Sequence[Bytes]
    node: Node


def cluster_from(text_or_path: str, own: Sequence[GpuKind] = ()) -> Cluster:
    """Return the cluster that a user names.

    Args:
        text_or_path: COUNTxKIND, on nodes of the kind's usual size, such as `16xH100`; or the path of a TOML file.
        own: kinds of GPU from profiles, in addition to those that come with maveriq.

    Raises:
        InputError: neither of them, an unknown kind of GPU, no GPU, or an invalid file.
    """
    short = _SHORT.fullmatch(text_or_path)
    if short:
        count, kind = int(short[1]), _kind(short[2], own)
        if not 1 <= count <= MAX_GPUS:
            raise InputError(f"GPUs {text_or_path!r}: the count must lie between 1 and {MAX_GPUS}")
        # Use the catalogue's spelling of the kind, so that 8xa6000 and 8xA6000 are the same cluster.
        return _cluster(f"{count}x{kind.name}", _filled(kind, [0] * count, kind.gpus_per_node or count, Node()))
    if not _names_file(text_or_path):
        raise InputError(
            f"GPUs {text_or_path!r}: write count and kind, such as 8xA6000, or give the path of a cluster's TOML file"
        )
    return _from_file(Path(text_or_path), own)


def gpu_kinds_in(text_or_path: str) -> tuple[str, ...]:
    """Return the kinds of GPU of a cluster as the user wrote them; () where none is written, as in `local`.

    Raises:
        InputError: an invalid file.
    """
    short = _SHORT.fullmatch(text_or_path)
    if short:
        return (short[2],)
    if not _names_file(text_or_path):
        return ()
    read = _read(Path(text_or_path))
    return (read.gpu,) if isinstance(read, _OneKindFile) else tuple(dict.fromkeys(node.gpu for node in read.nodes))


def _names_file(text: str) -> bool:
    return text.endswith(".toml") or os.sep in text


def _read(path: Path) -> _OneKindFile | _NodesFile:
    has_nodes = "nodes" in read_toml(path, dict[str, Any], what="cluster")
    return read_toml(path, _NodesFile, what="cluster") if has_nodes else read_toml(path, _OneKindFile, what="cluster")


def _kind(name: str, own: Sequence[GpuKind]) -> GpuKind:
    found = next((kind for kind in own if kind.name.casefold() == name.casefold()), None)
    return found or load_gpu_kind(name)


def _from_file(path: Path, own: Sequence[GpuKind]) -> Cluster:
    read, where = _read(path), f"cluster {str(path)!r}"
    if isinstance(read, _OneKindFile):
        kind = _kind_of(read, own)
        gpus_per_node = read.gpus_per_node or kind.gpus_per_node or read.count
        nodes = list(_filled(kind, _used_bytes(read, where), gpus_per_node, _node(read)))
    else:
        gpus = sum(table.count * table.repeat for table in read.nodes)
        if gpus > MAX_GPUS:
            raise InputError(f"{where}: {gpus} GPUs are too many; at most {MAX_GPUS} are allowed")
        nodes = [
            _NodeGpus(
                kind=_kind_of(table, own),
                used_bytes=_used_bytes(table, f"{where}: entry {number} of nodes"),
                node=_node(table),
            )
            for number, table in enumerate(read.nodes, start=1)
            for _ in range(table.repeat)
        ]
    try:
        return _cluster(read.name, nodes)
    except InputError as error:
        raise InputError(f"{where}: {error}; lower used_gib or raise memory_gib") from None


def _kind_of(table: _Gpus, own: Sequence[GpuKind]) -> GpuKind:
    kind = _kind(table.gpu, own)
    return kind if table.memory_gib is None else replace(kind, capacity_bytes=bytes_from_gib(table.memory_gib))


def _node(table: _Gpus) -> Node:
    return Node(network_gbps=table.network_gbps, usd_per_hour=table.usd_per_hour)


def _used_bytes(table: _Gpus, where: str) -> list[Bytes]:
    used_gib = [0.0] * table.count if table.used_gib is None else table.used_gib
    if len(used_gib) != table.count:
        raise InputError(f"{where}: used_gib has {len(used_gib)} numbers for {table.count} GPUs; give one for each")
    return [bytes_from_gib(amount) for amount in used_gib]


def _filled(kind: GpuKind, used_bytes: Sequence[Bytes], gpus_per_node: int, node: Node) -> Iterable[_NodeGpus]:
    """Deal equal GPUs to nodes, of which the last may stay partly empty."""
    for first in range(0, len(used_bytes), gpus_per_node):
        yield _NodeGpus(kind=kind, used_bytes=used_bytes[first : first + gpus_per_node], node=node)


def _cluster(name: str, nodes: Iterable[_NodeGpus]) -> Cluster:
    listed = list(nodes)
    placed = ((number, gpus.kind, used) for number, gpus in enumerate(listed) for used in gpus.used_bytes)
    return Cluster(
        name=name,
        gpus=tuple(
            Gpu(
                gpu_id=gpu_id,
                node=number,
                kind=kind.name,
                capacity_bytes=kind.capacity_bytes,
                idle_bytes=kind.idle_bytes + used,
            )
            for gpu_id, (number, kind, used) in enumerate(placed)
        ),
        nodes=tuple(gpus.node for gpus in listed),
    )
