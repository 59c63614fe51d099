"""How long the steps of a pipeline take in each of its stages.

A step passes the stages one after the other, and each stage works at one step at a time. What the host adds comes
before the first stage: it prepares one step while the stages work at others. After every stage but the last the
activations are handed over. So a pipeline with as many steps in flight as stages ends one every time that the slowest
part has done its work, unless the whole way of a step is longer than that of all in flight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from maveriq.estimate.engine_presets import EnginePreset
from maveriq.estimate.step_time import GriddedSteps
from maveriq.estimate.step_timer import Ticks, ticks


@dataclass(frozen=True, slots=True, kw_only=True)
class StageModel:
    """One stage.

    Args:
        steps: time of its operators.
        layers: its layers.
        hand_over_us: time in which the activations of so many tokens reach the next stage; 0 for the last.
    """

    steps: GriddedSteps
    layers: int
    hand_over_us: Callable[[int], float]


class PipelineTimer:
    """The times of steps in the parts of one engine: its host, then its stages.

    Args:
        stages: from the first to the last.
        preset: what the engine's process adds.
    """

    def __init__(self, stages: Sequence[StageModel], preset: EnginePreset) -> None:
        self._stages = stages
        self._preset = preset

    @property
    def parts(self) -> int:
        """The parts that work at one step at a time: the host and the stages."""
        return 1 + len(self._stages)

    def step(self, decodes: int, context_tokens: int, chunks: Sequence[tuple[int, int]] = ()) -> list[Ticks]:
        """Return the time of a step in each part; the arguments are those of `StepTimer.step`."""
        tokens = decodes + sum(chunk for chunk, _ in chunks)
        times = [ticks(float(self._preset.host_us(decodes + len(chunks))))]
        for stage in self._stages:
            gpu_us = stage.steps.gpu_us(decodes=decodes, context_tokens=context_tokens, chunks=chunks)
            kernels_us = self._preset.kernels_us(gpu_us, has_prefill=bool(chunks), layers=stage.layers)
            times.append(ticks(float(kernels_us) + stage.hand_over_us(tokens)))
        return times


class Pipeline:
    """When the steps in flight of one engine pass its parts (mutable). They keep their order.

    Args:
        parts: that work at one step at a time.
    """

    def __init__(self, parts: int) -> None:
        self._free = [0] * parts

    def enter(self, now: Ticks, times: Sequence[Ticks]) -> tuple[Ticks, Ticks]:
        """Let a step enter, with its time in each part; return when the first part begins it and the last ends it.

        Each part begins it when the part before has done its work, and when it has itself done with the step before.
        """
        start = at = max(now, self._free[0])
        for part, time in enumerate(times):
            at = self._free[part] = max(at, self._free[part]) + time
        return start, at
