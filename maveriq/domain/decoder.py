"""The structure of a decoder: what its layers are made of, and what follows from it.

Parameters, weights that a token passes, and the bytes that a token takes in the KV cache are counted here, from the
matrices that each part of a layer consists of. `maveriq.domain.decoder_config` reads a `Decoder` from a `config.json`.

Sizes are numbers of values (rows, columns, heads), never bytes, unless a name says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

from maveriq.domain.attention import Attention, DeltaNet, GroupedAttention, LatentAttention, StateSpace
from maveriq.domain.feed_forward import DenseFeedForward, ExpertFeedForward, FeedForward
from maveriq.domain.matrices import Matrix, check_counts
from maveriq.domain.weight_formats import BITS_16, WeightFormat
from maveriq.errors import InputError
from maveriq.units import Bytes

__all__ = [
    "Attention",
    "Decoder",
    "DeltaNet",
    "DenseFeedForward",
    "ExpertFeedForward",
    "FeedForward",
    "GroupedAttention",
    "KvCache",
    "LatentAttention",
    "LayerKind",
    "Matrix",
    "StateSpace",
    "part_of",
    "plain_decoder",
]
"""The parts of layers belong to a decoder: who works with decoders imports them from here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKind:
    """Layers that are built alike.

    Args:
        attention: what mixes tokens; None in a layer that is a feed-forward part alone.
        feed_forward: the feed-forward part; None in a layer without one.
        parallel: whether both take the same input, so that a tensor-parallel layer is summed up once, not twice.
        norm_parameters: weights and biases of the layer's norms, and other parameters that are no matrix.
        formats: how the checkpoint stores its matrices, by name; those that are not there have 16 bits.
    """

    attention: Attention | None
    feed_forward: FeedForward | None
    parallel: bool = False
    norm_parameters: int = 0
    formats: tuple[tuple[str, WeightFormat], ...] = ()

    def weight_matrices(self, hidden_size: int) -> tuple[Matrix, ...]:
        """Return the weight matrices of a layer."""
        attention = self.attention.weight_matrices(hidden_size) if self.attention else ()
        return attention + (self.feed_forward.weight_matrices(hidden_size) if self.feed_forward else ())

    @property
    def vectors(self) -> int:
        """Parameters of a layer that are no matrix and no bias."""
        parts = (self.attention, self.feed_forward)
        return self.norm_parameters + sum(part.vectors for part in parts if part is not None)

    def weight_bytes(self, hidden_size: int, stored_as: WeightFormat | None = None) -> Bytes:
        """Return the bytes of a layer's weights.

        Args:
            hidden_size: values of a token between layers.
            stored_as: how its matrices are stored; None for as the checkpoint stores them.
        """
        formats = dict(self.formats)
        size = 2 * self.vectors
        for matrix in self.weight_matrices(hidden_size):
            stored = formats.get(matrix.name, BITS_16) if stored_as is None else stored_as
            stored = BITS_16 if matrix.keeps_16_bits else stored
            size += matrix.copies * stored.bytes_of(matrix.inputs, matrix.outputs) + 2 * matrix.biases
        return size


