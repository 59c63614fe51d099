"""GPUs and clusters, the memory reserved on them, and the view that a policy gets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from maveriq.domain.gpu_kinds import gpu_sheets
from maveriq.errors import InputError, InvariantError
from maveriq.units import MICROS_PER_SECOND, Bytes, Micros, gib


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU of a cluster.

    `idle_bytes` is what the driver holds while no model is loaded; it counts against capacity.

    Raises:
        InputError: the capacity is not larger than the idle memory.
    """

    gpu_id: int
    node: int
    kind: str
    capacity_bytes: Bytes
    idle_bytes: Bytes = 0

    def __post_init__(self) -> None:
        if self.idle_bytes < 0 or self.capacity_bytes <= self.idle_bytes:
            raise InputError(
                f"GPU {self.gpu_id} ({self.kind}): capacity {gib(self.capacity_bytes):.3f} GiB must be more than "
                f"the {gib(self.idle_bytes):.3f} GiB held when idle"
            )


DEFAULT_NETWORK_GBPS = 100.0
"""The network of a node that says nothing of it, Gbit/s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """What the GPUs of a node share.

    Args:
        network_gbps: bandwidth between this node and others, Gbit/s in one direction.
        usd_per_hour: what one of its GPUs costs, US dollars an hour; None for the list price of its kind.
    """

    network_gbps: float = DEFAULT_NETWORK_GBPS
    usd_per_hour: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """GPUs numbered from 0 in order, on nodes.

    Args:
        name: for tables and records.
        gpus: the GPUs.
        nodes: what is known of each node, in the order of their numbers; () if nothing is.

    Raises:
        InputError: no GPU, or ids that are not 0, 1, 2, ...
    """

    name: str
    gpus: tuple[Gpu, ...]
    nodes: tuple[Node, ...] = ()

    def __post_init__(self) -> None:
        if not self.gpus:
            raise InputError(f"cluster {self.name!r} has no GPU; give at least one, for example 8xA6000")
        if [gpu.gpu_id for gpu in self.gpus] != list(range(len(self.gpus))):
            raise InputError(f"cluster {self.name!r}: GPUs must be numbered 0 to {len(self.gpus) - 1} in order")

    def __len__(self) -> int:
        return len(self.gpus)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of its GPUs, in the order of the first GPU of each."""
        return tuple(dict.fromkeys(gpu.kind for gpu in self.gpus))

    @property
    def has_network(self) -> bool:
        """Whether it has more than one node."""
        return len({gpu.node for gpu in self.gpus}) > 1

    def node(self, number: int) -> Node:
        """Return what is known of a node."""
        return self.nodes[number] if self.nodes else Node()

    def largest_node(self, kind: str) -> int:
        """Return the GPUs of the largest node with GPUs of a kind."""
        return max(Counter(gpu.node for gpu in self.gpus if gpu.kind == kind).values())

    def network_gbps(self, kind: str) -> float:
        """Return the bandwidth of the slowest network among the nodes with GPUs of a kind, Gbit/s."""
        return min(self.node(gpu.node).network_gbps for gpu in self.gpus if gpu.kind == kind)

    def at_price(self, usd_per_hour: float) -> Cluster:
        """Return the same cluster at another price of a GPU and hour, US dollars."""
        count = 1 + max(gpu.node for gpu in self.gpus)
        return replace(
            self, nodes=tuple(replace(self.node(number), usd_per_hour=usd_per_hour) for number in range(count))
        )

    def usd_per_hour(self, gpu: Gpu) -> float | None:
        """Return what a GPU costs, US dollars an hour: as the user says, else by the list; None if neither says it."""
        own, sheet = self.node(gpu.node).usd_per_hour, gpu_sheets().get(gpu.kind)
        return own if own is not None or sheet is None else sheet.usd_per_hour


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchTiming:
    """The overhead of a dispatcher (SPEC 6); all zero means none.

    A request goes at the first tick not before its arrival plus `after_arrival_us` and the
    release of its last GPU plus `after_release_us`, at most one dispatch per tick; nothing goes
    within `registration_delay_us` after an engine registers.

    Raises:
        InputError: a negative duration.
    """

    tick_us: Micros = 0
    after_arrival_us: Micros = 0
    after_release_us: Micros = 0
    registration_delay_us: Micros = 0

    def __post_init__(self) -> None:
        for name in ("tick_us", "after_arrival_us", "after_release_us", "registration_delay_us"):
            if getattr(self, name) < 0:
                raise InputError(f"dispatch timing: {name} must not be negative, not {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadWindow:
    """How the load of a GPU is measured (SPEC 5): the share of its last samples that were busy.

    A sample is taken each `sample_us`. It looks back over `look_us`, and is busy when the GPU
    executed for more than `busy_share` of that. Readings of a GPU are always equally old; how old,
    from 0 to `max_phase_us`, differs between GPUs, so that those that work alike are seldom
    found equally busy. With 0, all GPUs are sampled at the same instant.

    Raises:
        InputError: no sample, an empty one, one that overlaps the next, a share
            outside 0 to 1, or a phase outside 0 to the time between samples.
    """

    samples: int = 120
    sample_us: Micros = MICROS_PER_SECOND
    look_us: Micros = MICROS_PER_SECOND // 6
    busy_share: float = 0.01
    max_phase_us: Micros = 0

    def __post_init__(self) -> None:
        if self.samples < 1 or not 1 <= self.look_us <= self.sample_us or not 0 <= self.busy_share < 1:
            raise InputError(
                "load window: needs at least one sample, a look back from 1 µs up to the time between samples, and a "
                f"busy share from 0 to 1, not {self.samples}, {self.look_us} of {self.sample_us} µs, {self.busy_share}"
            )
        if not 0 <= self.max_phase_us <= self.sample_us:
            raise InputError(
                f"load window: the largest phase must lie between 0 and the {self.sample_us} µs between samples, "
                f"not {self.max_phase_us} µs"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuView:
    """One GPU as a policy sees it.

    `load` is the share of recent one-second samples in which the GPU was busy, 0 to 1; `tenants`
    counts the deployments that hold memory on it, and `continuous_tenants` those whose engines batch continuously.
    A GPU that is down is not in the view. `kind` is
    "" where all GPUs of the cluster are of one kind. `usd_per_hour` is its price, None if it is not known.
    """

    gpu_id: int
    node: int
    capacity_bytes: Bytes
    free_bytes: Bytes
    load: float
    tenants: int = 0
    continuous_tenants: int = 0
    kind: str = ""
    usd_per_hour: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterView:
    """The cluster at one instant: GPUs in the order of their IDs."""

    gpus: tuple[GpuView, ...]

    def with_deployment(self, shares: Mapping[int, Bytes]) -> ClusterView:
        """Return the view with one more deployment, which takes so much memory on each of its GPUs."""
        return self._with_tenants(shares, 1)

    def without_tenant(self, shares: Mapping[int, Bytes]) -> ClusterView:
        """Return the view without what holds so much memory on each of its GPUs."""
        return self._with_tenants(shares, -1)

    def _with_tenants(self, shares: Mapping[int, Bytes], added: int) -> ClusterView:
        return ClusterView(
            gpus=tuple(
                replace(gpu, free_bytes=gpu.free_bytes - added * shares[gpu.gpu_id], tenants=gpu.tenants + added)
                if gpu.gpu_id in shares
                else gpu
                for gpu in self.gpus
            )
        )

    def without(self, gpu_ids: Collection[int]) -> ClusterView:
        """Return the view without some GPUs."""
        return ClusterView(gpus=tuple(gpu for gpu in self.gpus if gpu.gpu_id not in gpu_ids))

    def by_free_memory(self) -> list[GpuView]:
        """Return the GPUs, most free memory first; ties keep the order of ids."""
        return sorted(self.gpus, key=lambda gpu: -gpu.free_bytes)


@dataclass(slots=True)
class ClusterState:
    """How much memory each deployment holds on each GPU, and which GPUs are down.

    `is_mixed` says whether its GPUs are of several kinds, `has_network` whether they are on several nodes.

    Invariant: no GPU ever holds more than its capacity (checked at each reservation).
    """

    cluster: Cluster
    _held: dict[int, dict[int, Bytes]] = field(default_factory=dict)
    _continuous: set[int] = field(default_factory=set)  # deployments whose engines batch continuously
    is_mixed: bool = field(init=False)
    has_network: bool = field(init=False)
    _used: list[Bytes] = field(init=False)
    _tenants: list[int] = field(init=False)  # deployments that hold memory on each GPU
    _continuous_tenants: list[int] = field(init=False)  # those of them whose engines batch continuously
    _seen: list[GpuView | None] = field(init=False)  # as policies last saw them; None after a change
    _usd_per_hour: list[float | None] = field(init=False)
    _open_faults: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.is_mixed = len(self.cluster.kinds) > 1
        self.has_network = self.cluster.has_network
        self._used = [gpu.idle_bytes for gpu in self.cluster.gpus]
        self._tenants = [0] * len(self.cluster)
        self._continuous_tenants = [0] * len(self.cluster)
        self._seen = [None] * len(self.cluster)
        self._usd_per_hour = [self.cluster.usd_per_hour(gpu) for gpu in self.cluster.gpus]

    def reserve(self, deployment_id: int, shares: Mapping[int, Bytes], *, is_continuous: bool = False) -> None:
        """Reserve memory for a deployment on each of its GPUs.

        Args:
            deployment_id: the deployment.
            shares: the memory, by GPU.
            is_continuous: whether its engine batches continuously.

        Raises:
            InvariantError: it holds memory already, or a GPU has too little.
        """
        if deployment_id in self._held:
            raise InvariantError(f"deployment {deployment_id} holds memory already")
        for gpu_id, amount in shares.items():
            if amount > self.free_bytes(gpu_id):
                raise InvariantError(
                    f"deployment {deployment_id} wants {gib(amount):.3f} GiB on GPU {gpu_id}, "
                    f"which has {gib(self.free_bytes(gpu_id)):.3f} GiB free"
                )
        self._held[deployment_id] = dict(shares)
        if is_continuous:
            self._continuous.add(deployment_id)
        self._count(deployment_id, 1)

    def release(self, deployment_id: int) -> None:
        """Free the memory of a deployment.

        Raises:
            InvariantError: it holds none.
        """
        if deployment_id not in self._held:
            raise InvariantError(f"deployment {deployment_id} holds no memory to release")
        self._count(deployment_id, -1)
        del self._held[deployment_id]
        self._continuous.discard(deployment_id)

    def _count(self, deployment_id: int, sign: int) -> None:
        """Add a deployment to its GPUs, or with the sign -1 take it away."""
        is_continuous = deployment_id in self._continuous
        for gpu_id, amount in self._held[deployment_id].items():
            self._used[gpu_id] += sign * amount
            self._tenants[gpu_id] += sign
            self._continuous_tenants[gpu_id] += sign * is_continuous
            self._seen[gpu_id] = None

    def holds(self, deployment_id: int) -> bool:
        """Return whether a deployment holds memory."""
        return deployment_id in self._held

    def used_bytes(self, gpu_id: int) -> Bytes:
        """Return the used memory of a GPU, idle memory included."""
        return self._used[gpu_id]

    def free_bytes(self, gpu_id: int) -> Bytes:
        """Return the free memory of a GPU."""
        return self.cluster.gpus[gpu_id].capacity_bytes - self._used[gpu_id]

    def set_down(self, gpu_id: int, *, down: bool) -> None:
        """Start or end a failure of a GPU; it is down until the last one ends."""
        self._open_faults[gpu_id] += 1 if down else -1

    def is_down(self, gpu_id: int) -> bool:
        """Return whether a GPU is down."""
        return self._open_faults[gpu_id] > 0

    def view(self, loads: Sequence[float]) -> ClusterView:
        """Return the view for a policy; `loads` has one share per GPU, in the order of ids."""
        return ClusterView(
            gpus=tuple(
                self._view_of(gpu, load)
                for gpu, load in zip(self.cluster.gpus, loads, strict=True)
                if not self.is_down(gpu.gpu_id)
            )
        )

    def _view_of(self, gpu: Gpu, load: float) -> GpuView:
        """Return a GPU as a policy sees it: the same object as the last time, if nothing has changed."""
        seen = self._seen[gpu.gpu_id]
        if seen is None or seen.load != load:
            seen = self._seen[gpu.gpu_id] = GpuView(
                gpu_id=gpu.gpu_id,
                node=gpu.node,
                capacity_bytes=gpu.capacity_bytes,
                free_bytes=self.free_bytes(gpu.gpu_id),
                load=load,
                tenants=self._tenants[gpu.gpu_id],
                continuous_tenants=self._continuous_tenants[gpu.gpu_id],
                kind=gpu.kind if self.is_mixed else "",
                usd_per_hour=self._usd_per_hour[gpu.gpu_id],
            )
        return seen
