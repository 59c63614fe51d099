"""What an engine's process adds to its kernels: host time of a step, of its sequences, of a request's way in and out.

The figures are few, and belong to a generation of an engine, never to a model (`maveriq/data/engine_presets.toml`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import Annotated, Any

import msgspec

from maveriq.domain.engine_defaults import NEWEST_CHECKED, memory_defaults
from maveriq.domain.engine_versions import release_numbers
from maveriq.domain.gpu_kinds import GpuSheet
from maveriq.domain.models import KvType, WeightType
from maveriq.errors import InputError, UnknownNameError
from maveriq.estimate.engine_memory import EngineSettings
from maveriq.estimate.log_grid import Sizes
from maveriq.estimate.operators import EngineKernels
from maveriq.files import data_path
from maveriq.tables import read_toml

DEFAULT_ENGINE = "vllm"
"""The engine that is estimated where none is named."""

SHARPNESS = 2  # the host launches unevenly, so that neither of two times hides the other
_NotNegative = Annotated[float, msgspec.Meta(ge=0, le=1e6)]
_Factor = Annotated[float, msgspec.Meta(gt=0, le=10)]
_OTHER_NAMES = {"tensorrt-llm": "trtllm", "trt-llm": "trtllm", "tensorrt_llm": "trtllm"}


class Uncertainty(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """How far the true value of each fitted time may lie from the fitted one: a standard deviation; 0 if not fitted."""

    step_us: _NotNegative = 0.0
    sequence_us: _NotNegative = 0.0
    kernel_factor: _NotNegative = 0.0
    prefill_factor: _NotNegative = 0.0
    api_us: _NotNegative = 0.0
    api_token_us: _NotNegative = 0.0
    api_sequence_us: _NotNegative = 0.0


class EngineTimes(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """What `maveriq fit` finds of a deployment, in place of the same fields of its engine's preset."""

    step_us: _NotNegative
    sequence_us: _NotNegative
    kernel_factor: _Factor
    prefill_factor: _Factor
    api_us: _NotNegative
    api_token_us: _NotNegative
    api_sequence_us: _NotNegative = 0.0
    uncertainty: Uncertainty = Uncertainty()