@dataclass(frozen=True, slots=True, kw_only=True)
class KvCache:
    """What the KV cache takes of one sequence, over all layers and before any split over GPUs.

    Args:
        full_bytes: bytes a token in the layers that keep every token.
        windowed: (window, bytes a token) of the layers that keep the last tokens of a window, one pair a window.
        state_bytes: bytes of what layers keep of a sequence, however long it is (state-space layers, delta nets).
    """

    full_bytes: Bytes
    windowed: tuple[tuple[int, Bytes], ...] = ()
    state_bytes: Bytes = 0

    @property
    def token_bytes(self) -> Bytes:
        """Bytes of one more token, while all windows hold it."""
        return self.full_bytes + sum(size for _, size in self.windowed)

    def sequence_bytes(self, tokens: int) -> Bytes:
        """Return the bytes of a sequence of so many tokens."""
        return (
            self.state_bytes
            + tokens * self.full_bytes
            + sum(min(tokens, window) * size for window, size in self.windowed)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """A decoder: embedding, layers, output.

    Args:
        hidden_size: values of a token between layers.
        vocab_size: rows of the embedding.
        tied_embeddings: whether the output uses the embedding's matrix.
        layer_kinds: the distinct kinds of layers.
        layer_pattern: for every layer in order, the index of its kind.
        context_tokens: the longest sequence; None where the configuration names none.
        rope_type: how rotary positions are scaled; `default` where they are not, or where there are none.
        learned_positions: rows of the matrix of learned positions; 0 where there is none.
        other_parameters: parameters beside layers, embedding, output and positions: the last norm, biases.
        other_inputs_parameters: parameters of the parts that encode other inputs than text (a vision tower).
        head_format: how the checkpoint stores the output matrix.
        kv_bits: bits of a value in the KV cache that the checkpoint was quantised for; 0 where it says nothing.
        not_counted: parts of the checkpoint that no figure here includes, in words.

    Raises:
        InputError: a count is not positive, or the pattern names a kind that is not there.
    """

    hidden_size: int
    vocab_size: int
    tied_embeddings: bool
    layer_kinds: tuple[LayerKind, ...]
    layer_pattern: tuple[int, ...]
    context_tokens: int | None = None
    rope_type: str = "default"
    learned_positions: int = 0
    other_parameters: int = 0
    other_inputs_parameters: int = 0
    head_format: WeightFormat = BITS_16
    kv_bits: int = 0
    not_counted: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_counts(self, ("hidden_size", "vocab_size"), or_none=("context_tokens",))
        if not self.layer_pattern or set(self.layer_pattern) != set(range(len(self.layer_kinds))):
            raise InputError("decoder: layer_pattern must use every one of layer_kinds, by index, and no other")

    @property
    def layers(self) -> int:
        """The number of layers."""
        return len(self.layer_pattern)

    def kinds(self, first: int = 0, end: int | None = None) -> Sequence[tuple[LayerKind, int]]:
        """Return the kinds among layers `first` up to `end`, each with its number of layers there."""
        counted = self.layer_pattern[first:end]
        return [(kind, number) for index, kind in enumerate(self.layer_kinds) if (number := counted.count(index))]

    def layer_parameters(self, kind: LayerKind) -> int:
        """Return the parameters of one layer of a kind."""
        return kind.vectors + sum(matrix.weights + matrix.biases for matrix in kind.weight_matrices(self.hidden_size))

    def active_layer_parameters(self, kind: LayerKind) -> int:
        """Return the parameters of one layer of a kind that a token passes."""
        return kind.vectors + sum(matrix.active_weights for matrix in kind.weight_matrices(self.hidden_size))

    def layers_parameters(self, first: int = 0, end: int | None = None) -> int:
        """Return the parameters of layers `first` up to `end`, those of a pipeline stage."""
        return sum(number * self.layer_parameters(kind) for kind, number in self.kinds(first, end))

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the embedding and of learned positions."""
        return (self.vocab_size + self.learned_positions) * self.hidden_size

    @property
    def head_parameters(self) -> int:
        """Parameters of the output matrix; 0 where it is the embedding's."""
        return 0 if self.tied_embeddings else self.vocab_size * self.hidden_size

    def text_parameters(self) -> int:
        """Return the parameters of the decoder alone."""
        return self.layers_parameters() + self.embedding_parameters + self.head_parameters + self.other_parameters

    def parameters(self) -> int:
        """Return all parameters, those that encode other inputs than text included."""
        return self.text_parameters() + self.other_inputs_parameters

    def active_parameters(self) -> int:
        """Return the parameters that a token of text passes, the embedding and the output included."""
        inactive = sum(
            number * (self.layer_parameters(kind) - self.active_layer_parameters(kind)) for kind, number in self.kinds()
        )
        return self.text_parameters() - inactive

    def weight_bytes(self, stored_as: WeightFormat | None = None) -> Bytes:
        """Return the bytes of the decoder's weights: layers, and embedding, output and norms in 16 bits.

        Args:
            stored_as: how the matrices of layers are stored; None for as the checkpoint stores them, the output too.
        """
        return self.layers_bytes(stored_as) + self.embedding_bytes() + self.head_bytes(stored_as)

    def layers_bytes(self, stored_as: WeightFormat | None = None, first: int = 0, end: int | None = None) -> Bytes:
        """Return the bytes of the weights of layers `first` up to `end`, stored as in `weight_bytes`."""
        return sum(number * kind.weight_bytes(self.hidden_size, stored_as) for kind, number in self.kinds(first, end))

    def embedding_bytes(self) -> Bytes:
        """Return the bytes of embedding, learned positions and what stands beside the layers, in 16 bits."""
        return 2 * (self.embedding_parameters + self.other_parameters)

    def head_bytes(self, stored_as: WeightFormat | None = None) -> Bytes:
        """Return the bytes of the output matrix, in 16 bits unless the checkpoint quantises it; 0 where it is tied."""
        stored = self.head_format if stored_as is None else BITS_16
        return 0 if self.tied_embeddings else stored.bytes_of(self.hidden_size, self.vocab_size)

    def kv_cache(self, value_bytes: float = 2, first: int = 0, end: int | None = None) -> KvCache:
        """Return what the KV cache takes, of layers `first` up to `end`.

        Args:
            value_bytes: bytes of a value: 2 in 16 bits, 1 in 8.
            first: the first layer.
            end: the layer after the last; None for all.
        """
        full_bytes = state_bytes = 0
        windows: dict[int, int] = {}
        for kind, number in self.kinds(first, end):
            if kind.attention is None:
                continue
            state_bytes += number * kind.attention.state_bytes
            size = number * (int(kind.attention.cached_values * value_bytes) + kind.attention.index_bytes)
            window = kind.attention.window
            if window is None:
                full_bytes += size
            else:
                windows[window] = windows.get(window, 0) + size
        return KvCache(full_bytes=full_bytes, windowed=tuple(sorted(windows.items())), state_bytes=state_bytes)

    def kv_bytes_per_token(self, value_bytes: float = 2) -> Bytes:
        """Return the bytes of a token in the KV cache over all layers, windowed ones included."""
        return self.kv_cache(value_bytes).token_bytes

    def features(self) -> tuple[str, ...]:
        """Return what sets it apart from a plain decoder: equal layers, full attention, a dense feed-forward part."""
        experts = [kind.feed_forward for kind in self.layer_kinds if isinstance(kind.feed_forward, ExpertFeedForward)]
        named = [
            *([f"{experts[0].experts} experts in {self._layers_with(ExpertFeedForward)} layers"] if experts else []),
            *dict.fromkeys(kind.attention.feature for kind in self.layer_kinds if kind.attention is not None),
        ]
        found = tuple(feature for feature in named if feature)
        return found or (("layers that differ from each other",) if len(self.layer_kinds) > 1 else ())

    def _layers_with(self, part: type[FeedForward]) -> int:
        return sum(number for kind, number in self.kinds() if isinstance(kind.feed_forward, part))


def plain_decoder(
    *,
    layers: int,
    hidden_size: int,
    vocab_size: int,
    attention: GroupedAttention,
    feed_forward: DenseFeedForward,
    parallel: bool = False,
    tied_embeddings: bool = False,
    context_tokens: int | None = None,
    rope_type: str = "default",
) -> Decoder:
    """Return a decoder of equal layers, each with two norms of one weight a value."""
    norms = hidden_size if parallel else 2 * hidden_size
    kind = LayerKind(attention=attention, feed_forward=feed_forward, parallel=parallel, norm_parameters=norms)
    return Decoder(
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        tied_embeddings=tied_embeddings,
        layer_kinds=(kind,),
        layer_pattern=(0,) * layers,
        context_tokens=context_tokens,
        rope_type=rope_type,
        other_parameters=hidden_size,
    )


_PARTS: Mapping[type, Sequence[Any]] = {
    Attention: (GroupedAttention, LatentAttention, DeltaNet, StateSpace),
    FeedForward: (DenseFeedForward, ExpertFeedForward),
}


def part_of(kind: type, values: Mapping[str, Any]) -> object:
    """Return a part of a layer from its fields, as they were written for storage.

    Args:
        kind: `Attention` or `FeedForward`.
        values: fields by name. What an older version did not write has its default.

    Raises:
        InputError: the fields are not those of such a part.
    """
    for part in _PARTS.get(kind, ()):
        needed = {field.name for field in fields(part) if field.default is MISSING}
        if needed <= set(values) <= {field.name for field in fields(part)}:
            found: object = part(**values)
            return found
    raise InputError(f"decoder: no {kind.__name__} has the fields {', '.join(sorted(values))}")
