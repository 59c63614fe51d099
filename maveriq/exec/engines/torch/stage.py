"""A rank's part of a decoder: its layers, and at the ends the embedding and the output matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional

from maveriq.exec.engines.torch.architecture import Activation, Architecture
from maveriq.exec.engines.torch.attention import KvCache, Positions, attend, turn
from maveriq.exec.engines.torch.linear import DenseLinear, Linear, make_linear
from maveriq.exec.engines.torch.links import Links
from maveriq.exec.engines.torch.parameters import Pair, Parameters
from maveriq.exec.engines.torch.plan import Part
from maveriq.exec.engines.torch.sources import Source
from maveriq.exec.messages import EngineSpec


class Norm:
    """Root mean square norm, or layer norm where there is a bias."""

    def __init__(self, pair: Pair, epsilon: float) -> None:
        self._weight, self._bias = pair
        self._epsilon = epsilon

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Apply it over the last dimension."""
        if self._bias is None:
            return functional.rms_norm(x, x.shape[-1:], self._weight, self._epsilon)
        return functional.layer_norm(x, x.shape[-1:], self._weight, self._bias, self._epsilon)

    @property
    def size_bytes(self) -> int:
        """Memory of its vectors."""
        return sum(part.nbytes for part in (self._weight, self._bias) if part is not None)


class Attention:
    """This rank's heads. What it returns is its part of a sum over the stage, without the bias."""

    def __init__(self, arch: Architecture, part: Part, spec: EngineSpec, layer: int, parameters: Parameters) -> None:
        weight, bias = parameters.queries_keys_values(layer)
        self._heads = len(part.share(arch.heads))
        self._kv_heads = len(part.kv_share(arch.kv_heads))
        self._rotary = arch.rotary
        self._in = make_linear(spec.weights, weight, bias)
        out, self.bias = parameters.attention_out(layer)
        self._out = make_linear(spec.weights, out)
        self.caches = tuple(
            KvCache(
                kind=spec.kv,
                kv_heads=self._kv_heads,
                head_size=arch.head_size,
                device=weight.device,
                dtype=weight.dtype,
            )
            for _ in range(2)
        )
        self.linears = (self._in, self._out)

    def __call__(self, x: torch.Tensor, positions: Positions) -> torch.Tensor:
        """Apply it; [batch, tokens, hidden] to the same."""
        batch, tokens, _ = x.shape
        joint = self._in(x).view(batch, tokens, self._heads + 2 * self._kv_heads, -1).transpose(1, 2)
        query, key, value = joint.split((self._heads, self._kv_heads, self._kv_heads), dim=1)
        keys = self.caches[0].put(turn(key, positions, self._rotary), positions)
        values = self.caches[1].put(value, positions)
        mixed = attend(turn(query, positions, self._rotary), keys, values, positions)
        return self._out(mixed.transpose(1, 2).flatten(2))


_ACTIVATIONS: Mapping[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    Activation.SILU: functional.silu,
    Activation.GELU: functional.gelu,
    Activation.GELU_TANH: lambda x: functional.gelu(x, approximate="tanh"),
}


