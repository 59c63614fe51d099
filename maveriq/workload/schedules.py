"""Schedules: CSV files with one request per row, for one endpoint each, replayed as recorded.

Columns: `arrival_s, endpoint, prompt_tokens, output_tokens`. `endpoint` is a number (1 for the first model of the set)
in all rows, or the name of a model in all rows. Optional are `service_s` (recorded service time), `slo_s` (0 for none),
`priority` (0 or 1), `prompt_id` (any text; equal for equal prompts), `session_id` (any text), `think_s`,
`prefix_hashes` and `prefix_hash_tokens`. Times have a resolution of one microsecond. Of the `requests.csv` of a run the
first four columns are read: its requests, as they were sent.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from maveriq.csv_columns import Batch, check_whole, csv_batches, floats, micros_column, whole_numbers
from maveriq.errors import InputError, UnknownNameError
from maveriq.files import written_whole
from maveriq.tables import Row, check_header, shortened
from maveriq.units import MICROS_PER_SECOND
from maveriq.workload.content_columns import HASH_TOKENS, HASHES, PROMPT, SESSION, THINK, ContentColumns
from maveriq.workload.prefixes import PrefixHashes
from maveriq.workload.requests import Arrivals

SCHEDULE_COLUMNS = ("arrival_s", "endpoint", "prompt_tokens", "output_tokens")
CONTENT_COLUMNS = {
    PROMPT: "prompt_id", SESSION: "session_id", THINK: "think_s", HASHES: "prefix_hashes",
    HASH_TOKENS: "prefix_hash_tokens",
}  # fmt: skip
"""Columns that say what requests have in common, by their meaning."""

SCHEDULE_OPTIONAL_COLUMNS = ("service_s", "slo_s", "priority", *CONTENT_COLUMNS.values())

SCHEDULE = "schedule"
"""What error messages call such a file."""

_RUN_COLUMNS = ("request_id", "deployment_id", "status")  # with these a file is the records of a run
_MAX_SECONDS = 1e9  # beyond, a float no longer holds every microsecond
_MAX_COUNT = 100_000_000
_MAX_REQUESTS = 10_000_000
_MAX_NAMES = 10_000
_MIN_SECONDS = {"arrival_s": 0.0, "slo_s": 0.0, "service_s": 1e-6}


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A recorded schedule, replayed as it stands.

    Args:
        name: of the file.
        arrivals: the requests.
        endpoint_names: names of models, the first one that of `endpoint_id` 1; empty where the file numbers endpoints.
    """

    name: str
    arrivals: Arrivals
    endpoint_names: tuple[str, ...] = ()

    def endpoint_ids(self, models: Sequence[str]) -> np.ndarray[Any, Any]:
        """Return the endpoint of each request (int64, from 1), given the names of a set's models in their order.

        Raises:
            InputError: the set has too few models, lacks one by name, or has several of a name.
        """
        ids = self.arrivals.endpoint_id
        if not self.endpoint_names:
            if ids.max() > len(models):
                raise InputError(
                    f"schedule {self.name!r} has requests for endpoint {ids.max()}, but the model set has"
                    f" {len(models)} models; give the model set it was recorded with"
                )
            return ids
        for name in self.endpoint_names:
            if models.count(name) > 1:
                raise InputError(
                    f"schedule {self.name!r} has requests for {shortened(name)}, which the model set has several"
                    " times; number the endpoints, 1 for the first model of the set"
                )
            if name not in models:
                raise UnknownNameError(f"endpoint of schedule {self.name!r}", name, models)
        positions = np.array([models.index(name) + 1 for name in self.endpoint_names], np.int64)
        return np.take(positions, ids - 1)


