"""The KV cache that transformers' modules write to: reserved in advance, and in 8 bits if asked for.

transformers grows its caches by concatenation. These layers replace its own: memory is reserved before an execution,
and only the layers of this stage hold any. A layer with a sliding window keeps few more tokens than the window. All
prompts are padded on the left, so that a step's tokens have the same index in all sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from maveriq.exec.engines.engine import EngineError, FailureKind
from maveriq.exec.engines.torch.kv_cache import KvCache

_SLACK_TOKENS = 64
"""Tokens that a layer with a window has room for beyond it; when they are used up, the window moves to the front."""


@dataclass(slots=True)
class CacheState:
    """What all layers of a cache share.

    Attributes:
        kind: a `KvType`.
        stored: tokens of each sequence before the current step, padding included.
        batch: sequences that memory is reserved for.
        tokens: tokens of each sequence that memory is reserved for.
    """

    kind: str
    stored: int = 0
    batch: int = 0
    tokens: int = 0


class FullLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of a layer that attends to all tokens."""

    def __init__(self, state: CacheState) -> None:
        super().__init__()
        self.is_initialized = True
        self._state = state
        self._caches: tuple[KvCache, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Memory that is reserved now."""
        return sum(cache.size_bytes for cache in self._caches)

    def reserve(self) -> None:
        """Reserve what the state says. A layer that has seen no keys and values yet reserves when it sees the first."""
        for cache in self._caches:
            cache.reserve(self._state.batch, self._needed_tokens)

    def release(self) -> None:
        """Free all memory."""
        for cache in self._caches:
            cache.release()

    @property
    def _needed_tokens(self) -> int:
        return self._state.tokens

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new keys and values [batch, KV heads, tokens, head size]; return those that the tokens attend to."""
        new = (key_states, value_states)
        if not self._caches:
            self._caches = tuple(
                KvCache(
                    kind=self._state.kind, kv_heads=x.shape[1], head_size=x.shape[3], device=x.device, dtype=x.dtype
                )
                for x in new
            )
            self.reserve()
        keys, values = self._prefill(new) if self._state.stored == 0 else self._decode(new)
        return keys, values

    def _prefill(self, new: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Store a prompt. It reads what it has just computed, also where 8 bits are stored."""
        for cache, x in zip(self._caches, new, strict=True):
            cache.write(x, 0)
        return new

    def _decode(self, new: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        return self._append(new, start=0, end=self._state.stored)

    def _append(self, new: Sequence[torch.Tensor], *, start: int, end: int) -> Sequence[torch.Tensor]:
        """Store tokens at index `end`, and return those from `start` on."""
        for cache, x in zip(self._caches, new, strict=True):
            cache.write(x, end)
        batch, _, tokens, _ = new[0].shape
        return [cache.read(batch, start, end + tokens) for cache in self._caches]

    def get_seq_length(self) -> int:
        """Return how many tokens came before this step."""
        return self._state.stored

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys `update` returns, and the number of the first."""
        return self._state.stored + query_length, 0


class WindowLayer(FullLayer):
    """Keys and values of a layer whose tokens attend to themselves and `window` - 1 tokens before."""

    is_sliding = True

    def __init__(self, state: CacheState, window: int) -> None:
        super().__init__(state)
        self._window = window
        self._end = 0  # the index in the cache after the last token

    @property
    def _needed_tokens(self) -> int:
        return min(self._state.tokens, self._window + _SLACK_TOKENS)

    @property
    def _before(self) -> int:
        """How many tokens before this step its first token attends to."""
        return min(self._state.stored, self._window - 1)

    def _prefill(self, new: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        tokens = new[0].shape[2]
        kept = min(tokens, self._window - 1)
        super()._prefill([x[:, :, tokens - kept :] for x in new])
        self._end = kept
        return new

    def _decode(self, new: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        tokens, before = new[0].shape[2], self._before
        if self._end + tokens > self._caches[0].capacity_tokens:
            for cache in self._caches:
                cache.move_to_front(self._end - before, self._end)
            self._end = before
        read = self._append(new, start=self._end - before, end=self._end)
        self._end += tokens
        return read

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys `update` returns, and the number of the first."""
        return self._before + query_length, self._state.stored - self._before


class RecurrentLayer(LinearAttentionLayer):  # type: ignore[misc]
    """The states of a layer that keeps no keys and values: of a size that does not depend on the number of tokens."""

    def __init__(self, state: CacheState, states: int) -> None:
        super().__init__(number_of_states=states)
        self._state = state

    @property
    def _tensors(self) -> list[tuple[dict[int, Any], int, torch.Tensor]]:
        kinds = (self.conv_states, self.recurrent_states)
        return [(kind, key, tensor) for kind in kinds for key, tensor in kind.items() if tensor is not None]

    @property
    def size_bytes(self) -> int:
        """Memory that is reserved now."""
        return sum(int(tensor.nbytes) for _, _, tensor in self._tensors)

    def reserve(self) -> None:
        """Reserve states for the batch. A layer that has not run yet reserves when it first runs."""
        for kind, key, tensor in self._tensors:
            if len(tensor) != self._state.batch:
                kind[key] = None  # free it first
                kind[key] = tensor.new_zeros(self._state.batch, *tensor.shape[1:])

    def release(self) -> None:
        """Free all memory."""
        for kind, key, tensor in self._tensors:
            kind[key] = tensor.new_zeros(0, *tensor.shape[1:])

    def mark(self, *, ran: bool) -> None:
        """Say whether there are states of earlier tokens, also on stages that do not run this layer."""
        self.has_previous_state: dict[int, bool] = dict.fromkeys(range(self.number_of_states), ran)


class EmptyLayer(DummyLayer):  # type: ignore[misc]
    """A layer that keeps nothing, such as one of experts alone."""

    size_bytes = 0

    def reserve(self) -> None:
        """Reserve nothing."""

    def release(self) -> None:
        """Free nothing."""


class StageCache(Cache):  # type: ignore[misc]
    """A cache with a layer for each of the model, of which only those of this stage hold anything.

    Args:
        config: the model's configuration, of transformers.
        kind: a `KvType`, of keys and values.

    Raises:
        EngineError: a layer keeps something else.
    """

    def __init__(self, config: Any, kind: str) -> None:
        self._state = CacheState(kind=kind)
        super().__init__(layers=[_own_layer(layer, self._state) for layer in DynamicCache(config=config).layers])

    @property
    def size_bytes(self) -> int:
        """Memory that is reserved now."""
        return sum(layer.size_bytes for layer in self.layers)

    @property
    def stored(self) -> int:
        """Tokens of each sequence so far, padding included."""
        return self._state.stored

    def begin(self) -> None:
        """Forget all tokens."""
        self._state.stored = 0
        for layer in self._recurrent:
            layer.mark(ran=False)

    def advance(self, tokens: int) -> None:
        """Count the tokens of a step that has run."""
        self._state.stored += tokens
        for layer in self._recurrent:
            layer.mark(ran=True)

    @property
    def _recurrent(self) -> list[RecurrentLayer]:
        return [layer for layer in self.layers if isinstance(layer, RecurrentLayer)]

    def reserve_for(self, batch: int, tokens: int) -> None:
        """Reserve memory for `batch` sequences of `tokens` tokens, padding included."""
        self._state.batch, self._state.tokens = batch, tokens
        for layer in self.layers:
            layer.reserve()

    def release(self) -> None:
        """Free all memory."""
        for layer in self.layers:
            layer.release()


def _own_layer(layer: Any, state: CacheState) -> FullLayer | RecurrentLayer | EmptyLayer:
    # By exact class: other kinds of layers of transformers are derived from these.
    if type(layer) is DynamicLayer:
        return FullLayer(state)
    if type(layer) is DynamicSlidingWindowLayer:
        return WindowLayer(state, int(layer.sliding_window))
    if type(layer) is LinearAttentionLayer:
        return RecurrentLayer(state, int(layer.number_of_states))
    if type(layer) is DummyLayer:
        return EmptyLayer()
    raise EngineError(
        FailureKind.UNSUPPORTED,
        f"its layers keep a {type(layer).__name__}; the torch engine keeps keys and values, and recurrent states",
    )
