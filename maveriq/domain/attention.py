"""What mixes the tokens of a sequence in a layer: kinds of attention, and of layers whose state has a fixed size."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from maveriq.domain.matrices import Matrix, check_counts
from maveriq.errors import InputError
from maveriq.units import Bytes


class Attention(ABC):
    """What mixes the tokens of a sequence in a layer: its matrices, and what it keeps of each token.

    Args:
        window: the last tokens that a token attends to, itself included; None for all.
    """

    window: int | None = None

    @abstractmethod
    def weight_matrices(self, hidden_size: int) -> tuple[Matrix, ...]:
        """Return the weight matrices."""

    @property
    @abstractmethod
    def vectors(self) -> int:
        """Parameters that are not in a matrix: norms, sinks."""

    @property
    def cached_values(self) -> int:
        """Values that the KV cache keeps of a token, in the cache's format."""
        return 0

    @property
    def index_bytes(self) -> Bytes:
        """Bytes that an index of the tokens takes beside, whatever the cache's format."""
        return 0

    @property
    def state_bytes(self) -> Bytes:
        """Bytes of the state of one sequence, however long it is."""
        return 0

    @property
    def feature(self) -> str:
        """What sets it apart from plain attention, in words; "" where nothing does."""
        return ""


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
        key_is_value: keys are also the values, so there is no value projection; the KV cache still holds both.
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

    @property
    def feature(self) -> str:
        """Windows, and values that are not as wide as keys."""
        if self.window is not None:
            return f"a sliding window of {self.window} tokens"
        if self.output_gate:
            return "attention with an output gate"
        return "keys that are values" if self.key_is_value or self.value_head_size != self.head_size else ""

    def __post_init__(self) -> None:
        if not self.value_head_size:
            object.__setattr__(self, "value_head_size", self.head_size)
        check_counts(self, ("heads", "kv_heads", "head_size", "value_head_size"), or_none=("window",))
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
        index_heads: heads of the indexer that picks the tokens to attend to (DeepSeek sparse attention); 0 without one.
        index_size: values of such a head; its keys are cached in 8 bits with a 32-bit scale for 128 of them.
        index_tokens: how many tokens it picks.
    """

    heads: int
    query_rank: int
    kv_rank: int
    nope_size: int
    rope_size: int
    value_size: int
    bias: bool = False
    window: int | None = None
    index_heads: int = 0
    index_size: int = 0
    index_tokens: int = 0

    @property
    def feature(self) -> str:
        """That it is latent, and whether it is sparse."""
        sparse = f"latent attention to {self.index_tokens} tokens that an indexer picks"
        return sparse if self.index_tokens else "latent attention"

    @property
    def index_bytes(self) -> Bytes:
        """The indexer's key and its scales."""
        return self.index_size + 4 * -(-self.index_size // 128) if self.index_heads else 0

    def __post_init__(self) -> None:
        check_counts(self, ("heads", "kv_rank", "nope_size", "rope_size", "value_size"), or_none=("window",))
        if self.query_rank:
            check_counts(self, ("query_rank",))

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
        indexer: tuple[Matrix, ...] = ()
        if self.index_heads:
            name, source = "self_attn.indexer", self.query_rank or hidden_size
            indexer = (
                Matrix(name=f"{name}.wq_b", inputs=source, outputs=self.index_heads * self.index_size),
                Matrix(name=f"{name}.wk", inputs=hidden_size, outputs=self.index_size),
                Matrix(name=f"{name}.weights_proj", inputs=hidden_size, outputs=self.index_heads, keeps_16_bits=True),
            )
        return (
            *queries,
            *indexer,
            Matrix(name="self_attn.kv_a_proj", inputs=hidden_size, outputs=latent + self.rope_size, bias=self.bias),
            Matrix(name="self_attn.kv_b_proj", inputs=latent, outputs=keys_values),
            Matrix(name="self_attn.o_proj", inputs=self.heads * self.value_size, outputs=hidden_size, bias=self.bias),
        )

    @property
    def vectors(self) -> int:
        """The norms of the latent vectors and of the indexer's key."""
        return self.query_rank + self.kv_rank + (2 * self.index_size if self.index_heads else 0)

    @property
    def cached_values(self) -> int:
        """The latent vector, and the part of the key that has a position."""
        return self.kv_rank + self.rope_size


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaNet(Attention):
    """A gated delta net: linear attention, whose state has a fixed size.

    Args:
        key_heads: heads of queries and keys.
        value_heads: heads of values.
        key_size: values of a head's query and key.
        value_size: values of a head's value.
        convolution: tokens that the convolution before it sees.
    """

    key_heads: int
    value_heads: int
    key_size: int
    value_size: int
    convolution: int

    def __post_init__(self) -> None:
        check_counts(self, ("key_heads", "value_heads", "key_size", "value_size", "convolution"))

    @property
    def _mixed(self) -> int:
        """Values that the convolution passes: queries, keys and values."""
        return 2 * self.key_heads * self.key_size + self.value_heads * self.value_size

    def weight_matrices(self, hidden_size: int) -> tuple[Matrix, ...]:
        """Return the projections in, those of gates, and the output."""
        values = self.value_heads * self.value_size
        return (
            Matrix(name="linear_attn.in_proj_qkv", inputs=hidden_size, outputs=self._mixed),
            Matrix(name="linear_attn.in_proj_z", inputs=hidden_size, outputs=values),
            Matrix(name="linear_attn.in_proj_b", inputs=hidden_size, outputs=self.value_heads),
            Matrix(name="linear_attn.in_proj_a", inputs=hidden_size, outputs=self.value_heads),
            Matrix(name="linear_attn.out_proj", inputs=values, outputs=hidden_size),
        )

    @property
    def vectors(self) -> int:
        """The convolution, decay, time steps and norm."""
        return self._mixed * self.convolution + 2 * self.value_heads + self.value_size

    @property
    def state_bytes(self) -> Bytes:
        """The convolution's last inputs in 16 bits, and the state of each head in 32 bits."""
        return 2 * self._mixed * (self.convolution - 1) + 4 * self.value_heads * self.key_size * self.value_size

    @property
    def feature(self) -> str:
        """What it is."""
        return "gated delta-net layers"


@dataclass(frozen=True, slots=True, kw_only=True)
class StateSpace(Attention):
    """A state-space layer (Mamba 2), whose state has a fixed size.

    Args:
        heads: heads. head_size: values of each.
        groups: groups of heads that share how they read and write the state.
        state_size: values of the state for each value of a head.
        convolution: tokens that the convolution before it sees.
        bias: whether the projections have a bias. convolution_bias: whether the convolution has one.
    """

    heads: int
    head_size: int
    groups: int
    state_size: int
    convolution: int
    bias: bool = False
    convolution_bias: bool = True

    def __post_init__(self) -> None:
        check_counts(self, ("heads", "head_size", "groups", "state_size", "convolution"))

    @property
    def _inner(self) -> int:
        return self.heads * self.head_size

    @property
    def _mixed(self) -> int:
        """Values that the convolution passes."""
        return self._inner + 2 * self.groups * self.state_size

    def weight_matrices(self, hidden_size: int) -> tuple[Matrix, ...]:
        """Return the projections in and out."""
        inputs = self._inner + self._mixed + self.heads
        return (
            Matrix(name="mixer.in_proj", inputs=hidden_size, outputs=inputs, bias=self.bias),
            Matrix(name="mixer.out_proj", inputs=self._inner, outputs=hidden_size, bias=self.bias),
        )

    @property
    def vectors(self) -> int:
        """The convolution, decay, time steps, direct paths and norm."""
        return self._mixed * (self.convolution + self.convolution_bias) + 3 * self.heads + self._inner

    @property
    def state_bytes(self) -> Bytes:
        """The convolution's last inputs in 16 bits, and the state in 32 bits."""
        return 2 * self._mixed * (self.convolution - 1) + 4 * self._inner * self.state_size

    @property
    def feature(self) -> str:
        """What it is."""
        return "state-space layers"
