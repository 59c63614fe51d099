"""Settings of TensorRT-LLM, SGLang and exclusive engines, by their own argument names, and their defaults."""

from __future__ import annotations

import msgspec

from maveriq.domain.engine_defaults import (
    TRTLLM_FREE_MEMORY_FRACTION,
    TRTLLM_MAX_NUM_TOKENS,
    sglang_chunk_tokens,
    sglang_memory_share,
)
from maveriq.domain.engine_versions import release_of
from maveriq.engine.exclusive import ExclusiveEngine
from maveriq.engine.interface import Engine
from maveriq.engine.kv_blocks import KVBlockPool
from maveriq.engine.settings import Count, EngineHost, ResolvedSettings, Share
from maveriq.engine.sglang import SglangEngine
from maveriq.engine.trtllm import CapacityPolicy, ChunkingPolicy, TrtllmEngine
from maveriq.errors import InputError


class TrtllmSettings(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="trtllm"
):
    """Arguments of TensorRT-LLM (`tensorrt_llm/llmapi/llm_args.py`).

    Args:
        version: of TensorRT-LLM; its rules here are those of 1.x.
        max_batch_size: requests of a step.
        max_num_tokens: tokens of a step.
        max_seq_len: longest sequence; None for the model's.
        tokens_per_block: tokens of a KV block.
        free_gpu_memory_fraction: share of the memory left by weights and activations that the KV cache takes.
        num_gpu_blocks: KV blocks; None for as many as there is memory for.
        enable_block_reuse: find blocks of prompts that begin alike.
        enable_chunked_prefill: split prompts over several steps.
        capacity_scheduler_policy: which requests may run.
        context_chunking_policy: how prompts share a step, where they are split.
        disable_overlap_scheduler: compose a step only when the one before has run.
        tensor_parallel_size: GPUs that share each layer.
        pipeline_parallel_size: pipeline stages; more than one is not modelled.
    """

    version: str = "1.2"
    max_batch_size: Count = 2048
    max_num_tokens: Count = TRTLLM_MAX_NUM_TOKENS
    max_seq_len: Count | None = None
    tokens_per_block: Count = 32
    free_gpu_memory_fraction: Share = TRTLLM_FREE_MEMORY_FRACTION
    num_gpu_blocks: Count | None = None
    enable_block_reuse: bool = True
    enable_chunked_prefill: bool = False
    capacity_scheduler_policy: CapacityPolicy = CapacityPolicy.GUARANTEED_NO_EVICT
    context_chunking_policy: ChunkingPolicy = ChunkingPolicy.FIRST_COME_FIRST_SERVED
    disable_overlap_scheduler: bool = False
    tensor_parallel_size: Count = 1
    pipeline_parallel_size: Count = 1

    def resolve(self, host: EngineHost) -> ResolvedSettings:
        """Fill in the defaults.

        Raises:
            InputError: the version is not one, or a pipeline is asked for.
        """
        release_of(self.version)
        _no_pipeline("TensorRT-LLM", self.pipeline_parallel_size)
        max_seq_len = self.max_seq_len or host.context_tokens

        def build(blocks: int, _: bool) -> Engine:  # noqa: FBT001
            return TrtllmEngine(
                KVBlockPool(blocks, self.tokens_per_block, prefix_caching=self.enable_block_reuse),
                max_seq_len=max_seq_len,
                max_batch_size=self.max_batch_size,
                max_num_tokens=self.max_num_tokens,
                capacity_policy=self.capacity_scheduler_policy,
                chunking_policy=self.context_chunking_policy if self.enable_chunked_prefill else None,
                overlaps=not self.disable_overlap_scheduler,
            )

        return ResolvedSettings(
            max_model_len=max_seq_len,
            block_size=self.tokens_per_block,
            max_num_batched_tokens=self.max_num_tokens,
            max_num_seqs=self.max_batch_size,
            memory_share=self.free_gpu_memory_fraction,
            is_share_of_free=True,
            num_gpu_blocks=self.num_gpu_blocks,
            build=build,
        )


