"""Which GPUs a configuration may take: all of one kind, the GPUs of each stage on one node.

Stages exchange little, so a pipeline may cross nodes; where a node can hold it, it does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TypeAlias

from maveriq.domain.cluster import ClusterView, GpuView
from maveriq.domain.parallel import network_hops
from maveriq.units import Bytes

Gpus: TypeAlias = Sequence[GpuView]


class GpuPool:
    """The GPUs of one kind that are up.

    Args:
        gpus: at least one, by ID.
    """

    def __init__(self, gpus: Gpus) -> None:
        by_free_memory = sorted(gpus, key=lambda gpu: -gpu.free_bytes)
        # Sorting is stable: nodes are in the order of their numbers, the GPUs of each by free memory, then by ID.
        by_node = groupby(sorted(by_free_memory, key=lambda gpu: gpu.node), key=lambda gpu: gpu.node)
        self._nodes = [list(of_node) for _, of_node in by_node]
        self._count = len(gpus)
        self._in_node: dict[int, Gpus | None] = {}
        self._stages: dict[int, list[Gpus]] = {}

    def __len__(self) -> int:
        return self._count

    @property
    def kind(self) -> str:
        """Their kind; "" where the cluster has no other."""
        return self._nodes[0][0].kind

    @property
    def capacity_bytes(self) -> Bytes:
        """Memory of its smallest GPU."""
        return min(gpu.capacity_bytes for node in self._nodes for gpu in node)

    @property
    def least_usd_per_hour(self) -> float:
        """Price of its cheapest GPU; 0 where one has none."""
        return min(gpu.usd_per_hour or 0.0 for node in self._nodes for gpu in node)

    @property
    def largest_node(self) -> int:
        """GPUs of the largest node."""
        return max(map(len, self._nodes))

    def choices(self, *, tp: int, pp: int) -> Iterator[tuple[Gpus, int]]:
        """Yield GPUs for `pp` stages of `tp` GPUs, stage-major, and how often a stage hands over to another node.

        First those of the node with most free memory, then those of the cluster; none where no GPUs would do.
        """
        in_node = self._best_of_a_node(tp * pp)
        if in_node is not None:
            yield in_node, 0
        stages = self._stages_by_free_memory(tp)[:pp]
        if len(self._nodes) > 1 and len(stages) == pp > 1:
            # Stages on the same node follow each other.
            order = list(dict.fromkeys(stage[0].node for stage in stages))
            chosen = [gpu for stage in sorted(stages, key=lambda stage: order.index(stage[0].node)) for gpu in stage]
            yield chosen, network_hops([gpu.node for gpu in chosen], tp)

    def _best_of_a_node(self, count: int) -> Gpus | None:
        """Return the `count` GPUs with most free memory together that a node has, the cheapest of equal ones.

        None if no node has so many.
        """
        if count not in self._in_node:
            enough = [node[:count] for node in self._nodes if len(node) >= count]
            best = max(enough, key=lambda gpus: (sum(gpu.free_bytes for gpu in gpus), -_price(gpus)), default=None)
            self._in_node[count] = best
        return self._in_node[count]

    def _stages_by_free_memory(self, tp: int) -> list[Gpus]:
        """Return groups of `tp` GPUs of a node, those with most free memory first, the cheapest of equal ones."""
        if tp not in self._stages:
            stages = [node[at : at + tp] for node in self._nodes for at in range(0, len(node) - tp + 1, tp)]
            self._stages[tp] = sorted(stages, key=lambda stage: (-stage[-1].free_bytes, _price(stage)))
        return self._stages[tp]


def _price(gpus: Gpus) -> float:
    return sum(gpu.usd_per_hour or 0.0 for gpu in gpus)


def gpu_pools(view: ClusterView) -> list[GpuPool]:
    """Return the GPUs of each kind, in the order of the first GPU of each."""
    kinds: dict[str, list[GpuView]] = {}
    for gpu in view.gpus:
        kinds.setdefault(gpu.kind, []).append(gpu)
    return [GpuPool(gpus) for gpus in kinds.values()]
