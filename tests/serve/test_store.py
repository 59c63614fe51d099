"""The state file."""

import asyncio
import json
import os
import sqlite3
import stat
import tempfile
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from fakes import OneGpu, gpus
from running import TIMEOUT_S

from maveriq.domain.cluster import ClusterState
from maveriq.domain.deployments import EndpointSpec, Intent, Objective
from maveriq.domain.models import load_model, model_from_hf_config
from maveriq.domain.requests import RequestStatus
from maveriq.errors import InputError
from maveriq.exec.live_cluster import EndpointRequest
from maveriq.policy.policy import Deploy
from maveriq.serve import store as store_module
from maveriq.serve.job_writer import StoreError
from maveriq.serve.store import INTERRUPTED, EndedRequest, RequestRow, Store, StoredEndpoint, StoredModel

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


def test_store_keeps_the_layers_of_a_model(state: Path) -> None:
    config = {
        "model_type": "deepseek_v3", "num_hidden_layers": 3, "hidden_size": 64, "num_attention_heads": 8,
        "intermediate_size": 100, "vocab_size": 1000, "kv_lora_rank": 32, "q_lora_rank": None, "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8, "v_head_dim": 12, "n_routed_experts": 16, "num_experts_per_tok": 4,
        "moe_intermediate_size": 24, "first_k_dense_replace": 1, "n_shared_experts": 1,
    }  # fmt: skip
    spec = model_from_hf_config(json.dumps(config), name="mine", where="config.json")

    async def tell(store: Store) -> None:
        await store.add_model(spec, "")
        assert [stored.spec for stored in await store.models()] == [spec]

    with_store(state, tell)


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


def fail(_database: sqlite3.Connection) -> None:
    raise ValueError("poison")


def write_and_fail(database: sqlite3.Connection) -> None:
    database.execute("INSERT INTO models (name, spec, folder) VALUES ('half', '', '')")
    raise ValueError("poison")


def end_the_transaction(database: sqlite3.Connection) -> None:
    database.execute("ROLLBACK")
    raise sqlite3.OperationalError("database or disk is full")


@pytest.mark.parametrize("bad", [fail, write_and_fail, end_the_transaction])
def test_a_bad_job_fails_alone(state: Path, bad: Callable[[sqlite3.Connection], None]) -> None:
    async def test(store: Store) -> None:
        release = threading.Event()
        blocked = asyncio.create_task(store._writer.run(lambda _database: release.wait(TIMEOUT_S)))
        await asyncio.sleep(0.01)  # so that the others share the next transaction
        jobs = [asyncio.create_task(store.accept(row(name))) for name in "ab"]
        jobs.insert(1, asyncio.create_task(store._writer.run(bad)))  # type: ignore[arg-type]
        await asyncio.sleep(0.01)
        release.set()
        await blocked
        results = await asyncio.gather(*jobs, return_exceptions=True)
        assert (results[0], results[2]) == (True, True)
        assert isinstance(results[1], StoreError)
        assert {found.request_id for found in await store.requests(status=None, limit=10)} == {"a", "b"}
        assert await store.models() == []

    with_store(state, test)


@pytest.mark.parametrize("suffix", ["", "-wal"])
@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_is_deleted_or_replaced_takes_no_more(state: Path, suffix: str, *, replaced: bool) -> None:
    async def test(store: Store) -> None:
        await store.accept(row("a"))
        assert store.problem() == ""
        path = Path(f"{state}{suffix}")
        path.rename(f"{path}.moved")
        if replaced:
            path.write_bytes(b"")
        with pytest.raises(StoreError, match="was replaced" if replaced else "was deleted"):
            await store.accept(row("b"))
        assert "while the server runs" in store.problem()
        Path(f"{path}.moved").replace(path)
        assert await store.accept(row("b"))

    with_store(state, test)


def test_the_file_is_private(state: Path) -> None:
    async def test(store: Store) -> None:
        await store.accept(row("a"))
        for path in (state, Path(f"{state}-wal")):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600

    with_store(state, test)
    state.chmod(0o644)
    with_store(state, test)


@pytest.mark.parametrize("kind", [":memory:", "folder", "fifo", "device"])
def test_what_is_no_file_is_refused(tmp_path: Path, kind: str) -> None:
    path = {":memory:": Path(":memory:"), "device": Path("/dev/null")}.get(kind, tmp_path / kind)
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    with pytest.raises(InputError, match="would be lost" if kind == ":memory:" else "is not a regular file"):
        Store(path)


def test_a_file_that_another_program_locks_is_refused(state: Path) -> None:
    with_store(state, lambda store: store.accept(row("a")))
    other = sqlite3.connect(state)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(InputError, match="in use by another maveriq serve or another program"):
        Store(state)
    other.close()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_read_only_file_is_refused_in_one_line() -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        state = Path(folder) / "state.db"
        Store(state).close()
        state.chmod(0o444)
        os.seteuid(65_534)
        try:
            with pytest.raises(InputError, match="is read-only for this user") as error:
                Store(state)
        finally:
            os.seteuid(0)
        assert "\n" not in str(error.value)
        assert stat.S_IMODE(state.stat().st_mode) == 0o444


def test_a_damaged_file_is_refused(state: Path) -> None:
    with_store(state, lambda store: store.accept(row("a")))
    content = bytearray(state.read_bytes())
    content[4096 + 8 :] = b"\xff" * (len(content) - 4096 - 8)
    state.write_bytes(bytes(content))
    with pytest.raises(InputError, match=r"damaged|malformed"):
        Store(state)


def test_a_row_that_cannot_be_read_is_named(state: Path) -> None:
    async def test(store: Store) -> None:
        await store.add_model(MODEL, "")
        await store._writer.run(lambda database: database.execute("UPDATE models SET spec = '{}'").rowcount)
        with pytest.raises(StoreError, match="model 1 cannot be read"):
            await store.models()

    with_store(state, test)


def test_closed_store(state: Path) -> None:
    async def test(store: Store) -> None:
        store.close()
        store.close()
        with pytest.raises(StoreError, match="is closed"):
            await store.models()

    with_store(state, test)
