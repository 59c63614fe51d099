"""A rank's part of one of maveriq's own decoders: rotary positions, attention, layers.

Token p of a sequence is stored at index p of the cache, whatever the other prompts' lengths are: prompts are padded on
the right, and what padding tokens wrote is overwritten before any token attends to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention

from maveriq.exec.engines.torch.collectives import Collectives
from maveriq.exec.engines.torch.config import Activation, DecoderConfig, Rotary, Shard
from maveriq.exec.engines.torch.kv_cache import KvCache
from maveriq.exec.engines.torch.linear import DenseLinear, Linear, make_linear
from maveriq.exec.engines.torch.weights import Parameters, WeightAndBias, WeightSource
from maveriq.exec.messages import EngineSpec
from maveriq.exec.messages import PromptSequence as Prompt


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Positions:
    """The positions of the tokens of one step.

    Attributes:
        index: [batch, tokens], the position of each token in its sequence.
        context_length: cache entries up to the last one that any token attends to.
        mask: [batch, 1, 1, context_length], True where a token attends; only when decoding sequences of different
            lengths, else None.
        cos: [batch, 1, tokens, size of the rotary part].
        sin: likewise.
    """

    index: torch.Tensor
    context_length: int
    mask: torch.Tensor | None
    cos: torch.Tensor
    sin: torch.Tensor

    @property
    def is_prefill(self) -> bool:
        """Whether this is a prefill."""
        return bool(self.index.shape[1] > 1)


def prefill_positions(rotary: Rotary, batch: int, tokens: int, *, like: torch.Tensor) -> Positions:
    """Return the positions of prompts padded to `tokens`; `like` gives device and dtype."""
    index = torch.arange(tokens, device=like.device).expand(batch, tokens)
    cos, sin = _cos_sin(rotary, index[:1], like.dtype)
    return Positions(index=index, context_length=tokens, mask=None, cos=cos, sin=sin)


def decode_positions(rotary: Rotary, lengths_so_far: Sequence[int], *, like: torch.Tensor) -> Positions:
    """Return the positions of one new token per sequence, after `lengths_so_far` tokens."""
    index = torch.tensor(lengths_so_far, device=like.device)[:, None]
    context_length = max(lengths_so_far) + 1
    mask = None
    if min(lengths_so_far) + 1 < context_length:
        mask = (torch.arange(context_length, device=like.device) <= index)[:, None, None, :]
    cos, sin = _cos_sin(rotary, index, like.dtype)
    return Positions(index=index, context_length=context_length, mask=mask, cos=cos, sin=sin)


def _cos_sin(rotary: Rotary, index: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosine and sine of each position's angles, computed in float32 as in transformers."""
    exponents = torch.arange(0, rotary.size, 2, device=index.device, dtype=torch.float32) / rotary.size
    frequencies = _scaled(1.0 / rotary.theta**exponents, rotary)
    angles = index[:, None, :, None].float() / rotary.position_scale * frequencies
    angles = angles.repeat_interleave(2, dim=-1) if rotary.interleaved else torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _scaled(frequencies: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Scale low frequencies down as llama 3.1 does (transformers, `_compute_llama3_parameters`)."""
    if not rotary.frequency_scaling:
        return frequencies
    factor, low, high, context = rotary.frequency_scaling
    wavelengths = 2 * math.pi / frequencies
    smooth = ((context / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * frequencies / factor + smooth * frequencies


def apply_rotary(x: torch.Tensor, positions: Positions, rotary: Rotary) -> torch.Tensor:
    """Rotate queries or keys [batch, heads, tokens, head size] by their positions."""
    rotated = x[..., : rotary.size]
    if rotary.interleaved:
        across = torch.stack((-rotated[..., 1::2], rotated[..., ::2]), dim=-1).flatten(-2)
    else:
        half = rotary.size // 2
        across = torch.cat((-rotated[..., half:], rotated[..., :half]), dim=-1)
    rotated = rotated * positions.cos + across * positions.sin
    return rotated if rotary.size == x.shape[-1] else torch.cat((rotated, x[..., rotary.size :]), dim=-1)


def cached(cache: KvCache, new: torch.Tensor, positions: Positions) -> torch.Tensor:
    """Store the new keys or values, [batch, KV heads, tokens, head size], and return all up to `context_length`."""
    if positions.is_prefill:
        cache.write(new, 0)
        return new  # not quantised
    if positions.mask is None:
        cache.write(new, positions.context_length - 1)
    else:
        cache.write_each(new, positions.index[:, 0])
    return cache.read(len(new), 0, positions.context_length)


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, positions: Positions) -> torch.Tensor:
    """Return [batch, heads, tokens, head size]: causal attention for a prefill, over the whole context for a decode."""
    if positions.is_prefill:
        grouped = query.shape[1] != key.shape[1]
        return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
    # Queries that share a KV head are laid out along the token dimension, so that keys and values are not repeated.
    batch, heads, _, size = query.shape
    query = query.view(batch, key.shape[1], -1, size)
    return scaled_dot_product_attention(query, key, value, attn_mask=positions.mask).reshape(batch, heads, 1, size)


class Norm:
    """RMS norm, or layer norm if there is a bias."""

    def __init__(self, pair: WeightAndBias, epsilon: float) -> None:
        self._weight, self._bias = pair
        self._epsilon = epsilon

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise over the last dimension."""
        if self._bias is None:
            return functional.rms_norm(x, x.shape[-1:], self._weight, self._epsilon)
        return functional.layer_norm(x, x.shape[-1:], self._weight, self._bias, self._epsilon)

    @property
    def size_bytes(self) -> int:
        """Memory of the weight and bias."""
        return sum(part.nbytes for part in (self._weight, self._bias) if part is not None)


class Attention:
    """Attention over this rank's heads. Returns this rank's term of the sum over the stage, without the bias."""

    def __init__(self, arch: DecoderConfig, shard: Shard, spec: EngineSpec, layer: int, parameters: Parameters) -> None:
        weight, bias = parameters.queries_keys_values(layer)
        self._heads = len(shard.partition(arch.heads))
        self._kv_heads = len(shard.partition_kv_heads(arch.kv_heads))
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
        keys = cached(self.caches[0], apply_rotary(key, positions, self._rotary), positions)
        values = cached(self.caches[1], value, positions)
        mixed = attention(apply_rotary(query, positions, self._rotary), keys, values, positions)
        return self._out(mixed.transpose(1, 2).flatten(2))


_ACTIVATIONS: Mapping[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    Activation.SILU: functional.silu,
    Activation.GELU: functional.gelu,
    Activation.GELU_TANH: lambda x: functional.gelu(x, approximate="tanh"),
}


class FeedForward:
    """This rank's shard of the feed-forward block. Returns its term of the sum over the stage, without the bias."""

    def __init__(self, arch: DecoderConfig, spec: EngineSpec, layer: int, parameters: Parameters) -> None:
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
    """Attention and feed-forward block, sequential (two all-reduces over the stage) or parallel (one)."""

    def __init__(
        self,
        arch: DecoderConfig,
        shard: Shard,
        spec: EngineSpec,
        layer: int,
        parameters: Parameters,
        collectives: Collectives,
    ) -> None:
        self._parallel_attention = arch.parallel_attention
        self._collectives = collectives
        self.attention = Attention(arch, shard, spec, layer, parameters)
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
        if self._parallel_attention:
            mlp_input = normed if self._feed_forward_norm is None else self._feed_forward_norm(x)
            return x + self._sum(attended + self._feed_forward(mlp_input), self._bias_of_both)
        x = x + self._sum(attended, self.attention.bias)
        normed = x if self._feed_forward_norm is None else self._feed_forward_norm(x)
        return x + self._sum(self._feed_forward(normed), self._feed_forward.bias)

    def _sum(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        x = self._collectives.all_reduce(x)
        return x if bias is None else x + bias

    @property
    def size_bytes(self) -> int:
        """Memory of its weights."""
        norms = [norm for norm in (self._attention_norm, self._feed_forward_norm) if norm is not None]
        biases = [bias for bias in (self.attention.bias, self._feed_forward.bias) if bias is not None]
        linears = (*self.attention.linears, *self._feed_forward.linears)
        matrices = sum(linear.size_bytes for linear in linears)
        return matrices + sum(norm.size_bytes for norm in norms) + int(sum(bias.nbytes for bias in biases))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LmHead:
    """The last norm, and this rank's rows of the output matrix."""

    norm: Norm
    matrix: Linear

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits [batch, this rank's tokens] for the hidden states [batch, hidden] of one token each."""
        return self.matrix(self.norm(x))


class OwnStage:
    """A rank's shard of a model of maveriq's own decoder, loaded (`decoding.Stage`).

    Attributes:
        arch: the configuration of the whole model.
        shard: which part of it this is.
        embedding: [vocabulary, hidden] on the first stage, else None.

    Args:
        like: gives device and dtype of hidden states.
    """

    def __init__(
        self,
        arch: DecoderConfig,
        shard: Shard,
        spec: EngineSpec,
        source: WeightSource,
        collectives: Collectives,
        *,
        like: torch.Tensor,
    ) -> None:
        parameters = Parameters(arch, shard, source)
        self.arch = arch
        self.shard = shard
        self.vocabulary = arch.vocabulary
        self.hidden = arch.hidden
        self._like = like
        self.embedding = parameters.embedding() if shard.is_first_stage else None
        self._layers = [Layer(arch, shard, spec, layer, parameters, collectives) for layer in shard.layers]
        self._lm_head = None
        if shard.is_last_stage:
            self._lm_head = LmHead(
                norm=Norm(parameters.final_norm(), arch.norm_epsilon),
                matrix=DenseLinear(*parameters.output(self.embedding)),
            )

    def prefill(self, prompts: Sequence[Sequence[int]], received: torch.Tensor | None) -> torch.Tensor:
        """See `decoding.Stage`. Prompts are padded on the right."""
        longest = max(map(len, prompts))
        padded = [[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts]
        x = self._embedded(torch.tensor(padded, device=self._like.device), received)
        x = self._run(x, prefill_positions(self.arch.rotary, len(prompts), longest, like=self._like))
        if not self.shard.is_last_stage:
            return x
        last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=x.device)
        return self._logits(x[torch.arange(len(prompts), device=x.device), last])

    def decode(self, tokens: torch.Tensor, lengths: Sequence[int], received: torch.Tensor | None) -> torch.Tensor:
        """See `decoding.Stage`."""
        x = self._run(
            self._embedded(tokens[:, None], received), decode_positions(self.arch.rotary, lengths, like=self._like)
        )
        return self._logits(x[:, 0]) if self.shard.is_last_stage else x

    def _embedded(self, tokens: torch.Tensor, received: torch.Tensor | None) -> torch.Tensor:
        if received is not None:
            return received
        if self.embedding is None:
            raise RuntimeError("a stage without embedding needs the hidden states of the one before")
        return functional.embedding(tokens, self.embedding)

    def _run(self, x: torch.Tensor, positions: Positions) -> torch.Tensor:
        """Run its layers; [batch, tokens, hidden] to the same."""
        for layer in self._layers:
            x = layer(x, positions)
        return x

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        """Return this rank's logits of the next token, [batch, this rank's tokens]; on the last stage only."""
        if self._lm_head is None:
            raise RuntimeError("only the last stage computes logits")
        return self._lm_head.logits(x)

    def reserve(self, prompts: Sequence[Prompt]) -> None:
        """Reserve KV cache for an execution of these prompts."""
        tokens = max(len(prompt.prompt) + prompt.output_tokens for prompt in prompts)
        for layer in self._layers:
            for cache in layer.attention.caches:
                cache.reserve(len(prompts), tokens)

    def release(self) -> None:
        """Free the KV cache."""
        for layer in self._layers:
            for cache in layer.attention.caches:
                cache.release()

    @property
    def layers(self) -> int:
        """How many transformer layers it holds."""
        return len(self._layers)

    @property
    def weights_bytes(self) -> int:
        """Memory of the weights; tied matrices count once."""
        total = sum(layer.size_bytes for layer in self._layers)
        if self.embedding is not None:
            total += self.embedding.nbytes
        if self._lm_head is not None:
            total += self._lm_head.norm.size_bytes + self._lm_head.matrix.size_bytes
            if self.arch.tie_word_embeddings and self.embedding is not None:
                total -= len(self.shard.partition(self.arch.vocabulary)) * self.embedding[0].nbytes
        return total

    @property
    def kv_cache_bytes(self) -> int:
        """Memory that the KV cache has reserved now."""
        return sum(cache.size_bytes for layer in self._layers for cache in layer.attention.caches)
