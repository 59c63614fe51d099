"""Exceptions of external engines: out of memory behind wrappers, on which GPU, how much was needed and free."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from maveriq.exec.engines.engine import EngineError, FailureKind
from maveriq.exec.engines.failures import as_engine_error

CUDA_OUT_OF_MEMORY = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 3 has a total capacity of 47.41 GiB of which 1.25 GiB is free."
    " Including non-PyTorch memory, this process has 46.16 GiB memory in use."
)
DESIRED_UTILIZATION = (
    "Free memory on device cuda:1 (0.31/47.41 GiB) on startup is less than desired GPU memory utilization "
    "(0.01, 0.47 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes."
)
KV_CACHE_ON_A_CPU = (
    "Available memory on node 0 (20.1/23.2 GiB) on kv cache allocation is less than requested memory for kv "
    "(512.0 GiB). Decrease --kv-cache-memory-bytes, VLLM_CPU_KVCACHE_SPACE, or reduce CPU memory"
)


class OutOfMemoryError(RuntimeError):
    """As torch's."""


def raised(*links: Exception, by: str) -> Exception:
    """Return the last exception, raised because of the ones before it.

    Args:
        links: the chain, innermost first.
        by: "cause" (`raise ... from error`), "context" (raised in an `except`), or "none" (`raise ... from None`).
    """
    for inner, outer in pairwise(links):
        outer.__context__ = inner
        outer.__cause__ = inner if by == "cause" else None
        outer.__suppress_context__ = by != "context"
    return links[-1]


@pytest.mark.parametrize("by", ["cause", "context", "none"])
@pytest.mark.parametrize(
    "inner",
    [
        MemoryError(),
        OutOfMemoryError(CUDA_OUT_OF_MEMORY),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("Executor creation failed due to insufficient GPU memory."),
        RuntimeError("[TensorRT-LLM][ERROR] CUDA runtime error in cudaMallocAsync(ptr, n): out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes. Error code 12"),
        ValueError("No available memory for the cache blocks."),
        ValueError("Free memory on device cuda:0 is less than desired"),
    ],
    ids=lambda error: str(error)[:40],
)
def test_out_of_memory_is_recognised_behind_wrappers(inner: Exception, by: str) -> None:
    error = raised(inner, KeyError("rank 1"), RuntimeError("Executor worker returned error"), by=by)
    found = as_engine_error("trtllm", error)
    assert found.kind is FailureKind.OUT_OF_MEMORY
    assert f"{type(inner).__name__}: {str(inner)[:20]}" in str(found)
    assert "\n" not in str(found)


@pytest.mark.parametrize(
    ("message", "device", "sizes"),
    [
        (CUDA_OUT_OF_MEMORY, "cuda:3", "needs 2.50 GiB, 1.25 GiB free"),
        (DESIRED_UTILIZATION, "cuda:1", "needs 0.47 GiB, 0.31 GiB free"),
        (KV_CACHE_ON_A_CPU, "", "needs 512.0 GiB, 20.1 GiB free"),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes.", "", "needs 4096 bytes ("),
        ("Executor creation failed due to insufficient GPU memory.", "", None),
    ],
)
def test_the_gpu_and_the_sizes_are_named_where_the_engine_names_them(
    message: str, device: str, sizes: str | None
) -> None:
    found = as_engine_error("vllm", raised(RuntimeError(message), RuntimeError("a wrapper"), by="cause"))
    assert found.device == device
    assert (f"vllm: {sizes}" in str(found)) == (sizes is not None)
    assert message[:60] in str(found)


def test_the_exception_with_sizes_counts_among_several() -> None:
    error = raised(
        OutOfMemoryError(CUDA_OUT_OF_MEMORY), RuntimeError("not enough memory"), RuntimeError("failed"), by="context"
    )
    assert as_engine_error("vllm", error).device == "cuda:3"


def test_another_failure_is_described_with_its_cause() -> None:
    error = raised(
        ValueError("no such\nlayer"), KeyError("k"), RuntimeError("Executor worker returned error"), by="cause"
    )
    found = as_engine_error("trtllm", error)
    assert found.kind is FailureKind.ERROR
    assert str(found) == ("trtllm: RuntimeError: Executor worker returned error; caused by ValueError: no such layer")
    suppressed = raised(ValueError("hidden"), RuntimeError("shown"), by="none")
    assert str(as_engine_error("trtllm", suppressed)) == "trtllm: RuntimeError: shown"


def test_what_workers_printed_counts_where_the_exception_says_nothing() -> None:
    error = RuntimeError("WorkerProc initialization failed")
    printed = ["ValueError: the first", f"torch.OutOfMemoryError: {CUDA_OUT_OF_MEMORY}", "RuntimeError: closed by peer"]
    found = as_engine_error("vllm", error, printed=printed)
    assert (found.kind, found.device) == (FailureKind.OUT_OF_MEMORY, "cuda:3")
    assert as_engine_error("vllm", error, printed=["MemoryError"]).kind is FailureKind.OUT_OF_MEMORY
    found = as_engine_error("vllm", error, printed=printed[::2])
    assert str(found) == "vllm: RuntimeError: WorkerProc initialization failed; caused by ValueError: the first"
    known = raised(OutOfMemoryError(CUDA_OUT_OF_MEMORY.replace("GPU 3", "GPU 5")), error, by="cause")
    assert as_engine_error("vllm", known, printed=printed).device == "cuda:5"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("two\nlines"), FailureKind.ERROR),
        (RuntimeError(""), FailureKind.ERROR),
        (RuntimeError("x" * 10_000), FailureKind.ERROR),
        (RuntimeError("CUDA out of memory. " * 1_000), FailureKind.OUT_OF_MEMORY),
        (EngineError(FailureKind.UNSUPPORTED, "no"), FailureKind.UNSUPPORTED),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_failure_is_one_line_of_limited_length(error: Exception, kind: FailureKind) -> None:
    found = as_engine_error("vllm", error)
    assert found.kind is kind
    assert re.fullmatch(r".{1,600}", str(found))


def test_a_circular_chain_ends() -> None:
    first, second = RuntimeError("first"), RuntimeError("second")
    first.__cause__, second.__cause__ = second, first
    assert as_engine_error("vllm", first).kind is FailureKind.ERROR
