"""How long one step of an engine computes on the GPUs of a pipeline stage: the operators of its layers, added up.

A step holds sequences that decode, one token each, and chunks of prompts. Its kernels run one after another, so times
add up: the dense parts by the tokens of the step, attention by what each sequence attends to, the output by sequences.
What the host adds is `maveriq.estimate.engine_presets`. Times are microseconds.

`StepModel` evaluates the operators once, on grids of sizes, and interpolates linearly. One step then takes a few
microseconds to answer, and a fraction of one in compiled code (`maveriq.estimate.compiled_step`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from maveriq.domain.decoder import (
    Attention,
    Decoder,
    DenseFeedForward,
    ExpertFeedForward,
    GroupedAttention,
    LatentAttention,
    LayerKind,
)
from maveriq.domain.gpu_kinds import NumberFormat, number_format_of
from maveriq.errors import InputError, InvariantError
from maveriq.estimate.experts import ExpertLoad, experts_hit
from maveriq.estimate.log_grid import Array
from maveriq.estimate.operators import Heads, Operators, quantises_activations
from maveriq.estimate.step_grids import Line, StepGrids, Surface, SurfacePair

MANY_CHUNKS = 32
"""Chunks that fill any GPU: a chunk beside others adds its share of so many."""

_KEPT_PARTS = 512
_VALUE_BYTES = 2
_LAYER_KERNELS = 5
_QUANTISE_KERNELS = 3

# The matrices that say how a part is stored.
_QUERY = ("self_attn.q_proj", "self_attn.q_a_proj")
_OUTPUT = ("self_attn.o_proj",)
_DENSE = ("mlp.up_proj", "mlp.shared_experts.up_proj")
_EXPERTS = ("mlp.experts.up_proj", "experts.up_proj")
_SAMPLER_US = 30.0
_SAMPLER_BYTES = 16  # a logit is read and written several times, in 32 bits

# From one point to the next at most a factor of 1.5, except where tiles end: there a step in time is real.
_TOKENS = np.asarray(
    [1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 65, 96, 128, 129, 192, 256, 257, 384, 512, 513, 768, 769, 1024, 1025, 1280,
     1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 32768, 65536], dtype=np.float64,
)  # fmt: skip
_SEQUENCES = np.asarray(
    [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096], dtype=np.float64
)
_CONTEXT = np.asarray(
    [1, 64, 128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768, 65536, 131072,
     262144], dtype=np.float64,
)  # fmt: skip
_CHUNK = np.asarray(
    [1, 16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 16384, 32768],
    dtype=np.float64,
)  # fmt: skip
_PAST = np.asarray([0, 128, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072], dtype=np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Formats:
    """How a model is stored and computed.

    Args:
        weights: the matrices of layers, but for routers; None for each as the checkpoint stores it.
        kv: the KV cache.
    """

    weights: NumberFormat | None = NumberFormat.BFLOAT16
    kv: NumberFormat = NumberFormat.BFLOAT16

    def of(self, kind: LayerKind, *matrices: str) -> NumberFormat:
        """Return the format of a product with some of a layer's matrices, which are fused or stored alike."""
        if self.weights is not None:
            return self.weights
        stored = (stored for name, stored in kind.formats if name in matrices)
        return next((found for found in map(number_format_of, stored) if found), NumberFormat.BFLOAT16)

    def of_head(self, decoder: Decoder) -> NumberFormat:
        """Return the format of the output matrix, which only checkpoints quantise."""
        stored = None if self.weights is not None else number_format_of(decoder.head_format)
        return stored or NumberFormat.BFLOAT16


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """How the GPUs of a stage share its layers.

    Args:
        tp: GPUs that share each layer.
        ep: groups among which whole experts are dealt; the GPUs of a group share each expert. It divides `tp`.
    """

    tp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        if self.tp < 1 or self.ep < 1 or self.tp % self.ep:
            raise InputError(f"sharding: expert parallelism {self.ep} must divide the {self.tp} GPUs of a stage")


class Chunk(NamedTuple):
    """A chunk of a prompt: `tokens` tokens behind `past` ones."""

    tokens: int
    past: int = 0


