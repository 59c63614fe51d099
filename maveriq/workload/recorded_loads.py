"""Requests that load generators recorded: results of `vllm bench serve`, GuideLLM reports, AIPerf's records.

These files hold times, token counts and latencies of requests that were really sent; here only when each was sent and
its token counts are read. Requests that failed are left out, and counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np

from maveriq.csv_columns import MAX_BYTES
from maveriq.errors import InputError
from maveriq.input_files import read_lines, read_text
from maveriq.tables import readable_error
from maveriq.workload.trace_formats import MAX_TOKENS, RequestTrace, counted

VLLM_BENCH, GUIDELLM, AIPERF = "vLLM benchmark", "GuideLLM report", "AIPerf records"

_WHAT = "trace"
_MAX_DOCUMENT_BYTES = 256 << 20
_MAX_REQUESTS = 10_000_000
_MAX_SECONDS = 9e9  # as nanoseconds it fits into 64 bits
_NS_PER_SECOND = 10**9
_MARKS = {
    VLLM_BENCH: re.compile(r'"(?:input_lens|request_throughput)"\s*:'),
    GUIDELLM: re.compile(r'"benchmarks"\s*:\s*\['),
    AIPERF: re.compile(r'"request_start_ns"\s*:'),
}
_T = TypeVar("_T")


class _VllmBench(msgspec.Struct, kw_only=True):
    input_lens: list[int] | None = None
    output_lens: list[int] | None = None
    start_times: list[float] | None = None
    errors: list[str | None] | None = None


class _GuidellmRequest(msgspec.Struct, kw_only=True):
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    start_time: float | None = None
    request_start_time: float | None = None


class _GuidellmRequests(msgspec.Struct, kw_only=True):
    successful: list[_GuidellmRequest] = []
    incomplete: list[msgspec.Raw] = []
    errored: list[msgspec.Raw] = []


class _GuidellmBenchmark(msgspec.Struct, kw_only=True):
    requests: _GuidellmRequests


class _Guidellm(msgspec.Struct, kw_only=True):
    benchmarks: list[_GuidellmBenchmark]


class _AiperfValue(msgspec.Struct, kw_only=True):
    value: float


class _AiperfMetadata(msgspec.Struct, kw_only=True):
    request_start_ns: int


class _AiperfMetrics(msgspec.Struct, kw_only=True):
    input_sequence_length: _AiperfValue | None = None
    output_sequence_length: _AiperfValue | None = None


class _AiperfRecord(msgspec.Struct, kw_only=True):
    metadata: _AiperfMetadata
    metrics: _AiperfMetrics | None = None
    error: object = None


def recorded_load_in(head: str) -> str | None:
    """Return which of these files begins so, None for none."""
    start = head.lstrip()
    if not start.startswith("{"):
        return None
    return next((name for name, mark in _MARKS.items() if mark.search(start)), None)


def read_recorded_load(path: Path, kind: str, *, benchmark: int | None = None) -> RequestTrace:
    """Read such a file.

    Args:
        path: the file.
        kind: what `recorded_load_in` found.
        benchmark: which of several benchmarks of a GuideLLM report, from 1; None if it has one.

    Raises:
        InputError: the file cannot be used; the message names the line or the field.
    """
    where = f"{_WHAT} {str(path)!r}"
    if kind != GUIDELLM and benchmark not in (None, 1):
        raise InputError(f"{where} is a file of {kind} and holds one benchmark; leave out --benchmark")
    if kind == VLLM_BENCH:
        return _vllm_bench(path, where)
    if kind == GUIDELLM:
        return _guidellm(path, where, benchmark)
    return _aiperf(path, where)


def _vllm_bench(path: Path, where: str) -> RequestTrace:
    found = _decoded(read_text(path, what=_WHAT, max_bytes=_MAX_DOCUMENT_BYTES), _VllmBench, where)
    if found.input_lens is None or found.output_lens is None:
        raise InputError(
            f"{where} is a result of vllm bench serve without its requests (input_lens, output_lens); run it with "
            "--save-detailed"
        )
    inputs, outputs = found.input_lens, found.output_lens
    errors = found.errors or [""] * len(inputs)
    times = found.start_times
    for name, column in (("output_lens", outputs), ("errors", errors), ("start_times", times)):
        if column is not None and len(column) != len(inputs):
            raise InputError(f"{where}: input_lens has {len(inputs)} entries, and {name} has {len(column)}")
    kept = [index for index, error in enumerate(errors) if not error]
    return _trace(
        path, VLLM_BENCH, where,
        prompts=[inputs[index] for index in kept],
        outputs=[outputs[index] for index in kept],
        times_s=None if times is None else [times[index] for index in kept],
        failed=len(inputs) - len(kept),
    )  # fmt: skip


def _guidellm(path: Path, where: str, benchmark: int | None) -> RequestTrace:
    found = _decoded(read_text(path, what=_WHAT, max_bytes=_MAX_DOCUMENT_BYTES), _Guidellm, where).benchmarks
    if benchmark is None and len(found) > 1:
        raise InputError(
            f"{where} holds {len(found)} benchmarks; take one with "
            f"maveriq trace convert {path.name} OUT.csv --to plain --benchmark NUMBER"
        )
    index = (benchmark or 1) - 1
    if not 0 <= index < len(found):
        raise InputError(f"{where} has no benchmark {index + 1}; it holds {len(found)}")
    requests = found[index].requests
    prompts, outputs, times_s = [], [], []
    for number, request in enumerate(requests.successful):
        start_s = request.start_time if request.start_time is not None else request.request_start_time
        if request.prompt_tokens is None or request.output_tokens is None or start_s is None:
            raise InputError(
                f"{where}: benchmarks[{index}].requests.successful[{number}] must have prompt_tokens, output_tokens "
                "and start_time or request_start_time"
            )
        prompts.append(request.prompt_tokens)
        outputs.append(request.output_tokens)
        times_s.append(start_s)
    failed = len(requests.incomplete) + len(requests.errored)
    return _trace(path, GUIDELLM, where, prompts=prompts, outputs=outputs, times_s=times_s, failed=failed)


def _aiperf(path: Path, where: str) -> RequestTrace:
    prompts, outputs, times_ns, failed = [], [], [], 0
    for number, line in _lines(path):
        record = _decoded(line, _AiperfRecord, f"{where}, line {number}")
        if record.error is not None:
            failed += 1
            continue
        metrics = record.metrics or _AiperfMetrics()
        if metrics.input_sequence_length is None or metrics.output_sequence_length is None:
            raise InputError(
                f"{where}, line {number}: metrics must have input_sequence_length and output_sequence_length"
            )
        prompts.append(metrics.input_sequence_length.value)
        outputs.append(metrics.output_sequence_length.value)
        times_ns.append(record.metadata.request_start_ns)
        if len(prompts) > _MAX_REQUESTS:
            raise InputError(f"{where} has more than {_MAX_REQUESTS:,} requests; give a part of it")
    first_ns = min(times_ns, default=0)
    times_s = [(time_ns - first_ns) / _NS_PER_SECOND for time_ns in times_ns]
    return _trace(path, AIPERF, where, prompts=prompts, outputs=outputs, times_s=times_s, failed=failed)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    lines = enumerate(read_lines(path, what=_WHAT, max_bytes=MAX_BYTES), start=1)
    return ((number, line) for number, line in lines if line.strip())


def _decoded(text: str, shape: type[_T], where: str) -> _T:
    try:
        return msgspec.json.decode(text, type=shape)
    except msgspec.ValidationError as error:
        raise InputError(f"{where}: {readable_error(str(error))}") from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise InputError(f"{where} is not valid JSON: {error}") from None


def _trace(
    path: Path,
    kind: str,
    where: str,
    *,
    prompts: Sequence[float],
    outputs: Sequence[float],
    times_s: Sequence[float] | None,
    failed: int,
) -> RequestTrace:
    """Return the requests in the order in which they were sent.

    Raises:
        InputError: there is none, or a number is out of range.
    """
    if not prompts:
        raise InputError(f"{where} ({kind}) has no request that succeeded")
    time_s = np.zeros(len(prompts)) if times_s is None else np.array(times_s, np.float64)
    time_s -= time_s.min()
    if not ((time_s >= 0) & (time_s <= _MAX_SECONDS)).all():
        raise InputError(f"{where}: a time is out of range")
    order = np.argsort(time_s, kind="stable")
    tokens: list[np.ndarray[Any, Any]] = []
    for name, column in (("prompt", prompts), ("output", outputs)):
        counts = np.array(column, np.float64)
        bad = ~((counts >= 0) & (counts <= MAX_TOKENS) & (counts == np.floor(counts)))
        if bad.any():
            index = int(np.argmax(bad))
            raise InputError(
                f"{where}: request {index + 1} of those that succeeded: {name} tokens must be a whole number from 0 to "
                f"{MAX_TOKENS}, not {column[index]}"
            )
        tokens.append(counts[order].astype(np.int64))
    remarks = (f"{counted(failed, 'request')} that failed left out",) if failed else ()
    return RequestTrace(
        name=path.name,
        format_name=kind,
        has_dates=False,
        has_times=times_s is not None,
        time_ns=np.rint(time_s[order] * _NS_PER_SECOND).astype(np.int64),
        prompt_tokens=np.maximum(tokens[0], 1),
        output_tokens=np.maximum(tokens[1], 1),
        requests_without_tokens=int(((tokens[0] == 0) | (tokens[1] == 0)).sum()),
        remarks=remarks,
    )
