"""Positions, the KV cache, and attention over it.

Token p of a sequence lies in place p of the cache, whatever the lengths of its neighbours: prompts of a batch are
filled up on the right, and what the filling wrote is overwritten before it is ever looked at.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from maveriq.domain.models import KvType
from maveriq.exec.engines.torch.architecture import Rotary

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