class SglangSettings(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="sglang"
):
    """Arguments of SGLang (`server_args.py`).

    Args:
        version: of SGLang; its rules here are those of 0.5.23.
        max_running_requests: requests that run together.
        max_prefill_tokens: prompt tokens of a step.
        chunked_prefill_size: prompt tokens of a step, the last of which is cut; -1 computes prompts whole; None for the
            default of the GPU.
        context_length: longest sequence; None for the model's.
        page_size: tokens of a page of the KV cache.
        mem_fraction_static: share of a GPU's memory for weights and KV cache; None for the default of the GPU.
        max_total_tokens: tokens of the KV cache; None for as many as there is memory for.
        schedule_conservativeness: scales the guess of how much running requests will still generate.
        disable_radix_cache: find no pages of prompts that begin alike.
        enable_mixed_chunk: let running requests decode beside prompts.
        disable_overlap_schedule: compose a step only when the one before has run.
        tensor_parallel_size: GPUs that share each layer.
        pipeline_parallel_size: pipeline stages; more than one is not modelled.
    """

    version: str = "0.5.23"
    max_running_requests: Count = 2048
    max_prefill_tokens: Count = 16_384
    chunked_prefill_size: int | None = None
    context_length: Count | None = None
    page_size: Count = 1
    mem_fraction_static: Share | None = None
    max_total_tokens: Count | None = None
    schedule_conservativeness: float = 1.0
    disable_radix_cache: bool = False
    enable_mixed_chunk: bool = False
    disable_overlap_schedule: bool = False
    tensor_parallel_size: Count = 1
    pipeline_parallel_size: Count = 1

    def resolve(self, host: EngineHost) -> ResolvedSettings:
        """Fill in the defaults.

        Raises:
            InputError: the version is not one, a pipeline is asked for, or the conservativeness is negative.
        """
        release_of(self.version)
        _no_pipeline("SGLang", self.pipeline_parallel_size)
        if self.schedule_conservativeness < 0:
            raise InputError(
                f"engine: schedule_conservativeness is {self.schedule_conservativeness}; it must be at least 0"
            )
        chunk = self.chunked_prefill_size
        if chunk is None:
            chunk = sglang_chunk_tokens(host.gpu_memory_gib)
        context_length = self.context_length or host.context_tokens

        def build(blocks: int, _: bool) -> Engine:  # noqa: FBT001
            return SglangEngine(
                KVBlockPool(blocks, self.page_size, prefix_caching=not self.disable_radix_cache),
                context_length=context_length,
                max_running_requests=self.max_running_requests,
                max_prefill_tokens=self.max_prefill_tokens,
                chunked_prefill_size=chunk if chunk > 0 else None,
                conservativeness=self.schedule_conservativeness,
                mixes_chunks=self.enable_mixed_chunk,
                overlaps=not self.disable_overlap_schedule,
            )

        return ResolvedSettings(
            max_model_len=context_length,
            block_size=self.page_size,
            max_num_batched_tokens=chunk if chunk > 0 else self.max_prefill_tokens,
            max_num_seqs=self.max_running_requests,
            memory_share=self.mem_fraction_static
            or sglang_memory_share(host.gpu_memory_gib, chunk_tokens=max(chunk, 0), tp=self.tensor_parallel_size),
            num_gpu_blocks=None if self.max_total_tokens is None else self.max_total_tokens // self.page_size,
            build=build,
        )


class ExclusiveSettings(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="exclusive"
):
    """Settings of an engine that computes one batch to its end before the next one starts.

    Args:
        max_num_seqs: requests of a batch.
        max_model_len: longest sequence; None for the model's.
        block_size: tokens of a KV block.
        gpu_memory_utilization: share of a GPU's memory that it may take.
        num_gpu_blocks: KV blocks; None for as many as there is memory for.
    """

    max_num_seqs: Count = 1
    max_model_len: Count | None = None
    block_size: Count = 16
    gpu_memory_utilization: Share = 0.9
    num_gpu_blocks: Count | None = None

    def resolve(self, host: EngineHost) -> ResolvedSettings:
        """Fill in the defaults."""
        max_model_len = self.max_model_len or host.context_tokens

        def build(blocks: int, _: bool) -> Engine:  # noqa: FBT001
            pool = KVBlockPool(blocks, self.block_size, prefix_caching=False)
            return ExclusiveEngine(pool, max_model_len=max_model_len, max_num_seqs=self.max_num_seqs)

        return ResolvedSettings(
            max_model_len=max_model_len,
            block_size=self.block_size,
            max_num_batched_tokens=self.max_num_seqs * max_model_len,
            max_num_seqs=self.max_num_seqs,
            memory_share=self.gpu_memory_utilization,
            num_gpu_blocks=self.num_gpu_blocks,
            build=build,
        )


def _no_pipeline(engine: str, stages: int) -> None:
    if stages > 1:
        raise InputError(
            f'engine: pipelines of {engine} are not modelled (pipeline_parallel_size {stages}); use kind "vllm", or '
            "pipeline_parallel_size 1"
        )
