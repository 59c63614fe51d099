"""The executor as a service uses it: prompts in, tokens and outcomes out."""

import asyncio

import pytest
from engine_fixtures import TIMEOUT_S, EngineCase, run_async, running_executor, until
from fixtures import MODEL
from test_faults import first_token, send, status, up

from maveriq.domain.deployments import Intent, Objective
from maveriq.domain.requests import RequestStatus
from maveriq.errors import InputError
from maveriq.exec.engine_process import LaunchSpec
from maveriq.exec.live_cluster import EndpointRequest, LiveCluster, RequestHandle
from maveriq.exec.messages import Loaded
from maveriq.exec.run_notes import RunNotes


def test_tokens_stream_before_the_outcome(tmp_path) -> None:
    async def check() -> None:
        async with running_executor({1: [(0,)]}, tmp_path, token_s=0.01) as executor:
            cluster: LiveCluster = executor
            await up(executor)
            handle: RequestHandle = send(executor, tokens=100)
            arrived_us = cluster.now_us
            tokens = handle.tokens()
            await anext(tokens)
            assert executor.progress().running == 1, "tokens come while the request runs"
            assert len([token async for token in tokens]) == 99
            ended = await handle.outcome()
            assert ended.status is RequestStatus.COMPLETED
            assert ended.arrival_us <= arrived_us <= ended.first_token_us <= ended.finish_us
            assert ended.start_us <= ended.first_token_us
            assert [token async for token in handle.tokens()] == list(ended.tokens)  # a late reader gets all tokens

    run_async(check)


def test_cancelling_fails_a_waiting_request_and_lets_a_running_one_finish(tmp_path) -> None:
    async def check() -> None:
        async with running_executor({1: [(0,)]}, tmp_path, token_s=0.005) as executor:
            await up(executor)
            running, waiting, after = send(executor, tokens=20), send(executor), send(executor)
            executor.cancel(waiting.request_id)
            executor.cancel(running.request_id)
            executor.cancel(10**9)
            ended = await waiting.outcome()
            assert (ended.status, ended.reason) == (RequestStatus.FAILED, "the client went away")
            assert (await running.outcome()).status is RequestStatus.COMPLETED
            assert (await after.outcome()).status is RequestStatus.COMPLETED
            executor.cancel(running.request_id)

    run_async(check)


def test_a_batch_starts_and_ends_together(tmp_path) -> None:
    async def check() -> None:
        async with running_executor({1: [(0,)]}, tmp_path, token_s=0.002, batch_size=3) as executor:
            await up(executor)
            first, *others = [send(executor, tokens=count, prompt=(count,)) for count in (5, 2, 9, 1)]
            ends = [await handle.outcome() for handle in others]
            assert [len(end.tokens) for end in ends] == [2, 9, 1]
            assert len({(end.start_us, end.finish_us) for end in ends}) == 1
            assert (await first.outcome()).finish_us <= ends[0].start_us

    run_async(check)


def test_records_count_the_tokens_that_came(tmp_path) -> None:
    async def check() -> None:
        async with running_executor({1: [(0,)]}, tmp_path, backend="engine_fixtures:EndsEarly") as executor:
            await up(executor)
            ends = [await send(executor, tokens=tokens).outcome() for tokens in (2, 50)]
            assert [len(end.tokens) for end in ends] == [2, 3]
            assert executor.end_requests().output_tokens.tolist() == [2, 3]

    run_async(check)


def test_an_unknown_endpoint_is_an_input_error(tmp_path) -> None:
    async def check() -> None:
        async with running_executor({1: []}, tmp_path) as executor:
            for call in (lambda: send(executor), lambda: executor.endpoint(1), lambda: executor.remove(1)):
                with pytest.raises(InputError, match="there is no endpoint 1"):
                    call()
            executor.deploy(EndpointRequest(model=MODEL, intent=Intent(objective=Objective.MIN_COST), output_tokens=1))
            assert status(executor) == "rejected"
            ended = await send(executor).outcome()
            assert (ended.status, ended.reason) == (RequestStatus.REFUSED, "deployment 1 (tiny) was rejected")
            await executor.close()
            with pytest.raises(InputError, match="shut down"):
                send(executor)

    run_async(check)


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt": ()},
        {"prompt": (-1,)},
        {"prompt": (1 << 31,)},
        {"prompt": (1 << 70,)},
        {"tokens": 0},
        {"tokens": 10**7},
    ],
    ids=repr,
)
def test_an_invalid_request_is_refused_and_changes_nothing(tmp_path, wrong) -> None:
    async def check() -> None:
        async with running_executor({1: [(0,)]}, tmp_path) as executor:
            await up(executor)
            with pytest.raises(InputError, match="request 1 cannot be put to an engine"):
                send(executor, **wrong)
            assert (await send(executor).outcome()).request_id == 1

    run_async(check)


def test_injecting_a_fault_without_an_engine_leaves_no_note(tmp_path) -> None:
    async def check() -> None:
        async with running_executor({1: []}, tmp_path) as executor:
            executor.deploy(EndpointRequest(model=MODEL, intent=Intent(objective=Objective.MIN_COST), output_tokens=1))
            for deployment_id in (1, 2):
                executor.inject_fault(deployment_id, for_us=None)
            assert executor.notes.notes == []

    run_async(check)


def test_run_notes_are_bounded(monkeypatch) -> None:
    monkeypatch.setattr("maveriq.exec.run_notes.MAX_ENGINES", 3)
    notes = RunNotes()
    launch = LaunchSpec(spec=EngineCase(backend="emulated").spec(), needed={0: 1}, load_s=0)
    for number in range(200):
        notes.engine_starting(1, number)
        notes.engine_loaded(launch, Loaded(backend="emulated", version="1"), number + 1)
        notes.add_note("deployment 1 (tiny)", number, "it crashed")
    assert [engine.start_s for engine in notes.engines] == [1, 1, 1]
    assert len(notes.notes) == 101
    assert "omitted" in notes.notes[-1]


def test_endpoints_keep_their_ids_over_a_restart(tmp_path) -> None:
    async def check() -> None:
        async with running_executor({7: [(0,)], 8: [(1,)]}, tmp_path) as executor:
            requested = EndpointRequest(model=MODEL, intent=Intent(objective=Objective.MIN_COST), output_tokens=1)
            assert executor.deploy(requested, endpoint_id=7) == 7
            assert executor.deploy(requested) == 8
            await until(lambda: status(executor, 7) == status(executor, 8) == "up")
            assert (await send(executor, 7).outcome()).status is RequestStatus.COMPLETED

    run_async(check)


def test_progress_counts(tmp_path) -> None:
    async def check() -> None:
        async with running_executor({1: [(0,)]}, tmp_path, token_s=0.01) as executor:
            await up(executor)
            handle = send(executor, tokens=30)
            send(executor)
            await first_token(handle)
            seen = executor.progress()
            assert (seen.arrived, seen.running, seen.waiting, seen.total) == (2, 1, 1, 2)
            await asyncio.wait_for(executor.drained(), TIMEOUT_S)
            assert executor.progress().completed == 2

    run_async(check)
