"""The parameters of a rank's part, cut out of the whole tensors of transformers' models.

Every family's attention is brought into one form: queries, keys and values of this rank's heads, one matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from maveriq.exec.engines.torch.architecture import Architecture, Family
from maveriq.exec.engines.torch.plan import Part
from maveriq.exec.engines.torch.sources import Source


@dataclass(frozen=True, slots=True, kw_only=True)
class _Names:
    """What transformers calls the parts of a family; those of a layer after `layer`, which takes its number."""

    embedding: str
    final_norm: str
    layer: str
    queries_keys_values: tuple[str, ...]
    attention_out: str
    attention_norm: str
    feed_forward_norm: str
    feed_forward_in: tuple[str, ...]
    feed_forward_out: str


_NAMES: Mapping[Family, _Names] = MappingProxyType(
    {
        Family.LLAMA: _Names(
            embedding="model.embed_tokens",
            final_norm="model.norm",
            layer="model.layers.{}.",
            queries_keys_values=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            attention_out="self_attn.o_proj",
            attention_norm="input_layernorm",
            feed_forward_norm="post_attention_layernorm",
            feed_forward_in=("mlp.gate_proj", "mlp.up_proj"),
            feed_forward_out="mlp.down_proj",
        ),
        Family.FALCON: _Names(
            embedding="transformer.word_embeddings",
            final_norm="transformer.ln_f",
            layer="transformer.h.{}.",
            queries_keys_values=("self_attention.query_key_value",),
            attention_out="self_attention.dense",
            attention_norm="input_layernorm",
            feed_forward_norm="post_attention_layernorm",
            feed_forward_in=("mlp.dense_h_to_4h",),
            feed_forward_out="mlp.dense_4h_to_h",
        ),
        Family.GPTJ: _Names(
            embedding="transformer.wte",
            final_norm="transformer.ln_f",
            layer="transformer.h.{}.",
            queries_keys_values=("attn.q_proj", "attn.k_proj", "attn.v_proj"),
            attention_out="attn.out_proj",
            attention_norm="ln_1",
            feed_forward_norm="",
            feed_forward_in=("mlp.fc_in",),
            feed_forward_out="mlp.fc_out",
        ),
    }
)

Pair = tuple[torch.Tensor, torch.Tensor | None]
"""A weight and its bias."""


class Parameters:
    """Reads the parameters of a rank's part."""

    def __init__(self, arch: Architecture, part: Part, source: Source) -> None:
        self._arch = arch
        self._part = part
        self._source = source
        self._names = _NAMES[arch.family]

    def embedding(self) -> torch.Tensor:
        """Return all of it, [vocabulary, hidden]: a rank looks up whole rows."""
        return self._source.read(f"{self._names.embedding}.weight", (self._arch.vocabulary, self._arch.hidden))

    def output(self, embedding: torch.Tensor | None) -> Pair:
        """Return this rank's share of the output matrix, by tokens; a view of the embedding where it is tied to it.

        The bias is never tied.
        """
        arch = self._arch
        mine = _slice(self._part.share(arch.vocabulary))
        shape = (arch.vocabulary,)
        bias = _own(self._source.read("lm_head.bias", shape)[mine]) if arch.output_bias else None
        if not arch.tied:
            return _own(self._source.read("lm_head.weight", (*shape, arch.hidden))[mine]), bias
        return (_own(self.embedding()[mine]) if embedding is None else embedding[mine]), bias

    def final_norm(self) -> Pair:
        """Return the norm before the output matrix."""
        return self._norm(self._names.final_norm)

    def attention_norm(self, layer: int) -> Pair:
        """Return the norm before attention."""
        two = self._arch.feed_forward_norm and self._arch.parallel
        return self._norm(self._of(layer, "ln_attn" if two else self._names.attention_norm))

    def feed_forward_norm(self, layer: int) -> Pair:
        """Return the norm before the feed-forward part, where it has its own (beside attention only falcon's has)."""
        return self._norm(self._of(layer, "ln_mlp" if self._arch.parallel else self._names.feed_forward_norm))

    def queries_keys_values(self, layer: int) -> Pair:
        """Return the rows of this rank's heads, those of queries first, then keys, then values."""
        arch, names = self._arch, [self._of(layer, name) for name in self._names.queries_keys_values]
        kv = arch.kv_heads
        if len(names) > 1:
            counts = (arch.heads, kv, kv)
            pairs = [
                self._pair(name, count * arch.head_size, arch.hidden, bias=arch.attention_bias)
                for name, count in zip(names, counts, strict=True)
            ]
            biases = [bias for _, bias in pairs if bias is not None]
            return self._heads([weight for weight, _ in pairs]), self._heads(biases) if biases else None
        # Falcon's one matrix: per KV head its queries, its key, its value.
        rows = (arch.heads + 2 * kv) * arch.head_size
        weight, bias = self._pair(names[0], rows, arch.hidden, bias=arch.attention_bias)
        return self._heads(self._unfuse(weight)), None if bias is None else self._heads(self._unfuse(bias))

    def attention_out(self, layer: int) -> Pair:
        """Return the columns of this rank's heads; the bias whole."""
        arch, name = self._arch, self._of(layer, self._names.attention_out)
        # GPT-J's attention has no bias anywhere, llama's and falcon's everywhere or nowhere.
        weight, bias = self._pair(name, arch.hidden, arch.hidden, bias=arch.attention_bias)
        mine = self._part.share(arch.heads)
        return _own(weight[:, mine.start * arch.head_size : mine.stop * arch.head_size]), bias

    def feed_forward_in(self, layer: int) -> Pair:
        """Return the rows of this rank's share of the width; of a gated one the gate's first."""
        arch, mine = self._arch, _slice(self._part.share(self._arch.intermediate))
        pairs = [
            self._pair(self._of(layer, name), arch.intermediate, arch.hidden, bias=arch.feed_forward_bias)
            for name in self._names.feed_forward_in
        ]
        biases = [bias[mine] for _, bias in pairs if bias is not None]
        return torch.cat([weight[mine] for weight, _ in pairs]), torch.cat(biases) if biases else None

    def feed_forward_out(self, layer: int) -> Pair:
        """Return the columns of this rank's share of the width; the bias whole."""
        arch, name = self._arch, self._of(layer, self._names.feed_forward_out)
        weight, bias = self._pair(name, arch.hidden, arch.intermediate, bias=arch.feed_forward_bias)
        return _own(weight[:, _slice(self._part.share(arch.intermediate))]), bias

    def _of(self, layer: int, name: str) -> str:
        return self._names.layer.format(layer) + name

    def _pair(self, name: str, outputs: int, inputs: int, *, bias: bool) -> Pair:
        weight = self._source.read(f"{name}.weight", (outputs, inputs))
        return weight, self._source.read(f"{name}.bias", (outputs,)) if bias else None

    def _norm(self, name: str) -> Pair:
        shape = (self._arch.hidden,)
        weight = self._source.read(f"{name}.weight", shape)
        return weight, None if self._arch.root_mean_square_norm else self._source.read(f"{name}.bias", shape)

    def _unfuse(self, fused: torch.Tensor) -> list[torch.Tensor]:
        arch = self._arch
        groups = fused.unflatten(0, (arch.kv_heads, arch.heads // arch.kv_heads + 2, arch.head_size))
        return [groups[:, :-2].flatten(0, 2), groups[:, -2].flatten(0, 1), groups[:, -1].flatten(0, 1)]

    def _heads(self, rows: list[torch.Tensor]) -> torch.Tensor:
        """Return this rank's heads of queries, keys and values."""
        size = self._arch.head_size
        shares = (self._part.share(self._arch.heads), *[self._part.kv_share(self._arch.kv_heads)] * 2)
        return torch.cat([part[mine.start * size : mine.stop * size] for part, mine in zip(rows, shares, strict=True)])


def _slice(share: range) -> slice:
    return slice(share.start, share.stop)


def _own(view: torch.Tensor) -> torch.Tensor:
    """Return memory of its own, unless it is all of a tensor anyway: a view would keep the rest alive."""
    return view.clone() if view.untyped_storage().nbytes() > view.nbytes else view
