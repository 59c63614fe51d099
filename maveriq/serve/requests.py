"""The life cycle of accepted requests: each is stored before it runs, and its one final status before its response.

The stored status is the one that the client gets. A final status that cannot be stored becomes an error: the client
gets it in place of the outcome, and so does the state file once it can be written again.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace

from maveriq.domain.requests import RequestStatus
from maveriq.errors import InputError
from maveriq.exec.live_cluster import LiveCluster, Outcome, RequestHandle, Submission
from maveriq.serve.errors import ApiError
from maveriq.serve.history import RecentRequests
from maveriq.serve.job_writer import StoreError
from maveriq.serve.metrics import Metrics
from maveriq.serve.store import EndedRequest, RequestRow, Store

_LOG = logging.getLogger(__name__)
_STORE_RETRY_S = 0.5
_STORE_TIMEOUT_S = 2.0  # how long a client waits for its outcome to be stored
_NOT_STORED = "the request ended, but its outcome could not be stored"
_LATENCY_SMOOTHING = 0.1  # weight of the newest latency in the moving average
_MAX_RETRY_AFTER_S = 60
_STOPPING_RETRY_AFTER_S = 10


@dataclass(slots=True, eq=False)
class AcceptedRequest:
    """A request in flight.

    Args:
        row: as stored when it was accepted.
        submission: what the cluster runs.
        handle: done once the request is stored and submitted to the cluster.
        outcome: done once the final status is stored or, if that is not possible, replaced by an error.
        outcome_stored: whether `outcome` is in the state file; False where an error replaced it.
        in_cluster: whether the cluster is processing it.
        cancelled: whether its client disconnected.
    """

    row: RequestRow
    submission: Submission
    handle: asyncio.Future[RequestHandle] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    outcome: asyncio.Future[Outcome] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    outcome_stored: bool = True
    in_cluster: bool = False
    cancelled: bool = False


class RequestLifecycle:
    """Accepts requests up to a limit and follows each one to its end, even if its client disconnects.

    `open` says whether new requests are accepted; `store_works` whether the last write to the state file succeeded.
    """

    def __init__(
        self, cluster: LiveCluster, store: Store, metrics: Metrics, recent: RecentRequests, *, max_in_flight: int
    ) -> None:
        self._cluster = cluster
        self._store = store
        self._metrics = metrics
        self._recent = recent
        self._max_in_flight = max_in_flight
        self._in_flight: dict[asyncio.Task[None], AcceptedRequest] = {}
        self._average_latency_s = 1.0
        self.open = True
        self.store_works = True

    def __len__(self) -> int:
        """The number of requests in flight."""
        return len(self._in_flight)

    def in_flight_at(self, endpoint_id: int) -> int:
        """Return the number of requests in flight of an endpoint."""
        return sum(accepted.submission.endpoint_id == endpoint_id for accepted in self._in_flight.values())

    async def accept(self, model: str, submission: Submission, request_id: str | None) -> AcceptedRequest:
        """Accept a request and return it once it is stored and submitted to the cluster.

        Raises:
            ApiError: too many requests are in flight, the ID is taken, the state file cannot be written, or the
                server is stopping.
        """
        if not self.open:
            raise ApiError(503, "the server is stopping", code="server_stopping", retry_after_s=_STOPPING_RETRY_AFTER_S)
        if len(self._in_flight) >= self._max_in_flight:
            raise ApiError(
                429,
                f"{self._max_in_flight} requests are in flight, which is the maximum; try again later",
                code="queue_full",
                retry_after_s=self._retry_after_s(),
            )
        row = RequestRow(
            request_id=request_id or f"req-{uuid.uuid4().hex}",
            model=model,
            endpoint_id=submission.endpoint_id,
            accepted_s=time.time(),
            prompt_tokens=len(submission.prompt),
        )
        accepted = AcceptedRequest(row, submission)
        task = asyncio.create_task(self._follow(accepted))
        self._in_flight[task] = accepted
        task.add_done_callback(self._in_flight.pop)
        try:
            await asyncio.shield(accepted.handle)
        except asyncio.CancelledError:
            self.cancel(accepted)
            raise
        return accepted

    def cancel(self, accepted: AcceptedRequest) -> None:
        """Cancel a request whose client disconnected. It has no effect on a request that ended."""
        if accepted.cancelled or accepted.outcome.done():
            return
        accepted.cancelled = True
        if accepted.in_cluster:
            self._cluster.cancel(accepted.handle.result().request_id)

    async def drained(self) -> None:
        """Wait until no requests are in flight and all final statuses are stored."""
        while self._in_flight:
            await asyncio.wait(list(self._in_flight))

    def _retry_after_s(self) -> int:
        """Return an estimate of the time until a request ends: the average latency."""
        return max(1, min(round(self._average_latency_s), _MAX_RETRY_AFTER_S))

    async def _follow(self, accepted: AcceptedRequest) -> None:
        """Store a request, run it, and store its final status."""
        row, clock = accepted.row, asyncio.get_running_loop().time
        begun_s = clock()
        try:
            if not await self._store.accept(row):
                message = f"request ID {row.request_id!r} is taken; give each request its own ID"
                _reject(accepted, ApiError(409, message, code="request_id_taken", param="X-Request-Id"))
                return
        except StoreError as error:
            self.store_works = False
            _reject(accepted, ApiError(503, str(error), code="state_not_writable", retry_after_s=10))
            return
        self.store_works = True
        self._metrics.accepted.labels(row.model).inc()
        outcome = await self._run(accepted)
        latency_s = clock() - begun_s
        self._average_latency_s += _LATENCY_SMOOTHING * (latency_s - self._average_latency_s)
        await self._end(accepted, outcome)

    async def _run(self, accepted: AcceptedRequest) -> Outcome:
        """Submit a request to the cluster and return its outcome."""
        try:
            handle = self._cluster.submit(accepted.submission)
            accepted.in_cluster = True
            if accepted.cancelled:
                self._cluster.cancel(handle.request_id)
            accepted.handle.set_result(handle)
            return await handle.outcome()
        except InputError as error:  # its endpoint was removed while the request was stored
            return self._end_without_cluster(accepted, RequestStatus.REFUSED, str(error))
        except Exception:
            _LOG.exception("request %s: the cluster failed", accepted.row.request_id)
            reason = "the cluster failed; see the server's log"
            return self._end_without_cluster(accepted, RequestStatus.FAILED, reason)
        finally:
            accepted.in_cluster = False

    def _end_without_cluster(self, accepted: AcceptedRequest, status: RequestStatus, reason: str) -> Outcome:
        """Return the outcome of a request that the cluster did not end, and resolve its handle."""
        now_us = self._cluster.now_us
        outcome = Outcome(
            request_id=0, status=status, reason=reason, tokens=(),
            arrival_us=now_us, start_us=-1, first_token_us=-1, finish_us=now_us,
        )  # fmt: skip
        if not accepted.handle.done():
            accepted.handle.set_result(_EndedHandle(outcome))
        return outcome

    async def _end(self, accepted: AcceptedRequest, outcome: Outcome) -> None:
        """Store the final status, then resolve `accepted.outcome`.

        A status that cannot be stored in time becomes a failure. Storing that is retried until it succeeds.
        """
        clock = asyncio.get_running_loop().time
        give_up_s = clock() + _STORE_TIMEOUT_S
        while True:
            try:
                await self._store.end(
                    EndedRequest(
                        request_id=accepted.row.request_id,
                        status=outcome.status,
                        reason=outcome.reason,
                        output_tokens=len(outcome.tokens),
                    )
                )
            except StoreError as error:
                if self.store_works:
                    _LOG.error("%s", error)
                self.store_works = False
                if accepted.outcome_stored and (clock() >= give_up_s or not self.open):
                    accepted.outcome_stored = False
                    outcome = replace(outcome, status=RequestStatus.FAILED, reason=f"{_NOT_STORED}: {error}")
                    self._resolve(accepted, outcome)
            else:
                self.store_works = True
                break
            await asyncio.sleep(_STORE_RETRY_S)
        if accepted.outcome_stored:
            self._resolve(accepted, outcome)

    def _resolve(self, accepted: AcceptedRequest, outcome: Outcome) -> None:
        """Count a request as ended, and give its client the outcome."""
        row, slo_us = accepted.row, accepted.submission.slo_us
        self._metrics.count_ended(row.model, outcome, prompt_tokens=row.prompt_tokens, slo_us=slo_us)
        self._recent.add(row.model, row.endpoint_id, outcome, prompt_tokens=row.prompt_tokens, slo_us=slo_us)
        accepted.outcome.set_result(outcome)


def _reject(accepted: AcceptedRequest, error: ApiError) -> None:
    """Raise an error in the caller of `accept`, unless it was cancelled."""
    if accepted.cancelled:
        accepted.handle.cancel()
    else:
        accepted.handle.set_exception(error)


class _EndedHandle:
    """The handle of a request that the cluster never accepted."""

    request_id = 0

    def __init__(self, outcome: Outcome) -> None:
        self._outcome = outcome

    async def tokens(self) -> AsyncIterator[int]:
        for token in self._outcome.tokens:
            yield token

    async def outcome(self) -> Outcome:
        return self._outcome
