"""Exceptions of other projects' engines as `EngineError`: the kind of failure, and one line that explains it.

Engines wrap the exception of a worker in others, so the whole chain is searched, and then what the workers printed
(`maveriq.exec.engines.worker_log`). Out of memory is recognised by text:
CUDA, NCCL and the engines' C++ parts raise it as a plain `RuntimeError`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from maveriq.exec.engines.engine import EngineError, FailureKind

_OUT_OF_MEMORY_TEXTS = (
    "out of memory",  # torch.OutOfMemoryError; "CUDA error: out of memory" of the driver; cudaMalloc in TensorRT-LLM
    "can't allocate memory",  # torch on a CPU
    "alloc_failed",  # cuBLAS
    "insufficient gpu memory",  # TensorRT-LLM, _torch/pyexecutor/py_executor_creator.py
    "no available memory",  # vLLM, v1/core/kv_cache_utils.py
    "free memory on device",  # vLLM, v1/worker/utils.py
    "not enough gpu memory",  # vLLM, v1/worker/gpu_model_runner.py
    "not enough memory",
    "less than requested memory",  # vLLM, v1/worker/cpu_worker.py
)

_SIZE = r"[\d.]+ (?:[KMGT]iB|bytes)"

# How much was needed and free, and on which device, as far as the engines say it.
_SHORTAGES = (
    # torch, c10/cuda/CUDACachingAllocator.cpp
    re.compile(
        rf"Tried to allocate (?P<needed>{_SIZE})\. GPU (?P<gpu>\d+) has a total capacity of {_SIZE} of which "
        rf"(?P<free>{_SIZE}) is free"
    ),
    # torch on a CPU, c10/core/impl/alloc_cpu.cpp
    re.compile(r"you tried to allocate (?P<needed>\d+ bytes)"),
    # vLLM, v1/worker/utils.py
    re.compile(
        r"Free memory on device cuda:(?P<gpu>\d+) \((?P<free_gib>[\d.]+)/[\d.]+ GiB\) on startup is less than desired "
        r"GPU memory utilization \([\d.]+, (?P<needed>[\d.]+ GiB)\)"
    ),
    # vLLM, v1/worker/cpu_worker.py
    re.compile(
        r"\((?P<free_gib>[\d.]+)/[\d.]+ GiB\) on kv cache allocation is less than requested memory for kv "
        r"\((?P<needed>[\d.]+ GiB)\)"
    ),
)

_MAX_MESSAGE_LENGTH = 500


def as_engine_error(engine: str, error: BaseException, *, printed: Sequence[str] = ()) -> EngineError:
    """Return an engine's exception as an `EngineError`.

    Out of memory anywhere in the chain of causes and contexts, or else in what the workers printed, is the reason. Its
    message begins with the sizes that are needed and free, and `EngineError.device` names the GPU, where the exception
    has them. Any other failure is described by the exception and the one that caused it.

    Args:
        engine: the engine's name, for the message.
        error: the exception.
        printed: exceptions that the engine's workers printed, as `type: message`, in order.
    """
    if isinstance(error, EngineError):
        return error
    shortages = [_text(link) for link in _chain(error) if is_out_of_memory(link)]
    shortages = shortages or [text for text in printed if _is_shortage(text)]
    if shortages:
        return _out_of_memory(engine, shortages)
    text, root = _text(error), _root_cause(error)
    cause = _text(root) if root is not error else next(iter(printed), text)
    if cause != text:
        text = f"{text[: _MAX_MESSAGE_LENGTH // 2]}; caused by {cause}"
    return EngineError(FailureKind.ERROR, f"{engine}: {text[:_MAX_MESSAGE_LENGTH]}")


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an exception itself reports that memory ran out."""
    return isinstance(error, MemoryError) or means_out_of_memory(str(error))


def means_out_of_memory(message: str) -> bool:
    """Say whether an engine's message reports that memory ran out."""
    lower = message.lower()
    return any(text in lower for text in _OUT_OF_MEMORY_TEXTS)


def _is_shortage(printed: str) -> bool:
    """Say whether an exception that was printed as `type: message` reports that memory ran out."""
    return printed.partition(":")[0].endswith("MemoryError") or means_out_of_memory(printed)


def _out_of_memory(engine: str, shortages: list[str]) -> EngineError:
    """Return the error for exceptions that report a shortage; the first with sizes counts, else the last."""
    for text in shortages:
        for pattern in _SHORTAGES:
            if found := pattern.search(text):
                known = found.groupdict()
                free = known.get("free") or (f"{known['free_gib']} GiB" if known.get("free_gib") else None)
                sizes = f"needs {known['needed']}" + (f", {free} free" if free else "")
                device = f"cuda:{known['gpu']}" if known.get("gpu") else ""
                message = f"{engine}: {sizes} ({text[:_MAX_MESSAGE_LENGTH]})"
                return EngineError(FailureKind.OUT_OF_MEMORY, message, device=device)
    return EngineError(FailureKind.OUT_OF_MEMORY, f"{engine}: {shortages[-1][:_MAX_MESSAGE_LENGTH]}")


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and all its causes and contexts, also suppressed ones, each once."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        link = waiting.pop(0)
        if link is None or id(link) in seen:
            continue
        seen.add(id(link))
        yield link
        waiting += [link.__cause__, link.__context__]


def _root_cause(error: BaseException) -> BaseException:
    """Return the exception that Python would print first."""
    seen: set[int] = set()
    while id(error) not in seen:
        seen.add(id(error))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__) or error
    return error


def _text(error: BaseException) -> str:
    """Return an exception as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"
