"""What versions of engines do differently, and their defaults by GPU (`maveriq/data/engine_schedulers.toml`).

The engine models schedule by it, and the physics estimator takes its default settings from it.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Annotated, NamedTuple

import msgspec

from maveriq.domain.engine_versions import release_of
from maveriq.errors import InputError
from maveriq.files import data_path
from maveriq.tables import read_toml

NEWEST_CHECKED = "0.23.0"
"""The newest version of vLLM whose scheduler was compared call by call; the defaults where none is named."""

TRTLLM_MAX_NUM_TOKENS = 8192
TRTLLM_FREE_MEMORY_FRACTION = 0.9
"""Of the memory that weights and activations leave, what the KV cache of TensorRT-LLM takes (`llmapi/llm_args.py`)."""

_UNLIMITED_STEP_TOKENS = 8192  # about the largest step of engines that processed prompts whole
_Share = Annotated[float, msgspec.Meta(gt=0, le=1)]
_Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]

_MB_PER_GIB = 1024
_LARGE_GIB, _LEAST_RESERVE_GIB = 60, 10.0


class VllmRules(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What differs between versions of vLLM.

    Args:
        reserve_full_prompt: a request is admitted only if blocks for all its present tokens are free, not only for its
            first chunk (`scheduler_reserve_full_isl`).
        one_decode_in_flight: with a pipeline, a request whose token is in flight is passed over until it arrives, also
            where scheduling is asynchronous.
        threshold_needs_company: `long_prefill_token_threshold` holds only beside other requests.
        cursor_follows_victims: with priorities, the pass over running requests steps back for each victim before it,
            not only for one that the step held already.
        reuse_unhashed_first: blocks that are freed without content that can be found (above all the last, which is not
            full) are reused before all others, not after them.
        async_scheduling: its default.
        block_size: its default.
    """

    reserve_full_prompt: bool
    one_decode_in_flight: bool
    threshold_needs_company: bool
    cursor_follows_victims: bool
    reuse_unhashed_first: bool
    async_scheduling: bool
    block_size: _Count


class VllmLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Default limits of vLLM on some GPUs.

    Args:
        since: first version.
        min_memory_gib: memory that the GPU has at least.
        except_gpus: beginnings of the names of GPUs to which this does not apply.
        batched_tokens: `max_num_batched_tokens` of the API server.
        offline_batched_tokens: the same of the class `LLM`.
        max_num_seqs: sequences that run together.
    """

    since: str
    min_memory_gib: float
    except_gpus: tuple[str, ...]
    batched_tokens: _Count
    offline_batched_tokens: _Count
    max_num_seqs: _Count

    def applies(self, release: tuple[int, ...], gpu_name: str, memory_gib: float) -> bool:
        """Return whether these hold for a version on a GPU."""
        return (
            release >= release_of(self.since)
            and memory_gib >= self.min_memory_gib
            and not gpu_name.upper().startswith(self.except_gpus)
        )


class _VllmMemory(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    since: str
    gpu_memory_utilization: _Share


class _SglangLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    below_gib: float
    chunked_prefill_size: _Count


class MemoryDefaults(NamedTuple):
    """What an engine takes of a GPU's memory by default.

    Args:
        step_tokens: most tokens of a step.
        share: share of a GPU's memory that the engine may take; with `is_share_of_free`, that the KV cache takes of
            what weights and activations leave.
        is_share_of_free: see there.
    """

    step_tokens: int
    share: float
    is_share_of_free: bool = False


class _Tables(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    vllm: list[dict[str, str | bool | int | float]]
    vllm_limits: list[VllmLimits]
    vllm_memory: list[_VllmMemory]
    sglang_limits: list[_SglangLimits]


@cache
def _tables() -> _Tables:
    return read_toml(data_path("engine_schedulers.toml"), _Tables, what="table of engine schedulers")


@cache
def vllm_rules(version: str) -> VllmRules:
    """Return the rules of a version of vLLM.

    Raises:
        InputError: it is not a version, or one whose scheduler is not modelled.
    """
    release = release_of(version)
    rules: dict[str, str | bool | int | float] = {}
    first = _first_vllm()
    for line in _tables().vllm:
        if release >= release_of(str(line["since"])):
            rules |= line
    if not rules:
        raise InputError(
            f"vLLM {version}: schedulers before {first} (engine V0) are not modelled; name {first} or later"
        )
    del rules["since"]
    return msgspec.convert(rules, VllmRules)


def _first_vllm() -> str:
    """Return the first version of vLLM whose scheduler is modelled."""
    return str(_tables().vllm[0]["since"])


def vllm_limits(version: str, gpu_name: str, memory_gib: float) -> VllmLimits:
    """Return the default limits of a version of vLLM on a GPU.

    Args:
        version: of vLLM.
        gpu_name: the kind of GPU.
        memory_gib: memory of one.
    """
    release = release_of(version)
    holding = [limits for limits in _tables().vllm_limits if limits.applies(release, gpu_name, memory_gib)]
    return max(holding, key=lambda limits: limits.min_memory_gib)


def sglang_chunk_tokens(memory_gib: float) -> int:
    """Return the default `chunked_prefill_size` of SGLang on a GPU."""
    return next(line.chunked_prefill_size for line in _tables().sglang_limits if memory_gib < line.below_gib)


def vllm_memory_share(version: str) -> float:
    """Return the default `gpu_memory_utilization` of a version of vLLM: its share of a GPU's memory."""
    release = release_of(version)
    return [line for line in _tables().vllm_memory if release >= release_of(line.since)][-1].gpu_memory_utilization


def sglang_memory_share(memory_gib: float, *, chunk_tokens: int, tp: int) -> float:
    """Return the default `mem_fraction_static` of SGLang, without what it sets aside for CUDA graphs.

    Args:
        memory_gib: memory of a GPU.
        chunk_tokens: `chunked_prefill_size`; 0 where prompts are computed whole.
        tp: GPUs that share each layer.
    """
    reserve_gib = (512 + 1.5 * chunk_tokens + 128 * tp) / _MB_PER_GIB
    if memory_gib > _LARGE_GIB:
        reserve_gib = max(reserve_gib, _LEAST_RESERVE_GIB)
    return max(0.0, 1 - reserve_gib / memory_gib)


@lru_cache(maxsize=1024)
def memory_defaults(engine: str, version: str, *, gpu_name: str, memory_gib: float, tp: int) -> MemoryDefaults:
    """Return what an engine takes of a GPU's memory by default.

    Args:
        engine: vllm, trtllm, sglang or torch.
        version: of the engine.
        gpu_name: the kind of GPU.
        memory_gib: memory of one.
        tp: GPUs that share each layer.

    Raises:
        InputError: it is not a version.
    """
    if engine == "torch":  # whose cache grows as it needs to
        return MemoryDefaults(_UNLIMITED_STEP_TOKENS, 1.0)
    if engine == "trtllm":
        return MemoryDefaults(TRTLLM_MAX_NUM_TOKENS, TRTLLM_FREE_MEMORY_FRACTION, is_share_of_free=True)
    if engine == "sglang":
        chunk = sglang_chunk_tokens(memory_gib)
        return MemoryDefaults(chunk, sglang_memory_share(memory_gib, chunk_tokens=chunk, tp=tp))
    share = vllm_memory_share(version)
    if release_of(version) < release_of(_first_vllm()):
        return MemoryDefaults(_UNLIMITED_STEP_TOKENS, share)
    return MemoryDefaults(vllm_limits(version, gpu_name, memory_gib).batched_tokens, share)
