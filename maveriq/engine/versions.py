"""What a version of an engine does differently (`maveriq/data/engine_schedulers.toml`)."""

from __future__ import annotations

from functools import cache
from typing import Annotated

import msgspec

from maveriq.domain.engine_versions import release_of
from maveriq.errors import InputError
from maveriq.files import data_path
from maveriq.tables import read_toml

_Share = Annotated[float, msgspec.Meta(gt=0, le=1)]
_Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]


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
        gpu_memory_utilization: its default.
        block_size: its default.
    """

    reserve_full_prompt: bool
    one_decode_in_flight: bool
    threshold_needs_company: bool
    cursor_follows_victims: bool
    reuse_unhashed_first: bool
    async_scheduling: bool
    gpu_memory_utilization: _Share
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


class _SglangLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    below_gib: float
    chunked_prefill_size: _Count


class _Tables(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    vllm: list[dict[str, str | bool | int | float]]
    vllm_limits: list[VllmLimits]
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
    first = str(_tables().vllm[0]["since"])
    for line in _tables().vllm:
        if release >= release_of(str(line["since"])):
            rules |= line
    if not rules:
        raise InputError(
            f"vLLM {version}: schedulers before {first} (engine V0) are not modelled; name {first} or later"
        )
    del rules["since"]
    return msgspec.convert(rules, VllmRules)


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
