"""Positions, the KV cache, and attention over it.

Token p of a sequence lies in place p of the cache, whatever the lengths of its neighbours: prompts of a batch are
filled up on the right, and what the filling wrote is overwritten before it is ever looked at.

A rank's part of a decoder: its layers, and at the ends the embedding and the output matrix.
Greedy decoding, the same loop on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention

from maveriq.domain.models import KvType
from maveriq.exec.engines.torch.collectives import Collectives
from maveriq.exec.engines.torch.config import Activation, DecoderConfig, RankSlice, Rotary
from maveriq.exec.engines.torch.weights import DenseLinear, Linear, Pair, Parameters, Source, make_linear
from maveriq.exec.messages import EngineSpec
from maveriq.exec.messages import PromptSequence as Prompt

_ROUND_TOKENS = 64
"""Rooms are made so many tokens at a time, so that a slightly longer prompt does not make another."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Positions:
    """Where the tokens of a step stand.

    Attributes:
        index: [batch, tokens], the place of each token in its sequence.
        reach: places of the cache that any of them sees.
        mask: [batch, 1, 1, reach] for one token a sequence where lengths differ, True where it looks; else None.
        cos: [batch, 1, tokens, size of the rotary part].
        sin: likewise.
    """

    index: torch.Tensor
    reach: int
    mask: torch.Tensor | None
    cos: torch.Tensor
    sin: torch.Tensor

    @property
    def many(self) -> bool:
        """Whether this is a prefill."""
        return bool(self.index.shape[1] > 1)


def prefill_positions(rotary: Rotary, batch: int, tokens: int, *, like: torch.Tensor) -> Positions:
    """Return the positions of prompts filled up to `tokens`; `like` gives device and type."""
    index = torch.arange(tokens, device=like.device).expand(batch, tokens)
    cos, sin = _turns(rotary, index[:1], like.dtype)
    return Positions(index=index, reach=tokens, mask=None, cos=cos, sin=sin)


def decode_positions(rotary: Rotary, places: list[int], *, like: torch.Tensor) -> Positions:
    """Return the positions of one more token per sequence, each at its place."""
    index = torch.tensor(places, device=like.device)[:, None]
    reach = max(places) + 1
    mask = None
    if min(places) + 1 < reach:
        mask = (torch.arange(reach, device=like.device) <= index)[:, None, None, :]
    cos, sin = _turns(rotary, index, like.dtype)
    return Positions(index=index, reach=reach, mask=mask, cos=cos, sin=sin)


