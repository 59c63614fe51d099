"""Which degrees of tensor and expert parallelism can share a decoder's layers, as engines for LLMs demand it."""

from __future__ import annotations

from collections.abc import Iterator

from maveriq.domain.decoder import (
    Decoder,
    DenseFeedForward,
    ExpertFeedForward,
    GroupedAttention,
    LatentAttention,
    LayerKind,
    Matrix,
)
from maveriq.domain.parallel import why_tp_does_not_divide
from maveriq.domain.weight_formats import BITS_16, WeightFormat

_SPLIT_INPUTS = ("o_proj", "down_proj")
_SPLIT_OUTPUTS = ("q_proj", "k_proj", "v_proj", "q_b_proj", "kv_b_proj", "gate_proj", "up_proj")
_UNPADDED_BLOCK = 64  # weights; kernels with smaller blocks pad what a GPU gets


def tensor_parallel_divisors(decoder: Decoder, gpus: int) -> list[int]:
    """Return the degrees up to `gpus` that divide the attention heads of every layer."""
    heads = {
        kind.attention.heads
        for kind in decoder.layer_kinds
        if isinstance(kind.attention, GroupedAttention | LatentAttention)
    }
    largest = min(gpus, *heads) if heads else gpus
    return [tp for tp in range(1, largest + 1) if not any(count % tp for count in heads)]


def expert_parallel_degrees(decoder: Decoder, tp: int) -> list[int]:
    """Return the degrees that policies consider for a stage of `tp` GPUs: experts split, or dealt out whole."""
    has_experts = any(isinstance(kind.feed_forward, ExpertFeedForward) for kind in decoder.layer_kinds)
    return [1, tp] if tp > 1 and has_experts else [1]


def why_not_shared(decoder: Decoder, *, tp: int, ep: int = 1, stored_as: WeightFormat | None = None) -> str | None:
    """Return which part of a layer the GPUs of a stage cannot share, in one clause; None where they can share all.

    Args:
        decoder: the model.
        tp: tensor-parallel degree, the GPUs of a stage.
        ep: groups among them to which whole experts are dealt; it divides `tp`.
        stored_as: how the matrices of layers are stored; None for as the checkpoint stores them.
    """
    if ep > 1 and not any(isinstance(kind.feed_forward, ExpertFeedForward) for kind in decoder.layer_kinds):
        return f"EP {ep} deals out experts, and the model has none"
    reasons = (_why_not_shared_kind(kind, decoder.hidden_size, tp, ep, stored_as) for kind in decoder.layer_kinds)
    return next((reason for reason in reasons if reason), None)


def _why_not_shared_kind(
    kind: LayerKind, hidden_size: int, tp: int, ep: int, stored_as: WeightFormat | None
) -> str | None:
    heads = kv_heads = width = None
    if isinstance(kind.attention, GroupedAttention):
        heads, kv_heads = kind.attention.heads, kind.attention.kv_heads
    elif isinstance(kind.attention, LatentAttention):
        heads = kind.attention.heads
    if isinstance(kind.feed_forward, DenseFeedForward):
        width = kind.feed_forward.width
    elif isinstance(kind.feed_forward, ExpertFeedForward):
        width = kind.feed_forward.shared_width
        if kind.feed_forward.experts % ep:
            return f"EP {ep} does not divide the {kind.feed_forward.experts} experts"
        if kind.feed_forward.width % (tp // ep):
            return f"TP {tp // ep} does not divide the experts' width {kind.feed_forward.width}"
    undivided = why_tp_does_not_divide(tp, heads=heads, kv_heads=kv_heads, feed_forward=width)
    return undivided or next(_cut_blocks(kind, hidden_size, tp, ep, stored_as), None)


def _cut_blocks(kind: LayerKind, hidden_size: int, tp: int, ep: int, stored_as: WeightFormat | None) -> Iterator[str]:
    """Yield a reason for each matrix whose blocks of weights with a common scale the GPUs would cut."""
    formats = dict(kind.formats)
    for matrix in kind.weight_matrices(hidden_size):
        stored = formats.get(matrix.name, BITS_16) if stored_as is None else stored_as
        if matrix.keeps_16_bits:
            continue
        share = tp // ep if matrix.copies > 1 else tp
        if matrix.name.endswith(("k_proj", "v_proj")) and isinstance(kind.attention, GroupedAttention):
            share = min(share, kind.attention.kv_heads)
        if share > 1 and (cut := _cut(matrix, stored, share)):
            size, block = cut
            yield (
                f"TP {share} leaves each GPU {size // share} values of {matrix.name}, which cuts through the blocks of "
                f"{block} {stored.name} weights"
            )


def _cut(matrix: Matrix, stored: WeightFormat, share: int) -> tuple[int, int] | None:
    """Return the size and the block that a share cuts, None where it cuts none."""
    for ends, size, block in (
        (_SPLIT_INPUTS, matrix.inputs, stored.block_inputs),
        (_SPLIT_OUTPUTS, matrix.outputs, stored.block_outputs),
    ):
        if matrix.name.endswith(ends) and block >= _UNPADDED_BLOCK and size // share % block:
            return size, block
    return None
