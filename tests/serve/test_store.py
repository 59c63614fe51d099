"""The state file."""

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from fakes import OneGpu, gpus
from running import TIMEOUT_S

from maveriq.domain.cluster import ClusterState
from maveriq.domain.deployments import EndpointSpec, Intent, Objective
from maveriq.domain.models import load_model
from maveriq.domain.requests import RequestStatus
from maveriq.exec.live_cluster import EndpointRequest
from maveriq.policy.policy import Deploy
from maveriq.serve import store as store_module
from maveriq.serve.store import INTERRUPTED, EndedRequest, RequestRow, Store, StoredEndpoint, StoredModel, StoreError

MODEL = load_model("falcon-7b")
INTENT = Intent(objective=Objective.MIN_LATENCY, slo_s=0.5, min_accuracy=90.5, float16_only=True)
ASKED = EndpointRequest(model=MODEL, intent=INTENT, output_tokens=20, batch_size=3)


def row(name: str) -> RequestRow:
    return RequestRow(request_id=name, model="falcon-7b", endpoint_id=1, accepted_s=1.5, prompt_tokens=7)


def ended(name: str, status: RequestStatus = RequestStatus.COMPLETED) -> EndedRequest:
    return EndedRequest(request_id=name, status=status, reason="", output_tokens=4)


def with_store(path: Path, test: Callable[[Store], Awaitable[None]], *, kept: int = 100) -> None:
    store = Store(path, kept_requests=kept)
    try:
        asyncio.run(asyncio.wait_for(test(store), TIMEOUT_S))  # type: ignore[arg-type]
    finally:
        store.close()


def test_store_keeps_models_endpoints_and_requests(state: Path) -> None:
    endpoint = EndpointSpec(
        endpoint_id=1, model=MODEL, intent=INTENT, requested_us=0, prompt_tokens=8, output_tokens=20, batch_size=3
    )
    decision = OneGpu().decide(endpoint, ClusterState(gpus()).view([0.0] * 4))
    assert isinstance(decision, Deploy)

    async def tell(store: Store) -> None:
        assert await store.add_model(MODEL, "here") == StoredModel(model_id=1, spec=MODEL, folder="here")
        assert await store.add_endpoint(1, ASKED, "llf") == 1
        await store.set_plans(1, decision.plans)
        assert await store.add_endpoint(1, ASKED, "") == 2
        await store.remove_endpoint(2)
        assert await store.add_endpoint(1, ASKED, "") == 3, "a number is never given twice"
        assert await store.accept(row("a"))

    async def read_back(store: Store) -> None:
        assert await store.models() == [StoredModel(model_id=1, spec=MODEL, folder="here")]
        first = StoredEndpoint(endpoint_id=1, model_id=1, request=ASKED, placement="llf", plans=decision.plans)
        assert await store.endpoints() == [
            first,
            StoredEndpoint(endpoint_id=3, model_id=1, request=ASKED, placement=""),
        ]
        assert await store.request("a") == row("a")
        assert await store.request("b") is None

    with_store(state, tell)
    with_store(state, read_back)


def test_a_request_ends_once(state: Path) -> None:
    async def test(store: Store) -> None:
        assert await store.accept(row("a"))
        assert not await store.accept(row("a"))
        await store.end(ended("a"))
        await store.end(ended("a", RequestStatus.FAILED))
        assert await store.fail_interrupted_requests() == 0
        assert not await store.accept(row("a"))
        found = await store.request("a")
        assert found is not None
        assert (found.status, found.output_tokens) == ("completed", 4)

    with_store(state, test)


def test_interrupted_requests_fail_at_the_next_start(state: Path) -> None:
    async def test(store: Store) -> None:
        await asyncio.gather(*(store.accept(row(name)) for name in "abc"))
        await store.end(ended("b"))
        assert await store.fail_interrupted_requests() == 2
        failed = await store.requests(status="failed", limit=10)
        assert {(row.request_id, row.reason) for row in failed} == {("a", INTERRUPTED), ("c", INTERRUPTED)}
        assert len(await store.requests(status=None, limit=2)) == 2

    with_store(state, test)


def test_old_ended_requests_are_pruned(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_PRUNE_EVERY", 1)

    async def test(store: Store) -> None:
        await store.accept(row("open"))
        for number in range(10):
            await store.accept(row(str(number)))
            await store.end(ended(str(number)))
        kept = [row.request_id for row in await store.requests(status=None, limit=100)]
        assert kept == ["9", "8", "7", "open"]

    with_store(state, test, kept=3)


def test_full_disk_and_recovery(state: Path) -> None:
    async def test(store: Store) -> None:
        async def max_pages(count: int) -> None:
            def set_it(file: sqlite3.Connection) -> None:
                file.execute(f"PRAGMA max_page_count = {count}")

            await store._writer.run(set_it)

        await store.accept(row("before"))
        await max_pages(1)  # which SQLite takes to mean: no more than there are
        results = await asyncio.gather(
            *(store.accept(row("x" * 60 + str(n))) for n in range(500)), return_exceptions=True
        )
        full = [result for result in results if isinstance(result, StoreError)]
        assert full
        assert "database or disk is full" in str(full[0])
        assert len(await store.requests(status=None, limit=1_000)) == 501 - len(full), "who heard yes is there"
        await max_pages(1_000_000)
        assert await store.accept(row("after"))

    with_store(state, test)


def test_failing_job_raises_in_all_jobs_of_its_transaction(state: Path) -> None:
    async def test(store: Store) -> None:
        results = await asyncio.gather(
            store._writer.run(lambda _file: 1 // 0), store.accept(row("a")), return_exceptions=True
        )
        assert isinstance(results[0], StoreError)
        assert (await store.request("a") is not None) == (results[1] is True)

    with_store(state, test)


def test_closed_store(state: Path) -> None:
    async def test(store: Store) -> None:
        store.close()
        store.close()
        with pytest.raises(StoreError, match="is closed"):
            await store.models()

    with_store(state, test)