def why_not_timed(decoder: Decoder) -> str | None:
    """Return what of a decoder has no step times here; None where all has.

    These are layers with a state, and sparse attention, which would be priced as if it attended to all tokens.
    """
    for kind in decoder.layer_kinds:
        attention = kind.attention
        sparse = isinstance(attention, LatentAttention) and attention.index_heads
        if attention is not None and (sparse or not isinstance(attention, GroupedAttention | LatentAttention)):
            return f"{attention.feature}: step times of these are not modelled"
    return None


class GriddedSteps:
    """The time of a step, interpolated between the points of grids.

    Args:
        grids: times of the parts of a step.
    """

    def __init__(self, grids: StepGrids) -> None:
        self.grids = grids
        self._tokens_us = Line(grids.tokens, grids.tokens_us)
        self._decode_us = Surface(grids.sequences, grids.context, grids.decode_us)
        self._mixed_decode_us = Surface(grids.sequences, grids.context, grids.mixed_decode_us)
        self._prefill_us = SurfacePair(grids.chunk, grids.past, grids.prefill_us, grids.prefill_lead_us)
        self._head_us = Line(grids.sequences, grids.head_us)

    @property
    def packed(self) -> Array:
        """What `maveriq.estimate.compiled_step` answers from."""
        return self.grids.packed()

    @property
    def contexts(self) -> Sequence[int]:
        """Lengths of a sequence, ascending, between which the time of a step that only decodes is linear in them."""
        return [int(context) for context in self.grids.context]

    def mixed_decode_us(self, decodes: float, context: float) -> float:
        """Return the time of attention of so many decoding sequences of a length, beside chunks of prompts."""
        return self._mixed_decode_us.at(decodes, context)

    def gpu_us(self, *, decodes: float, context_tokens: float, chunks: Iterable[tuple[int, int]] = ()) -> float:
        """Return the time of the kernels of a step.

        Args:
            decodes: sequences that decode; a mean may be a fraction.
            context_tokens: tokens that these attend to, all sequences together.
            chunks: chunks of prompts, each a `Chunk` or `(tokens, past)`.
        """
        tokens = sequences = float(decodes)
        time_us = lead_us = beside_others_us = 0.0
        last = None
        for chunk in chunks:
            chunk_tokens, past = chunk
            tokens += chunk_tokens
            sequences += 1
            if chunk is not last:  # equal ones are often the same object
                beside_others_us, more_alone_us = self._prefill_us.at(chunk_tokens, past)
                lead_us, last = max(lead_us, more_alone_us), chunk
            time_us += beside_others_us
        if not tokens:
            return 0.0
        time_us += lead_us
        if decodes:
            decode = self._mixed_decode_us if sequences > decodes else self._decode_us
            time_us += decode.at(decodes, context_tokens / decodes)
        return time_us + self._tokens_us.at(tokens) + self._head_us.at(sequences)


class StepModel(GriddedSteps):
    """The time of a step in one pipeline stage.

    Args:
        decoder: the model.
        operators: the operators of the stage's GPUs.
        sharding: how these share a layer.
        formats: how weights and cache are stored.
        first: the stage's first layer.
        end: the layer after its last; None for all. The last stage computes the output, too.

    Raises:
        InputError: `why_not_timed` has a reason.
    """

    def __init__(
        self,
        decoder: Decoder,
        operators: Operators,
        *,
        sharding: Sharding = Sharding(),
        formats: Formats = Formats(),
        first: int = 0,
        end: int | None = None,
    ) -> None:
        reason = why_not_timed(decoder)
        if reason is not None:
            raise InputError(reason)
        is_last = end is None or end == decoder.layers
        layers = _Layers(decoder, operators, sharding, formats)
        super().__init__(_grids(layers, decoder.kinds(first, end), is_last=is_last))


