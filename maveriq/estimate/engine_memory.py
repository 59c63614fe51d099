"""The memory of an engine on each GPU: weights, activations, its own reserve, and the KV blocks that the rest holds.

As vLLM does it: the engine may take a share of a GPU's memory (`gpu_memory_utilization`). What weights, the activations
of its largest step and its own needs leave becomes KV blocks. TensorRT-LLM takes a share of what these leave.
"""

from __future__ import annotations

from dataclasses import dataclass

from maveriq.domain.decoder import (
    Decoder,
    DenseFeedForward,
    ExpertFeedForward,
    GroupedAttention,
    LatentAttention,
    LayerKind,
)
from maveriq.domain.gpu_kinds import GpuSheet
from maveriq.domain.weight_formats import WeightFormat
from maveriq.errors import InputError
from maveriq.units import BYTES_PER_GIB, Bytes

_ACTIVATION_BYTES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """Settings of an engine that decide about its memory, by vLLM's names.

    Args:
        max_num_batched_tokens: most tokens of a step.
        block_size: tokens of a KV block.
        gpu_memory_utilization: the share of a GPU's memory that the engine may take; with `is_share_of_free`, that the
            KV cache takes of what the rest leaves.
        is_share_of_free: see there.
        kv_value_bytes: bytes of a value in the KV cache.
        reserve_gib: what the engine takes on each GPU beside these: context, graphs, workspaces.
        communication_gib: what buffers take beside where it has several GPUs.
        peer_gib: what they take beside for each other GPU of a stage.

    Raises:
        InputError: a setting is out of range.
    """

    max_num_batched_tokens: int = 8192
    block_size: int = 16
    gpu_memory_utilization: float = 0.9
    is_share_of_free: bool = False
    kv_value_bytes: float = 2.0
    # Read off five recorded numbers of KV blocks of vLLM 0.15 and 0.23 on H100.
    reserve_gib: float = 0.2
    communication_gib: float = 0.5
    peer_gib: float = 0.0

    def __post_init__(self) -> None:
        for name in ("max_num_batched_tokens", "block_size"):
            if getattr(self, name) < 1:
                raise InputError(f"engine settings: {name} must be at least 1, not {getattr(self, name)}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise InputError(
                f"engine settings: gpu_memory_utilization must be in (0, 1], not {self.gpu_memory_utilization}"
            )


def predict_kv_blocks(
    decoder: Decoder,
    gpu: GpuSheet,
    *,
    tp: int = 1,
    pp: int = 1,
    stage_layers: int | None = None,
    settings: EngineSettings = EngineSettings(),
    stored_as: WeightFormat | None = None,
) -> int:
    """Return the KV blocks of an engine; 0 where not even the weights fit.

    Args:
        decoder: the model.
        gpu: the kind of GPU.
        tp: GPUs that share each layer.
        pp: stages.
        stage_layers: layers of the largest stage, which decides; None where stages share them evenly.
        settings: the engine's.
        stored_as: how the matrices of layers are stored; None for as the checkpoint stores them.
    """
    share, usable = settings.gpu_memory_utilization, gpu.usable_gib * BYTES_PER_GIB
    stages = pp if stage_layers is None else decoder.layers / stage_layers
    held = decoder.weight_bytes(stored_as) / (tp * stages)
    held += reserved_bytes(decoder, tp=tp, pp=pp, step_tokens=settings.max_num_batched_tokens, settings=settings)
    left = share * (usable - held) if settings.is_share_of_free else share * usable - held
    block_bytes = settings.block_size * token_bytes(decoder, tp=tp, kv_value_bytes=settings.kv_value_bytes) / stages
    return max(0, int(left / block_bytes))


def why_batch_does_not_fit(blocks: int, settings: EngineSettings, *, batch: int, tokens: int) -> str | None:
    """Return why so many sequences of so many tokens, prompt and output, do not fit the KV blocks; None if they do."""
    if batch * -(-tokens // settings.block_size) <= blocks:
        return None
    what = f"a sequence of {tokens} tokens does" if batch == 1 else f"{batch} sequences of {tokens} tokens do"
    return f"{what} not fit: the {blocks} KV blocks left hold {blocks * settings.block_size} tokens"


def reserved_bytes(decoder: Decoder, *, tp: int, pp: int = 1, step_tokens: float, settings: EngineSettings) -> float:
    """Return what one GPU holds beside weights and cache: the engine's own, and the activations of its largest step.

    Args:
        decoder: the model.
        tp: GPUs that share each layer.
        pp: stages.
        step_tokens: tokens of the largest step.
        settings: the engine's.
    """
    widest = max(_activation_values(kind, tp) for kind in decoder.layer_kinds) + 2 * decoder.hidden_size
    engine_gib = settings.reserve_gib + (settings.communication_gib if tp * pp > 1 else 0.0)
    engine_gib += settings.peer_gib * (tp - 1)
    return engine_gib * BYTES_PER_GIB + _ACTIVATION_BYTES * step_tokens * widest


def token_bytes(decoder: Decoder, *, tp: int, kv_value_bytes: float) -> float:
    """Return the bytes of a token in the KV cache of one of the `tp` GPUs of a stage."""
    return decoder.kv_cache(kv_value_bytes).token_bytes * cache_copies(decoder, tp) / tp


def sequence_bytes(decoder: Decoder, tokens: int, *, tp: int, settings: EngineSettings) -> Bytes:
    """Return the bytes of a sequence in the KV caches of the `tp` GPUs of a stage together, in whole blocks."""
    in_blocks = settings.block_size * -(-tokens // settings.block_size)
    return decoder.kv_cache(settings.kv_value_bytes).sequence_bytes(in_blocks) * cache_copies(decoder, tp)


def cache_copies(decoder: Decoder, tp: int) -> int:
    """Return how often the GPUs of a stage keep a token: KV heads are dealt out, latent vectors are not."""
    copies = 1
    for kind in decoder.layer_kinds:
        if isinstance(kind.attention, LatentAttention):
            copies = max(copies, tp)
        elif isinstance(kind.attention, GroupedAttention):
            copies = max(copies, tp // kind.attention.kv_heads)
    return copies


def _activation_values(kind: LayerKind, tp: int) -> float:
    """Return the values of a token that one GPU keeps within a layer."""
    values = 0.0
    if isinstance(kind.attention, GroupedAttention):
        values += (kind.attention.heads + 2 * kind.attention.kv_heads) * kind.attention.head_size / tp
    elif isinstance(kind.attention, LatentAttention):
        values += 3 * kind.attention.heads * (kind.attention.nope_size + kind.attention.rope_size) / tp
    if isinstance(kind.feed_forward, DenseFeedForward):
        values += 3 * kind.feed_forward.width / tp
    elif isinstance(kind.feed_forward, ExpertFeedForward):
        part = kind.feed_forward
        values += 3 * (part.experts_per_token * part.width + part.shared_width) / tp
    return values
