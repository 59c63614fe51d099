"""The life cycle of requests: each gets exactly one final status, and it is stored."""

import asyncio
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from fakes import FakeCluster, placements
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from running import TIMEOUT_S

from maveriq.domain.deployments import Intent, Objective
from maveriq.domain.models import load_model
from maveriq.domain.requests import FINAL_STATUSES, RequestStatus
from maveriq.exec.live_cluster import EndpointRequest, Submission
from maveriq.serve.errors import ApiError
from maveriq.serve.history import RecentRequests
from maveriq.serve.job_writer import StoreError
from maveriq.serve.metrics import Metrics
from maveriq.serve.requests import AcceptedRequest, RequestLifecycle
from maveriq.serve.store import EndedRequest, RequestRow, Store

FINAL = {status.label for status in FINAL_STATUSES}


class Rig:
    """A request life cycle on a fake cluster with one endpoint."""

    def __init__(self, folder: Path, token_s: float) -> None:
        self.cluster = FakeCluster(placements(), token_s=token_s)
        self.store = Store(folder / "state.db")
        self.metrics = Metrics()
        self.requests = RequestLifecycle(self.cluster, self.store, self.metrics, RecentRequests(), max_in_flight=6)
        requested = EndpointRequest(
            model=load_model("llama-2-7b"), intent=Intent(objective=Objective.MIN_COST), output_tokens=3
        )
        self.endpoint_id = self.cluster.deploy(requested)

    async def send(self, name: str | None = None, *, output_tokens: int = 3, slo_us: int = 0) -> AcceptedRequest:
        submission = Submission(endpoint_id=self.endpoint_id, prompt=(1, 2), output_tokens=output_tokens, slo_us=slo_us)
        return await self.requests.accept("llama-2-7b", submission, name)

    async def rows(self) -> list[RequestRow]:
        return await self.store.requests(status=None, limit=1_000)


@asynccontextmanager
async def new_rig(token_s: float = 0.0) -> AsyncIterator[Rig]:
    with tempfile.TemporaryDirectory() as folder:
        rig = Rig(Path(folder), token_s)
        await asyncio.sleep(0.001)
        try:
            yield rig
        finally:
            await rig.cluster.close()
            await rig.requests.drained()
            rig.store.close()


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), TIMEOUT_S))  # type: ignore[arg-type]


