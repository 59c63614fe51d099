"""Linear layers: dense, and weight-only quantised to 8 or 4 bits.

A quantised layer keeps only the small form. It is expanded a slice at a time while it is used, so that peak memory
grows by a slice (which stays in a GPU's cache), not by a matrix.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch.nn.functional import linear

from maveriq.domain.models import WeightType

_SLICE_ELEMENTS = 16 * 2**20
_MOST_ROWS_OF_CPU_KERNEL = 4  # torch's int8 kernel for float32 loses to expanding beyond so many rows
_GROUP_SIZES = (128, 64, 32, 16, 8, 4, 2)


class Linear(Protocol):
    """y = x W' + b over the last dimension."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Apply it; [..., inputs] to [..., outputs]."""

    @property
    def size_bytes(self) -> int:
        """Memory of what it keeps."""


class DenseLinear:
    """Weights [outputs, inputs] as they are."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Apply it."""
        return linear(x, self._weight, self._bias)

    @property
    def size_bytes(self) -> int:
        """Memory of weights and bias."""
        return sum(part.nbytes for part in (self._weight, self._bias) if part is not None)


class Int8Linear:
    """Weights as whole numbers from -127 to 127, times one scale per output."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        scale = weight.abs().amax(dim=1, keepdim=True).float().clamp_min(1e-8) / 127
        self._codes = (weight / scale).round_().to(torch.int8)
        self._scale = scale.squeeze(1).to(weight.dtype)
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Apply it."""
        rows = x.reshape(-1, x.shape[-1])
        if x.device.type == "cpu" and len(rows) <= _MOST_ROWS_OF_CPU_KERNEL:
            y = torch._weight_int8pack_mm(rows.contiguous(), self._codes, self._scale)  # noqa: SLF001
        else:
            y = rows.new_empty(len(rows), len(self._codes))
            for part in _slices(self._codes.shape[0], self._codes.shape[1]):
                y[:, part] = linear(rows, self._codes[part].to(x.dtype))
            y *= self._scale
        y = y if self._bias is None else y + self._bias
        return y.view(*x.shape[:-1], -1)

    @property
    def size_bytes(self) -> int:
        """Memory of codes, scales and bias."""
        return sum(part.nbytes for part in (self._codes, self._scale, self._bias) if part is not None)


class Int4Linear:
    """Weights as whole numbers from 0 to 15, two in a byte, with a scale and an offset per group of inputs.

    A group is the largest power of two up to 128 that divides the inputs.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        outputs, inputs = weight.shape
        group = next((size for size in _GROUP_SIZES if inputs % size == 0), inputs)
        grouped = weight.reshape(outputs, inputs // group, group).float()
        low, high = grouped.amin(dim=-1, keepdim=True), grouped.amax(dim=-1, keepdim=True)
        scale = ((high - low) / 15).clamp_min(1e-8)
        codes = ((grouped - low) / scale).round_().clamp_(0, 15).to(torch.uint8).view(outputs, inputs)
        # One byte holds numbers of the two halves of a row, so that expanding it is a concatenation.
        self._packed = codes[:, : inputs // 2] | codes[:, inputs // 2 :] << 4
        self._scale = scale.to(weight.dtype)
        self._low = low.to(weight.dtype)
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Apply it."""
        rows = x.reshape(-1, x.shape[-1])
        y = rows.new_empty(len(rows), len(self._packed))
        for part in _slices(len(self._packed), x.shape[-1]):
            y[:, part] = linear(rows, self._expand(part, x.dtype))
        y = y if self._bias is None else y + self._bias
        return y.view(*x.shape[:-1], -1)

    def _expand(self, part: slice, dtype: torch.dtype) -> torch.Tensor:
        packed, scale = self._packed[part], self._scale[part]
        codes = torch.cat((packed & 15, packed >> 4), dim=1).view(len(packed), scale.shape[1], -1)
        return torch.addcmul(self._low[part], codes.to(dtype), scale).flatten(1)

    @property
    def size_bytes(self) -> int:
        """Memory of codes, scales, offsets and bias."""
        parts = (self._packed, self._scale, self._low, self._bias)
        return sum(part.nbytes for part in parts if part is not None)


def make_linear(kind: str, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
    """Return a layer that stores this weight [outputs, inputs] as `kind` (a `WeightType`); odd rows stay in 8 bits."""
    if kind == WeightType.FLOAT16:
        return DenseLinear(weight, bias)
    if kind == WeightType.INT4 and weight.shape[1] % 2 == 0:
        return Int4Linear(weight, bias)
    return Int8Linear(weight, bias)


def _slices(outputs: int, inputs: int) -> list[slice]:
    step = max(1, _SLICE_ELEMENTS // inputs)
    return [slice(start, min(start + step, outputs)) for start in range(0, outputs, step)]
