"""Trace files of requests with times and token counts: recognised by their columns and read as they are.

A file is CSV with a header, or one JSON object a line, plain or packed. Its columns say which format it is; their
order, their case and further columns do not matter. Patel et al., "Splitwise: Efficient generative LLM inference using
phase splitting", ISCA 2024, describes the Azure traces; `traces/README.md` lists all formats.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from maveriq.csv_columns import Batch, check_whole, csv_batches, floats, json_batches, whole_numbers
from maveriq.domain.requests import PREFIX_HASH_TOKENS
from maveriq.errors import InputError
from maveriq.tables import Row
from maveriq.workload.content_columns import HASHES, PARENT, PROMPT, SESSION, THINK, ContentColumns
from maveriq.workload.prefixes import ListedHashes
from maveriq.workload.schedules import CONTENT_COLUMNS
from maveriq.workload.sessions import session_order
from maveriq.workload.timestamps import NS_PER_MINUTE, timestamps_ns

MAX_TOKENS = 100_000_000

_README = "traces/README.md"
_WHAT = "trace"
_MAX_REQUESTS = 10_000_000
_TAKE_A_PART = "take the first part of it with --limit or --duration-s"
_MAX_MINUTES = 1_000_000  # almost two years; a wrong year would ask for more memory than there is
_MAX_TIME_NS = 9 * 10**18  # of 64 bits
_NS_PER_US = 1_000
_SECOND_NS, _MILLISECOND_NS = 10**9, 10**6
_LISTS = ("hash_ids", CONTENT_COLUMNS[HASHES])


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceFormat:
    """A format, by the columns that it needs.

    `time_unit_ns` is the unit of its times, None for dates with times of day. `also` are further columns that tell
    it from a format with the same columns. `always_1` is a column that must hold 1 in every row, if the file has it.
    `time` is "" for a format without times. `content` are columns that a file may have, by their meaning
    (`maveriq.workload.content_columns`), with the unit of think times and the tokens of a prefix hash.
    """

    name: str
    time: str
    prompt: str
    output: str
    time_unit_ns: int | None = None
    also: tuple[str, ...] = ()
    always_1: str = ""
    content: Mapping[str, str] = field(default_factory=dict)
    tokens_per_hash: int = PREFIX_HASH_TOKENS
    think_unit_us: int = 1_000_000

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it needs and that are read."""
        return tuple(name for name in (self.time, self.prompt, self.output) if name)