def _turns(rotary: Rotary, index: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosine and sine of each position's angles. They are computed in float32 as everywhere."""
    exponents = torch.arange(0, rotary.size, 2, device=index.device, dtype=torch.float32) / rotary.size
    frequencies = _scaled(1.0 / rotary.theta**exponents, rotary)
    angles = index[:, None, :, None].float() / rotary.stretch * frequencies
    angles = angles.repeat_interleave(2, dim=-1) if rotary.interleaved else torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _scaled(frequencies: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Slow down low frequencies as llama 3.1 does (transformers, `_compute_llama3_parameters`)."""
    if not rotary.frequency_scaling:
        return frequencies
    factor, low, high, context = rotary.frequency_scaling
    wavelengths = 2 * math.pi / frequencies
    smooth = ((context / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * frequencies / factor + smooth * frequencies


def turn(x: torch.Tensor, positions: Positions, rotary: Rotary) -> torch.Tensor:
    """Turn queries or keys [batch, heads, tokens, head size] by their positions."""
    turned = x[..., : rotary.size]
    if rotary.interleaved:
        across = torch.stack((-turned[..., 1::2], turned[..., ::2]), dim=-1).flatten(-2)
    else:
        half = rotary.size // 2
        across = torch.cat((-turned[..., half:], turned[..., :half]), dim=-1)
    turned = turned * positions.cos + across * positions.sin
    return turned if rotary.size == x.shape[-1] else torch.cat((turned, x[..., rotary.size :]), dim=-1)


class KvCache:
    """Keys or values of one layer: [batch, KV heads, tokens, head size].

    It makes room when an execution begins and keeps it for the next one.
    """

    def __init__(self, *, kind: str, kv_heads: int, head_size: int, device: torch.device, dtype: torch.dtype) -> None:
        self._shape = (kv_heads, head_size)
        self._device = device
        self._dtype = dtype
        self._quantised = kind == KvType.INT8
        self.give_room_back()

    @property
    def size_bytes(self) -> int:
        """Memory that it takes now."""
        return sum(part.nbytes for part in (self._store, self._scale) if part is not None)

    def make_room(self, batch: int, tokens: int) -> None:
        """Make room for so many tokens of so many sequences."""
        batches, _, room, _ = self._store.shape
        if batch <= batches and tokens <= room:
            return
        # The old room goes before the new one comes.
        self.give_room_back()
        self._allot(max(batch, batches), max(-(-tokens // _ROUND_TOKENS) * _ROUND_TOKENS, room))

    def give_room_back(self) -> None:
        """Give all memory back."""
        self._allot(0, 0)

    def _allot(self, batch: int, tokens: int) -> None:
        heads, size = self._shape
        # Zeroes, since a place that is masked still enters a product.
        stored_as = torch.int8 if self._quantised else self._dtype
        self._store = torch.zeros(batch, heads, tokens, size, device=self._device, dtype=stored_as)
        self._scale = None
        if self._quantised:
            self._scale = torch.zeros(batch, heads, tokens, 1, device=self._device, dtype=self._dtype)

    def put(self, new: torch.Tensor, positions: Positions) -> torch.Tensor:
        """Add what is new, [batch, KV heads, tokens, head size], and return all that `positions` reaches."""
        batch, reach = new.shape[0], positions.reach
        if self._scale is None:
            _write(self._store, new, positions)
            return self._store[:batch, :, :reach]
        # 8 bits: one scale per token and head.
        scale = new.abs().amax(dim=-1, keepdim=True).float().clamp_min(1e-8) / 127
        _write(self._store, (new / scale).round_().to(torch.int8), positions)
        _write(self._scale, scale.to(self._dtype), positions)
        if positions.many:
            return new
        return self._store[:batch, :, :reach].to(self._dtype) * self._scale[:batch, :, :reach]


def _write(store: torch.Tensor, new: torch.Tensor, positions: Positions) -> None:
    batch = new.shape[0]
    if positions.many:
        store[:batch, :, : new.shape[2]] = new
    elif positions.mask is None:
        store[:batch, :, positions.reach - 1] = new[:, :, 0]
    else:
        store[torch.arange(batch, device=new.device), :, positions.index[:, 0]] = new[:, :, 0]


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, positions: Positions) -> torch.Tensor:
    """Return [batch, heads, tokens, head size]: causal within a prefill, everything up to itself for one token."""
    if positions.many:
        grouped = query.shape[1] != key.shape[1]
        return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
    # The queries that share a KV head take the place of tokens, so that nothing is repeated.
    batch, heads, _, size = query.shape
    query = query.view(batch, key.shape[1], -1, size)
    return scaled_dot_product_attention(query, key, value, attn_mask=positions.mask).reshape(batch, heads, 1, size)


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

    def __init__(
        self, arch: DecoderConfig, part: RankSlice, spec: EngineSpec, layer: int, parameters: Parameters
    ) -> None:
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
    """Attention and feed-forward part, one after the other (two sums over the stage) or side by side (one sum)."""

    def __init__(
        self,
        arch: DecoderConfig,
        part: RankSlice,
        spec: EngineSpec,
        layer: int,
        parameters: Parameters,
        links: Collectives,
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

    def __init__(
        self, arch: DecoderConfig, part: RankSlice, spec: EngineSpec, source: Source, links: Collectives
    ) -> None:
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


ENDED = -1
"""Stands for the token of a sequence that had ended before."""


def decode(
    stage: Stage, links: Collectives, prompts: Sequence[Prompt], *, like: torch.Tensor
) -> Iterator[tuple[list[int], bool]]:
    """Yield a token for each sequence, step by step until all have ended, and whether this step is the last.

    There must be room for all of it in the KV cache.

    Args:
        stage: this rank's part.
        links: to the others.
        prompts: what to go on from.
        like: gives device and type of hidden states.
    """
    lengths = [len(prompt.prompt) for prompt in prompts]
    longest = max(lengths)
    filled = [[*prompt.prompt, *[0] * (longest - len(prompt.prompt))] for prompt in prompts]
    tokens = torch.tensor(filled, device=like.device)
    positions = prefill_positions(stage.arch.rotary, len(prompts), longest, like=like)
    told = _step(stage, links, tokens, positions, [length - 1 for length in lengths], like=like)
    left = [prompt.output_tokens for prompt in prompts]
    places = lengths
    while True:
        step = [token if count else ENDED for token, count in zip(told.tolist(), left, strict=True)]
        left = [_left(prompt, token, count) for prompt, token, count in zip(prompts, step, left, strict=True)]
        last = not any(left)
        yield step, last
        if last:
            return
        positions = decode_positions(stage.arch.rotary, places, like=like)
        told = _step(stage, links, told[:, None], positions, [0] * len(prompts), like=like)
        # A sequence that has ended goes on, unheard, in its last place, so that it never outgrows its room.
        places = [place + 1 if count > 1 else place for place, count in zip(places, left, strict=True)]


def _left(prompt: Prompt, token: int, count: int) -> int:
    """Return how many tokens a sequence still wants after this one."""
    return 0 if token in prompt.stop_token_ids else max(count - 1, 0)


def _step(
    stage: Stage, links: Collectives, tokens: torch.Tensor, positions: Positions, ends: list[int], *, like: torch.Tensor
) -> torch.Tensor:
    """Run tokens [batch, tokens] through all stages and return the next ones, [batch]."""
    with torch.inference_mode():
        if stage.embedding is not None:
            x = torch.nn.functional.embedding(tokens, stage.embedding)
        else:
            x = links.take(like.new_empty(*tokens.shape, stage.arch.hidden))
        x = stage.run(x, positions)
        batch = len(ends)
        if stage.part.last:
            told = stage.likeliest(x[torch.arange(batch, device=x.device), torch.tensor(ends, device=x.device)])
        else:
            links.pass_on(x)
            told = torch.empty(batch, dtype=torch.long, device=x.device)
        return links.tell_tokens(told)
