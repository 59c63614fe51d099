"""Engines in this process whose times are known, and what tests of planned profiles share."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from maveriq.domain.gpu_kinds import GpuSheet, Link, NumberFormat
from maveriq.domain.models import KvType, ModelSpec, WeightType
from maveriq.domain.parallel import ParallelConfig
from maveriq.estimate.computed_parts import ComputedParts
from maveriq.estimate.hardware_profile import HardwareProfile
from maveriq.estimate.observations import with_layers
from maveriq.estimate.physics import PhysicsEstimator
from maveriq.estimate.profile_file import MachineRecord, planning_profile
from maveriq.exec.messages import EngineSpec, Finished, Generate, Hello, Load, Loaded, Stop
from maveriq.profiling.machine import nominal_sheet
from maveriq.profiling.plan import Wanted

MACHINE = MachineRecord(kind="cpu", memory_gib=4, cores=2, sheet=nominal_sheet(2, 4))
PLAIN = ParallelConfig(tp=1, pp=1, weights=WeightType.FLOAT16)
SLOWER = GpuSheet(
    memory_gib=4, usable_gib=4, bandwidth_gb_s=4.3, multiprocessors=2, clock_ghz=1.2, gpus_per_node=64, power_w=100,
    tflops={NumberFormat.BFLOAT16: 0.03}, link=Link.PCIE, link_gb_s=1, compute_capability=0.1, usd_per_hour=0.1,
    price_source="", source="", value_bytes=4, name="cpu",
)  # fmt: skip
"""The true speeds of the machine in these tests, which the profile does not know."""


def empty_profile() -> HardwareProfile:
    return planning_profile(MACHINE, "torch")


def truth() -> PhysicsEstimator:
    return PhysicsEstimator(replace(empty_profile(), sheet=SLOWER))


def parts() -> ComputedParts:
    return ComputedParts(PhysicsEstimator(empty_profile()))


def wanted(model: ModelSpec, **more: Any) -> Wanted:
    given: dict[str, Any] = {
        "model": model, "backend": "torch", "max_gpus": 1, "formats": [(WeightType.FLOAT16, KvType.NATIVE)],
        "batch_sizes": (1, 4), "prompt_tokens": (16, 256), "output_tokens": 20, "layers": None,
        "max_step_tokens": 4096, "can_run": lambda _configuration: True,
    }  # fmt: skip
    return Wanted(**given | more)


class KnownTimes:
    """A launcher of engines that answer at once, with the times of `truth`.

    Args:
        model: the whole model.
        stop_after: raises `Interrupted` instead of the n-th answer; None never.
    """

    def __init__(self, model: ModelSpec, *, stop_after: int | None = None) -> None:
        self._model = model
        self._stop_after = stop_after
        self._truth = truth()
        self.answers: list[tuple[int, tuple[int, ...]]] = []

    async def launch(self, spec: EngineSpec, gpu_ids: Sequence[int]) -> _Connection:
        return _Connection(self)

    def answer(self, spec: EngineSpec, message: Generate) -> Finished:
        if len(self.answers) == self._stop_after:
            raise Interrupted
        config = json.loads(spec.config_json)
        layers = tuple(range(config.get("num_hidden_layers", config.get("n_layer", 0))))
        short = self._model if len(layers) == self._model.layers else with_layers(self._model, layers)
        first = message.sequences[0]
        self.answers.append((len(layers), first.prompt))
        service = self._truth.service(
            short,
            ParallelConfig(tp=spec.tp, pp=spec.pp, weights=WeightType(spec.weights)),
            prompt_tokens=len(first.prompt),
            output_tokens=first.output_tokens,
            batch=len(message.sequences),
        )
        whole_s = service.first_token_s + (first.output_tokens - 1) * service.tpot_s
        return Finished(
            execution_id=message.execution_id, first_token_s=service.first_token_s, service_s=whole_s, outputs=()
        )


class Interrupted(BaseException):
    """Ctrl-C, or the end of the process."""


class _Connection:
    pid = os.getpid()

    def __init__(self, launcher: KnownTimes) -> None:
        self._launcher = launcher
        self._spec: EngineSpec | None = None
        self._inbox: asyncio.Queue[Any] = asyncio.Queue()
        self._inbox.put_nowait(Hello(protocol=1, pid=1))

    @property
    def channel(self) -> _Connection:
        return self

    def send(self, message: Any) -> None:
        match message:
            case Load():
                self._spec = message.spec
                self._inbox.put_nowait(Loaded(backend="known", version="1", weights_bytes=1 << 20))
            case Generate():
                assert self._spec is not None
                self._inbox.put_nowait(self._launcher.answer(self._spec, message))
            case Stop():
                pass

    async def receive(self) -> Any:
        return await self._inbox.get()

    async def wait_gone(self) -> None:
        return None

    def terminate(self) -> None: ...

    def kill(self) -> None: ...

    def close(self) -> None: ...


class TrueMemory:
    """A meter that reads a round number."""

    def before(self, gpu_ids: Sequence[int]) -> int:
        return 0

    def held(self, pid: int, gpu_ids: Sequence[int]) -> tuple[int, int]:
        return 300 << 20, 400 << 20