def read_schedule(path: Path) -> Schedule:
    """Read a schedule file.

    Raises:
        InputError: the file, a column, or a row is wrong, or times go back; the message names the line.
    """
    content = ContentColumns({})
    endpoints = _Endpoints()

    def choose(header: list[str]) -> list[str]:
        nonlocal content
        if set(header).issuperset((*_RUN_COLUMNS, *SCHEDULE_COLUMNS)):
            return list(SCHEDULE_COLUMNS)
        check_header(header, SCHEDULE_COLUMNS, SCHEDULE_OPTIONAL_COLUMNS, f"{SCHEDULE} {str(path)!r}")
        content = ContentColumns({meaning: name for meaning, name in CONTENT_COLUMNS.items() if name in header})
        return header

    parts: list[dict[str, np.ndarray[Any, Any]]] = []
    last_us = requests = 0
    for batch in csv_batches(path, choose, what=SCHEDULE, long=(CONTENT_COLUMNS[HASHES],)):
        convert = partial(_columns, last_us=last_us, endpoints=endpoints, content=content)
        part = batch.converted(convert, _RowCheck(last_us / MICROS_PER_SECOND, endpoints, content))
        parts.append(part)
        last_us = int(part["arrival_s"][-1])
        requests += len(batch.lines)
        if requests > _MAX_REQUESTS:
            raise InputError(f"{batch.where} has more than {_MAX_REQUESTS:,} requests; give a part of it")
    columns = {name: np.concatenate([part.pop(name) for part in parts]) for name in list(parts[0])}
    arrivals = Arrivals(
        arrival_us=columns["arrival_s"],
        endpoint_id=columns["endpoint"],
        prompt_tokens=columns["prompt_tokens"],
        output_tokens=columns["output_tokens"],
        slo_us=columns["slo_s"] if "slo_s" in columns else np.zeros(requests, np.int64),
        service_us=columns.get("service_s"),
        priority=columns.get("priority"),
        prompt_id=content.column(PROMPT),
        session_id=content.column(SESSION),
        think_us=content.column(THINK),
        prefix_hashes=content.prefix_hashes(),
    )
    return Schedule(name=path.name, arrivals=arrivals, endpoint_names=endpoints.names)


class _Endpoints:
    """The column of endpoints: numbers, or names if the first row has one."""

    def __init__(self) -> None:
        self._ids: dict[str, int] | None = None
        self._are_numbers = False

    @property
    def names(self) -> tuple[str, ...]:
        """The names in the order of their ids, from 1; empty for numbers."""
        return tuple(self._ids or ())

    def ids(self, cells: Sequence[str]) -> np.ndarray[Any, Any]:
        """Return the endpoints of some rows (int64, from 1).

        Raises:
            ValueError: a cell is not a number where the first is one, or is empty, or there are too many names.
        """
        if not self._are_numbers and self._ids is None:
            self._are_numbers = _is_number(cells[0])
            self._ids = None if self._are_numbers else {}
        if self._ids is None:
            return whole_numbers(cells, "endpoint", minimum=1, maximum=_MAX_COUNT)
        ids = self._ids
        found = np.array([ids.setdefault(cell.strip(), len(ids) + 1) for cell in cells], np.int64)
        if "" in ids or len(ids) > _MAX_NAMES:
            raise ValueError(f"endpoint must be one of at most {_MAX_NAMES:,} names of models")
        return found

    def check(self, row: Row) -> None:
        """Check one cell as `ids` does."""
        if self._ids is None:
            cell = row.cells["endpoint"]
            if not _is_number(cell):
                raise InputError(
                    f"{row.where}: endpoint must be a number as in the first row (1 for the first model of the set),"
                    f" not {shortened(cell)}; give numbers everywhere, or names of models everywhere"
                )
            check_whole(row, "endpoint", minimum=1, maximum=_MAX_COUNT)
        elif not row.cells["endpoint"].strip():
            raise InputError(f"{row.where}: endpoint is empty; give the name of a model of the set")


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _columns(
    batch: Batch, *, last_us: int, endpoints: _Endpoints, content: ContentColumns
) -> dict[str, np.ndarray[Any, Any]]:
    columns = {}
    for name, cells in batch.columns.items():
        if name in _MIN_SECONDS:
            columns[name] = _micros(cells, name)
        elif name in CONTENT_COLUMNS.values():
            continue
        elif name == "endpoint":
            columns[name] = endpoints.ids(cells)
        elif name == "priority":
            columns[name] = whole_numbers(cells, name, minimum=0, maximum=1)
        else:
            columns[name] = whole_numbers(cells, name, minimum=1, maximum=_MAX_COUNT)
    arrival_us = columns["arrival_s"]
    if arrival_us[0] < last_us or (arrival_us[1:] < arrival_us[:-1]).any():
        raise ValueError("arrival_s goes back")
    content.add(batch, columns["prompt_tokens"] + columns["output_tokens"])
    return columns


def _micros(cells: Sequence[str], name: str) -> np.ndarray[Any, Any]:
    seconds = floats(cells)
    if not ((seconds >= _MIN_SECONDS[name]) & (seconds <= _MAX_SECONDS)).all():
        raise ValueError(f"{name} must lie between {_MIN_SECONDS[name]:g} and {_MAX_SECONDS:g}")
    return micros_column(seconds)


