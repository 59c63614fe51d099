"""What the settings of all kinds of engine have in common (docs/engine-models.md).

Each kind has its own, whose fields carry the engine's own argument names. What is left out gets the default of the
engine's version, the GPU and the model when the settings are resolved.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, TypeAlias

import msgspec

from maveriq.engine.interface import Engine
from maveriq.errors import InputError

Count: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]
CountOrNone: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=1 << 31)]
Share: TypeAlias = Annotated[float, msgspec.Meta(gt=0, le=1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineHost:
    """What an engine finds where it starts, on which its defaults depend.

    Args:
        context_tokens: longest sequence of the model.
        gpu_name: kind of GPU.
        gpu_memory_gib: memory of one GPU, as its driver reports it.
    """

    context_tokens: int
    gpu_name: str = "H100-SXM"
    gpu_memory_gib: float = 79.18


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedSettings:
    """Settings in which nothing is left open but, perhaps, the size of the KV cache.

    Args:
        max_model_len: longest sequence, prompt and output.
        block_size: tokens of a KV block.
        max_num_batched_tokens: the most tokens of a step.
        max_num_seqs: the most requests that run together.
        memory_share: share of a GPU's memory that the engine may take; with `is_share_of_free`, that the KV cache takes
            of what weights and activations leave.
        is_share_of_free: see there.
        num_gpu_blocks: KV blocks; None for as many as there is memory for.
        reserved_blocks: blocks that no sequence gets.
        build: makes the engine of the number of blocks that sequences may hold, and of whether it lists all tokens.
    """

    max_model_len: int
    block_size: int
    max_num_batched_tokens: int
    max_num_seqs: int
    memory_share: float
    is_share_of_free: bool = False
    num_gpu_blocks: int | None = None
    reserved_blocks: int = 0
    build: Callable[[int, bool], Engine]

    def why_too_few_blocks(self, blocks: int) -> str | None:
        """Return why an engine with so many KV blocks does not start, None if it does."""
        needed = -(-self.max_model_len // self.block_size) + self.reserved_blocks
        if blocks >= needed:
            return None
        return (
            f"{blocks} KV blocks of {self.block_size} tokens do not hold one sequence of max_model_len "
            f"{self.max_model_len}, which takes {needed}"
        )

    def make_engine(self, num_gpu_blocks: int | None = None, *, lists_tokens: bool = False) -> Engine:
        """Return an engine without requests.

        Args:
            num_gpu_blocks: KV blocks where the settings do not say how many.
            lists_tokens: whether `finish_step` returns every token; otherwise it may leave out those of sequences that
                only decode, which is much faster.

        Raises:
            InputError: the number of blocks is unknown, or they do not hold the longest sequence.
        """
        blocks = num_gpu_blocks if self.num_gpu_blocks is None else self.num_gpu_blocks
        if blocks is None:
            raise InputError("engine: the number of KV blocks is unknown; set num_gpu_blocks")
        if (reason := self.why_too_few_blocks(blocks)) is not None:
            raise InputError(f"engine: {reason}; lower max_model_len or raise num_gpu_blocks")
        return self.build(blocks - self.reserved_blocks, lists_tokens)
