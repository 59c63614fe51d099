"""Requests in flight: each is written down before it runs, and has exactly one end that is written down too."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from maveriq.domain.requests import RequestStatus
from maveriq.errors import InputError
from maveriq.exec.live_cluster import LiveCluster, Outcome, RequestHandle, Submission
from maveriq.serve.errors import ApiError
from maveriq.serve.metrics import Metrics
from maveriq.serve.store import EndedRequest, RequestRow, Store, StoreError

_LOG = logging.getLogger(__name__)
_TRY_AGAIN_S = 1.0
_NEWEST_COUNTS = 0.1  # of the newest latency, in the average that says when to come back
_LONGEST_RETRY_AFTER_S = 60


@dataclass(slots=True, eq=False)
class AcceptedRequest:
    """A request on its way through the service.

    `ticket` comes when it is written down and given to the cluster; `outcome` when its end is
    written down (or could not be at the first try; it is tried until it can). `in_cluster` says
    whether it is under way there.
    """

    row: RequestRow
    submission: Submission
    handle: asyncio.Future[RequestHandle] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    outcome: asyncio.Future[Outcome] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    in_cluster: bool = False
    cancelled: bool = False


class RequestLifecycle:
    """Takes requests in, up to a bound, and follows each to its end whether or not somebody still waits."""

    def __init__(self, cluster: LiveCluster, store: Store, metrics: Metrics, *, maximum: int) -> None:
        self._cluster = cluster
        self._store = store
        self._metrics = metrics
        self._most = maximum
        self._tasks: dict[asyncio.Task[None], AcceptedRequest] = {}
        self._default_s = 1.0
        self.open = True
        self.store_works = True

    def __len__(self) -> int:
        return len(self._tasks)

    def waiting_for(self, endpoint_id: int) -> int:
        """Return how many requests in flight an endpoint has."""
        return sum(1 for one in self._tasks.values() if one.submission.endpoint_id == endpoint_id)

    async def accept(self, model: str, submission: Submission, request_id: str | None) -> AcceptedRequest:
        """Take in a request and return it when it is written down and given to the cluster.

        Raises:
            ApiError: too many are in flight, the id is taken, the state cannot be written, the server stops.
        """
        if not self.open:
            raise ApiError(503, "the server is stopping", code="server_stopping", retry_after_s=10)
        if len(self._tasks) >= self._most:
            raise ApiError(
                429,
                f"{self._most} requests are in flight, which is the most; try again later",
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
        self._tasks[task] = accepted
        task.add_done_callback(self._tasks.pop)
        try:
            await asyncio.shield(accepted.handle)
        except asyncio.CancelledError:
            self.cancel(accepted)
            raise
        return accepted

    def cancel(self, accepted: AcceptedRequest) -> None:
        """Note that nobody waits for a request any more."""
        if accepted.cancelled or accepted.outcome.done():
            return
        accepted.cancelled = True
        if accepted.in_cluster:
            self._cluster.cancel(accepted.handle.result().request_id)

    async def drained(self) -> None:
        """Wait until every request has ended and its end is written down."""
        while self._tasks:
            await asyncio.wait(list(self._tasks))

    def _retry_after_s(self) -> int:
        """Return about how long until a place is free: a usual latency."""
        return max(1, min(round(self._default_s), _LONGEST_RETRY_AFTER_S))

    async def _follow(self, accepted: AcceptedRequest) -> None:
        row = accepted.row
        try:
            if not await self._store.accept(row):
                taken = f"there is a request {row.request_id!r} already; give each request an id of its own"
                _fail(accepted, ApiError(409, taken, code="request_id_taken", param="X-Request-Id"))
                return
        except StoreError as error:
            self.store_works = False
            _fail(accepted, ApiError(503, str(error), code="state_not_writable", retry_after_s=10))
            return
        self.store_works = True
        self._metrics.accepted.labels(row.model).inc()
        outcome = await self._run(accepted)
        self._metrics.finished(row.model, outcome, prompt_tokens=row.prompt_tokens, slo_us=accepted.submission.slo_us)
        self._default_s += _NEWEST_COUNTS * (time.time() - row.accepted_s - self._default_s)
        await self._write_end(accepted, outcome)

    async def _run(self, accepted: AcceptedRequest) -> Outcome:
        """Give a request to the cluster and return how it ended there."""
        try:
            handle = self._cluster.submit(accepted.submission)
            accepted.in_cluster = True
            if accepted.cancelled:
                self._cluster.cancel(handle.request_id)
            accepted.handle.set_result(handle)
            return await handle.outcome()
        except InputError as error:  # its endpoint was removed while it was written down
            return self._ended(accepted, RequestStatus.REFUSED, str(error))
        except Exception:
            _LOG.exception("request %s: the cluster failed", accepted.row.request_id)
            return self._ended(accepted, RequestStatus.FAILED, "the cluster failed; the server's log says how")
        finally:
            accepted.in_cluster = False

    def _ended(self, accepted: AcceptedRequest, status: RequestStatus, reason: str) -> Outcome:
        """Return the end of a request that the cluster never ended, and let go who waits for its ticket."""
        now_us = self._cluster.now_us
        outcome = Outcome(
            request_id=0, status=status, reason=reason, tokens=(),
            arrival_us=now_us, start_us=-1, first_token_us=-1, finish_us=now_us,
        )  # fmt: skip
        if not accepted.handle.done():
            accepted.handle.set_result(_Ended(outcome))
        return outcome

    async def _write_end(self, accepted: AcceptedRequest, outcome: Outcome) -> None:
        ended = EndedRequest(
            request_id=accepted.row.request_id,
            status=outcome.status,
            reason=outcome.reason,
            output_tokens=len(outcome.tokens),
        )
        while True:
            try:
                await self._store.end(ended)
            except StoreError as error:
                if self.store_works:
                    _LOG.error("%s", error)
                self.store_works = False
            else:
                self.store_works = True
                break
            finally:
                if not accepted.outcome.done():
                    accepted.outcome.set_result(outcome)
            await asyncio.sleep(_TRY_AGAIN_S)


def _fail(accepted: AcceptedRequest, error: ApiError) -> None:
    """Tell who waits that a request was not accepted; nobody may be left."""
    if accepted.cancelled:
        accepted.handle.cancel()
    else:
        accepted.handle.set_exception(error)


class _Ended:
    """The ticket of a request that never came into the cluster."""

    request_id = 0

    def __init__(self, outcome: Outcome) -> None:
        self._outcome = outcome

    async def tokens(self) -> AsyncIterator[int]:
        for token in self._outcome.tokens:
            yield token

    async def outcome(self) -> Outcome:
        return self._outcome
