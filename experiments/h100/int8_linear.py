"""Linear layers with 8-bit weights: one scale per output channel, 16-bit activations.

Up to `MAX_KERNEL_ROWS` tokens, a Triton kernel reads the 8-bit weights, converts them to bfloat16 in registers and
multiplies on the tensor cores. With more tokens, the weights are converted to a bfloat16 matrix in memory, and the
library multiplies. A CPU always does the latter.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

MAX_KERNEL_ROWS = 64
KERNEL_NAME = f"triton w8a16 to {MAX_KERNEL_ROWS} tokens, above dequantise + cuBLAS"

if importlib.util.find_spec("triton") is not None:
    import triton
    import triton.language as tl

    def _multiply(  # type: ignore[no-untyped-def]
        x_ptr,
        weight_ptr,
        scale_ptr,
        out_ptr,
        rows,
        columns,
        depth,
        BLOCK_ROWS: tl.constexpr,  # noqa: N803 (Triton's custom for constants of a kernel)
        BLOCK_COLUMNS: tl.constexpr,  # noqa: N803
        BLOCK_DEPTH: tl.constexpr,  # noqa: N803
    ):
        row = tl.arange(0, BLOCK_ROWS)
        column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
        for start in range(0, depth, BLOCK_DEPTH):
            position = start + tl.arange(0, BLOCK_DEPTH)
            x = tl.load(
                x_ptr + row[:, None] * depth + position[None, :],
                mask=(row < rows)[:, None] & (position < depth)[None, :],
                other=0.0,
            )
            weight = tl.load(
                weight_ptr + column[:, None] * depth + position[None, :],
                mask=(column < columns)[:, None] & (position < depth)[None, :],
                other=0,
            )
            total += tl.dot(x, tl.trans(weight.to(tl.bfloat16)))
        scale = tl.load(scale_ptr + column, mask=column < columns, other=0.0)
        tl.store(
            out_ptr + row[:, None] * columns + column[None, :],
            (total * scale[None, :]).to(tl.bfloat16),
            mask=(row < rows)[:, None] & (column < columns)[None, :],
        )

    multiply_kernel: Any = triton.jit(_multiply)
else:
    multiply_kernel = None


class Int8Linear(nn.Module):  # type: ignore[misc] # mypy does not read torch
    """A linear layer whose weights are rounded to 8 bits, symmetrically, with one scale per output channel."""

    def __init__(self, source: nn.Linear) -> None:
        super().__init__()
        weight = source.weight.detach()
        largest = weight.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-12)
        scale = largest / 127.0
        self.register_buffer("weight", torch.round(weight.float() / scale).to(torch.int8))
        self.register_buffer("scale", scale.squeeze(1).contiguous())
        self.bias = source.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x times the transposed weights, plus the bias."""
        flat = x.reshape(-1, x.shape[-1])
        out = multiply_int8(flat, self.weight, self.scale)
        if self.bias is not None:
            out = out + self.bias
        return out.view(*x.shape[:-1], out.shape[-1])


def multiply_int8(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Multiply x (tokens, inputs) by 8-bit weights (outputs, inputs), whose row i stands for weight[i] * scale[i]."""
    rows, depth = x.shape
    columns = weight.shape[0]
    if not x.is_cuda or rows > MAX_KERNEL_ROWS or multiply_kernel is None:
        return torch.nn.functional.linear(x, weight.to(x.dtype)) * scale.to(x.dtype)
    out = torch.empty((rows, columns), device=x.device, dtype=torch.bfloat16)
    block_columns = 32 if columns <= 8192 else 64
    grid = ((columns + block_columns - 1) // block_columns,)
    multiply_kernel[grid](
        x.contiguous(),
        weight,
        scale,
        out,
        rows,
        columns,
        depth,
        BLOCK_ROWS=max(16, 1 << (rows - 1).bit_length()),
        BLOCK_COLUMNS=block_columns,
        BLOCK_DEPTH=128,
        num_warps=4,
        num_stages=4,
    )
    return out


def quantise_linears(model: nn.Module) -> None:
    """Replace every linear layer of a model but its output head by one with 8-bit weights."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and name != "lm_head":
                setattr(parent, name, Int8Linear(child))
