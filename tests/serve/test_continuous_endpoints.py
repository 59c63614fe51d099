"""Endpoints whose engines batch continuously: what a request may say, what is stored, and what is served."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sqlite3
import threading
from pathlib import Path

import httpx
import pytest
from engine_fixtures import QUICK, environment
from running import MODEL, TIMEOUT_S, Running, running, until
from test_serve_command import sample, serving

from maveriq.domain.deployments import Batching, Intent, Objective
from maveriq.domain.models import load_model
from maveriq.domain.requests import RequestStatus
from maveriq.engine.vllm_settings import VllmSettings
from maveriq.errors import InputError
from maveriq.exec.batching_spec import EngineChoice, live_batching_specs, settings_table
from maveriq.exec.executor import Executor
from maveriq.exec.launcher import ProcessLauncher
from maveriq.exec.live_cluster import EndpointRequest, Submission
from maveriq.scenario.build import build_live_system
from maveriq.scenario.options import Options
from maveriq.serve.settings import ServeSettings
from maveriq.serve.store import Store

SMALL = {"kind": "vllm", "max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 512}


# What a request may say


@pytest.mark.parametrize(
    ("backend", "text", "default"),
    [
        ("vllm", None, VllmSettings()),
        ("vllm", "exclusive", None),
        ("vllm", "vllm serve any --max-num-seqs 64", VllmSettings(max_num_seqs=64)),
        ("emulated", None, None),
        ("emulated", "vllm-0.15.1", VllmSettings(version="0.15.1")),
        ("torch", None, None),
        ("trtllm", "exclusive", None),
    ],
)
def test_the_default_of_a_backend(backend: str, text: str | None, default: VllmSettings | None) -> None:
    choice = EngineChoice.of(backend, text)
    assert choice.settings(None) == (default, text is not None and "serve" in text)


@pytest.mark.parametrize(
    ("backend", "given", "message"),
    [
        (
            "torch",
            "vllm",
            "runs torch engines one execution at a time; use --backend emulated or vllm",
        ),
        ("trtllm", {"kind": "vllm"}, "runs trtllm engines one execution at a time"),
        ("vllm", "sglang", "--backend vllm does not run engines of kind 'sglang'; --backend emulated emulates them"),
        ("vllm", {"max_nm_seqs": 3}, "unknown key `max_nm_seqs`"),
        ("vllm", {"max_num_seqs": 0}, "max_num_seqs"),
        ("vllm", "vlm", "unknown kind of engine 'vlm'"),
    ],
)
def test_what_a_backend_does_not_run_is_refused(backend: str, given: object, message: str) -> None:
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        EngineChoice(backend=backend).settings(given)  # type: ignore[arg-type]


def test_a_table_says_what_is_set_and_is_read_again() -> None:
    settings = VllmSettings(max_num_seqs=7, enable_prefix_caching=False)
    table = settings_table(settings)
    assert table == {"kind": "vllm", "version": settings.version, "max_num_seqs": 7, "enable_prefix_caching": False}
    assert EngineChoice().settings(table) == (settings, False)


def test_an_endpoint_tells_its_engine(server: Running) -> None:
    with server.client() as http:
        made = http.post("/endpoints", json={"model": MODEL, "engine": SMALL}).json()
        assert made["engine"] == SMALL | {"version": VllmSettings().version}
        assert http.get(f"/endpoints/{made['id']}").json()["engine"] == made["engine"]
        assert http.post("/endpoints", json={"model": MODEL}).json()["engine"] is None
        for engine, message in (
            ({"kind": "vllm", "max_nm_seqs": 3}, "unknown key `max_nm_seqs`"),
            ({"kind": "vllm", "max_num_seqs": [1]}, "engine"),
            ("vlm", "unknown kind of engine"),
            ("", "engine"),
        ):
            refused = http.post("/endpoints", json={"model": MODEL, "engine": engine})
            assert refused.status_code == 400
            assert message in refused.json()["error"]["message"]
        both = http.post("/endpoints", json={"model": MODEL, "engine": "vllm", "batch_size": 2})
        assert (both.status_code, both.json()["error"]["param"]) == (400, "batch_size")


# What is stored


def test_an_older_state_file_is_read_and_its_endpoints_are_exclusive(state: Path) -> None:
    asked = EndpointRequest(model=load_model(MODEL), intent=Intent(objective=Objective.MIN_COST), output_tokens=20)

    async def write(store: Store) -> None:
        model = await store.add_model(asked.model, "")
        await store.add_endpoint(model.model_id, asked, "")

    with contextlib.closing(Store(state)) as store:
        asyncio.run(write(store))
    with contextlib.closing(sqlite3.connect(state)) as older, older:
        # As version 2 wrote it: it knew neither key.
        older.execute("UPDATE endpoints SET request = json_remove(request, '$.engine', '$.whole_command')")
        older.execute("PRAGMA user_version = 2")
    with contextlib.closing(Store(state)) as store:
        [restored] = asyncio.run(store.endpoints())
    assert restored.request == asked
    assert restored.request.batching is Batching.EXCLUSIVE
    with contextlib.closing(sqlite3.connect(state)) as newer:
        assert newer.execute("PRAGMA user_version").fetchone() == (3,)


def test_an_engine_survives_a_restart(state: Path) -> None:
    with running(state) as server, server.client() as http:
        server.deploy(engine=SMALL)
        server.deploy(engine="vllm serve any --tensor-parallel-size 2")
        before = [endpoint["engine"] for endpoint in http.get("/endpoints").json()]
    with running(state) as server, server.client() as http:
        assert [endpoint["engine"] for endpoint in http.get("/endpoints").json()] == before


def test_a_server_has_a_default(state: Path) -> None:
    settings = ServeSettings(grace_period_s=2, engine=EngineChoice.of("vllm", None))
    with running(state, settings) as server, server.client() as http:
        server.deploy()
        server.deploy(engine="exclusive")
        assert [(endpoint["engine"] or {}).get("kind") for endpoint in http.get("/endpoints").json()] == ["vllm", None]


# What is served


def with_live_executor(folder: Path, test: object, *, gpus: str = "2xH100-SXM") -> None:
    """Run a test on an executor as `maveriq serve --backend emulated` makes one."""

    async def run() -> None:
        system, _ = build_live_system(Options(gpus=gpus, load_s=0))
        assert system.live_engines is not None
        with ProcessLauncher("emulated", logs=folder, environment=environment()) as launcher:
            specs = live_batching_specs(system.live_engines, "emulated")
            executor = Executor(system, launcher, supervision=QUICK, batching_of=specs)
            try:
                await test(executor)  # type: ignore[operator]
            finally:
                await executor.close()

    asyncio.run(asyncio.wait_for(run(), 3 * TIMEOUT_S))


def asked(engine: dict[str, object] | str | None, name: str = MODEL) -> EndpointRequest:
    settings, whole_command = EngineChoice().settings(engine)
    return EndpointRequest(
        model=load_model(name), intent=Intent(objective=Objective.MIN_COST), output_tokens=20, engine=settings,
        whole_command=whole_command,
    )  # fmt: skip


def test_continuous_and_exclusive_endpoints_side_by_side(tmp_path: Path) -> None:
    async def checks(executor: Executor) -> None:
        continuous, exclusive = executor.deploy(asked(dict(SMALL))), executor.deploy(asked(None))
        [first], [second] = executor.endpoint(continuous), executor.endpoint(exclusive)
        assert first.gpu_ids != second.gpu_ids
        while not all(executor.endpoint(number)[0].status == "up" for number in (continuous, exclusive)):
            await asyncio.sleep(0.01)
        assert executor.max_sequence_tokens(continuous) == 512
        assert executor.max_sequence_tokens(exclusive) == load_model(MODEL).context_tokens
        assert "longer than the 512" in (executor.why_too_long(continuous, 513) or "")
        handles = [
            executor.submit(Submission(endpoint_id=number, prompt=(1, 2, 3), output_tokens=30))
            for number in [continuous] * 8 + [exclusive] * 2
        ]
        outcomes = [await handle.outcome() for handle in handles]
        assert {outcome.status for outcome in outcomes} == {RequestStatus.COMPLETED}
        assert {len(outcome.tokens) for outcome in outcomes} == {30}
        starts, ends = [outcome.start_us for outcome in outcomes], [outcome.finish_us for outcome in outcomes]
        assert max(starts[:4]) < min(ends[:4])  # four run together
        assert starts[9] >= ends[8]  # one after the other
        assert (executor.endpoint(continuous)[0].running, executor.endpoint(exclusive)[0].running) == (0, None)
        executor.remove(continuous)
        assert executor._system.live_engines is not None
        assert not executor._system.live_engines.settings

    with_live_executor(tmp_path, checks)


def test_an_endpoint_with_contradictory_settings_is_rejected(tmp_path: Path) -> None:
    async def checks(executor: Executor) -> None:
        number = executor.deploy(asked({"max_num_seqs": 100, "max_num_batched_tokens": 10}))
        [deployment] = executor.endpoint(number)
        assert deployment.status == "rejected"
        assert "max_num_batched_tokens 10 is less than max_num_seqs 100" in deployment.reason

    with_live_executor(tmp_path, checks)


def test_a_whole_command_says_on_how_many_gpus(tmp_path: Path) -> None:
    async def checks(executor: Executor) -> None:
        number = executor.deploy(asked("vllm serve any --tensor-parallel-size 2 --gpu-memory-utilization 0.5"))
        [deployment] = executor.endpoint(number)
        assert len(deployment.gpu_ids) == 2
        shared = executor.deploy(asked("vllm serve any --gpu-memory-utilization 0.45", "llama-2-13b"))
        assert executor.endpoint(shared)[0].status != "rejected"  # beside the other, by its share of the memory

    with_live_executor(tmp_path, checks)


@pytest.mark.heavy
def test_serve_streams_cancels_measures_and_restarts(tmp_path: Path) -> None:
    options = ("--gpus", "2xH100-SXM", "--load-s", "0", "--engine", "vllm", "--time-scale", "1")
    body = {"model": MODEL, "prompt": "Hello", "max_tokens": 600, "stream": True}
    with serving(tmp_path, *options) as (server, url), httpx.Client(base_url=url, timeout=TIMEOUT_S) as http:
        assert http.post("/endpoints", json={"model": MODEL}).json()["engine"]["kind"] == "vllm"
        until(lambda: http.get("/endpoints/1").json()["status"] == "up")
        threads = [
            threading.Thread(target=lambda: httpx.post(f"{url}/v1/completions", json=body, timeout=TIMEOUT_S))
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        with http.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)  # the first token, while others run
            until(lambda: sample(http, "maveriq_deployment_running") == 4)
            assert 0 < sample(http, "maveriq_deployment_kv_use_ratio") < 1
        until(lambda: sample(http, "maveriq_deployment_running") == 3)  # the client is gone, and so is its request
        for thread in threads:
            thread.join(TIMEOUT_S)
        statuses = sorted(row["status"] for row in http.get("/requests").json())
        assert statuses == ["completed"] * 3 + ["failed"]
        server.send_signal(signal.SIGTERM)
        assert server.wait(TIMEOUT_S) == 0
    with serving(tmp_path, *options) as (server, url), httpx.Client(base_url=url, timeout=TIMEOUT_S) as http:
        assert http.get("/endpoints/1").json()["engine"]["kind"] == "vllm"
        until(lambda: http.get("/endpoints/1").json()["status"] == "up")
        assert http.post("/v1/completions", json=body | {"stream": False, "max_tokens": 3}).status_code == 200
