"""The state of every request, from arrival to its one final status."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from maveriq.control.events import EngineProgress
from maveriq.domain.records import NOT_YET, RequestTable
from maveriq.domain.requests import Request, RequestStatus
from maveriq.errors import InvariantError
from maveriq.units import Micros

if TYPE_CHECKING:
    import numpy as np

    Column: TypeAlias = np.ndarray[Any, Any]

_WAITING, _RUNNING = RequestStatus.WAITING.value, RequestStatus.RUNNING.value
_COMPLETED, _FAILED = RequestStatus.COMPLETED.value, RequestStatus.FAILED.value
_REFUSED, _UNFINISHED = RequestStatus.REFUSED.value, RequestStatus.UNFINISHED.value

RECENT_COMPLETIONS = 1_000
"""How many of the last completions live figures cover."""

MAX_REASONS = 10_000
"""Distinct reasons that are kept; a live cluster may run for months."""

_ROWS_AHEAD = 1 << 12

_ONE_MORE_REASON = "a reason beyond those kept"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackedRequest:
    """The state of one request; times are `NOT_YET` until they are known."""

    status: RequestStatus
    reason: str
    arrival_us: Micros
    start_us: Micros
    first_token_us: Micros
    finish_us: Micros


class RequestTracker:
    """One row per request and one packed column per field, so that millions take little memory.

    Request ids are 1, 2, 3, ... in the order of arrival. Status changes are checked: a request
    goes waiting, running (and back to waiting if its engine fails), then to one final status.
    """

    def __init__(self, *, on_end: Callable[[int], None] | None = None) -> None:
        self._endpoint_id = array("i")
        self._deployment_id = array("i")
        self._arrival_us = array("q")
        self._start_us = array("q")
        self._first_token_us = array("q")
        self._finish_us = array("q")
        self._status = array("b")
        self._reason = array("i")
        self._attempts = array("b")
        self._prompt_tokens = array("i")
        self._output_tokens = array("i")
        self._slo_us = array("q")
        self._preemptions = array("i")
        self._cached_tokens = array("i")
        self._steps = array("i")
        self._reasons = [""]
        self._reason_indices = {"": 0}
        self._count = [0] * len(RequestStatus)
        self._recent: deque[int] = deque(maxlen=RECENT_COMPLETIONS)
        self._on_end = on_end

    def __len__(self) -> int:
        return len(self._arrival_us)

    def count(self, status: RequestStatus) -> int:
        """Return how many requests have a status now."""
        return self._count[status]

    def arrived(self, request: Request) -> None:
        """Open the row of a request.

        Raises:
            InvariantError: ids are not 1, 2, 3, ... in order of arrival.
        """
        row = len(self._arrival_us)
        if request.request_id != row + 1:
            raise InvariantError(f"request {request.request_id} arrived as number {row + 1}")
        if row == len(self._status):
            self._open(_ROWS_AHEAD)
        self._endpoint_id.append(request.endpoint_id)
        self._arrival_us.append(request.arrival_us)
        self._prompt_tokens.append(request.prompt_tokens)
        self._output_tokens.append(request.output_tokens)
        self._slo_us.append(request.slo_us)
        self._count[_WAITING] += 1

    def _open(self, count: int) -> None:
        """Make further rows of the columns that begin alike in all requests, many at once: that takes less time."""
        for kept in (self._start_us, self._first_token_us, self._finish_us):
            kept.extend(array(kept.typecode, [NOT_YET]) * count)
        for kept in (
            self._deployment_id, self._status, self._reason, self._attempts, self._preemptions, self._cached_tokens,
            self._steps,
        ):  # fmt: skip
            kept.frombytes(bytes(count * kept.itemsize))

    def arrived_together(
        self, *, endpoint_id: Column, deployment_id: Column, arrival_us: Column, prompt_tokens: Column,
        output_tokens: Column, slo_us: Column,
    ) -> None:  # fmt: skip
        """Open the rows of the next requests, which wait for deployments; a column (int64) each."""
        import numpy as np

        first, count = len(self), len(arrival_us)
        columns = (
            (self._endpoint_id, endpoint_id),
            (self._arrival_us, arrival_us),
            (self._prompt_tokens, prompt_tokens),
            (self._output_tokens, output_tokens),
            (self._slo_us, slo_us),
        )
        for kept, column in columns:
            kept.frombytes(column.astype(kept.typecode).tobytes())
        self._open(max(0, len(self) - len(self._status)))
        view = np.frombuffer(self._deployment_id, dtype=self._deployment_id.typecode)
        view[first : first + count] = deployment_id
        self._count[_WAITING] += count

    def progressed_together(
        self,
        *,
        started: tuple[Column, Column, Column],
        preempted: Column,
        first_tokens: tuple[Column, Column],
        finished: tuple[Column, Column, Column, Column],
    ) -> None:
        """Record what continuous engines did, as `started`, `progressed`, `generated` and `completed` do.

        Args:
            started: numbers of requests, when each started, and how many tokens of its prompt were cached.
            preempted: numbers of requests, once for each time.
            first_tokens: numbers of requests, and when each got its first token.
            finished: numbers of requests in order of time, when each got its last token, how many it got, in how many
                steps.

        Raises:
            InvariantError: a request that started did not wait, or one that finished did not run.
        """
        import numpy as np

        def view(kept: array[int]) -> Column:
            return np.frombuffer(kept, dtype=kept.typecode)

        status = view(self._status)
        rows = started[0] - 1
        if (status[rows] != _WAITING).any():
            raise InvariantError("a request started that did not wait")
        status[rows] = _RUNNING
        view(self._start_us)[rows] = started[1]
        view(self._cached_tokens)[rows] = started[2]
        view(self._attempts)[rows] += 1
        np.add.at(view(self._preemptions), preempted - 1, 1)
        view(self._first_token_us)[first_tokens[0] - 1] = first_tokens[1]
        ended = finished[0] - 1
        if (status[ended] != _RUNNING).any():
            raise InvariantError("a request finished that did not run")
        status[ended] = _COMPLETED
        view(self._finish_us)[ended] = finished[1]
        view(self._output_tokens)[ended] = finished[2]
        view(self._steps)[ended] = finished[3]
        self._count[_WAITING] -= len(rows)
        self._count[_RUNNING] += len(rows) - len(ended)
        self._count[_COMPLETED] += len(ended)
        self._recent.extend(ended[-RECENT_COMPLETIONS:].tolist())

    def open_rows(self, start: int, end: int) -> list[int]:
        """Return the rows from one on, up to another, of requests that have not ended."""
        import numpy as np

        if start == end:
            return []
        status = np.frombuffer(self._status, dtype=self._status.typecode)[start:end]
        return (np.flatnonzero(status <= _RUNNING) + start).tolist()

    def prompt_tokens(self, request_ids: Column) -> Column:
        """Return the length of the prompt of each of some requests."""
        import numpy as np

        return np.asarray(np.frombuffer(self._prompt_tokens, dtype=self._prompt_tokens.typecode)[request_ids - 1])

    def columns(self) -> Mapping[str, Column]:
        """Return the columns for a driver that writes them itself, and then calls `refused_together` and `recount`.

        No request may arrive while they are in use.
        """
        import numpy as np

        names = (
            "endpoint_id", "deployment_id", "arrival_us", "start_us", "first_token_us", "finish_us", "status",
            "attempts", "prompt_tokens", "output_tokens",
        )  # fmt: skip
        kept = {name: getattr(self, f"_{name}") for name in names}
        return {name: np.frombuffer(column, dtype=column.typecode)[: len(self)] for name, column in kept.items()}

    def refused_together(self, rows: Column, reasons: Sequence[str], of_row: Column) -> None:
        """Record why requests were refused.

        Args:
            rows: their rows, in order of arrival.
            reasons: the distinct reasons, in the order in which they were first given.
            of_row: the place of each row's reason in `reasons`.
        """
        import numpy as np

        indices = np.array([self._reason_index(reason) for reason in reasons], dtype=self._reason.typecode)
        np.frombuffer(self._reason, dtype=self._reason.typecode)[rows] = indices[of_row]

    def recount(self) -> None:
        """Count requests by their status, and find those that completed last."""
        import numpy as np

        columns = self.columns()
        status, finish_us = columns["status"], columns["finish_us"]
        self._count = np.bincount(status, minlength=len(RequestStatus)).tolist()
        completed = np.flatnonzero(status == _COMPLETED)
        last = max(0, len(completed) - RECENT_COMPLETIONS)
        self._recent.extend(
            completed[np.argpartition(finish_us[completed], last)[last:]].tolist() if last else completed.tolist()
        )

    def assigned(self, request: Request, deployment_id: int) -> None:
        """Record the deployment that a request waits for."""
        self._deployment_id[request.request_id - 1] = deployment_id

    def started(self, request: Request, now_us: Micros) -> None:
        """Record that a waiting request runs."""
        row = request.request_id - 1
        self._move(row, _WAITING, _RUNNING)
        self._start_us[row] = now_us
        self._attempts[row] += 1

    def progressed(self, progress: EngineProgress, requests: Mapping[int, Request], now_us: Micros) -> None:
        """Record what a step of a continuous engine did, but not which requests finished.

        A request that was preempted counts as running until it ends.

        Args:
            progress: what it did.
            requests: those that the engine has, by ID; others are ignored.
            now_us: when the step ended.
        """
        for started in progress.started:
            if request := requests.get(started.request_id):
                self.started(request, started.start_us)
                self._cached_tokens[started.request_id - 1] = started.cached_tokens
        for request_id in progress.preempted:
            if request_id in requests:
                self._preemptions[request_id - 1] += 1
        for request_id in progress.first_tokens:
            if request_id in requests:
                self._first_token_us[request_id - 1] = now_us

    def completed(self, request: Request, first_token_us: Micros | None, now_us: Micros) -> None:
        """Record that a running request got its last token; the time of the first is None if it was recorded before."""
        row = request.request_id - 1
        self._move(row, _RUNNING, _COMPLETED)
        if first_token_us is not None:
            self._first_token_us[row] = first_token_us
        self._finish_us[row] = now_us
        self._recent.append(row)
        if self._on_end is not None:
            self._on_end(request.request_id)

    def generated(self, request: Request, output_tokens: int, steps: int = 0) -> None:
        """Record how many tokens a request got, and in how many steps something of it was computed, if that is known.

        Without a record it got as many tokens as it asked for.
        """
        self._output_tokens[request.request_id - 1] = output_tokens
        self._steps[request.request_id - 1] = steps

    def requeued(self, request: Request) -> None:
        """Record that a running request waits again because its engine failed; what it has got so far is lost."""
        row = request.request_id - 1
        self._move(row, _RUNNING, _WAITING)
        self._start_us[row] = self._first_token_us[row] = NOT_YET
        self._cached_tokens[row] = 0

    def attempts(self, request: Request) -> int:
        """Return how often a request was started."""
        return self._attempts[request.request_id - 1]

    def refused(self, request: Request, reason: str) -> None:
        """Record that a waiting request will not be served."""
        self._end(request.request_id, _WAITING, _REFUSED, reason)

    def failed(self, request_id: int, reason: str) -> None:
        """Record that a request was lost, with its engine or alone, or cancelled; it waited or ran."""
        before = _RUNNING if self.is_running(request_id) else _WAITING
        self._end(request_id, before, _FAILED, reason)

    def _end(self, request_id: int, before: int, after: int, reason: str) -> None:
        row = request_id - 1
        self._move(row, before, after)
        self._reason[row] = self._reason_index(reason)
        if self._on_end is not None:
            self._on_end(request_id)

    def is_running(self, request_id: int) -> bool:
        """Return whether a request runs; False if there is no such request."""
        return 0 < request_id <= len(self) and self._status[request_id - 1] == _RUNNING

    def deployment_of(self, request_id: int) -> int:
        """Return the deployment that a request waits for or ran on; 0 for none, or no such request."""
        return self._deployment_id[request_id - 1] if 0 < request_id <= len(self) else 0

    def row(self, request_id: int) -> TrackedRequest:
        """Return what is known of a request that has arrived."""
        row = request_id - 1
        return TrackedRequest(
            status=RequestStatus(self._status[row]),
            reason=self._reasons[self._reason[row]],
            arrival_us=self._arrival_us[row],
            start_us=self._start_us[row],
            first_token_us=self._first_token_us[row],
            finish_us=self._finish_us[row],
        )

    def _move(self, row: int, before: int, after: int) -> None:
        if self._status[row] != before:
            raise InvariantError(
                f"request {row + 1} cannot become {RequestStatus(after).label}: "
                f"it is {RequestStatus(self._status[row]).label}"
            )
        self._status[row] = after
        self._count[before] -= 1
        self._count[after] += 1

    def _reason_index(self, reason: str) -> int:
        if reason not in self._reason_indices and len(self._reasons) >= MAX_REASONS:
            reason = _ONE_MORE_REASON
        index = self._reason_indices.setdefault(reason, len(self._reasons))
        if index == len(self._reasons):
            self._reasons.append(reason)
        return index

    def recent_rows(self) -> list[tuple[Micros, Micros]]:
        """Return (latency, SLO) of the last completions, 1,000 at most; SLO 0 where there is none."""
        return [(self._finish_us[row] - self._arrival_us[row], self._slo_us[row]) for row in self._recent]

    def close(self) -> RequestTable:
        """End the run: what still waits or runs becomes unfinished. Returns all rows.

        The columns are views of the tracker's own memory, which must not change afterwards.

        Raises:
            InvariantError: the counts do not add up.
        """
        reason = self._reason_index("the run ended first")
        for row in self.open_rows(0, len(self)):
            self._move(row, self._status[row], _UNFINISHED)
            self._reason[row] = reason
        table = self._table()
        table.counts()
        return table

    def _table(self) -> RequestTable:
        import numpy as np

        rows = len(self)

        def column(values: array[int]) -> np.ndarray[Any, Any]:
            return np.frombuffer(values, dtype=values.typecode)[:rows] if rows else np.empty(0, dtype=values.typecode)

        return RequestTable(
            request_id=np.arange(1, rows + 1, dtype=np.int64),
            endpoint_id=column(self._endpoint_id),
            deployment_id=column(self._deployment_id),
            arrival_us=column(self._arrival_us),
            start_us=column(self._start_us),
            first_token_us=column(self._first_token_us),
            finish_us=column(self._finish_us),
            status=column(self._status),
            reason=column(self._reason),
            prompt_tokens=column(self._prompt_tokens),
            cached_tokens=column(self._cached_tokens),
            output_tokens=column(self._output_tokens),
            preemptions=column(self._preemptions),
            steps=column(self._steps),
            slo_us=column(self._slo_us),
            reasons=tuple(self._reasons),
        )