class FeedForward:
    """This rank's share of the width. What it returns is its part of a sum over the stage, without the bias."""

    def __init__(self, arch: Architecture, spec: EngineSpec, layer: int, parameters: Parameters) -> None:
        self._in = make_linear(spec.weights, *parameters.feed_forward_in(layer))
        out, self.bias = parameters.feed_forward_out(layer)
        self._out = make_linear(spec.weights, out)
        self._gated = arch.gated
        self._activation = _ACTIVATIONS[arch.activation]
        self.linears = (self._in, self._out)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Apply it; [batch, tokens, hidden] to the same."""
        if not self._gated:
            return self._out(self._activation(self._in(x)))
        gate, up = self._in(x).chunk(2, dim=-1)
        return self._out(self._activation(gate) * up)


class Layer:
    """Attention and feed-forward part, one after the other (two sums over the stage) or side by side (one sum)."""

    def __init__(
        self, arch: Architecture, part: Part, spec: EngineSpec, layer: int, parameters: Parameters, links: Links
    ) -> None:
        self._parallel = arch.parallel
        self._links = links
        self.attention = Attention(arch, part, spec, layer, parameters)
        self._feed_forward = FeedForward(arch, spec, layer, parameters)
        self._attention_norm = Norm(parameters.attention_norm(layer), arch.norm_epsilon)
        own = arch.feed_forward_norm
        self._feed_forward_norm = Norm(parameters.feed_forward_norm(layer), arch.norm_epsilon) if own else None
        biases = [bias for bias in (self.attention.bias, self._feed_forward.bias) if bias is not None]
        self._bias_of_both = sum(biases[1:], biases[0]) if biases else None

    def __call__(self, x: torch.Tensor, positions: Positions) -> torch.Tensor:
        """Apply it; [batch, tokens, hidden] to the same."""
        normed = self._attention_norm(x)
        attended = self.attention(normed, positions)
        if self._parallel:
            beside = normed if self._feed_forward_norm is None else self._feed_forward_norm(x)
            return x + self._sum(attended + self._feed_forward(beside), self._bias_of_both)
        x = x + self._sum(attended, self.attention.bias)
        normed = x if self._feed_forward_norm is None else self._feed_forward_norm(x)
        return x + self._sum(self._feed_forward(normed), self._feed_forward.bias)

    def _sum(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        x = self._links.add_up(x)
        return x if bias is None else x + bias

    @property
    def size_bytes(self) -> int:
        """Memory of its weights."""
        norms = [norm for norm in (self._attention_norm, self._feed_forward_norm) if norm is not None]
        biases = [bias for bias in (self.attention.bias, self._feed_forward.bias) if bias is not None]
        linears = (*self.attention.linears, *self._feed_forward.linears)
        return sum(part.size_bytes for part in (*norms, *linears)) + int(sum(bias.nbytes for bias in biases))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Output:
    """The end of a model: the last norm, and this rank's share of the tokens' scores."""

    norm: Norm
    matrix: Linear

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """Return [batch, this rank's tokens] for the hidden states [batch, hidden] of one token each."""
        return self.matrix(self.norm(x))


class Stage:
    """A rank's part of a model, loaded.

    Attributes:
        arch: the whole model's.
        part: which part it is.
        embedding: [vocabulary, hidden] at the first stage, else None.
    """

    def __init__(self, arch: Architecture, part: Part, spec: EngineSpec, source: Source, links: Links) -> None:
        parameters = Parameters(arch, part, source)
        self.arch = arch
        self.part = part
        self._links = links
        self.embedding = parameters.embedding() if part.first else None
        self._layers = [Layer(arch, part, spec, layer, parameters, links) for layer in part.layers]
        self._output = None
        if part.last:
            self._output = Output(
                norm=Norm(parameters.final_norm(), arch.norm_epsilon),
                matrix=DenseLinear(*parameters.output(self.embedding)),
            )

    def run(self, x: torch.Tensor, positions: Positions) -> torch.Tensor:
        """Run its layers; [batch, tokens, hidden] to the same."""
        for layer in self._layers:
            x = layer(x, positions)
        return x

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """Return this rank's scores of the next token, [batch, its tokens]; at the last stage only."""
        if self._output is None:
            raise RuntimeError("only the last stage knows the next token")
        return self._output.scores(x)

    def likeliest(self, x: torch.Tensor) -> torch.Tensor:
        """Return the likeliest next token of each sequence, [batch]; the lowest of several."""
        scores = self.scores(x)
        best, token = scores.max(dim=-1)
        if self.part.tp == 1:
            return token
        token += self.part.share(self.arch.vocabulary).start  # counted among this rank's until here
        bests = torch.stack(self._links.gather(best))
        tokens = torch.stack(self._links.gather(token))
        return tokens.gather(0, bests.argmax(dim=0, keepdim=True)).squeeze(0)

    def make_room(self, batch: int, tokens: int) -> None:
        """Make room in the KV cache for so many tokens of so many sequences."""
        for layer in self._layers:
            for cache in layer.attention.caches:
                cache.make_room(batch, tokens)

    def give_room_back(self) -> None:
        """Give the KV cache's memory back."""
        for layer in self._layers:
            for cache in layer.attention.caches:
                cache.give_room_back()

    @property
    def weights_bytes(self) -> int:
        """Memory of its weights; what is tied counts once."""
        total = sum(layer.size_bytes for layer in self._layers)
        if self.embedding is not None:
            total += self.embedding.nbytes
        if self._output is not None:
            total += self._output.norm.size_bytes + self._output.matrix.size_bytes
            if self.arch.tied and self.embedding is not None:
                total -= len(self.part.share(self.arch.vocabulary)) * self.embedding[0].nbytes
        return total

    @property
    def kv_cache_bytes(self) -> int:
        """Memory of its KV cache as it is now."""
        return sum(cache.size_bytes for layer in self._layers for cache in layer.attention.caches)
