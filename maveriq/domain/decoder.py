"""The structure of a decoder: what its layers are made of, and what follows from it.

Parameters, weights that a token passes, and the bytes that a token takes in the KV cache are counted here, from the
matrices that each part of a layer consists of. `maveriq.domain.decoder_config` reads a `Decoder` from a `config.json`.

Sizes are numbers of values (rows, columns, heads), never bytes, unless a name says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from maveriq.domain.weight_formats import BITS_16, WeightFormat
from maveriq.errors import InputError
from maveriq.units import Bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """Equal weight matrices of a layer.

    Args:
        name: the module within its layer, by the names of transformers: `self_attn.q_proj`, `mlp.experts.up_proj`.
        inputs: values that it takes.
        outputs: values that it makes.
        copies: how many there are, as many as experts.
        active: how many of them a token passes.
        bias: whether it adds a bias.
        keeps_16_bits: whether no tool quantises it: routers and gates.
    """

    name: str
    inputs: int
    outputs: int
    copies: int = 1
    active: int = 1
    bias: bool = False
    keeps_16_bits: bool = False

    @property
    def weights(self) -> int:
        """Weights of all copies, without biases."""
        return self.copies * self.inputs * self.outputs

    @property
    def biases(self) -> int:
        """Values of the biases of all copies."""
        return self.copies * self.outputs if self.bias else 0

    @property
    def active_weights(self) -> int:
        """Weights and biases of the copies that a token passes."""
        return self.active * self.outputs * (self.inputs + self.bias)


class Attention:
    """What mixes the tokens of a sequence in a layer: its matrices, and what it keeps of each token.

    Args:
        window: the last tokens that a token attends to, itself included; None for all.
    """

    window: int | None = None

    def weight_matrices(self, hidden_size: int) -> tuple[Matrix, ...]:
        """Return the weight matrices."""
        raise NotImplementedError

    @property
    def vectors(self) -> int:
        """Parameters that are no matrix: norms within, sinks."""
        raise NotImplementedError

    @property
    def cached_values(self) -> int:
        """Values that the KV cache keeps of a token; every GPU of a stage keeps all of them where `cache_is_shared`."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedAttention(Attention):
    """Attention with one KV head for a group of heads: multi-head, grouped-query or multi-query.

    Args:
        heads: query heads.
        kv_heads: KV heads, which divide the heads.
        head_size: values of a head's query and key.
        value_head_size: values of a head's value; 0 stands for the head size.
        window: the last tokens that a token attends to, itself included; None for all.
        bias: whether queries, keys and values have a bias.
        output_bias: whether the output has one.
        key_is_value: keys serve as values too, so that there is no matrix for values; both are cached.
        output_gate: queries come with a gate for the output, so that their matrix is twice as wide.
        vectors: parameters of the norms of queries and keys, and of sinks.
    """

    heads: int
    kv_heads: int
    head_size: int
    value_head_size: int = 0
    window: int | None = None
    bias: bool = False
    output_bias: bool = False
    key_is_value: bool = False
    output_gate: bool = False
    vectors: int = 0

    def __post_init__(self) -> None:
        if not self.value_head_size:
            object.__setattr__(self, "value_head_size", self.head_size)
        _check(self, ("heads", "kv_heads", "head_size", "value_head_size"), or_none=("window",))
        if self.heads % self.kv_heads:
            raise InputError(f"attention: {self.kv_heads} KV heads must divide the {self.heads} attention heads")

    def weight_matrices(self, hidden_size: int) -> tuple[Matrix, ...]:
        """Return the projections of queries, keys, values and output."""
        queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        queries *= 2 if self.output_gate else 1
        values, output = self.kv_heads * self.value_head_size, self.heads * self.value_head_size
        found = [
            Matrix(name="self_attn.q_proj", inputs=hidden_size, outputs=queries, bias=self.bias),
            Matrix(name="self_attn.k_proj", inputs=hidden_size, outputs=keys, bias=self.bias),
            Matrix(name="self_attn.v_proj", inputs=hidden_size, outputs=values, bias=self.bias),
            Matrix(name="self_attn.o_proj", inputs=output, outputs=hidden_size, bias=self.output_bias),
        ]
        return tuple(matrix for matrix in found if not (self.key_is_value and matrix.name == "self_attn.v_proj"))

    @property
    def cached_values(self) -> int:
        """Key and value of every KV head."""
        return self.kv_heads * (self.head_size + self.value_head_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttention(Attention):
    """Attention over a latent vector that all heads share (multi-head latent attention of DeepSeek).

    A token's latent vector and the rotary part of its key are cached once, and by every GPU of a stage.

    Args:
        heads: query heads.
        query_rank: size of the latent vector of queries; 0 where queries come from the hidden state.
        kv_rank: size of the latent vector that keys and values are made of.
        nope_size: values of a head's query and key without position.
        rope_size: values of them with rotary position; the key's are shared by all heads.
        value_size: values of a head's value.
        bias: whether the projections into latent vectors and of the output have a bias.
        window: the last tokens that a token attends to, itself included; None for all.
    """

    heads: int
    query_rank: int
    kv_rank: int
    nope_size: int
    rope_size: int
    value_size: int
    bias: bool = False
    window: int | None = None

    def __post_init__(self) -> None:
        _check(self, ("heads", "kv_rank", "nope_size", "rope_size", "value_size"), or_none=("window",))
        if self.query_rank:
            _check(self, ("query_rank",))

    def weight_matrices(self, hidden_size: int) -> tuple[Matrix, ...]:
        """Return the projections into latent vectors and out of them."""
        query, latent = self.heads * (self.nope_size + self.rope_size), self.kv_rank
        queries = [Matrix(name="self_attn.q_proj", inputs=hidden_size, outputs=query)]
        if self.query_rank:
            queries = [
                Matrix(name="self_attn.q_a_proj", inputs=hidden_size, outputs=self.query_rank, bias=self.bias),
                Matrix(name="self_attn.q_b_proj", inputs=self.query_rank, outputs=query),
            ]
        keys_values = self.heads * (self.nope_size + self.value_size)
        return (
            *queries,
            Matrix(name="self_attn.kv_a_proj", inputs=hidden_size, outputs=latent + self.rope_size, bias=self.bias),
            Matrix(name="self_attn.kv_b_proj", inputs=latent, outputs=keys_values),
            Matrix(name="self_attn.o_proj", inputs=self.heads * self.value_size, outputs=hidden_size, bias=self.bias),
        )

    @property
    def vectors(self) -> int:
        """The norms of the latent vectors."""
        return self.query_rank + self.kv_rank

    @property
    def cached_values(self) -> int:
        """The latent vector, and the part of the key that has a position."""
        return self.kv_rank + self.rope_size


class FeedForward:
    """The feed-forward part of a layer."""

    def weight_matrices(self, hidden_size: int) -> tuple[Matrix, ...]:
        """Return the weight matrices."""
        raise NotImplementedError

    @property
    def vectors(self) -> int:
        """Parameters that are no matrix."""
        return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseFeedForward(FeedForward):
    """A feed-forward part that every token passes.

    Args:
        width: values between its matrices.
        matrices: 3 where it is gated, else 2.
        bias: whether its matrices have a bias.
    """

    width: int
    matrices: int = 3
    bias: bool = False

    def __post_init__(self) -> None:
        _check(self, ("width", "matrices"))

    def weight_matrices(self, hidden_size: int) -> tuple[Matrix, ...]:
        """Return the projections up and down, and the gate's."""
        return _feed_forward("mlp", hidden_size, self.width, self.matrices, bias=self.bias)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertFeedForward(FeedForward):
    """A feed-forward part of experts, of which a router picks some for each token.

    Args:
        experts: routed experts.
        experts_per_token: those that a token passes.
        width: values between an expert's matrices.
        shared_width: the same of all shared experts together, which every token passes; 0 where there are none.
        matrices: 3 where experts are gated, else 2.
        bias: whether experts and router have a bias.
        router_correction: the router has a correction for each expert, beside its matrix.
        shared_gate: the shared experts' output is weighted by a gate.
        latent_size: size of the vectors that routed experts work on, where it is not the hidden size; else 0.
    """

    experts: int
    experts_per_token: int
    width: int
    shared_width: int = 0
    matrices: int = 3
    bias: bool = False
    router_correction: bool = False
    shared_gate: bool = False
    latent_size: int = 0

    def __post_init__(self) -> None:
        _check(self, ("experts", "experts_per_token", "width", "matrices"))
        if self.experts_per_token > self.experts:
            raise InputError(
                f"experts: a token cannot pass {self.experts_per_token} of {self.experts} experts (experts_per_token)"
            )

    def weight_matrices(self, hidden_size: int) -> tuple[Matrix, ...]:
        """Return the router, the experts and the shared experts."""
        experts, active, size = self.experts, self.experts_per_token, self.latent_size or hidden_size
        found = [Matrix(name="mlp.gate", inputs=hidden_size, outputs=experts, bias=self.bias, keeps_16_bits=True)]
        if self.latent_size:
            found += [
                Matrix(name="mlp.fc1_latent_proj", inputs=hidden_size, outputs=size),
                Matrix(name="mlp.fc2_latent_proj", inputs=size, outputs=hidden_size),
            ]
        found += _feed_forward(
            "mlp.experts", size, self.width, self.matrices, copies=experts, active=active, bias=self.bias
        )
        if self.shared_width:
            found += _feed_forward("mlp.shared_experts", hidden_size, self.shared_width, self.matrices)
        if self.shared_gate:
            found.append(Matrix(name="mlp.shared_expert_gate", inputs=hidden_size, outputs=1, keeps_16_bits=True))
        return tuple(found)

    @property
    def vectors(self) -> int:
        """The router's correction."""
        return self.experts if self.router_correction else 0


def _feed_forward(
    name: str, size: int, width: int, matrices: int, *, copies: int = 1, active: int = 1, bias: bool = False
) -> tuple[Matrix, ...]:
    up = [
        Matrix(name=f"{name}.{part}", inputs=size, outputs=width, copies=copies, active=active, bias=bias)
        for part in ("gate_proj", "up_proj")[3 - matrices :]
    ]
    down = Matrix(name=f"{name}.down_proj", inputs=width, outputs=size, copies=copies, active=active, bias=bias)
    return (*up, down)


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
    """

    full_bytes: Bytes
    windowed: tuple[tuple[int, Bytes], ...] = ()

    @property
    def token_bytes(self) -> Bytes:
        """Bytes of one more token, while all windows hold it."""
        return self.full_bytes + sum(size for _, size in self.windowed)

    def sequence_bytes(self, tokens: int) -> Bytes:
        """Return the bytes of a sequence of so many tokens."""
        return tokens * self.full_bytes + sum(min(tokens, window) * size for window, size in self.windowed)


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
        not_timed: why no step-time model here answers for it, in words; "" where one may.

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
    not_timed: str = ""

    def __post_init__(self) -> None:
        _check(self, ("hidden_size", "vocab_size"), or_none=("context_tokens",))
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
        full_values = 0
        windows: dict[int, int] = {}
        for kind, number in self.kinds(first, end):
            if kind.attention is None:
                continue
            values, window = number * kind.attention.cached_values, kind.attention.window
            if window is None:
                full_values += values
            else:
                windows[window] = windows.get(window, 0) + values
        windowed = tuple((window, int(values * value_bytes)) for window, values in sorted(windows.items()))
        return KvCache(full_bytes=int(full_values * value_bytes), windowed=windowed)

    def kv_bytes_per_token(self, value_bytes: float = 2) -> Bytes:
        """Return the bytes of a token in the KV cache over all layers, windowed ones included."""
        return self.kv_cache(value_bytes).token_bytes

    def features(self) -> tuple[str, ...]:
        """Return what sets it apart from a plain decoder: equal layers, full attention, a dense feed-forward part."""
        attentions = [kind.attention for kind, _ in self.kinds()]
        experts = [kind.feed_forward for kind in self.layer_kinds if isinstance(kind.feed_forward, ExpertFeedForward)]
        windows = sorted({attention.window for attention in attentions if attention and attention.window is not None})
        found = [
            f"{experts[0].experts} experts in {self._layers_with(ExpertFeedForward)} layers" if experts else "",
            "latent attention" if any(isinstance(attention, LatentAttention) for attention in attentions) else "",
            f"a sliding window of {' and '.join(map(str, windows))} tokens" if windows else "",
            self.not_timed,
        ]
        named = tuple(feature for feature in found if feature)
        if named:
            return named
        unusual = any(
            isinstance(attention, GroupedAttention)
            and (attention.value_head_size != attention.head_size or attention.key_is_value or attention.output_gate)
            for attention in attentions
        )
        return ("layers that differ from each other",) if len(self.layer_kinds) > 1 or unusual else ()

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
    Attention: (GroupedAttention, LatentAttention),
    FeedForward: (DenseFeedForward, ExpertFeedForward),
}


def part_of(kind: type, values: Mapping[str, Any]) -> object:
    """Return a part of a layer from its fields, as they were written for storage.

    Args:
        kind: `Attention` or `FeedForward`.
        values: fields by name.

    Raises:
        InputError: the fields are not those of such a part.
    """
    for part in _PARTS.get(kind, ()):
        if set(values) == {field.name for field in fields(part)}:
            found: object = part(**values)
            return found
    raise InputError(f"decoder: no {kind.__name__} has the fields {', '.join(sorted(values))}")


def _check(part: object, names: Sequence[str], or_none: Sequence[str] = ()) -> None:
    for name in (*names, *or_none):
        value = getattr(part, name)
        if name in or_none and value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"decoder: {name} must be a positive whole number, not {value!r}")
