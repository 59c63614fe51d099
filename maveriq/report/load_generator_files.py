"""Writes the requests of a run as load generators do: the result of `vllm bench serve`, or AIPerf's records.

So tools that read these files read simulated runs too. maveriq keeps no time of each token: the gaps between the
tokens of a request are written as equal.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from maveriq.domain.records import RequestTable, RunRecord
from maveriq.domain.requests import RequestStatus
from maveriq.errors import UnknownNameError
from maveriq.files import written_whole
from maveriq.units import MICROS_PER_SECOND

_PERCENTILES = (50, 90, 95, 99)


def write_load_generator_file(run: RunRecord, format_name: str, path: Path, *, overwrite: bool = False) -> int:
    """Write the requests of a run; the file appears whole or not at all.

    Args:
        run: the run.
        format_name: one of `LOAD_GENERATOR_FORMATS`.
        path: the file.
        overwrite: replace a file that is there.

    Returns:
        How many requests did not complete. They are written as errors.

    Raises:
        UnknownNameError: there is no such format.
        InputError: the file cannot be written.
        MaveriqError: the disk is full.
    """
    if format_name not in _WRITERS:
        raise UnknownNameError("format of runs", format_name, _WRITERS)
    with (
        written_whole(path, what="file", overwrite=overwrite) as partial,
        partial.open("w", encoding="utf-8", newline="\n") as file,
    ):
        file.writelines(_WRITERS[format_name](run.requests))
    return int((run.requests.status != RequestStatus.COMPLETED.value).sum())


def _vllm_bench(table: RequestTable) -> Iterator[str]:
    done = table.status == RequestStatus.COMPLETED.value
    ttft_s, tpot_s, latency_s = _times(table, done)
    outputs = np.where(done, table.output_tokens, 0)
    first_s, last_s = table.arrival_us.min(), table.finish_us[done].max() if done.any() else table.arrival_us.max()
    duration_s = max(1, int(last_s - first_s)) / MICROS_PER_SECOND
    result: dict[str, Any] = {
        "duration": duration_s,
        "completed": int(done.sum()),
        "total_input_tokens": int(table.prompt_tokens[done].sum()),
        "total_output_tokens": int(outputs.sum()),
        "request_throughput": done.sum() / duration_s,
        "output_throughput": outputs.sum() / duration_s,
    }
    several = done & (table.output_tokens > 1)
    for name, values in (
        ("ttft", ttft_s[done]),
        ("tpot", tpot_s[several]),
        ("itl", np.repeat(tpot_s[several], table.output_tokens[several] - 1)),
        ("e2el", latency_s[done]),
    ):
        result |= _figures(name, values * 1e3)
    gaps = zip(tpot_s.tolist(), outputs.tolist(), strict=True)
    result |= {
        "input_lens": table.prompt_tokens.tolist(),
        "output_lens": outputs.tolist(),
        "ttfts": ttft_s.tolist(),
        "itls": [[gap] * max(0, tokens - 1) for gap, tokens in gaps],
        "start_times": (table.arrival_us / MICROS_PER_SECOND).tolist(),
        "errors": list(_errors(table)),
    }
    yield json.dumps(result) + "\n"


def _figures(name: str, values_ms: npt.NDArray[Any]) -> dict[str, float]:
    if not len(values_ms):
        return {}
    percentiles = np.percentile(values_ms, _PERCENTILES).tolist()
    return {
        f"mean_{name}_ms": float(values_ms.mean()),
        f"median_{name}_ms": float(np.median(values_ms)),
        f"std_{name}_ms": float(values_ms.std()),
        **{f"p{percent}_{name}_ms": value for percent, value in zip(_PERCENTILES, percentiles, strict=True)},
    }


def _aiperf(table: RequestTable) -> Iterator[str]:
    done = table.status == RequestStatus.COMPLETED.value
    ttft_s, tpot_s, latency_s = _times(table, done)
    for row, error in enumerate(_errors(table)):
        start_ns, output_tokens = int(table.arrival_us[row]) * 1_000, int(table.output_tokens[row])
        metadata = {"session_num": row, "x_request_id": str(int(table.request_id[row])), "request_start_ns": start_ns}
        record: dict[str, Any] = {"metadata": metadata, "metrics": {}, "error": {"message": error} if error else None}
        if not error:
            metadata["request_end_ns"] = int(table.finish_us[row]) * 1_000
            record["metrics"] = {
                "input_sequence_length": {"value": int(table.prompt_tokens[row]), "unit": "tokens"},
                "output_sequence_length": {"value": output_tokens, "unit": "tokens"},
                "time_to_first_token": {"value": float(ttft_s[row]) * 1e3, "unit": "ms"},
                "request_latency": {"value": float(latency_s[row]) * 1e3, "unit": "ms"},
            }
            if output_tokens > 1:
                record["metrics"]["inter_token_latency"] = {"value": float(tpot_s[row]) * 1e3, "unit": "ms"}
        yield json.dumps(record) + "\n"


def _times(table: RequestTable, done: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """Return TTFT, TPOT and latency of each request in s; 0 for one that did not complete."""
    ttft_us = np.where(done, table.first_token_us - table.arrival_us, 0)
    latency_us = np.where(done, table.finish_us - table.arrival_us, 0)
    tpot_us = (latency_us - ttft_us) / np.maximum(1, table.output_tokens - 1)
    return ttft_us / MICROS_PER_SECOND, tpot_us / MICROS_PER_SECOND, latency_us / MICROS_PER_SECOND


def _errors(table: RequestTable) -> Iterator[str]:
    """Yield why each request did not complete, "" for one that did."""
    for status, reason in zip(table.status.tolist(), table.reason.tolist(), strict=True):
        done = status == RequestStatus.COMPLETED.value
        yield "" if done else table.reasons[reason] or RequestStatus(status).label


_WRITERS: dict[str, Callable[[RequestTable], Iterator[str]]] = {"vllm-bench": _vllm_bench, "aiperf": _aiperf}
LOAD_GENERATOR_FORMATS = tuple(_WRITERS)
"""The formats that a run can be written in."""
