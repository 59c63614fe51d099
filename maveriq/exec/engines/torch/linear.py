"""Linear layers: dense, and weight-only quantised to 8 or 4 bits.

A quantised layer keeps only the quantised weights and expands them one slice of rows at a time while it computes. Peak
memory grows by one slice, which fits a cache, instead of a whole matrix.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Protocol

import torch
from torch.nn.functional import linear

from maveriq.domain.models import WeightType

_SLICE_ELEMENTS = MappingProxyType({"cpu": 2**18, "cuda": 2**24})
"""Elements per slice. On a CPU a slice that fits the cache is 5 times as fast as whole matrices and twice as fast as
torch's int8 kernel (measured)."""
_MIN_SCALE = 1e-7  # keeps rows of zeros zero, and fits float16
_GROUP_SIZES = (128, 64, 32, 16, 8, 4, 2)


class Linear(Protocol):
    """Computes y = x W' + b over the last dimension."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., inputs] to [..., outputs]."""

    def expanded(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the whole matrix [outputs, inputs] in a dtype of activations."""

    @property
    def size_bytes(self) -> int:
        """Memory of the weights, scales and bias."""


class DenseLinear:
    """Unquantised weights, [outputs, inputs]."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Apply it."""
        return linear(x, self._weight, self._bias)

    def expanded(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the matrix."""
        return self._weight.to(dtype)

    @property
    def size_bytes(self) -> int:
        """Memory of weights and bias."""
        return sum(part.nbytes for part in (self._weight, self._bias) if part is not None)


class Int8Linear:
    """Symmetric int8 weights (-127 to 127) with one scale per output."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._codes = torch.empty_like(weight, dtype=torch.int8)
        self._scale = weight.new_empty(len(weight))
        self._bias = bias
        for part in _slices(weight, weight.shape[1]):
            scale = weight[part].abs().amax(dim=1, keepdim=True).float().clamp_min(_MIN_SCALE) / 127
            self._codes[part] = (weight[part] / scale).round_()
            self._scale[part] = scale.squeeze(1)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Apply it."""
        rows = x.reshape(-1, x.shape[-1])
        y = rows.new_empty(len(rows), len(self._codes))
        for part in _slices(self._codes, x.shape[-1]):
            # Scale before the product: the unscaled product would overflow float16.
            y[:, part] = linear(rows, self._expand(part, x.dtype))
        y = y if self._bias is None else y + self._bias
        return y.view(*x.shape[:-1], -1)

    def expanded(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the whole matrix."""
        return self._expand(slice(None), dtype)

    def _expand(self, part: slice, dtype: torch.dtype) -> torch.Tensor:
        return self._codes[part].to(dtype).mul_(self._scale[part, None])

    @property
    def size_bytes(self) -> int:
        """Memory of codes, scales and bias."""
        return sum(part.nbytes for part in (self._codes, self._scale, self._bias) if part is not None)


class Int4Linear:
    """Unsigned 4-bit weights, two in a byte, with a scale and an offset per group of inputs.

    A group is the largest power of two up to 128 that divides the inputs.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        outputs, inputs = weight.shape
        group = next(size for size in _GROUP_SIZES if inputs % size == 0)
        self._packed = torch.empty(outputs, inputs // 2, device=weight.device, dtype=torch.uint8)
        self._scale = weight.new_empty(outputs, inputs // group, 1)
        self._low = weight.new_empty(outputs, inputs // group, 1)
        self._bias = bias
        for part in _slices(weight, inputs):
            grouped = weight[part].unflatten(1, (-1, group)).float()
            low, high = grouped.amin(dim=-1, keepdim=True), grouped.amax(dim=-1, keepdim=True)
            scale = ((high - low) / 15).clamp_min(_MIN_SCALE)
            codes = ((grouped - low) / scale).round_().clamp_(0, 15).to(torch.uint8).flatten(1)
            # A byte holds one number of each half of the row, so that expanding is a concatenation.
            self._packed[part] = codes[:, : inputs // 2] | codes[:, inputs // 2 :] << 4
            self._scale[part], self._low[part] = scale, low

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Apply it."""
        rows = x.reshape(-1, x.shape[-1])
        y = rows.new_empty(len(rows), len(self._packed))
        for part in _slices(self._packed, x.shape[-1]):
            y[:, part] = linear(rows, self._expand(part, x.dtype))
        y = y if self._bias is None else y + self._bias
        return y.view(*x.shape[:-1], -1)

    def expanded(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the whole matrix."""
        return self._expand(slice(None), dtype)

    def _expand(self, part: slice, dtype: torch.dtype) -> torch.Tensor:
        packed, scale = self._packed[part], self._scale[part]
        half = packed.shape[1]
        weight = torch.empty(len(packed), 2 * half, device=packed.device, dtype=dtype)
        weight[:, :half] = packed & 15
        weight[:, half:] = packed >> 4
        weight.view(len(packed), scale.shape[1], -1).mul_(scale).add_(self._low[part])
        return weight

    @property
    def size_bytes(self) -> int:
        """Memory of codes, scales, offsets and bias."""
        parts = (self._packed, self._scale, self._low, self._bias)
        return sum(part.nbytes for part in parts if part is not None)


def make_linear(kind: str, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
    """Return a layer that stores this weight [outputs, inputs] as `kind`, a `WeightType`.

    int4 needs an even number of inputs; other matrices are stored as int8.
    """
    if kind == WeightType.FLOAT16:
        return DenseLinear(weight, bias)
    if kind == WeightType.INT4 and weight.shape[1] % 2 == 0:
        return Int4Linear(weight, bias)
    return Int8Linear(weight, bias)


def _slices(weight: torch.Tensor, inputs: int) -> list[slice]:
    """Return slices of the rows of a matrix with this number of inputs, sized for its device."""
    step = max(1, _SLICE_ELEMENTS[weight.device.type] // inputs)
    return [slice(start, start + step) for start in range(0, len(weight), step)]