class Chaos:
    """Things that happen to a service."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.accepted: list[AcceptedRequest] = []
        self.going: list[asyncio.Task[AcceptedRequest]] = []

    async def send(self) -> None:
        if len(self.rig.requests) < 6:
            self.accepted.append(await self.rig.send())
        else:
            with pytest.raises(ApiError, match="which is the maximum"):
                await self.rig.send()

    async def client_goes(self) -> None:
        if self.accepted:
            self.rig.requests.cancel(self.accepted[-1])

    async def client_goes_early(self) -> None:
        """Go while the request is written down."""
        task = asyncio.create_task(self.rig.send())
        await asyncio.sleep(0)
        task.cancel()
        self.going.append(task)

    async def engine_fails(self) -> None:
        self.rig.cluster.breaks += 1

    async def engine_is_lost(self) -> None:
        self.rig.cluster.lose_engine(self.rig.endpoint_id)

    async def remove(self) -> None:
        self.rig.cluster.remove(self.rig.endpoint_id)

    async def wait(self) -> None:
        await asyncio.sleep(0.002)


DOINGS = [
    Chaos.send, Chaos.client_goes, Chaos.client_goes_early, Chaos.engine_fails, Chaos.engine_is_lost, Chaos.remove,
    Chaos.wait,
]  # fmt: skip


@given(st.lists(st.sampled_from(DOINGS), min_size=1, max_size=20))
@settings(max_examples=25, deadline=None)
def test_every_accepted_request_has_exactly_one_final_status(doings: list[Callable[[Chaos], Awaitable[None]]]) -> None:
    async def test() -> None:
        async with new_rig() as rig:
            chaos = Chaos(rig)
            for doing in doings:
                await doing(chaos)
            await rig.cluster.close()
            await rig.requests.drained()
            await asyncio.gather(*chaos.going, return_exceptions=True)
            rows = {row.request_id: row for row in await rig.rows()}
            assert {row.status for row in rows.values()} <= FINAL
            assert ended(rig) == Counter(row.status for row in rows.values())
            for each in chaos.accepted:
                row, outcome = rows[each.row.request_id], each.outcome.result()
                assert (row.status, row.reason) == (outcome.status.label, outcome.reason)

    run(test)


def test_limit_of_requests_in_flight() -> None:
    async def test() -> None:
        async with new_rig(token_s=0.005) as rig:
            sent = await asyncio.gather(*(rig.send() for _ in range(10)), return_exceptions=True)
            refused = [error for error in sent if isinstance(error, ApiError)]
            assert {error.status for error in refused} == {429}
            assert len(refused) == 4
            await rig.requests.drained()
            assert len(await rig.rows()) == 6
            await rig.send()

    run(test)


def test_request_id_taken() -> None:
    async def test() -> None:
        async with new_rig() as rig:
            await rig.send("mine")
            with pytest.raises(ApiError, match="'mine' is taken"):
                await rig.send("mine")
            await rig.requests.drained()
            assert [row.status for row in await rig.rows()] == ["completed"]

    run(test)


def test_endpoint_removed_while_a_request_is_stored() -> None:
    async def test() -> None:
        async with new_rig() as rig:
            rig.endpoint_id = 99
            accepted = await rig.send()
            outcome = await accepted.outcome
            assert (outcome.status, outcome.reason) == (RequestStatus.REFUSED, "there is no endpoint 99")
            assert [token async for token in accepted.handle.result().tokens()] == []
            assert await accepted.handle.result().outcome() == outcome

    run(test)


def test_removing_an_endpoint_refuses_waiting_requests() -> None:
    async def test() -> None:
        async with new_rig() as rig:
            rig.cluster.permits = permits = asyncio.Semaphore(0)
            runs, waits = await rig.send(), await rig.send()
            await asyncio.sleep(0.002)
            rig.cluster.remove(rig.endpoint_id)
            assert (await waits.outcome).status is RequestStatus.REFUSED
            for _ in range(3):
                permits.release()
            assert (await runs.outcome).status is RequestStatus.COMPLETED

    run(test)


class FailingStore(Store):
    """A disk that is full for a while."""

    full = ""

    async def accept(self, row: RequestRow) -> bool:
        if self.full == "accept":
            raise StoreError("the disk is full")
        return await super().accept(row)

    async def end(self, ended: EndedRequest) -> None:
        if self.full == "end":
            raise StoreError("the disk is full")
        await super().end(ended)


@asynccontextmanager
async def failing_store(rig: Rig, folder: Path) -> AsyncIterator[FailingStore]:
    """Give the rig a store that fails when told to."""
    store = FailingStore(folder / "other.db")
    rig.requests = RequestLifecycle(rig.cluster, store, rig.metrics, RecentRequests(), max_in_flight=6)
    yield store
    await rig.requests.drained()
    store.close()


def test_what_cannot_be_stored_does_not_run(tmp_path: Path) -> None:
    async def test() -> None:
        async with new_rig() as rig, failing_store(rig, tmp_path) as store:
            store.full = "accept"
            with pytest.raises(ApiError, match="the disk is full") as error:
                await rig.send()
            assert error.value.status == 503
            assert rig.cluster.submitted == []

    run(test)


def test_an_outcome_that_cannot_be_stored_becomes_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        monkeypatch.setattr("maveriq.serve.requests._STORE_RETRY_S", 0.01)
        monkeypatch.setattr("maveriq.serve.requests._STORE_TIMEOUT_S", 0.05)
        async with new_rig() as rig, failing_store(rig, tmp_path) as store:
            store.full = "end"
            accepted = await rig.send("mine")
            outcome = await accepted.outcome
            assert outcome.status is RequestStatus.FAILED
            assert "could not be stored: the disk is full" in outcome.reason
            assert not accepted.outcome_stored
            assert not rig.requests.store_works
            assert len(rig.requests) == 1
            store.full = ""
            await rig.requests.drained()
            assert rig.requests.store_works
            found = await store.request("mine")
            assert found is not None
            assert (found.status, found.reason) == ("failed", outcome.reason)
            assert ended(rig) == {"failed": 1}

    run(test)


def test_a_client_waits_a_moment_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        monkeypatch.setattr("maveriq.serve.requests._STORE_RETRY_S", 0.01)
        monkeypatch.setattr("maveriq.serve.requests._STORE_TIMEOUT_S", TIMEOUT_S)
        async with new_rig() as rig, failing_store(rig, tmp_path) as store:
            store.full = "end"
            accepted = await rig.send("mine")
            while rig.requests.store_works:
                await asyncio.sleep(0.001)
            assert not accepted.outcome.done(), "no answer before it is stored"
            store.full = ""
            assert (await accepted.outcome).status is RequestStatus.COMPLETED
            found = await store.request("mine")
            assert found is not None
            assert found.status == "completed"

    run(test)


def test_a_reason_that_is_no_text_is_stored(tmp_path: Path) -> None:
    async def test() -> None:
        store = Store(tmp_path / "other.db")
        await store.accept(RequestRow(request_id="a", model="m", endpoint_id=1, accepted_s=0.0, prompt_tokens=1))
        await store.end(
            EndedRequest(request_id="a", status=RequestStatus.FAILED, reason="lone \ud800", output_tokens=0)
        )
        found = await store.request("a")
        assert found is not None
        assert found.reason == "lone ?"
        store.close()

    run(test)


def test_cluster_error_fails_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with new_rig() as rig:
            monkeypatch.setattr(rig.cluster, "submit", lambda _submission: 1 // 0)
            accepted = await rig.send()
            outcome = await accepted.outcome
            assert outcome.status is RequestStatus.FAILED
            assert "the cluster failed" in outcome.reason

    run(test)


def test_metrics() -> None:
    async def test() -> None:
        async with new_rig(token_s=0.002) as rig:
            first = await rig.send(slo_us=10_000_000)
            second = await rig.send(slo_us=1)
            third = await rig.send(output_tokens=1)
            outcomes = [await each.outcome for each in (first, second, third)]
            rig.cluster.breaks = 1
            await (await rig.send(slo_us=10_000_000)).outcome
            rig.metrics.add_cluster(rig.cluster.progress, rig.requests.__len__)
            assert value(rig, "maveriq_requests_accepted_total", model="llama-2-7b") == 4
            assert value(rig, "maveriq_requests_total", model="llama-2-7b", status="completed") == 3
            assert value(rig, "maveriq_requests_total", model="llama-2-7b", status="failed") == 1
            assert value(rig, "maveriq_slo_requests_total", model="llama-2-7b", met="true") == 1
            assert value(rig, "maveriq_slo_requests_total", model="llama-2-7b", met="false") == 2
            assert value(rig, "maveriq_prompt_tokens_total", model="llama-2-7b") == 6
            assert value(rig, "maveriq_generated_tokens_total", model="llama-2-7b") == 7
            latencies_s = [(each.finish_us - each.arrival_us) / 1e6 for each in outcomes]
            firsts_s = [(each.first_token_us - each.arrival_us) / 1e6 for each in outcomes]
            per_token_s = [(each.finish_us - each.first_token_us) / 2e6 for each in outcomes[:2]]
            for name, figures in (
                ("request_latency", latencies_s),
                ("time_to_first_token", firsts_s),
                ("time_per_output_token", per_token_s),
            ):
                assert value(rig, f"maveriq_{name}_seconds_count", model="llama-2-7b") == len(figures)
                assert value(rig, f"maveriq_{name}_seconds_sum", model="llama-2-7b") == pytest.approx(sum(figures))
            assert value(rig, "maveriq_deployment_up", deployment="1", endpoint="1", model="llama-2-7b") == 1
            assert value(rig, "maveriq_gpu_load_ratio", gpu="3") == 0.25
            assert value(rig, "maveriq_requests_in_flight") == len(rig.requests)
            rig.cluster.lose_engine(rig.endpoint_id)
            assert value(rig, "maveriq_engine_restarts_total", deployment="1", endpoint="1", model="llama-2-7b") == 1
            rig.cluster.remove(rig.endpoint_id)
            assert value(rig, "maveriq_engine_restarts_total", deployment="1", endpoint="1", model="llama-2-7b") is None

    run(test)


def ended(rig: Rig) -> dict[str, int]:
    """Return how many requests ended in each status, as the metrics say."""
    counts = {status: value(rig, "maveriq_requests_total", model="llama-2-7b", status=status) for status in FINAL}
    return {status: int(count) for status, count in counts.items() if count}


def value(rig: Rig, name: str, **labels: str) -> float | None:
    registry: CollectorRegistry = rig.metrics.registry
    return registry.get_sample_value(name, labels)