def _grids(layers: _Layers, kinds: Sequence[tuple[LayerKind, int]], *, is_last: bool) -> StepGrids:
    tokens_us, head_us = np.zeros(len(_TOKENS)), np.zeros(len(_SEQUENCES))
    decode_us, mixed_us = np.zeros((2, len(_SEQUENCES), len(_CONTEXT)))
    prefill_us, alone_us = np.zeros((2, len(_CHUNK), len(_PAST)))
    of_weights = replace(layers, formats=Formats(weights=layers.formats.weights))
    of_cache = replace(layers, formats=Formats(kv=layers.formats.kv))
    for kind, number in kinds:
        tokens_us += number * _dense_us(of_weights, kind)
        if kind.attention is not None:
            decode, mixed, one, many = _attention_us(of_cache, kind.attention)
            decode_us += number * decode
            mixed_us += number * mixed
            prefill_us += number * np.clip((many - one[0, 0]) / MANY_CHUNKS, 0.0, one)
            alone_us += number * one
    if is_last:
        head_us += _head_us(of_weights)
    attention = (decode_us, mixed_us, prefill_us, alone_us)
    decode_us, mixed_us, prefill_us, alone_us = (_never_beaten_by_more(times_us) for times_us in attention)
    return StepGrids(
        tokens=_TOKENS, tokens_us=tokens_us, sequences=_SEQUENCES, context=_CONTEXT, decode_us=decode_us,
        mixed_decode_us=mixed_us, chunk=_CHUNK, past=_PAST, prefill_us=prefill_us,
        prefill_lead_us=alone_us - prefill_us, head_us=head_us,
    )  # fmt: skip


# Plans ask for many formats of a model. Its layers do not depend on that of the cache, nor attention on the weights.


@lru_cache(maxsize=_KEPT_PARTS)
def _dense_us(layers: _Layers, kind: LayerKind) -> Array:
    return layers.dense_us(kind, _TOKENS)


@lru_cache(maxsize=_KEPT_PARTS)
def _head_us(layers: _Layers) -> Array:
    return layers.head_us(_SEQUENCES)


@lru_cache(maxsize=_KEPT_PARTS)
def _attention_us(layers: _Layers, attention: Attention) -> tuple[Array, Array, Array, Array]:
    """Return the times of decoding, alone and beside chunks, and of prefill: of one chunk and of many."""
    sizes, past = (attention, _SEQUENCES[:, None], _CONTEXT[None, :]), (attention, _CHUNK[:, None], _PAST[None, :])
    return (
        layers.decode_us(*sizes, has_chunks=False),
        layers.decode_us(*sizes, has_chunks=True),
        layers.prefill_us(*past),
        layers.prefill_us(*past, chunks=MANY_CHUNKS),
    )


def _never_beaten_by_more(times_us: Array) -> Array:
    """Return times that no larger size along any axis beats.

    Kernels can be padded to a larger size. Where a table gives them more time than that, its measurements are off:
    it has fp8 products of one row on a B200 at three times the time of two rows.
    """
    backwards = times_us[(slice(None, None, -1),) * times_us.ndim]
    for axis in range(times_us.ndim):
        backwards = np.minimum.accumulate(backwards, axis)
    return np.ascontiguousarray(backwards[(slice(None, None, -1),) * times_us.ndim])