AZURE = TraceFormat(name="Azure trace", time="TIMESTAMP", prompt="ContextTokens", output="GeneratedTokens")
FORMATS = (
    AZURE,
    TraceFormat(
        name="BurstGPT trace",
        time="Timestamp",
        prompt="Request tokens",
        output="Response tokens",
        time_unit_ns=_SECOND_NS,
        content={SESSION: "Session ID"},
    ),
    TraceFormat(
        name="Qwen-Bailian trace",
        time="timestamp",
        prompt="input_length",
        output="output_length",
        time_unit_ns=_SECOND_NS,
        also=("chat_id",),
        content={SESSION: "chat_id", PARENT: "parent_chat_id", HASHES: "hash_ids"},
        tokens_per_hash=16,
    ),
    TraceFormat(
        name="Mooncake trace",
        time="timestamp",
        prompt="input_length",
        output="output_length",
        time_unit_ns=_MILLISECOND_NS,
        content={HASHES: "hash_ids", SESSION: "session_id", THINK: "delay"},
        think_unit_us=1_000,
    ),
    TraceFormat(
        name="vidur trace",
        time="arrived_at",
        prompt="num_prefill_tokens",
        output="num_decode_tokens",
        time_unit_ns=_SECOND_NS,
    ),
    TraceFormat(
        name="Splitwise trace",
        time="arrival_timestamp",
        prompt="prompt_size",
        output="token_size",
        time_unit_ns=_SECOND_NS,
        always_1="batch_size",
    ),
    TraceFormat(
        name="plain trace",
        time="arrival_s",
        prompt="prompt_tokens",
        output="output_tokens",
        time_unit_ns=_SECOND_NS,
        content=CONTENT_COLUMNS,
    ),
    TraceFormat(
        name="plain trace without times",
        time="",
        prompt="prompt_tokens",
        output="output_tokens",
        content=CONTENT_COLUMNS,
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TracePart:
    """The part of a trace that is needed, from its start: so many requests, and those of so many seconds.

    A large file is not read beyond it. A smaller one is read whole, so that it is checked to its end, and typical
    lengths are those of the whole trace.

    Args:
        requests: None for all.
        span_s: from the first request, in the time of the file; None for all.
    """

    requests: int | None = None
    span_s: float | None = None

    def ends_before(self, requests: int, span_ns: int) -> bool:
        """Return whether so many requests, over so long a time, are more than the part."""
        if self.requests is not None and requests >= self.requests:
            return True
        return self.span_s is not None and (span_ns - _MILLISECOND_NS) / _SECOND_NS > self.span_s  # times are rounded


WHOLE_TRACE = TracePart()
LARGE_FILE_BYTES = 64 << 20
"""A file that is larger, as it is stored, is read only as far as it is needed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTrace:
    """The requests of a file, a column each (int64), in order of time; token counts are at least 1.

    Args:
        name: of the file.
        format_name: what the file was recognised as.
        has_dates: its times are dates with times of day.
        time_ns: since 1970 for dates, else as the file has it.
        prompt_tokens: of each request.
        output_tokens: of each request.
        requests_without_tokens: how many have a prompt or output of 0 tokens in the file, counted as 1.
        ignored_columns: columns of the file that are not read.
        is_whole: the file was read to its end.
        has_times: the file says when requests arrive; else all times are 0, and turns of a session follow each other.
        remarks: what else a reader must know, a sentence without full stop each.
        prompt_id: as in `Arrivals`, as are the next three; None where the file has none.
        session_id: see there.
        think_us: see there.
        prefix_hashes: see there.
    """

    name: str
    format_name: str
    has_dates: bool
    time_ns: np.ndarray[Any, Any]
    prompt_tokens: np.ndarray[Any, Any]
    output_tokens: np.ndarray[Any, Any]
    requests_without_tokens: int = 0
    ignored_columns: tuple[str, ...] = ()
    is_whole: bool = True
    has_times: bool = True
    remarks: tuple[str, ...] = ()
    prompt_id: np.ndarray[Any, Any] | None = None
    session_id: np.ndarray[Any, Any] | None = None
    think_us: np.ndarray[Any, Any] | None = None
    prefix_hashes: ListedHashes | None = None

    def __len__(self) -> int:
        return len(self.time_ns)

    def by_session(self) -> RequestTrace:
        """Return the requests so that the turns of a session follow each other, where its first one is.

        Times stay in their places.
        """
        if self.session_id is None:
            return self
        order = session_order(self.session_id)
        columns: dict[str, Any] = {
            name: getattr(self, name)[order]
            for name in ("prompt_tokens", "output_tokens", "prompt_id", "session_id", "think_us")
            if getattr(self, name) is not None
        }
        if self.prefix_hashes is not None:
            columns["prefix_hashes"] = self.prefix_hashes.rows(order)
        return replace(self, **columns)

    @property
    def arrival_us(self) -> np.ndarray[Any, Any]:
        """When each request arrives after the first one, to the nearest microsecond."""
        nearest: np.ndarray[Any, Any] = (self.time_ns - self.time_ns[0] + _NS_PER_US // 2) // _NS_PER_US
        return nearest

    @property
    def requests_per_minute(self) -> np.ndarray[Any, Any]:
        """Counts per minute from the first to the last; each time is rounded to the nearest minute, halves to even."""
        minutes = _nearest_minutes(self.time_ns)
        return np.bincount(minutes - minutes[0])


def read_requests(path: Path, *, json_lines: bool = False, part: TracePart = WHOLE_TRACE) -> RequestTrace:
    """Read a file of requests with times and token counts in any of `FORMATS`.

    Args:
        path: the file.
        json_lines: it has one JSON object a line, and not CSV.
        part: what is needed of it.

    Raises:
        InputError: the file is of no such format, or a row is wrong; the message names the line.
    """
    reader = _Reader(path)
    read = json_batches if json_lines else csv_batches
    may_stop = path.stat().st_size > LARGE_FILE_BYTES
    columns, is_whole = [], True
    for batch in read(path, reader.choose, what=_WHAT, remedy=_TAKE_A_PART, long=_LISTS):
        columns.append(reader.convert(batch))
        if may_stop and part.ends_before(reader.requests, int(columns[-1][0][-1] - columns[0][0][0])):
            is_whole = False
            break
    time_ns, prompts, outputs = (np.concatenate(column) for column in zip(*columns, strict=True))
    if _nearest_minutes(time_ns[-1:])[0] - _nearest_minutes(time_ns[:1])[0] >= _MAX_MINUTES:
        raise InputError(
            f"{reader.where} cannot be used: it spans more than {_MAX_MINUTES:,} minutes; is a year wrong?"
        )
    without = int(((prompts == 0) | (outputs == 0)).sum())
    trace = RequestTrace(
        name=path.name,
        format_name=reader.format.name,
        has_dates=reader.format.time_unit_ns is None and reader.format.time != "",
        has_times=reader.format.time != "",
        time_ns=time_ns,
        # A few public rows have no token at all; a request has at least one.
        prompt_tokens=np.maximum(prompts, 1).astype(np.int64),
        output_tokens=np.maximum(outputs, 1).astype(np.int64),
        requests_without_tokens=without,
        ignored_columns=reader.ignored,
        is_whole=is_whole,
        prompt_id=reader.content.column(PROMPT),
        session_id=reader.content.column(SESSION),
        think_us=reader.content.column(THINK),
        prefix_hashes=reader.content.prefix_hashes(),
    )
    return trace if trace.has_times else trace.by_session()


def counted(number: int, noun: str) -> str:
    """Return a count with its noun: 1 request, 1,200 requests."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def remarks_on(trace: RequestTrace) -> list[str]:
    """Return what a reader must know of how the file was read, a sentence without full stop each."""
    remarks = list(trace.remarks)
    if trace.requests_without_tokens:
        remarks.append(f"0 tokens count as 1, in {counted(trace.requests_without_tokens, 'request')}")
    if trace.ignored_columns:
        remarks.append(f"columns not read: {', '.join(trace.ignored_columns)}"[:200])
    if not trace.is_whole:
        remarks.append("the file is large, and read only as far as needed")
    return remarks


def _nearest_minutes(time_ns: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    minutes, rest = np.divmod(time_ns, NS_PER_MINUTE)
    half = NS_PER_MINUTE // 2
    nearest: np.ndarray[Any, Any] = minutes + ((rest > half) | ((rest == half) & (minutes % 2 == 1)))
    return nearest


class _Reader:
    """Recognises the format of a file by its header and converts its rows."""

    def __init__(self, path: Path) -> None:
        self.where = f"{_WHAT} {str(path)!r}"
        self.format = AZURE
        self.ignored: tuple[str, ...] = ()
        self.content = ContentColumns({})
        self._columns: tuple[str, ...] = ()  # as the file writes them: time, prompt, output
        self._ones: tuple[str, ...] = ()
        self._last_ns = -(2**63)
        self.requests = 0

    def choose(self, header: list[str]) -> Sequence[str]:
        """Return the columns to read."""
        names = {_normalised(name): name for name in header}
        self.format = format_of(header, self.where)
        self._columns = tuple(names[_normalised(name)] for name in self.format.columns)
        self._ones = tuple(name for name in header if name == self.format.always_1)
        content = {
            meaning: names[_normalised(name)]
            for meaning, name in self.format.content.items()
            if _normalised(name) in names
        }
        self.content = ContentColumns(
            content, think_unit_us=self.format.think_unit_us, tokens_per_hash=self.format.tokens_per_hash
        )
        chosen = tuple(dict.fromkeys((*self._columns, *self._ones, *content.values())))
        self.ignored = tuple(name for name in header if name not in chosen)
        return chosen

    def convert(self, batch: Batch) -> tuple[np.ndarray[Any, Any], ...]:
        """Return times and token counts of a batch."""
        columns = batch.converted(self._arrays, self._check_row)
        self._last_ns = int(columns[0][-1])
        self.requests += len(batch.lines)
        if self.requests > _MAX_REQUESTS:
            raise InputError(f"{self.where} has more than {_MAX_REQUESTS:,} requests; {_TAKE_A_PART}")
        return columns

    def _arrays(self, batch: Batch) -> tuple[np.ndarray[Any, Any], ...]:
        prompt, output = self._columns[-2:]
        time_ns = np.zeros(len(batch.lines), np.int64)
        if self.format.time:
            time = self._columns[0]
            time_ns = self._times_ns(batch.columns[time])
            if time_ns[0] < self._last_ns or (time_ns[1:] < time_ns[:-1]).any():
                raise ValueError(f"{time} goes back")
        for name in self._ones:
            whole_numbers(batch.columns[name], name, minimum=1, maximum=1)
        prompts, outputs = (
            whole_numbers(batch.columns[name], name, minimum=0, maximum=MAX_TOKENS).astype(np.int32)
            for name in (prompt, output)
        )
        self.content.add(batch, prompts.astype(np.int64) + outputs)
        return time_ns, prompts, outputs

    def _times_ns(self, cells: Sequence[str]) -> np.ndarray[Any, Any]:
        if self.format.time_unit_ns is None:
            return timestamps_ns(cells)
        times = floats(cells) * self.format.time_unit_ns
        if not ((times >= 0) & (times <= _MAX_TIME_NS)).all():
            raise ValueError("a time is out of range")
        nearest: np.ndarray[Any, Any] = np.rint(times).astype(np.int64)
        return nearest

    def _check_row(self, row: Row) -> None:
        if self.format.time:
            self._check_time(row, self._columns[0])
        for name in self._columns[-2:]:
            check_whole(row, name, minimum=0, maximum=MAX_TOKENS)
        for name in self._ones:
            check_whole(row, name, minimum=1, maximum=1)
        self.content.check_row(row)

    def _check_time(self, row: Row, time: str) -> None:
        cell = row.cells[time]
        if self.format.time_unit_ns is None:
            try:
                [moment_ns] = timestamps_ns([cell])
            except (ValueError, OverflowError):
                raise InputError(
                    f"{row.where}: {time} must look like 2023-11-16 18:17:03.9799600, with an offset such as Z or "
                    f"+02:00 if it is not UTC, not {cell[:60]!r}"
                ) from None
        else:
            row.number(time, minimum=0, maximum=_MAX_TIME_NS / self.format.time_unit_ns)
            [moment_ns] = self._times_ns([cell])
        if moment_ns < self._last_ns:
            raise InputError(f"{row.where}: {time} {cell!r} is before that of the row above; sort the file by time")
        self._last_ns = moment_ns


def format_of(header: Sequence[str], where: str) -> TraceFormat:
    """Return the format that a header belongs to.

    Raises:
        InputError: it belongs to none; the message names what is missing, or which columns to rename.
    """
    names = {_normalised(name) for name in header}
    if len(names) != len(header):
        raise InputError(f"{where}: a column stands twice in the header")
    present = {
        known.name: [name for name in (*known.columns, *known.also) if _normalised(name) in names] for known in FORMATS
    }
    has_time = any(re.search(_MEANINGS["arrival_s"], name, re.IGNORECASE) for name in header)
    for known in FORMATS:
        if len(present[known.name]) == len(known.columns) + len(known.also) and (known.time or not has_time):
            return known
    nearest = max(FORMATS, key=lambda known: len(present[known.name]))
    missing = [name for name in nearest.columns if name not in present[nearest.name]]
    if len(missing) == 1 or set(present[nearest.name]) - {nearest.time}:
        raise InputError(
            f"{where} looks like {_article(nearest.name)} but has no column {', '.join(missing)} "
            f"(its columns: {_listed(header)}){_renaming(header)}"
        )
    raise InputError(
        f"{where} is neither an Azure trace nor a schedule, nor in another known format "
        f"(its columns: {_listed(header)}){_renaming(header)}"
    )


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name[:40]) for name in names[:12]) + (", ..." if len(names) > 12 else "")


_MEANINGS = {
    "arrival_s": r"time|arriv|start|date",
    "prompt_tokens": r"prompt|input|context|prefill|request",
    "output_tokens": r"output|generat|response|decode|completion|new",
}


def _renaming(header: Sequence[str]) -> str:
    """Return how to make a plain trace of the file: which columns to rename, as far as their names tell."""
    renamed = []
    for target, pattern in _MEANINGS.items():
        near = [name for name in header if re.search(pattern, name, re.IGNORECASE) and name != target]
        if target != "arrival_s":
            near = [name for name in near if re.search(r"tok|len|size", name, re.IGNORECASE)]
        renamed += [f"{name[:40]!r} to {target}" for name in near[:1] if target not in header]
    rename = f"rename {', '.join(renamed)}; " if renamed else ""
    return f"; {rename}a plain trace has arrival_s (in seconds), prompt_tokens, output_tokens, see {_README}"


def _normalised(name: str) -> str:
    """Return a column's name without case, spaces and underscores."""
    return re.sub(r"[\s_-]", "", name).lower()


def refuse_json(head: str, where: str) -> NoReturn:
    """Refuse a JSON file that is not one request a line, by its start.

    Raises:
        InputError: always.
    """
    if re.search(r'"(conversations|from|messages|prompt)"\s*:', head):
        raise InputError(
            f"{where} holds prompts or conversations (as ShareGPT does), without times and token counts; count the "
            "tokens of conversations with your model's tokenizer by maveriq trace convert --tokenizer FOLDER, or write "
            f"arrival_s, prompt_tokens, output_tokens ({_README}), or draw requests with --rate R --prompt-tokens "
            "sharegpt"
        )
    raise InputError(
        f"{where} is one JSON document; write one JSON object a line, or CSV, with arrival_s (in seconds), "
        f"prompt_tokens and output_tokens ({_README})"
    )
