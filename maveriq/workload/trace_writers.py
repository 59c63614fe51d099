"""Writes requests in the formats of other tools, one row or line for each.

A format that cannot hold something says so: `lost_in` names what a reader of the file will not find.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from maveriq.domain.requests import PREFIX_HASH_TOKENS
from maveriq.errors import InputError, UnknownNameError
from maveriq.files import written_whole
from maveriq.workload.prefixes import PrefixHashes
from maveriq.workload.requests import Arrivals
from maveriq.workload.schedules import Schedule, csv_lines
from maveriq.workload.trace_formats import RequestTrace

_NS_PER_US, _NS_PER_MS, _NS_PER_TICK = 1_000, 1_000_000, 100
_TICKS_PER_SECOND = 10_000_000


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WritableRequests:
    """Requests to write, a column each (int64), in order of time.

    Args:
        time_ns: since 1970 if `has_dates`, else since some start.
        has_dates: the times are dates with times of day.
        has_times: the times are known; else they are all 0.
        prompt_tokens: of each request.
        output_tokens: of each request.
        prompt_id: as in `Arrivals`, as are the next three.
        session_id: see there.
        think_us: see there.
        prefix_hashes: see there.
        other: what else is known of the requests, which only a schedule holds.
    """

    time_ns: np.ndarray[Any, Any]
    has_dates: bool
    has_times: bool
    prompt_tokens: np.ndarray[Any, Any]
    output_tokens: np.ndarray[Any, Any]
    prompt_id: np.ndarray[Any, Any] | None = None
    session_id: np.ndarray[Any, Any] | None = None
    think_us: np.ndarray[Any, Any] | None = None
    prefix_hashes: PrefixHashes | None = None
    other: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.time_ns)

    @property
    def since_first_ns(self) -> np.ndarray[Any, Any]:
        """The times after the first request."""
        after: np.ndarray[Any, Any] = self.time_ns - self.time_ns[0]
        return after

    def first(self, requests: int) -> WritableRequests:
        """Return the first requests alone."""
        columns: dict[str, Any] = {}
        for column in fields(self):
            value = getattr(self, column.name)
            if isinstance(value, np.ndarray):
                columns[column.name] = value[:requests]
        if self.prefix_hashes is not None:
            columns["prefix_hashes"] = self.prefix_hashes.rows(np.arange(min(requests, len(self))))
        return replace(self, **columns)


def writable(trace: RequestTrace | Schedule | Arrivals, *, has_times: bool = True) -> WritableRequests:
    """Return the requests of a file, or of conversations that have no times."""
    if isinstance(trace, RequestTrace):
        return WritableRequests(
            time_ns=trace.time_ns,
            has_dates=trace.has_dates,
            has_times=trace.has_times,
            prompt_tokens=trace.prompt_tokens,
            output_tokens=trace.output_tokens,
            prompt_id=trace.prompt_id,
            session_id=trace.session_id,
            think_us=trace.think_us,
            prefix_hashes=trace.prefix_hashes,
        )
    arrivals = trace.arrivals if isinstance(trace, Schedule) else trace
    other = {"service_s": arrivals.service_us is not None, "slo_s": bool(arrivals.slo_us.any())}
    other |= {"priority": arrivals.priority is not None, "endpoint": bool((arrivals.endpoint_id != 1).any())}
    return WritableRequests(
        time_ns=arrivals.arrival_us * _NS_PER_US,
        has_dates=False,
        has_times=has_times,
        prompt_tokens=arrivals.prompt_tokens,
        output_tokens=arrivals.output_tokens,
        prompt_id=arrivals.prompt_id,
        session_id=arrivals.session_id,
        think_us=arrivals.think_us,
        prefix_hashes=arrivals.prefix_hashes,
        other=tuple(name for name, is_there in other.items() if is_there),
    )


def _azure(requests: WritableRequests) -> Iterator[str]:
    yield "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    start = 0 if requests.has_dates else requests.time_ns[0]  # 1970, for times without a date
    ticks = (requests.time_ns - start + _NS_PER_TICK // 2) // _NS_PER_TICK
    whole, rest = np.divmod(ticks, _TICKS_PER_SECOND)
    dates = np.datetime_as_string(whole.astype("datetime64[s]")).tolist()
    for date, tick, prompt, output in zip(dates, rest.tolist(), *_tokens(requests), strict=True):
        yield f"{date.replace('T', ' ')}.{tick:07d},{prompt},{output}\n"


def _burstgpt(requests: WritableRequests) -> Iterator[str]:
    yield "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    for time, prompt, output in zip(_seconds(requests), *_tokens(requests), strict=True):
        yield f"{time},unknown,{prompt},{output},{prompt + output},API log\n"


def _mooncake(requests: WritableRequests) -> Iterator[str]:
    times_ms = ((requests.since_first_ns + _NS_PER_MS // 2) // _NS_PER_MS).tolist()
    lists = _mooncake_hashes(requests)
    for time_ms, prompt, output, hashes in zip(times_ms, *_tokens(requests), lists, strict=True):
        listed = ", ".join(map(str, hashes))
        yield (
            f'{{"timestamp": {time_ms}, "input_length": {prompt}, "output_length": {output}, "hash_ids": [{listed}]}}\n'
        )


def _mooncake_hashes(requests: WritableRequests) -> Iterator[Sequence[int]]:
    """Yield the hashes of each prompt; where they are not known, those of equal prompts alone are equal.

    Tools that read Mooncake's traces need one for each 512 tokens. Those that are made up count from 0.
    """
    known = requests.prefix_hashes if _has_mooncake_hashes(requests) else None
    blocks = (-(-requests.prompt_tokens // PREFIX_HASH_TOKENS)).tolist()
    if known is not None:
        yield from (known.of(row)[:number] for row, number in enumerate(blocks))
        return
    prompts = [0] * len(requests) if requests.prompt_id is None else requests.prompt_id.tolist()
    made: dict[int, range] = {}
    after = 0
    for prompt, number in zip(prompts, blocks, strict=True):
        own = made.get(prompt, range(0)) if prompt else range(0)
        if len(own) < number:
            own = range(after, after + number)
            after += number
            if prompt:
                made[prompt] = own
        yield own[:number]


def _has_mooncake_hashes(requests: WritableRequests) -> bool:
    hashes = requests.prefix_hashes
    return hashes is not None and hashes.tokens_per_hash == PREFIX_HASH_TOKENS


def _vidur(requests: WritableRequests) -> Iterator[str]:
    yield "arrived_at,num_prefill_tokens,num_decode_tokens\n"
    for time, prompt, output in zip(_seconds(requests), *_tokens(requests), strict=True):
        yield f"{time},{prompt},{output}\n"


def _splitwise(requests: WritableRequests) -> Iterator[str]:
    yield "request_id,request_type,application_id,arrival_timestamp,batch_size,prompt_size,token_size\n"
    for row, (time, prompt, output) in enumerate(zip(_seconds(requests), *_tokens(requests), strict=True)):
        yield f"{row},2,0,{time},1,{prompt},{output}\n"


def _plain(requests: WritableRequests) -> Iterator[str]:
    columns = {"prompt_tokens": requests.prompt_tokens, "output_tokens": requests.output_tokens}
    if requests.has_times:
        columns = {"arrival_s": (requests.since_first_ns + _NS_PER_US // 2) // _NS_PER_US, **columns}
    return csv_lines(columns, requests)


def _tokens(requests: WritableRequests) -> tuple[list[int], list[int]]:
    return requests.prompt_tokens.tolist(), requests.output_tokens.tolist()


def _seconds(requests: WritableRequests) -> Iterator[str]:
    """Yield times after the first request in seconds, to the microsecond."""
    micros = (requests.since_first_ns + _NS_PER_US // 2) // _NS_PER_US
    for time_us in micros.tolist():
        yield f"{time_us // 1_000_000}.{time_us % 1_000_000:06d}"


@dataclass(frozen=True, slots=True)
class _Writer:
    """Writes the lines of a format, which holds times to `resolution`, and these of the optional columns."""

    lines: Callable[[WritableRequests], Iterator[str]]
    resolution: str
    holds: tuple[str, ...] = ()
    needs_times: bool = True


_CONTENT = ("prompt_id", "session_id", "think_us", "prefix_hashes")
_WRITERS = {
    "azure": _Writer(_azure, "100 ns"),
    "burstgpt": _Writer(_burstgpt, "1 µs"),
    "mooncake": _Writer(_mooncake, "1 ms", ("prompt_id", "prefix_hashes")),
    "vidur": _Writer(_vidur, "1 µs"),
    "splitwise": _Writer(_splitwise, "1 µs"),
    "plain": _Writer(_plain, "1 µs", _CONTENT, needs_times=False),
}
WRITTEN_FORMATS = tuple(_WRITERS)
"""The formats that can be written."""


def lost_in(requests: WritableRequests, format_name: str) -> list[str]:
    """Return what a file of a format does not hold of some requests."""
    holds = _writer(format_name).holds
    lost = [name for name in _CONTENT if getattr(requests, name) is not None and name not in holds]
    hashes = requests.prefix_hashes
    if format_name == "mooncake" and hashes is not None and not _has_mooncake_hashes(requests):
        lost.append(f"prefix_hashes (each stands for {hashes.tokens_per_hash} tokens, not for {PREFIX_HASH_TOKENS})")
    return [*(name.replace("think_us", "think_s") for name in lost), *requests.other]


def check_format(format_name: str) -> None:
    """Check the name of a format.

    Raises:
        UnknownNameError: none of `WRITTEN_FORMATS` has it.
    """
    _writer(format_name)


def resolution_of(format_name: str) -> str:
    """Return to which unit a format rounds times."""
    return _writer(format_name).resolution


def write_trace(requests: WritableRequests, format_name: str, path: Path, *, overwrite: bool = False) -> None:
    """Write requests in one of `WRITTEN_FORMATS`; the file appears whole or not at all.

    Raises:
        UnknownNameError: there is no such format.
        InputError: the format needs times and there are none, or the file cannot be written.
        MaveriqError: the disk is full.
    """
    writer = _writer(format_name)
    if writer.needs_times and not requests.has_times:
        raise InputError(
            f"a file in the format {format_name} needs times, and these requests have none; give --to plain"
        )
    with (
        written_whole(path, what="trace", overwrite=overwrite) as partial,
        partial.open("w", encoding="utf-8", newline="\n") as file,
    ):
        file.writelines(writer.lines(requests))


def _writer(format_name: str) -> _Writer:
    if format_name not in _WRITERS:
        raise UnknownNameError("format", format_name, _WRITERS)
    return _WRITERS[format_name]
