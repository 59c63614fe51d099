"""A `GpuMeter` of idle, empty GPUs."""

from dataclasses import dataclass, field

from maveriq.exec.gpus import GpuIdentity, GpuReading


@dataclass(slots=True)
class FakeMeter:
    memory_bytes: list[int]
    kind: str = "virtual"
    slow: bool = field(default=False, init=False)

    @property
    def gpus(self) -> tuple[GpuIdentity, ...]:
        return tuple(
            GpuIdentity(uuid=f"VIRTUAL-{gpu_id}", name=self.kind, memory_bytes=memory)
            for gpu_id, memory in enumerate(self.memory_bytes)
        )

    def read(self) -> tuple[GpuReading, ...]:
        return tuple(GpuReading(used_bytes=0, busy_share=0.0) for _ in self.memory_bytes)

    def read_one(self, number: int) -> GpuReading:
        return self.read()[number]

    def close(self) -> None:
        pass
