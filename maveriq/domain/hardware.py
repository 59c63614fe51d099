"""GPUs and clusters: what there is to place models on."""

from __future__ import annotations

from dataclasses import dataclass

from maveriq.errors import InputError
from maveriq.units import MICROS_PER_SECOND, Bytes, Micros, gib


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU of a cluster.

    `idle_bytes` is what the driver holds while no model is loaded; it counts against capacity.

    Raises:
        InputError: there is no capacity beside what is held when idle.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """GPUs numbered from 0 in order.

    Raises:
        InputError: no GPU, or ids that are not 0, 1, 2, ...
    """

    name: str
    gpus: tuple[Gpu, ...]

    def __post_init__(self) -> None:
        if not self.gpus:
            raise InputError(f"cluster {self.name!r} has no GPU; give at least one, for example 8xA6000")
        if [gpu.gpu_id for gpu in self.gpus] != list(range(len(self.gpus))):
            raise InputError(f"cluster {self.name!r}: GPUs must be numbered 0 to {len(self.gpus) - 1} in order")

    def __len__(self) -> int:
        return len(self.gpus)


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchTiming:
    """What a serving system's dispatcher costs (SPEC 6); all zero is an ideal one.

    A request goes at the first tick not before its arrival plus `after_arrival_us` and the
    release of its last GPU plus `after_release_us`, at most one dispatch per tick; nothing goes
    within `pause_us` after an engine registers.

    Raises:
        InputError: a negative duration.
    """

    tick_us: Micros = 0
    after_arrival_us: Micros = 0
    after_release_us: Micros = 0
    pause_us: Micros = 0

    def __post_init__(self) -> None:
        for field in ("tick_us", "after_arrival_us", "after_release_us", "pause_us"):
            if getattr(self, field) < 0:
                raise InputError(f"dispatch timing: {field} must not be negative, not {getattr(self, field)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadWindow:
    """How the load of a GPU is measured (SPEC 5): the share of its last samples that were busy.

    A sample is taken each `sample_us`. It looks back over `look_us`, and is busy when the GPU
    executed for more than `busy_share` of that. Readings of a GPU are always equally old; how old,
    from 0 to `most_phase_us`, differs between GPUs, so that those that work alike are seldom
    found equally busy. 0 is a sampler that sees all GPUs at one instant.

    Raises:
        InputError: no sample, one without length, one that overlaps its neighbour, a share
            outside 0 to 1, or a phase outside 0 to the time between samples.
    """

    samples: int = 120
    sample_us: Micros = MICROS_PER_SECOND
    look_us: Micros = MICROS_PER_SECOND // 6
    busy_share: float = 0.01
    most_phase_us: Micros = 0

    def __post_init__(self) -> None:
        if self.samples < 1 or not 1 <= self.look_us <= self.sample_us or not 0 <= self.busy_share < 1:
            raise InputError(
                "load window: needs at least one sample, a look back from 1 µs up to the time between samples, and a "
                f"busy share from 0 to 1, not {self.samples}, {self.look_us} of {self.sample_us} µs, {self.busy_share}"
            )
        if not 0 <= self.most_phase_us <= self.sample_us:
            raise InputError(
                f"load window: the largest phase must lie between 0 and the {self.sample_us} µs between samples, "
                f"not {self.most_phase_us} µs"
            )