class EnginePreset(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """One generation of an engine.

    Args:
        engine: the engine.
        since: its first version; "" for any.
        before: the version after its last; "" for any.
        tested: versions of the runs that it was fitted to or checked against.
        step_us: host time of a step.
        sequence_us: host time of each sequence of a step.
        layer_us: host time to launch the kernels of a layer, while those before run; 0 where CUDA graphs launch them.
        kernel_factor: time of a step's kernels over that of the operators, in steps that only decode.
        prefill_factor: the same in steps that hold prefill.
        api_us: what a request's first token takes beside waiting and its step: HTTP, tokenizer.
        api_token_us: the same for each token of its prompt.
        api_sequence_us: the same for each sequence that runs meanwhile: one event loop takes requests in and sends the
            tokens of all streams out.
        mixes_prefill: whether sequences go on decoding in steps that hold prefill.
        asynchronous: whether the scheduler prepares a step while the one before runs: an arrival then joins the step
            after the one that is prepared already.
        fp8_block_floor_us: see `maveriq.estimate.operators.EngineKernels`.
        peer_read_limit_mb: see there.
        one_hopper_attention: see there.
        int4_by_channel: whether int4 weights share a scale by output channel; else by groups of 128, as AWQ's do.
        reserve_gib: see `maveriq.estimate.engine_memory.EngineSettings`.
        communication_gib: see there.
        peer_gib: see there.
        lacks_weights: formats of weights that it cannot run.
        lacks_kv: formats of the KV cache that it cannot keep.
        fitted: whether its host times were fitted to runs; else they are a guess.
        uncertainty: of the fitted times.
        source: whose runs the figures come from.
        version: the version that was asked for; "" where none was.
        name: the preset's name, from the table's key.
    """

    engine: str
    since: str
    before: str
    tested: str
    step_us: _NotNegative
    sequence_us: _NotNegative
    layer_us: _NotNegative = 0.0
    kernel_factor: _Factor
    prefill_factor: _Factor
    api_us: _NotNegative
    api_token_us: _NotNegative
    api_sequence_us: _NotNegative = 0.0
    mixes_prefill: bool
    asynchronous: bool
    fp8_block_floor_us: _NotNegative = 0.0
    peer_read_limit_mb: _NotNegative = 0.0
    one_hopper_attention: bool = False
    int4_by_channel: bool = False
    reserve_gib: _NotNegative = 0.2
    communication_gib: _NotNegative = 0.5
    peer_gib: _NotNegative = 0.0
    lacks_weights: tuple[WeightType, ...] = ()
    lacks_kv: tuple[KvType, ...] = ()
    fitted: bool
    uncertainty: Uncertainty = Uncertainty()
    source: str
    version: str = ""
    name: str = ""

    def why_not_stored(self, weights: WeightType, kv: KvType) -> str | None:
        """Return which format it lacks, in one clause; None if it runs both."""
        if weights in self.lacks_weights:
            return f"{self.name} runs no {weights} weights"
        return f"{self.name} keeps no {kv} KV cache" if kv in self.lacks_kv else None

    @property
    def kernels(self) -> EngineKernels:
        """What its kernels do differently from the usual ones."""
        return EngineKernels(
            fp8_block_floor_us=self.fp8_block_floor_us,
            peer_read_limit_mb=self.peer_read_limit_mb,
            one_hopper_attention=self.one_hopper_attention,
        )

    def settings(self, gpu: GpuSheet, *, tp: int, kv_value_bytes: float) -> EngineSettings:
        """Return its default settings that decide about memory.

        Args:
            gpu: the kind of GPU.
            tp: GPUs that share each layer.
            kv_value_bytes: bytes of a value in the KV cache.
        """
        version = self.version
        if release_numbers(version) is None:  # none is named, or those that stand for the whole generation
            version = NEWEST_CHECKED if not self.before else self.since or "0"
        usual = memory_defaults(self.engine, version, gpu_name=gpu.name, memory_gib=gpu.usable_gib, tp=tp)
        return EngineSettings(
            max_num_batched_tokens=usual.step_tokens,
            gpu_memory_utilization=usual.share,
            is_share_of_free=usual.is_share_of_free,
            kv_value_bytes=kv_value_bytes,
            reserve_gib=self.reserve_gib,
            communication_gib=self.communication_gib,
            peer_gib=self.peer_gib,
        )

    def step_time_us(self, gpu_us: Sizes, *, sequences: Sizes, has_prefill: bool, layers: Sizes = 0) -> Any:
        """Return the time of a step: its kernels, and what the host adds. Numbers or arrays of equal shape.

        Args:
            gpu_us: time of its operators, as `maveriq.estimate.step_time` adds them up.
            sequences: sequences of the step.
            has_prefill: whether it holds a chunk of a prompt.
            layers: layers of the model.
        """
        kernels_us = self.kernels_us(gpu_us, has_prefill=has_prefill, layers=layers)
        return kernels_us + self.step_us + self.sequence_us * sequences

    def kernels_us(self, gpu_us: Sizes, *, has_prefill: bool, layers: Sizes = 0) -> Any:
        """Return the time of a step's kernels, of so many layers; the arguments are those of `step_time_us`."""
        kernels_us = gpu_us * (self.prefill_factor if has_prefill else self.kernel_factor)
        if self.layer_us:  # the host launches kernels while others run: the slower of the two decides
            kernels_us = (kernels_us**SHARPNESS + (self.layer_us * layers) ** SHARPNESS) ** (1 / SHARPNESS)
        return kernels_us

    def host_us(self, sequences: Sizes) -> Any:
        """Return what the host adds to a step of so many sequences."""
        return self.step_us + self.sequence_us * sequences

    def first_token_delay_us(self, prompt_tokens: float, *, running: float) -> float:
        """Return what the first token takes beside waiting for its step and that step, while so many sequences run."""
        return self.api_us + self.api_token_us * prompt_tokens + self.api_sequence_us * running

    @property
    def times(self) -> EngineTimes:
        """Its times that `maveriq fit` finds for a deployment."""
        return EngineTimes(**{name: getattr(self, name) for name in EngineTimes.__struct_fields__})

    def with_times(self, times: EngineTimes) -> EnginePreset:
        """Return the preset with the times of a deployment."""
        return msgspec.structs.replace(self, **msgspec.structs.asdict(times))

    def covers(self, version: str) -> bool:
        """Return whether a version belongs to this generation; a release candidate belongs to its release."""
        since, release, before = (release_numbers(text) for text in (self.since, version, self.before))
        return release is not None and (since is None or release >= since) and (before is None or release < before)


@cache
def engine_presets() -> Mapping[str, EnginePreset]:
    """Return the presets by name, the generations of an engine from old to new."""
    read = read_toml(data_path("engine_presets.toml"), dict[str, EnginePreset], what="table of engine presets")
    return MappingProxyType({name: msgspec.structs.replace(preset, name=name) for name, preset in read.items()})


def engine_preset(name: str) -> EnginePreset:
    """Return the preset of an engine.

    Args:
        name: an engine (`vllm`, its newest generation), an engine and its version (`vllm-0.23.0`), or a preset
            (`vllm-2025`).

    Raises:
        UnknownNameError: no preset has this name, and no engine.
        InputError: what follows the engine's name is not a version.
    """
    presets, wanted = engine_presets(), name.strip().casefold()
    for other, usual in _OTHER_NAMES.items():
        wanted = usual + wanted.removeprefix(other) if wanted.startswith(other) else wanted
    if wanted in presets:  # whose tested versions stand for the one that is not named
        return msgspec.structs.replace(presets[wanted], version=presets[wanted].tested)
    engine, _, text = wanted.partition("-")
    generations = [preset for preset in presets.values() if preset.engine == engine]
    if not generations:
        engines = {preset.engine for preset in presets.values()}
        raise UnknownNameError("engine", name, engines | presets.keys(), "or an engine with its version, vllm-0.23.0")
    if not text:
        return generations[-1]
    preset = next((preset for preset in generations if preset.covers(text)), None)
    if preset is None:
        raise InputError(
            f"engine {name!r}: {text!r} is not a version; write {engine}-0.23.0, or one of {', '.join(sorted(presets))}"
        )
    return msgspec.structs.replace(preset, version=text)
