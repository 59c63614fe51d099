"""Settings of vLLM, by its own argument names, and their defaults (`vllm/engine/arg_utils.py`; SCHEDULERS 1.9)."""

from __future__ import annotations

from typing import Literal

import msgspec

from maveriq.domain.engine_defaults import (
    NEWEST_CHECKED,
    VllmLimits,
    vllm_limits,
    vllm_memory_share,
    vllm_rules,
)
from maveriq.engine.kv_blocks import KVBlockPool
from maveriq.engine.settings import Count, CountOrNone, EngineHost, ResolvedSettings, Share
from maveriq.engine.vllm import SchedulerLimits, VllmScheduler
from maveriq.engine.vllm_engine import VllmEngine
from maveriq.errors import InputError

_NULL_BLOCKS = 1


class VllmSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="vllm"):
    """Arguments of vLLM; None stands for the default of the version, the GPU and the model.

    Args:
        version: of vLLM.
        max_num_seqs: requests that run together.
        max_num_batched_tokens: tokens of a step.
        max_model_len: longest sequence.
        block_size: tokens of a KV block.
        gpu_memory_utilization: share of a GPU's memory that it may take.
        num_gpu_blocks: KV blocks, the one that is never used included (`--num-gpu-blocks-override`).
        kv_cache_memory_bytes: memory of the KV cache of a GPU, instead of what is left of the share.
        enable_prefix_caching: keep blocks that are free for prompts that begin alike.
        enable_chunked_prefill: split prompts over several steps.
        long_prefill_token_threshold: the most tokens of a prompt in one step; 0 for no such limit.
        max_num_partial_prefills: above 1 it only sets that threshold, to 4 % of `max_model_len`.
        scheduling_policy: in order of arrival, or of priority.
        async_scheduling: compose a step while the one before runs.
        scheduler_reserve_full_isl: admit a request only if blocks for its whole prompt are free.
        performance_mode: "throughput" doubles the default limits of a step.
        tensor_parallel_size: GPUs that share each layer.
        pipeline_parallel_size: pipeline stages.
        enable_expert_parallel: deal whole experts to the GPUs.
        dtype: 16-bit format of weights that are not quantised.
        quantization: how weights are quantised.
        kv_cache_dtype: format of the KV cache.
        offline: used as the class `LLM`, whose defaults differ from the API server's.
    """

    version: str = NEWEST_CHECKED
    max_num_seqs: Count | None = None
    max_num_batched_tokens: Count | None = None
    max_model_len: Count | None = None
    block_size: Count | None = None
    gpu_memory_utilization: Share | None = None
    num_gpu_blocks: Count | None = None
    kv_cache_memory_bytes: Count | None = None
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    long_prefill_token_threshold: CountOrNone = 0
    max_num_partial_prefills: Count = 1
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    async_scheduling: bool | None = None
    scheduler_reserve_full_isl: bool = True
    performance_mode: Literal["balanced", "interactivity", "throughput"] = "balanced"
    tensor_parallel_size: Count = 1
    pipeline_parallel_size: Count = 1
    enable_expert_parallel: bool = False
    dtype: str = "auto"
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    offline: bool = False

    def resolve(self, host: EngineHost) -> ResolvedSettings:
        """Fill in the defaults.

        Raises:
            InputError: the version is not modelled, or arguments contradict each other.
        """
        rules = vllm_rules(self.version)
        block_size = self.block_size or rules.block_size
        max_model_len = self.max_model_len or host.context_tokens
        usual = vllm_limits(self.version, host.gpu_name, host.gpu_memory_gib)
        max_num_seqs, tokens = self._limits(usual, max_model_len)
        is_async = self.async_scheduling
        if is_async is None:
            is_async = rules.async_scheduling and self.pipeline_parallel_size == 1
        limits = SchedulerLimits(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=tokens,
            max_model_len=max_model_len,
            long_prefill_token_threshold=self._threshold(max_model_len),
            enable_chunked_prefill=self.enable_chunked_prefill,
            scheduler_reserve_full_isl=self.scheduler_reserve_full_isl,
            by_priority=self.scheduling_policy == "priority",
            async_scheduling=is_async,
            pipeline_parallel_size=self.pipeline_parallel_size,
        )

        def build(blocks: int, lists_tokens: bool) -> VllmEngine:  # noqa: FBT001
            pool = KVBlockPool(
                blocks,
                block_size,
                prefix_caching=self.enable_prefix_caching,
                reuse_unhashed_first=rules.reuse_unhashed_first,
            )
            return VllmEngine(VllmScheduler(limits, rules, pool, counts_together=not lists_tokens))

        return ResolvedSettings(
            max_model_len=max_model_len,
            block_size=block_size,
            max_num_batched_tokens=tokens,
            max_num_seqs=max_num_seqs,
            memory_share=self.gpu_memory_utilization or vllm_memory_share(self.version),
            num_gpu_blocks=self.num_gpu_blocks,
            reserved_blocks=_NULL_BLOCKS,
            build=build,
        )

    def _limits(self, usual: VllmLimits, max_model_len: int) -> tuple[int, int]:
        """Return sequences and tokens of a step."""
        factor = 2 if self.performance_mode == "throughput" else 1
        usual_seqs = factor * usual.max_num_seqs
        tokens = self.max_num_batched_tokens
        if tokens is None:
            tokens = factor * (usual.offline_batched_tokens if self.offline else usual.batched_tokens)
            tokens = min(tokens, (self.max_num_seqs or usual_seqs) * max_model_len)
            if not self.enable_chunked_prefill:
                tokens = max(tokens, max_model_len)
        elif not self.enable_chunked_prefill and tokens < max_model_len:
            raise InputError(
                f"engine: max_num_batched_tokens {tokens} is less than max_model_len {max_model_len}, which vLLM "
                "refuses without chunked prefill; raise the one, lower the other, or allow chunks"
            )
        seqs = min(usual_seqs, tokens) if self.max_num_seqs is None else self.max_num_seqs
        if tokens < seqs:
            raise InputError(
                f"engine: max_num_batched_tokens {tokens} is less than max_num_seqs {seqs}, which vLLM refuses; a step "
                "computes at least one token of each sequence"
            )
        return seqs, tokens

    def _threshold(self, max_model_len: int) -> int:
        if self.max_num_partial_prefills > 1 and not self.long_prefill_token_threshold:
            return int(max_model_len * 0.04)
        return self.long_prefill_token_threshold


def vllm_layers_of_stages(layers: int, stages: int) -> tuple[int, ...]:
    """Return how vLLM deals layers to pipeline stages: the rest goes to the stages before the last, one layer each.

    Source: `vllm/distributed/utils.py`, `get_pp_indices`. The last stage has the output matrix beside its layers.
    """
    each, rest = divmod(layers, stages)
    return tuple(each + (stages - 1 - rest <= stage < stages - 1) for stage in range(stages))
