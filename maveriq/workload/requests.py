"""A workload: the endpoints, and the requests that arrive at them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from maveriq.domain.deployments import EndpointSpec
from maveriq.domain.requests import Request
from maveriq.errors import InputError
from maveriq.workload.prefixes import PrefixHashes
from maveriq.workload.sessions import session_order


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrivals:
    """Requests in the order of arrival, a column each (NumPy int64, equal lengths).

    Columns: `arrival_us` (not decreasing, from 0), `endpoint_id` (from 1), `prompt_tokens` and
    `output_tokens` (at least 1), `slo_us` (0 for none), `service_us` (the recorded time of
    service where the workload is a recording that has it, else None), `priority` (1 for a request
    that goes to the head of the queue; None where there is none), `prompt_id` (equal for equal prompts, from 1;
    None where it is unknown), `session_id` (of the conversation that a request is a turn of, from 1; 0 or None for
    none), `think_us` (time between the end of the turn before and this one; None for 0), `prefix_hashes` (None where
    nothing is known of them).

    A turn is sent at `arrival_us`, but not before `think_us` after the turn before it in the same session has ended.

    Raises:
        InputError: columns of different lengths, no request, times that go back, counts below 1.
    """

    arrival_us: np.ndarray[Any, Any]
    endpoint_id: np.ndarray[Any, Any]
    prompt_tokens: np.ndarray[Any, Any]
    output_tokens: np.ndarray[Any, Any]
    slo_us: np.ndarray[Any, Any]
    service_us: np.ndarray[Any, Any] | None = None
    priority: np.ndarray[Any, Any] | None = None
    prompt_id: np.ndarray[Any, Any] | None = None
    session_id: np.ndarray[Any, Any] | None = None
    think_us: np.ndarray[Any, Any] | None = None
    prefix_hashes: PrefixHashes | None = None

    def __post_init__(self) -> None:
        columns = (getattr(self, field.name) for field in fields(self))
        lengths = {len(column) for column in columns if column is not None}
        if len(lengths) != 1:
            raise InputError(f"workload: columns have different lengths {sorted(lengths)}")
        if lengths == {0}:
            raise InputError("workload: no request arrives; raise the scale or give a longer trace")
        if self.arrival_us[0] < 0 or (self.arrival_us[1:] < self.arrival_us[:-1]).any():
            raise InputError("workload: arrivals must start at 0 or later and be in order of time")
        for name in ("endpoint_id", "prompt_tokens", "output_tokens"):
            if getattr(self, name).min() < 1:
                raise InputError(f"workload: {name} must be at least 1 everywhere")

    def __len__(self) -> int:
        return len(self.arrival_us)

    @property
    def has_turns(self) -> bool:
        """Whether a request waits for another one to end."""
        if self.session_id is None:
            return False
        numbered = self.session_id[self.session_id > 0]
        return len(np.unique(numbered)) < len(numbered)

    def by_session(self) -> Arrivals:
        """Return the requests so that the turns of a session follow each other, where its first one is now.

        Times stay in their places.
        """
        if not self.has_turns or self.session_id is None:
            return self
        order = session_order(self.session_id)
        columns: dict[str, Any] = {
            field.name: column.rows(order) if isinstance(column, PrefixHashes) else column[order]
            for field in fields(self)
            if field.name != "arrival_us" and (column := getattr(self, field.name)) is not None
        }
        return replace(self, **columns)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadSource:
    """What a workload was made of.

    Args:
        trace: the trace's name.
        format_name: what the trace is.
        options: the options that shaped it, as resolved; one that does not apply is missing.
        requests_in_trace: how many requests the trace has; None for a load without a trace, and for a large file
            that was not read to its end.
        requests: how many the workload has.
        dropped: how many requests of the trace are not in the workload, by reason.
        remarks: what else a reader must know, a sentence without full stop each.
    """

    trace: str
    format_name: str
    options: Mapping[str, Any]
    requests_in_trace: int | None
    requests: int
    dropped: Mapping[str, int]
    remarks: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return it in plain values without nulls, as run.json holds it."""
        counts = {} if self.requests_in_trace is None else {"requests_in_trace": self.requests_in_trace}
        return {
            "name": self.trace,
            "format": self.format_name,
            **self.options,
            **counts,
            "requests": self.requests,
            "dropped": dict(self.dropped),
            "remarks": list(self.remarks),
        }

    def describe(self) -> str:
        """Return it as one line."""
        kept = f"{self.requests:,} requests"
        if self.requests_in_trace is not None:
            whole = self.requests == self.requests_in_trace
            kept = f"all {kept}" if whole else f"{kept} of {self.requests_in_trace:,}"
        options = [
            f"{name.removesuffix('_s').replace('_', ' ')}: {_plain(value)}" for name, value in self.options.items()
        ]
        dropped = [f"{count:,} dropped by {reason}" for reason, count in self.dropped.items()]
        return f"workload: {self.trace} ({self.format_name}), " + "; ".join([kept, *options, *dropped, *self.remarks])


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Endpoints in the order of time, and the requests.

    Args:
        name: of the workload.
        endpoints: the endpoints.
        arrivals: the requests.
        source: None for one that options did not describe.
        concurrency: closed loop: so many clients, each of which sends a request when the one before has ended. The
            times of the requests are then the earliest ones. None for open loop: requests are sent at their times.
    """

    name: str
    endpoints: tuple[EndpointSpec, ...]
    arrivals: Arrivals
    source: WorkloadSource | None = None
    concurrency: int | None = None

    @property
    def reacts(self) -> bool:
        """Whether requests wait for others to end, so that the last one is sent at a time that is not known before."""
        return self.concurrency is not None or self.arrivals.has_turns


_CHUNK = 1 << 14
_FIRST_CHUNK = 1


def requests_of(arrivals: Arrivals, *, first: int = 0) -> Iterator[Request]:
    """Yield the requests one by one, from a row on; a chunk of the columns at a time keeps memory small."""
    start, size = first, _FIRST_CHUNK
    while start < len(arrivals):
        yield from _requests_in(arrivals, start, min(start + size, len(arrivals)))
        start += size
        size = min(8 * size, _CHUNK)


def _requests_in(arrivals: Arrivals, start: int, end: int) -> Iterator[Request]:
    none = np.zeros(end - start, dtype=np.int64)
    columns = [
        none if column is None else column[start:end]
        for column in (
            arrivals.arrival_us,
            arrivals.endpoint_id,
            arrivals.prompt_tokens,
            arrivals.output_tokens,
            arrivals.slo_us,
            arrivals.priority,
            arrivals.prompt_id,
            arrivals.session_id,
        )
    ]
    columns[5] = columns[5].astype(bool)
    hashes = arrivals.prefix_hashes
    for request_id, (
        arrival_us,
        endpoint_id,
        prompt_tokens,
        output_tokens,
        slo_us,
        priority,
        prompt_id,
        session_id,
    ) in enumerate(zip(*(column.tolist() for column in columns), strict=True), start + 1):
        request = Request(
            request_id=request_id,
            endpoint_id=endpoint_id,
            arrival_us=arrival_us,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            slo_us=slo_us,
            priority=priority,
            prompt_id=prompt_id,
            session_id=session_id,
        )
        if hashes is not None:
            request.prefix_hashes = hashes.of(request_id - 1)
            request.prefix_hash_tokens = hashes.tokens_per_hash
        yield request
