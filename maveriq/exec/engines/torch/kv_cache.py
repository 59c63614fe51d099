"""Keys or values of one layer, in the dtype of activations or in 8 bits."""

from __future__ import annotations

import torch

from maveriq.domain.models import KvType

_ROUND_TOKENS = 64
"""The KV cache grows in multiples of this, so that a slightly longer prompt does not reallocate it."""
_MIN_SCALE = 1e-8


class KvCache:
    """Keys or values of one layer: [batch, KV heads, tokens, head size].

    Memory is reserved when an execution begins and kept for the next one. In 8 bits there is one scale per token and
    head.
    """

    def __init__(self, *, kind: str, kv_heads: int, head_size: int, device: torch.device, dtype: torch.dtype) -> None:
        self._shape = (kv_heads, head_size)
        self._device = device
        self._dtype = dtype
        self.is_quantised = kind == KvType.INT8
        self.release()

    @property
    def size_bytes(self) -> int:
        """Memory that is reserved now."""
        return sum(part.nbytes for part in (self._store, self._scale) if part is not None)

    def reserve(self, batch: int, tokens: int) -> None:
        """Reserve memory for `batch` sequences of `tokens` tokens; never shrinks."""
        old_batch, _, old_tokens, _ = self._store.shape
        if batch <= old_batch and tokens <= old_tokens:
            return
        # Free the old memory before allocating the new.
        self.release()
        self._allocate(max(batch, old_batch), max(-(-tokens // _ROUND_TOKENS) * _ROUND_TOKENS, old_tokens))

    def release(self) -> None:
        """Free all memory."""
        self._allocate(0, 0)

    def _allocate(self, batch: int, tokens: int) -> None:
        heads, size = self._shape
        # Zeros, because masked entries still enter a product, where NaN would spread.
        store_dtype = torch.int8 if self.is_quantised else self._dtype
        self._store = torch.zeros(batch, heads, tokens, size, device=self._device, dtype=store_dtype)
        self._scale = None
        if self.is_quantised:
            self._scale = torch.zeros(batch, heads, tokens, 1, device=self._device, dtype=self._dtype)

    @property
    def capacity_tokens(self) -> int:
        """How many tokens of each sequence it has room for."""
        return int(self._store.shape[2])

    def write(self, new: torch.Tensor, start: int) -> None:
        """Store keys or values [batch, KV heads, tokens, head size] from index `start` on in every sequence."""
        batch, stop = new.shape[0], start + new.shape[2]
        codes, scale = self._encode(new)
        self._store[:batch, :, start:stop] = codes
        if self._scale is not None:
            self._scale[:batch, :, start:stop] = scale

    def write_each(self, new: torch.Tensor, index: torch.Tensor) -> None:
        """Store one token of each sequence, [batch, KV heads, 1, head size], at the indices [batch]."""
        rows = torch.arange(len(index), device=index.device)
        codes, scale = self._encode(new)
        self._store[rows, :, index] = codes[:, :, 0]
        if self._scale is not None and scale is not None:
            self._scale[rows, :, index] = scale[:, :, 0]

    def read(self, batch: int, start: int, stop: int) -> torch.Tensor:
        """Return the tokens `start` to `stop` of the first `batch` sequences, [batch, KV heads, tokens, head size]."""
        stored = self._store[:batch, :, start:stop]
        return stored if self._scale is None else stored.to(self._dtype) * self._scale[:batch, :, start:stop]

    def move_to_front(self, start: int, stop: int) -> None:
        """Move the tokens `start` to `stop` to index 0."""
        for part in (self._store, self._scale):
            if part is not None:
                part[:, :, : stop - start] = part[:, :, start:stop].clone()

    def _encode(self, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return what is stored: codes, and a scale per token and head if it is quantised."""
        if not self.is_quantised:
            return new, None
        scale = new.abs().amax(dim=-1, keepdim=True).float().clamp_min(_MIN_SCALE) / 127
        return (new / scale).round_().to(torch.int8), scale.to(self._dtype)
