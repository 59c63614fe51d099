"""Engines in this process whose times are known, and what tests of planned profiles share."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec

from maveriq.domain.gpu_kinds import GpuSheet, Link, NumberFormat
from maveriq.domain.models import KvType, ModelSpec, WeightType
from maveriq.domain.parallel import ParallelConfig
from maveriq.estimate.computed_parts import ComputedParts
from maveriq.estimate.engine_presets import engine_preset
from maveriq.estimate.hardware_profile import HardwareProfile
from maveriq.estimate.observations import with_layers
from maveriq.estimate.physics import PhysicsEstimator
from maveriq.estimate.profile_file import MachineRecord, planning_profile
from maveriq.exec.messages import (
    Admitted,
    Ended,
    EngineSpec,
    Finished,
    Generate,
    Hello,
    Load,
    Loaded,
    NewTokens,
    PromptSequence,
    StepReport,
    Stop,
    SubmitRequest,
)
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


class KnownSteps(KnownTimes):
    """A launcher of engines that batch continuously, with the steps of `truth` and an admission of 3 ms.

    The first sample's prompts come apart: the engine begins before the last one is there.
    """

    ADMISSION_S = 0.003

    def __init__(self, model: ModelSpec) -> None:
        super().__init__(model)
        preset = msgspec.structs.replace(engine_preset("vllm-0.32.0"), step_us=900.0)
        self.steps = PhysicsEstimator(self._truth.profile, preset, continuous=True)
        self.apart = True

    async def launch(self, spec: EngineSpec, gpu_ids: Sequence[int]) -> _Connection:
        return _SteppedConnection(self)

    def step_s(self, spec: EngineSpec, decodes: Sequence[int], chunks: Sequence[int]) -> float:
        """Return the time of a step of sequences of these lengths and prompts of these."""
        layers = json.loads(spec.config_json)["num_hidden_layers"]
        short = self._model if layers == self._model.layers else with_layers(self._model, tuple(range(layers)))
        timer = self.steps.step_timer(short, PLAIN)
        return timer.step(len(decodes), sum(decodes), [(chunk, 0) for chunk in chunks]) / 2**32 / 1e6


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


class _SteppedConnection(_Connection):
    """Computes a step whenever it is asked for a message and has requests."""

    def __init__(self, launcher: KnownSteps) -> None:
        super().__init__(launcher)
        self._known = launcher
        self._clock_s, self._number = 0.0, 0
        self._lengths: dict[int, int] = {}  # of the requests that decode
        self._left: dict[int, int] = {}
        self._waiting: list[PromptSequence] = []

    def send(self, message: Any) -> None:
        if isinstance(message, SubmitRequest):
            self._waiting.append(message.sequence)
        else:
            super().send(message)

    async def receive(self) -> Any:
        if not self._inbox.empty() or not (self._waiting or self._left):
            return await super().receive()
        assert self._spec is not None
        late = self._waiting[1:] if self._known.apart else []
        self._known.apart = False
        joining, self._waiting = self._waiting[: len(self._waiting) - len(late)], late
        step_s = self._known.step_s(self._spec, list(self._lengths.values()), [len(each.prompt) for each in joining])
        if not self._lengths:
            await asyncio.sleep(KnownSteps.ADMISSION_S + step_s)
        self._clock_s += step_s
        for each in joining:
            self._lengths[each.request_id], self._left[each.request_id] = len(each.prompt), each.output_tokens
        given = list(self._lengths)
        ended = []
        for number in given:
            self._lengths[number] += 1
            self._left[number] -= 1
            if not self._left[number]:
                ended.append(Ended(number, 0.1, 1))
                del self._lengths[number], self._left[number]
        self._number += 1
        return StepReport(
            number=self._number, ended_s=self._clock_s, step_s=step_s,
            tokens=tuple(NewTokens(number, (1,)) for number in given),
            admitted=tuple(Admitted(each.request_id, 0) for each in joining), ended=tuple(ended),
            batch_tokens=len(given) + sum(len(each.prompt) - 1 for each in joining),
        )  # fmt: skip


class TrueMemory:
    """A meter that reads a round number."""

    def before(self, gpu_ids: Sequence[int]) -> int:
        return 0

    def held(self, pid: int, gpu_ids: Sequence[int]) -> tuple[int, int]:
        return 300 << 20, 400 << 20
