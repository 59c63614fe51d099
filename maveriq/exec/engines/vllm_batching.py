"""vLLM as an engine that batches continuously: requests join and leave between its steps.

Arguments are vLLM's own (`BatchingSpec.arguments`). What its scheduler chose for a step is read where it returns it:
vLLM's API tells neither preemptions nor the tokens of a step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from maveriq.exec.device import Device
from maveriq.exec.engines.continuous import StepOutput
from maveriq.exec.engines.engine import EngineError, FailureKind
from maveriq.exec.engines.external import Translation, check_lengths, read_spec
from maveriq.exec.engines.failures import as_engine_error
from maveriq.exec.engines.vllm import NAME, VllmEngine, kv_bytes_per_token, sampling_params, translate
from maveriq.exec.messages import EngineSpec, Loaded, PromptSequence

_CPU_BLOCK_TOKENS = 32  # vLLM's attention on a CPU takes blocks of a multiple of so many tokens
_MEMORY = ("kv_cache_memory_bytes", "gpu_memory_utilization")
_FIXED_SIZE_ONLY = (*_MEMORY, "enable_prefix_caching")


def translate_batching(spec: EngineSpec, folder: str, *, cpus: tuple[int, ...] = ()) -> Translation:
    """Return the arguments, files and environment to start vLLM with.

    Args:
        spec: what to load; its `batching` has the arguments that concern batches and the KV cache.
        folder: as in `translate`.
        cpus: as in `translate`.

    Raises:
        EngineError: vLLM does not support the spec.
    """
    alone = translate(spec, folder, cpus=cpus)
    requirements = read_spec(NAME, spec)
    given = {} if spec.batching is None else dict(spec.batching.arguments)
    # Without a word about memory, it is that of a batch, as of engines that take one execution at a time.
    sized = "num_gpu_blocks_override" in given or not given.keys().isdisjoint(_MEMORY)
    left_out = _FIXED_SIZE_ONLY if sized else _FIXED_SIZE_ONLY[len(_MEMORY) :]
    arguments = {name: value for name, value in alone.arguments.items() if name not in left_out} | given
    block_size = given.get("block_size")
    if requirements.device is Device.CPU and block_size is not None and int(block_size) % _CPU_BLOCK_TOKENS:
        raise EngineError(
            FailureKind.UNSUPPORTED,
            f"vllm: on a CPU, block_size must be a multiple of {_CPU_BLOCK_TOKENS}, not {block_size}; set it for the "
            "engine, in the model set or the request",
        )
    blocks = given.get("num_gpu_blocks_override")
    if blocks is not None and block_size is not None:
        # vLLM then neither measures the memory that is free nor takes a share of it.
        size = int(blocks) * int(block_size) * kv_bytes_per_token(requirements)
        arguments["kv_cache_memory_bytes"] = given.get("kv_cache_memory_bytes", size)
    return Translation(arguments=arguments, files=alone.files, environment=alone.environment)


class ContinuousVllmEngine(VllmEngine):
    """vLLM as a `ContinuousEngine`."""

    def __init__(self) -> None:
        super().__init__()
        self._schedules: _Schedules | None = None
        self._kv_tokens = 0
        self._known: set[int] = set()  # requests that have been admitted and have not ended

    def _translate(self, spec: EngineSpec, folder: str, cpus: tuple[int, ...]) -> Translation:
        return translate_batching(spec, folder, cpus=cpus)

    def load(self, spec: EngineSpec) -> Loaded:
        """Start vLLM and warm it up; see `ContinuousEngine.load`."""
        loaded = super().load(spec)
        core = self._engine.engine_core.engine_core
        self._schedules = _Schedules(core.scheduler)
        cache = self._engine.vllm_config.cache_config
        self._kv_tokens = (cache.num_gpu_blocks - 1) * cache.block_size  # vLLM keeps one block empty
        size = cache.kv_cache_memory_bytes or 0
        return msgspec.structs.replace(loaded, kv_tokens=self._kv_tokens, kv_cache_bytes=size * spec.tp * spec.pp)

    def submit(self, sequence: PromptSequence, *, is_urgent: bool) -> None:
        """Put a request into vLLM's queue; see `ContinuousEngine.submit`."""
        check_lengths(NAME, (sequence,), self._max_tokens)
        sampling = sampling_params(sequence)
        prompt = {"prompt_token_ids": list(sequence.prompt)}
        try:
            self._loaded_engine().add_request(
                str(sequence.request_id), prompt, sampling, priority=0 if is_urgent else 1
            )
        except ValueError as error:  # vLLM refuses this request alone
            raise as_engine_error(NAME, error) from error

    def abort(self, request_id: int) -> None:
        """End a request."""
        self._known.discard(request_id)
        self._loaded_engine().abort_request([str(request_id)])

    def step(self) -> StepOutput:
        """Compute a step; see `ContinuousEngine.step`."""
        engine, schedules = self._loaded_engine(), self._schedules
        if schedules is None:
            raise EngineError(FailureKind.ERROR, "vllm: nothing is loaded")
        output = StepOutput()
        try:
            results = engine.step()
        except Exception as error:
            raise as_engine_error(NAME, error) from error
        for scheduled in schedules.take():
            self._note(scheduled, output)
        for result in results:
            request_id = int(result.request_id)
            tokens = tuple(result.outputs[0].token_ids)
            if tokens:
                output.tokens.append((request_id, tokens))
            if result.finished:
                self._known.discard(request_id)
                output.ended.append(request_id)
        scheduler = schedules.scheduler
        output.running, output.waiting = len(scheduler.running), len(scheduler.waiting)
        output.kv_tokens = round(scheduler.kv_cache_manager.usage * self._kv_tokens)
        return output

    def _note(self, scheduled: Any, output: StepOutput) -> None:
        """Note what a `SchedulerOutput` of vLLM says."""
        for new in scheduled.scheduled_new_reqs:
            [request_id] = _own([new.req_id])
            if request_id not in self._known:
                self._known.add(request_id)
                output.admitted.append((request_id, new.num_computed_tokens))
        output.preempted += _own(scheduled.preempted_req_ids or ())
        output.computed += _own(scheduled.num_scheduled_tokens)
        output.batch_tokens += scheduled.total_num_scheduled_tokens


class _Schedules:
    """Keeps what a scheduler of vLLM returns until it is asked for (mutable)."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self._kept: list[Any] = []
        self._schedule = scheduler.schedule
        scheduler.schedule = self._keep

    def _keep(self, *arguments: Any, **others: Any) -> Any:
        scheduled = self._schedule(*arguments, **others)
        self._kept.append(scheduled)
        return scheduled

    def take(self) -> list[Any]:
        """Return what was scheduled since the last call."""
        kept, self._kept = self._kept, []
        return kept


def _own(names: Iterable[str]) -> list[int]:
    """Return our IDs of requests; vLLM appends a random part to each."""
    return [int(name.partition("-")[0]) for name in names]