@dataclass(frozen=True, slots=True)
class _Layers:
    """Times of the parts of a layer on one of the GPUs that share it."""

    decoder: Decoder
    operators: Operators
    sharding: Sharding
    formats: Formats

    def dense_us(self, kind: LayerKind, tokens: Array) -> Array:
        """Return the time of all of a layer but attention itself, for so many tokens."""
        time_us = np.zeros_like(tokens)
        if kind.attention is not None:
            time_us = time_us + self._projections_us(kind, kind.attention, tokens)
        if isinstance(kind.feed_forward, DenseFeedForward):
            stored = self.formats.of(kind, *_DENSE)
            width, matrices = kind.feed_forward.width, kind.feed_forward.matrices
            time_us = time_us + self._feed_forward_us(stored, width, matrices, tokens)
        elif isinstance(kind.feed_forward, ExpertFeedForward):
            time_us = time_us + self._experts_us(kind, kind.feed_forward, tokens)
        kernels_us = _never_beaten_by_more(time_us + self._elementwise_us(kind, tokens))
        return kernels_us + self._all_reduces_us(kind, tokens)  # larger ones may go a faster way

    def decode_us(self, attention: Attention, sequences: Array, context: Array, *, has_chunks: bool) -> Array:
        """Return the time of attention of one new token in each sequence, alone or beside chunks of prompts."""
        seen = context if attention.window is None else np.minimum(context, attention.window)
        if isinstance(attention, LatentAttention):
            return self.operators.latent_decode_attention_us(
                self.formats.kv, sequences, seen,
                heads=attention.heads / self.sharding.tp, kv_rank=attention.kv_rank, rope_size=attention.rope_size,
            )  # fmt: skip
        operators, of = self.operators, self._heads(_grouped(attention))
        attention_us = operators.mixed_decode_attention_us if has_chunks else operators.decode_attention_us
        return attention_us(self.formats.kv, sequences, seen, of, windowed=attention.window is not None)

    def prefill_us(self, attention: Attention, chunk: Array, past: Array, *, chunks: int = 1) -> Array:
        """Return the time of attention of equal chunks of prompts."""
        window, kv = np.inf if attention.window is None else float(attention.window), self.formats.kv
        if isinstance(attention, LatentAttention):
            # Keys and values are expanded for all heads, to 16 bits; queries and keys are wider than values.
            kv = NumberFormat.BFLOAT16
            heads = max(1, attention.heads // self.sharding.tp)
            size = (attention.nope_size + attention.rope_size + attention.value_size) // 2
            of = Heads(heads=heads, kv_heads=heads, head_size=size)
        else:
            of = self._heads(_grouped(attention))
        return self.operators.prefill_attention_us(kv, chunk, past, of, window=window, chunks=chunks)

    def head_us(self, sequences: Array) -> Array:
        """Return the time of the output matrix and of choosing a token, for so many sequences."""
        decoder, tp = self.decoder, self.sharding.tp
        stored = self.formats.of_head(decoder)
        gemm_us = self.operators.gemm_us(stored, sequences, decoder.vocab_size / tp, decoder.hidden_size)
        sampled = self.operators.elementwise_us(0, _SAMPLER_BYTES * sequences * decoder.vocab_size)
        gathered = self.operators.all_reduce_us(tp, _VALUE_BYTES * sequences * decoder.vocab_size / tp)
        return np.asarray(_never_beaten_by_more(gemm_us) + sampled + gathered + _SAMPLER_US)

    def _heads(self, attention: GroupedAttention) -> Heads:
        """Return the heads of one GPU: KV heads that are fewer than the GPUs are copied."""
        tp = self.sharding.tp
        return Heads(
            heads=max(1, attention.heads // tp),
            kv_heads=max(1, attention.kv_heads // tp),
            head_size=attention.head_size,
        )

    def _projections_us(self, kind: LayerKind, attention: Attention, tokens: Array) -> Array:
        size, tp = self.decoder.hidden_size, self.sharding.tp
        if isinstance(attention, LatentAttention):
            return self._latent_projections_us(kind, attention, tokens)
        grouped = _grouped(attention)
        of = self._heads(grouped)
        queries = of.heads * of.head_size * (2 if grouped.output_gate else 1)
        values = 0 if grouped.key_is_value else grouped.value_head_size
        keys_values = of.kv_heads * (of.head_size + values)
        output = grouped.heads * grouped.value_head_size / tp
        inputs_us = self.operators.gemm_us(self.formats.of(kind, *_QUERY), tokens, queries + keys_values, size)
        return inputs_us + self.operators.gemm_us(self.formats.of(kind, *_OUTPUT), tokens, size, output)

    def _latent_projections_us(self, kind: LayerKind, attention: LatentAttention, tokens: Array) -> Array:
        size, dense = self.decoder.hidden_size, self.formats.of(kind, *_QUERY)
        heads = max(1, attention.heads // self.sharding.tp)
        latent = attention.query_rank + attention.kv_rank + attention.rope_size
        query = heads * (attention.nope_size + attention.rope_size)
        time_us = self.operators.gemm_us(dense, tokens, latent if attention.query_rank else latent + query, size)
        if attention.query_rank:
            time_us = time_us + self.operators.gemm_us(dense, tokens, query, attention.query_rank)
        # Decoding multiplies queries and results by the halves of the expansion, head by head; prefill expands once.
        for inner in (attention.nope_size, attention.value_size):
            time_us = time_us + self.operators.gemm_us(NumberFormat.BFLOAT16, tokens, attention.kv_rank, heads * inner)
        stored = self.formats.of(kind, *_OUTPUT)
        return time_us + self.operators.gemm_us(stored, tokens, size, heads * attention.value_size)

    def _feed_forward_us(self, stored: NumberFormat, width: float, matrices: int, tokens: Array) -> Array:
        size, share = self.decoder.hidden_size, width / self.sharding.tp
        up_us = self.operators.gemm_us(stored, tokens, (matrices - 1) * share, size)
        return up_us + self.operators.gemm_us(stored, tokens, size, share)

    def _experts_us(self, kind: LayerKind, part: ExpertFeedForward, tokens: Array) -> Array:
        size, (tp, ep) = self.decoder.hidden_size, (self.sharding.tp, self.sharding.ep)
        rows = tokens * part.experts_per_token / ep
        hit = np.minimum(experts_hit(part.experts, part.experts_per_token, tokens) / ep, rows)
        load = ExpertLoad(
            pairs=tokens * part.experts_per_token, rows=rows, hit=hit, inner_size=part.latent_size or size,
            width=part.width * ep / tp, matrices=part.matrices, whole=ep > 1,
        )  # fmt: skip
        time_us = self.operators.experts_us(self.formats.of(kind, *_EXPERTS), load)
        time_us = time_us + self.operators.gemm_us(NumberFormat.BFLOAT16, tokens, part.experts, size)
        if part.shared_width:
            stored = self.formats.of(kind, *_DENSE)
            time_us = time_us + self._feed_forward_us(stored, part.shared_width, part.matrices, tokens)
        return time_us

    def _elementwise_us(self, kind: LayerKind, tokens: Array) -> Array:
        tp, values = self.sharding.tp, 8.0 * self.decoder.hidden_size
        if isinstance(kind.attention, GroupedAttention):
            of = self._heads(kind.attention)
            values += 3 * (of.heads + 2 * of.kv_heads) * of.head_size
        elif isinstance(kind.attention, LatentAttention):
            values += 3 * kind.attention.heads / tp * (kind.attention.nope_size + kind.attention.rope_size)
        if isinstance(kind.feed_forward, DenseFeedForward):
            values += 3 * kind.feed_forward.width / tp
        elif isinstance(kind.feed_forward, ExpertFeedForward):
            values += 3 * kind.feed_forward.shared_width / tp
        quantised = quantises_activations(self.formats.of(kind, *_QUERY, *_DENSE))
        kernels = _LAYER_KERNELS + (_QUANTISE_KERNELS if quantised else 0)
        return self.operators.elementwise_us(kernels, _VALUE_BYTES * tokens * values)

    def _all_reduces_us(self, kind: LayerKind, tokens: Array) -> Array:
        parts = sum(part is not None for part in (kind.attention, kind.feed_forward))
        count = 1 if kind.parallel else parts
        message = _VALUE_BYTES * tokens * self.decoder.hidden_size
        return np.asarray(count * self.operators.all_reduce_us(self.sharding.tp, message))


def _grouped(attention: Attention) -> GroupedAttention:
    if not isinstance(attention, GroupedAttention):
        raise InvariantError(f"why_not_timed lets {type(attention).__name__} pass")
    return attention


def stage_models(
    decoder: Decoder, operators: Operators, layer_split: Sequence[int], *, sharding: Sharding, formats: Formats
) -> list[StepModel]:
    """Return the step model of each pipeline stage."""
    ends = np.cumsum(layer_split).tolist()
    starts = [0, *ends[:-1]]
    return [
        StepModel(decoder, operators, sharding=sharding, formats=formats, first=first, end=end)
        for first, end in zip(starts, ends, strict=True)
    ]
