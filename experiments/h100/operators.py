"""Measure single operators: copies, matrix products in three formats, attention, experts, element-wise kernels."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own custom)
import transformers
from int8_linear import KERNEL_NAME, multiply_int8
from timing import append_row, one_line, sm_clock_mhz, time_on_device
from torch.nn.attention import SDPBackend, bias, sdpa_kernel
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

_L2_BYTES = 64 * 2**20  # above the 50 MB of an H100: weights are rotated until they no longer fit
_MAX_KV_BYTES = 8 * 2**30


@dataclass(slots=True, kw_only=True)
class Operator:
    """One row of operators.csv; README.md explains the columns."""

    operator: str
    kernel: str
    format: str
    m: int | None = None
    n: int | None = None
    k: int | None = None
    batch: int | None = None
    query_tokens: int | None = None
    context: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_size: int | None = None
    bytes_moved: float | None = None
    flops: float | None = None
    status: str = "measured"
    seconds: float | None = None
    mad_seconds: float | None = None
    synced_seconds: float | None = None
    repeats: int | None = None
    experts_hit: float | None = None
    sm_clock_mhz: int | None = None
    elapsed_s: float | None = None
    reason: str = ""


Prepared = tuple[Operator, Callable[[], tuple[Callable[[], object], int]]]
"""An operator, and a function that allocates its data and returns the call to time and how often to capture it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorStage:
    """The measurements of single operators. `smoke` measures the first of each kind, `tiny` small shapes."""

    device: torch.device
    out: Path
    started: float
    smoke: bool = False
    tiny: bool = False

    def run(self, deadline: float) -> None:
        """Measure kind after kind, in rounds, so that every kind has its share when time runs out.

        Args:
            deadline: when to start no more measurements, as `time.time()` counts.
        """
        torch.manual_seed(0)
        kinds: list[Iterator[Prepared]] = [
            self._copies(),
            self._products(),
            self._decode_attention(),
            self._prefill_attention(),
            self._elementwise(),
            self._experts(),
        ]
        taken = {id(kind): 0 for kind in kinds}
        while kinds:
            for kind in list(kinds):
                share = list(itertools.islice(kind, self._share(taken[id(kind)])))
                taken[id(kind)] += len(share)
                if not share:
                    kinds.remove(kind)
                for operator, prepare in share:
                    self._measure(operator, prepare, is_late=time.time() > deadline)

    def _share(self, taken: int) -> int:
        if self.smoke:
            return 0 if taken else 3
        return 8

    def _measure(
        self, operator: Operator, prepare: Callable[[], tuple[Callable[[], object], int]], *, is_late: bool
    ) -> None:
        if is_late:
            operator.status, operator.reason = "skipped", "no time left"
        else:
            try:
                with torch.inference_mode():
                    call, calls = prepare()
                    timing = time_on_device(call, self.device, target_s=0.03, calls_in_graph=calls)
                operator.seconds, operator.mad_seconds = timing.seconds, timing.mad_seconds
                operator.synced_seconds, operator.repeats = timing.synced_seconds, timing.repeats
                operator.sm_clock_mhz = sm_clock_mhz()
            except torch.OutOfMemoryError:
                operator.status, operator.reason = "skipped", "out of memory"
            except Exception as error:  # recorded; the next operator may work
                operator.status, operator.reason = "failed", one_line(error)
            call = None  # type: ignore[assignment] # frees its data before the next one
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        operator.elapsed_s = round(time.time() - self.started, 2)
        append_row(self.out / "operators.csv", operator)

    @property
    def _dtype(self) -> torch.dtype:
        return torch.bfloat16

    def _copies(self) -> Iterator[Prepared]:
        for size in (2**20,) if self.tiny else (2**32, 2**30, 2**28, 2**26, 2**24, 2**22, 2**20, 2**16):

            def prepare(size: int = size) -> tuple[Callable[[], object], int]:
                source = torch.randint(0, 127, (size,), dtype=torch.int8, device=self.device)
                target = torch.empty_like(source)
                return lambda: target.copy_(source), max(1, min(20, 2**30 // size))

            yield Operator(operator="copy", kernel="copy_", format="int8", n=size, bytes_moved=2.0 * size), prepare

    def _products(self) -> Iterator[Prepared]:
        shapes: list[tuple[int, int]] = [  # (outputs, inputs) of the models
            (6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096),
            (7168, 5120), (5120, 5120), (34816, 5120), (5120, 17408), (151936, 5120),
            (4672, 4544), (18176, 4544), (4544, 18176),
            (10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672),
            (1024, 1024), (4096, 1024), (1024, 4096), (2048, 2048), (16384, 2048), (2048, 8192),
        ]  # fmt: skip
        rows: tuple[int, ...] = (1, 16, 64, 256, 1024, 4096, 16384, 4, 32, 128, 512, 2048)
        if self.tiny:
            shapes, rows = [(64, 32)], (1, 8)
        for m in rows:
            for n, k in shapes:
                for number_format in ("bf16", "fp8", "int8"):
                    if m * n * k <= 2**41:
                        yield self._product(m, n, k, number_format)

    def _product(self, m: int, n: int, k: int, number_format: str) -> Prepared:
        weight_bytes = n * k * (2 if number_format == "bf16" else 1)
        copies = 1 if self.tiny else max(1, min(64, -(-2 * _L2_BYTES // weight_bytes)))
        calls = copies * max(1, 8 // copies) if m <= 4096 else copies

        def prepare() -> tuple[Callable[[], object], int]:
            x = torch.randn(m, k, device=self.device, dtype=self._dtype)
            weights = [torch.randn(n, k, device=self.device, dtype=self._dtype) * 0.02 for _ in range(copies)]
            if number_format == "fp8":
                one = torch.ones((), device=self.device)
                x8 = x.to(torch.float8_e4m3fn)
                eights = [(weight * 50).to(torch.float8_e4m3fn) for weight in weights]

                def multiply(weight: torch.Tensor) -> object:
                    return torch._scaled_mm(  # noqa: SLF001 (torch has no public name for it)
                        x8, weight.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
                    )

                return _rotate(multiply, eights), calls
            if number_format == "int8":
                scale = torch.full((n,), 0.001, device=self.device)
                integers = [(weight * 1000).to(torch.int8) for weight in weights]
                return _rotate(lambda weight: multiply_int8(x, weight, scale), integers), calls
            return _rotate(lambda weight: F.linear(x, weight), weights), calls

        kernel = {"bf16": "cuBLAS through torch", "fp8": "torch._scaled_mm, one scale", "int8": KERNEL_NAME}
        element = 1 if number_format == "fp8" else 2
        moved = float(weight_bytes + m * k * element + m * n * 2)
        row = Operator(
            operator="gemm", kernel=kernel[number_format], format=number_format, m=m, n=n, k=k,
            bytes_moved=moved, flops=2.0 * m * n * k,
        )  # fmt: skip
        return row, prepare

    def _decode_attention(self) -> Iterator[Prepared]:
        contexts: tuple[int, ...] = (1024, 4096, 128, 512, 2048, 8192, 16384, 32768)
        batches: tuple[int, ...] = (1, 16, 64, 4, 256)
        heads_of: tuple[tuple[int, int, int], ...] = (
            (32, 8, 128),
            (40, 8, 128),
            (71, 1, 64),
            (32, 32, 128),
            (64, 8, 128),
            (8, 1, 128),
        )
        if self.tiny:
            contexts, batches, heads_of = (16,), (1, 2), ((4, 2, 16),)
        for heads, kv_heads, head_size in heads_of:
            for context, batch in itertools.product(contexts, batches):
                if 4 * batch * context * kv_heads * head_size <= _MAX_KV_BYTES:
                    yield self._attention("decode_attention", batch, 1, context, (heads, kv_heads, head_size))

    def _prefill_attention(self) -> Iterator[Prepared]:
        lengths: tuple[int, ...] = (1024, 4096, 128, 512, 2048, 8192, 16384)
        heads_of: tuple[tuple[int, int, int], ...] = ((32, 8, 128), (40, 8, 128), (71, 1, 64), (8, 1, 128))
        if self.tiny:
            lengths, heads_of = (16,), ((4, 2, 16),)
        for heads in heads_of:
            for length, batch in itertools.product(lengths, (1, 4)):
                if batch * length <= 16384:
                    yield self._attention("prefill_attention", batch, length, length, heads)
        if not self.tiny:
            for chunk, context in ((512, 2048), (512, 8192), (2048, 8192), (128, 4096), (2048, 16384)):
                yield self._attention("prefill_attention", 1, chunk, context, (32, 8, 128))
            for length in (1024, 4096, 8192):
                yield self._attention("prefill_attention", 1, length, length, (32, 8, 128), SDPBackend.CUDNN_ATTENTION)

    def _attention(
        self,
        name: str,
        batch: int,
        query_tokens: int,
        context: int,
        heads_of: tuple[int, int, int],
        backend: SDPBackend = SDPBackend.FLASH_ATTENTION,
    ) -> Prepared:
        heads, kv_heads, head_size = heads_of
        kv_bytes = 4 * batch * context * kv_heads * head_size
        copies = 1 if self.tiny or query_tokens > 1 else max(1, min(16, -(-2 * _L2_BYTES // kv_bytes)))
        has_past = 1 < query_tokens < context

        def prepare() -> tuple[Callable[[], object], int]:
            query = self._random(batch, heads, query_tokens, head_size)
            pairs = [
                (self._random(batch, kv_heads, context, head_size), self._random(batch, kv_heads, context, head_size))
                for _ in range(copies)
            ]
            mask = bias.causal_lower_right(query_tokens, context) if has_past else None

            def attend(pair: tuple[torch.Tensor, torch.Tensor]) -> object:
                is_causal = query_tokens > 1 and not has_past
                with sdpa_kernel(backend if self.device.type == "cuda" else SDPBackend.MATH):
                    return F.scaled_dot_product_attention(
                        query, *pair, attn_mask=mask, is_causal=is_causal, enable_gqa=heads != kv_heads
                    )

            return _rotate(attend, pairs), copies * max(1, 8 // copies) if query_tokens == 1 else 1

        pairs = query_tokens * (context - query_tokens) + query_tokens * (query_tokens + 1) / 2
        row = Operator(
            operator=name, kernel=f"torch sdpa {backend.name.lower()}", format="bf16", batch=batch,
            query_tokens=query_tokens, context=context, heads=heads, kv_heads=kv_heads, head_size=head_size,
            bytes_moved=float(kv_bytes + 4 * batch * query_tokens * heads * head_size),
            flops=4.0 * batch * heads * head_size * pairs,
        )  # fmt: skip
        return row, prepare

    def _elementwise(self) -> Iterator[Prepared]:
        rows = (1, 8) if self.tiny else (1, 64, 1024, 16384, 256, 4096)
        width, wide = (32, 64) if self.tiny else (4096, 14336)

        kernels: tuple[tuple[str, str, int, int, Callable[[int, int], Callable[[], object]]], ...] = (
            ("rms_norm", "transformers LlamaRMSNorm, several kernels", width, 2, self._llama_norm),
            ("rms_norm", "torch rms_norm", width, 2, self._fused_norm),
            ("silu_gate", "torch silu and product, two kernels", wide, 3, self._gate),
            ("add", "torch add", width, 3, self._add),
        )
        for m in rows:
            for name, kernel, columns, tensors, build in kernels:

                def prepare(
                    m: int = m, columns: int = columns, build: Callable[[int, int], Callable[[], object]] = build
                ) -> tuple[Callable[[], object], int]:
                    return build(m, columns), 8

                moved = 2.0 * m * columns * tensors
                yield (
                    Operator(operator=name, kernel=kernel, format="bf16", m=m, n=columns, bytes_moved=moved),
                    prepare,
                )

    def _llama_norm(self, m: int, columns: int) -> Callable[[], object]:
        norm, x = LlamaRMSNorm(columns).to(self.device, self._dtype), self._random(m, columns)
        return lambda: norm(x)

    def _fused_norm(self, m: int, columns: int) -> Callable[[], object]:
        weight, x = self._random(columns), self._random(m, columns)
        return lambda: F.rms_norm(x, (columns,), weight, 1e-5)

    def _gate(self, m: int, columns: int) -> Callable[[], object]:
        left, right = self._random(m, columns), self._random(m, columns)
        return lambda: F.silu(left) * right

    def _add(self, m: int, columns: int) -> Callable[[], object]:
        left, right = self._random(m, columns), self._random(m, columns)
        return lambda: left + right

    def _experts(self) -> Iterator[Prepared]:
        width, inner = (32, 64) if self.tiny else (4096, 14336)
        for m in (4,) if self.tiny else (1, 64, 1024, 4, 16, 256, 4096):
            row = Operator(
                operator="moe", kernel="transformers grouped_mm, 8 experts, top 2, router included", format="bf16",
                m=m, n=inner, k=width, flops=2.0 * m * 2 * 3 * width * inner,
            )  # fmt: skip

            def prepare(m: int = m, row: Operator = row) -> tuple[Callable[[], object], int]:
                config = transformers.MixtralConfig(hidden_size=width, intermediate_size=inner, num_local_experts=8)
                config._experts_implementation = "grouped_mm"  # noqa: SLF001 (a model sets it on its configuration)
                with torch.device(self.device):
                    block = MixtralSparseMoeBlock(config).to(self._dtype).eval()
                for weight in block.parameters():
                    weight.normal_(0, 0.02)
                x = self._random(1, m, width)
                chosen = block.gate(x)[-1]
                row.experts_hit = float(chosen.unique().numel())
                row.bytes_moved = row.experts_hit * 3 * width * inner * 2
                return lambda: block(x), 1

            yield row, prepare

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device, dtype=self._dtype)


def _rotate(function: Callable[[Any], object], arguments: list[Any]) -> Callable[[], object]:
    """Return a call that applies the function to one argument after the other, so that a cache holds none of them."""
    cycle = itertools.cycle(arguments)
    return lambda: function(next(cycle))