class _RowCheck:
    """Checks rows one by one, in their order, from a last arrival on."""

    def __init__(self, last_s: float, endpoints: _Endpoints, content: ContentColumns) -> None:
        self._last_s = last_s
        self._endpoints = endpoints
        self._content = content

    def __call__(self, row: Row) -> None:
        for name in (name for name in _MIN_SECONDS if name in row.cells):
            if row.number(name, minimum=_MIN_SECONDS[name]) > _MAX_SECONDS:
                raise InputError(f"{row.where}: {name} must be at most {_MAX_SECONDS:g}, not {row.cells[name]!r}")
        self._endpoints.check(row)
        for name in SCHEDULE_COLUMNS[2:]:
            check_whole(row, name, minimum=1, maximum=_MAX_COUNT)
        if "priority" in row.cells:
            check_whole(row, "priority", minimum=0, maximum=1)
        self._content.check_row(row)
        arrival_s = row.number("arrival_s")
        if arrival_s < self._last_s:
            raise InputError(
                f"{row.where}: arrival_s {arrival_s:g} is before {self._last_s:g} of the row above; sort by time"
            )
        self._last_s = arrival_s


def write_schedule(arrivals: Arrivals, path: Path, *, overwrite: bool = False) -> None:
    """Write a schedule file that `read_schedule` reads back exactly; it appears whole or not at all.

    Args:
        arrivals: the requests.
        path: the file.
        overwrite: replace a file that is there.

    Raises:
        InputError: the place cannot be written to, or the file is there already and may not be replaced.
        MaveriqError: the disk is full.
    """
    with (
        written_whole(path, what=SCHEDULE, overwrite=overwrite) as partial,
        partial.open("w", encoding="utf-8", newline="\n") as file,
    ):
        file.writelines(_lines(arrivals))


def _lines(arrivals: Arrivals) -> Iterator[str]:
    columns: dict[str, np.ndarray[Any, Any]] = {
        "arrival_s": arrivals.arrival_us,
        "endpoint": arrivals.endpoint_id,
        "prompt_tokens": arrivals.prompt_tokens,
        "output_tokens": arrivals.output_tokens,
    }
    if arrivals.service_us is not None:
        columns["service_s"] = arrivals.service_us
    if arrivals.slo_us.any():
        columns["slo_s"] = arrivals.slo_us
    if arrivals.priority is not None:
        columns["priority"] = arrivals.priority
    return csv_lines(columns, arrivals)


class Content(Protocol):
    """What requests have in common, a column each; see `Arrivals`."""

    @property
    def prompt_id(self) -> np.ndarray[Any, Any] | None:
        """Equal for equal prompts."""

    @property
    def session_id(self) -> np.ndarray[Any, Any] | None:
        """Of the conversation."""

    @property
    def think_us(self) -> np.ndarray[Any, Any] | None:
        """Time from the end of the turn before."""

    @property
    def prefix_hashes(self) -> PrefixHashes | None:
        """Hashes of prefixes."""


def csv_lines(numbers: Mapping[str, np.ndarray[Any, Any]], content: Content) -> Iterator[str]:
    """Yield the lines of a CSV file of requests, the header first.

    Args:
        numbers: columns of whole numbers; of microseconds where a name ends with `_s`, which are written as seconds.
        content: further columns, written where they are known.
    """
    columns = dict(numbers)
    if content.think_us is not None:
        columns["think_s"] = content.think_us
    for name in ("prompt_id", "session_id"):
        ids = getattr(content, name)
        if ids is not None:
            columns[name] = np.where(ids > 0, ids.astype(str), "")
    cells: list[Iterable[str]] = [
        (_seconds(column) if name.endswith("_s") else map(str, column.tolist())) for name, column in columns.items()
    ]
    header, hashes = list(columns), content.prefix_hashes
    if hashes is not None:
        header += ["prefix_hashes", "prefix_hash_tokens"]
        cells += [_hash_lists(hashes), itertools.repeat(str(hashes.tokens_per_hash), len(hashes))]
    yield ",".join(header) + "\n"
    for row in zip(*cells, strict=True):
        yield ",".join(row) + "\n"


def _hash_lists(hashes: PrefixHashes) -> Iterator[str]:
    """Yield the prefix hashes of each request as a cell: numbers with spaces between them."""
    for row in range(len(hashes)):
        yield " ".join(map(str, hashes.of(row)))


def _seconds(micros: np.ndarray[Any, Any]) -> Iterator[str]:
    whole, rest = np.divmod(micros, MICROS_PER_SECOND)
    for seconds, fraction in zip(whole.tolist(), rest.tolist(), strict=True):
        yield f"{seconds}.{fraction:06d}"
