"""Engines that batch continuously, in processes of their own: from the step loop to an executor's records."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_fixtures import QUICK, TIMEOUT_S, EngineCase, environment, run_async, started_engine, until
from fixtures import MODEL, FixedPlacement, TokenSeconds, arrivals, cluster, predict_service_time, scenario

from maveriq.control.controller import CLIENT_GONE, ControllerSettings
from maveriq.domain.deployments import Batching, Intent, Objective
from maveriq.domain.requests import RequestStatus
from maveriq.engine.vllm_settings import VllmSettings
from maveriq.exec.capabilities import known_engines
from maveriq.exec.continuous_loop import ContinuousLoop
from maveriq.exec.engines.continuous import CONTINUOUS_BACKENDS, make_continuous_engine
from maveriq.exec.engines.emulated_batching import EmulatedContinuousEngine
from maveriq.exec.engines.engine import EngineError, FailureKind
from maveriq.exec.executor import Executor
from maveriq.exec.launcher import ProcessLauncher
from maveriq.exec.live_cluster import EndpointRequest, Submission
from maveriq.exec.messages import (
    AbortRequest,
    BatchingSpec,
    Bye,
    Ping,
    Pong,
    PromptSequence,
    StepReport,
    Stop,
    SubmitRequest,
)
from maveriq.exec.numbered_messages import Inbox, Outbox
from maveriq.exec.replay import ReplaySettings, execute
from maveriq.exec.watchdog import SupervisionSettings
from maveriq.scenario.service_times import EstimatedServiceTimes
from maveriq.scenario.system import ServingSystem

CASE = EngineCase(backend="emulated")
SLOW = {"step_ms": 20.0, "prompt_token_us": 0.0}
FAST = {"step_ms": 0.0, "prompt_token_us": 0.0}


def sequence(request_id: int, prompt_tokens: int = 3, output_tokens: int = 4, **more: Any) -> PromptSequence:
    return PromptSequence(
        request_id=request_id, prompt=tuple(range(1, prompt_tokens + 1)), output_tokens=output_tokens, **more
    )


def batching(**arguments: Any) -> BatchingSpec:
    return BatchingSpec(kind="emulated", arguments=arguments)


def loaded_engine(**arguments: Any) -> EmulatedContinuousEngine:
    engine = EmulatedContinuousEngine()
    engine.load(CASE.spec(batching=batching(**FAST | arguments)))
    return engine


# The loop of steps, without a process


def run_loop(engine: EmulatedContinuousEngine, *sequences: PromptSequence) -> list[StepReport]:
    reports: list[StepReport] = []
    loop = ContinuousLoop(engine, reports.append)
    for submitted in sequences:
        loop.submit(submitted, is_urgent=False)
    for _ in range(10_000):
        if not loop.has_requests:
            return reports
        loop.step()
    raise AssertionError("the engine never ends its requests")


@pytest.mark.parametrize("kv_tokens", [1_000, 40, 24])
def test_tokens_come_once_and_in_order_whatever_is_preempted(kv_tokens: int) -> None:
    sequences = [sequence(number, prompt_tokens=2 + number, output_tokens=10) for number in range(1, 8)]
    engine = loaded_engine(max_num_seqs=4, max_num_batched_tokens=6, kv_tokens=kv_tokens)
    reports = run_loop(engine, *sequences)
    for submitted in sequences:
        tokens = [token for report in reports for given in report.tokens for token in given.tokens
                  if given.request_id == submitted.request_id]  # fmt: skip
        [alone] = [report.tokens for report in [collected(loaded_engine(), submitted)]]
        assert tokens == alone
    assert all(report.running <= 4 and report.batch_tokens <= 6 and report.kv_tokens <= kv_tokens for report in reports)
    assert [ended.request_id for report in reports for ended in report.ended] == sorted(
        submitted.request_id for submitted in sequences
    ) or kv_tokens < 1_000
    preempted = [number for report in reports for number in report.preempted]
    assert bool(preempted) == (kv_tokens < 1_000)
    admitted = [entry.request_id for report in reports for entry in report.admitted]
    assert sorted(admitted) == sorted(submitted.request_id for submitted in sequences)


class collected:  # noqa: N801  (a value, by what it holds)
    """The tokens that a request gets alone."""

    def __init__(self, engine: EmulatedContinuousEngine, submitted: PromptSequence) -> None:
        self.tokens = [token for report in run_loop(engine, submitted) for given in report.tokens
                       for token in given.tokens]  # fmt: skip


def test_steps_count_what_was_computed_of_a_request() -> None:
    reports = run_loop(loaded_engine(max_num_batched_tokens=4), sequence(1, prompt_tokens=10, output_tokens=3))
    [ended] = [ended for report in reports for ended in report.ended]
    assert (ended.steps, ended.failure) == (5, "")  # chunks of 4, 4 and 2 tokens, then two single ones
    assert [report.batch_tokens for report in reports] == [4, 4, 2, 1, 1]


def test_a_stop_token_ends_a_request() -> None:
    [first] = collected(loaded_engine(), sequence(1, output_tokens=1)).tokens
    assert collected(loaded_engine(), sequence(1, output_tokens=9, stop_token_ids=(first,))).tokens == [first]


def test_a_request_that_can_never_fit_fails_alone() -> None:
    reports = run_loop(loaded_engine(kv_tokens=10), sequence(1, 8, 8), sequence(2, 2, 2))
    ended = {entry.request_id: entry.failure for report in reports for entry in report.ended}
    assert ended[2] == ""
    assert "a sequence of 16 tokens does not fit a KV cache of 10" in ended[1]


def test_an_aborted_request_is_gone() -> None:
    reports: list[StepReport] = []
    loop = ContinuousLoop(loaded_engine(), reports.append)
    loop.submit(sequence(1), is_urgent=False)
    loop.step()
    loop.abort(1)
    loop.abort(1)
    assert not loop.has_requests
    assert not reports[-1].ended


def test_unknown_arguments_are_named() -> None:
    with pytest.raises(EngineError, match="unknown field `max_seqs`") as refused:
        loaded_engine(max_seqs=3)
    assert refused.value.kind is FailureKind.UNSUPPORTED


def test_backends_that_batch_continuously() -> None:
    assert set(CONTINUOUS_BACKENDS) == {name for name, facts in known_engines().items() if facts.continuous}
    assert isinstance(make_continuous_engine("emulated"), EmulatedContinuousEngine)


# Numbered messages


def test_messages_count_once_and_in_order() -> None:
    sent = [StepReport(number=number) for number in range(1, 6)]
    inbox: Inbox[StepReport] = Inbox()
    for order in itertools.permutations(range(5)):
        inbox = Inbox()
        taken = [due.number for index in (*order, *order) for due in inbox.take(sent[index])]
        assert taken == [1, 2, 3, 4, 5]
    assert inbox.take(StepReport(number=2**53)) == []


def test_what_is_not_acknowledged_is_sent_again_after_two_heartbeats() -> None:
    outbox: Outbox[StepReport] = Outbox()
    for number in (1, 2, 3):
        assert outbox.next_number == number
        outbox.add(StepReport(number=number))
    assert outbox.on_heartbeat(0) == []  # they may be on their way
    assert [message.number for message in outbox.on_heartbeat(1)] == [2, 3]
    outbox.add(StepReport(number=4))
    assert [message.number for message in outbox.on_heartbeat(2)] == [3]
    assert outbox.on_heartbeat(4) == []


# A process


def test_requests_join_and_leave_while_others_run(tmp_path: Path) -> None:
    async def talk() -> None:
        async with started_engine(CASE, tmp_path, load=False, batching=batching(**SLOW)) as engine:
            assert (await engine.load()).kv_tokens == 1_000_000
            first = SubmitRequest(number=1, sequence=sequence(1, output_tokens=100))
            engine.send(first, first)  # a duplicate counts once
            report = await engine.receive(StepReport)
            assert [given.request_id for given in report.tokens] == [1]
            engine.send(SubmitRequest(number=2, sequence=sequence(2, output_tokens=3)))
            reports = [await engine.receive(StepReport)]
            while not reports[-1].ended:
                reports.append(await engine.receive(StepReport))
            assert [ended.request_id for ended in reports[-1].ended] == [2]
            assert sum(len(report.tokens) == 2 for report in reports) == 3
            engine.send(AbortRequest(number=3, request_id=1), Ping(number=1, received=reports[-1].number))
            pong = await engine.receive(Pong)
            assert pong.accepted == 3
            assert pong.steps >= reports[-1].number
            engine.send(Stop())
            await engine.receive(Bye)
            assert await engine.exit_code() == 0

    run_async(talk)


def test_lost_reports_come_again(tmp_path: Path) -> None:
    async def talk() -> None:
        async with started_engine(CASE, tmp_path, batching=batching(**FAST)) as engine:
            engine.send(SubmitRequest(number=1, sequence=sequence(1, output_tokens=3)))
            reports = [await engine.receive(StepReport) for _ in range(3)]
            engine.send(Ping(number=1, received=1), Ping(number=2, received=1))
            again = [await engine.receive(StepReport) for _ in range(2)]
            assert again == reports[1:]

    run_async(talk)


def test_a_long_step_delays_neither_heartbeat_nor_stop(tmp_path: Path) -> None:
    async def talk() -> None:
        async with started_engine(CASE, tmp_path, batching=batching(step_ms=300.0)) as engine:
            engine.send(SubmitRequest(number=1, sequence=sequence(1, output_tokens=1_000)), Ping(number=1))
            assert (await engine.receive()).number == 1  # at once
            engine.send(Stop())
            await engine.receive(Bye)

    run_async(talk)


# An executor


def with_executor(
    folder: Path,
    test: Callable[[Executor, int], Awaitable[None]],
    *,
    backend: str = "emulated",
    supervision: SupervisionSettings = QUICK,
    **arguments: Any,
) -> None:
    """Run a test on an executor with an endpoint that is up."""
    serving = ServingSystem(
        cluster=cluster(4),
        policy=FixedPlacement({1: [(0,)]}),
        settings=ControllerSettings(),
        predict_service_time=predict_service_time,
        service_times=EstimatedServiceTimes(TokenSeconds(0.001)),
        load_time=lambda _plan: 1,
    )
    endpoint = EndpointRequest(
        model=MODEL, intent=Intent(objective=Objective.MIN_COST), output_tokens=8, engine=VllmSettings()
    )

    async def run() -> None:
        with ProcessLauncher(backend, logs=folder, environment=environment()) as launcher:
            spec = batching(**SLOW | arguments)
            executor = Executor(serving, launcher, supervision=supervision, batching_of=lambda *_: spec)
            try:
                endpoint_id = executor.deploy(endpoint)
                await until(lambda: executor.endpoint(endpoint_id)[0].status == "up")
                await test(executor, endpoint_id)
            finally:
                await executor.close()
        assert not executor.internal_error.done()

    run_async(run)


def submission(endpoint_id: int, prompt_tokens: int = 3, output_tokens: int = 4) -> Submission:
    return Submission(endpoint_id=endpoint_id, prompt=(5,) * prompt_tokens, output_tokens=output_tokens)


def test_tokens_of_many_requests_arrive_while_they_are_made(tmp_path: Path) -> None:
    async def checks(executor: Executor, endpoint_id: int) -> None:
        long = executor.submit(submission(endpoint_id, output_tokens=500))
        tokens = long.tokens()
        await anext(tokens)
        others = [executor.submit(submission(endpoint_id)) for _ in range(20)]
        outcomes = [await handle.outcome() for handle in others]
        assert {outcome.status for outcome in outcomes} == {RequestStatus.COMPLETED}
        assert len({outcome.tokens for outcome in outcomes}) == 1  # equal prompts
        assert len(long.tokens_so_far) < 100
        spans = [(outcome.start_us, outcome.finish_us) for outcome in outcomes]
        assert max(start for start, _ in spans) < min(finish for _, finish in spans)  # all at once
        executor.cancel(long.request_id)
        ended = await long.outcome()
        assert (ended.status, ended.reason) == (RequestStatus.FAILED, CLIENT_GONE)
        [counters] = executor.batching.counters().values()
        assert (counters.running, counters.waiting, counters.used_blocks) == (0, 0, 0)

    with_executor(tmp_path, checks)


def test_a_request_that_makes_every_engine_fail_is_tried_twice(tmp_path: Path) -> None:
    async def checks(executor: Executor, endpoint_id: int) -> None:
        fine = executor.submit(submission(endpoint_id, output_tokens=60))
        await anext(fine.tokens())
        poison = executor.submit(submission(endpoint_id, prompt_tokens=13))
        ended = await poison.outcome()
        assert ended.status is RequestStatus.FAILED
        assert "its engine ended with exit code 4" in ended.reason
        assert (await fine.outcome()).status is RequestStatus.FAILED  # both engines of it failed
        await until(lambda: executor.endpoint(endpoint_id)[0].status == "up")
        again = await executor.submit(submission(endpoint_id)).outcome()
        assert again.status is RequestStatus.COMPLETED

    with_executor(tmp_path, checks, backend="engine_fixtures:CrashesInStep")


def test_requests_of_an_engine_that_is_killed_go_on_where_they_were(tmp_path: Path) -> None:
    async def checks(executor: Executor, endpoint_id: int) -> None:
        handles = [executor.submit(submission(endpoint_id, prompt_tokens=n, output_tokens=20)) for n in range(1, 6)]
        await anext(handles[-1].tokens())
        before = [handle.tokens_so_far for handle in handles]
        executor.inject_fault(executor.endpoint(endpoint_id)[0].deployment_id, for_us=1)
        for handle, known in zip(handles, before, strict=True):
            ended = await handle.outcome()
            assert ended.status is RequestStatus.COMPLETED
            assert len(ended.tokens) == 20
            assert ended.tokens[: len(known)] == known

    with_executor(tmp_path, checks)


def test_a_removed_endpoint_finishes_what_its_engine_has(tmp_path: Path) -> None:
    async def checks(executor: Executor, endpoint_id: int) -> None:
        handle = executor.submit(submission(endpoint_id, output_tokens=10))
        await anext(handle.tokens())
        executor.remove(endpoint_id)
        assert (await handle.outcome()).status is RequestStatus.COMPLETED
        late = await executor.submit(submission(endpoint_id)).outcome()
        assert late.status is RequestStatus.REFUSED

    with_executor(tmp_path, checks)


def test_a_request_that_the_engine_refuses_fails_alone(tmp_path: Path) -> None:
    async def checks(executor: Executor, endpoint_id: int) -> None:
        big, small = (executor.submit(submission(endpoint_id, tokens)) for tokens in (60, 3))
        refused = await big.outcome()
        assert refused.status is RequestStatus.FAILED
        assert "does not fit a KV cache of 40" in refused.reason
        assert (await small.outcome()).status is RequestStatus.COMPLETED

    with_executor(tmp_path, checks, kv_tokens=40)


def test_an_engine_that_does_not_get_on_hangs(tmp_path: Path) -> None:
    async def checks(executor: Executor, endpoint_id: int) -> None:
        executor.submit(submission(endpoint_id, output_tokens=5))
        await until(lambda: any("its requests make no progress" in note for note in executor.notes.notes))

    hangs = SupervisionSettings(
        heartbeat_interval_s=0.05, hang_timeout_s=0.5, initial_backoff_s=0.02, max_restarts=2, start_timeout_s=TIMEOUT_S
    )
    with_executor(tmp_path, checks, supervision=hangs, step_ms=60_000.0)


# A replay


def test_a_replay_on_engine_processes_leaves_the_records_of_continuous_engines(tmp_path: Path) -> None:
    draws = np.random.default_rng(3)
    requests = arrivals(np.sort(draws.integers(0, 200_000, 30)).tolist(), [1] * 30, draws.integers(1, 12, 30).tolist())
    made = scenario(requests, {1: [(0,)]}, settings=ControllerSettings(refuse_beyond_context=False))
    endpoints = tuple(
        replace(endpoint, batching=Batching.CONTINUOUS, ready_at_start=True) for endpoint in made.workload.endpoints
    )
    replayed = replace(made, workload=replace(made.workload, endpoints=endpoints))

    async def replay() -> Any:
        with ProcessLauncher("emulated", logs=tmp_path, environment=environment()) as launcher:
            settings = ReplaySettings(supervision=QUICK, batching_of=lambda *_: batching(step_ms=5.0, max_num_seqs=8))
            return await execute(replayed, launcher, settings)

    result = run_async(replay)
    record = result.record
    assert (record.requests.status == RequestStatus.COMPLETED.value).all()
    assert (record.requests.steps == record.requests.output_tokens).all()  # one chunk, then a step for each token
    assert (record.requests.arrival_us <= record.requests.start_us).all()
    assert (record.requests.start_us <= record.requests.first_token_us).all()
    assert (record.requests.first_token_us <= record.requests.finish_us).all()
    assert record.engines is not None
    assert 0 < record.engines.running.max() <= 8
    assert 0 < record.engines.kv_use.max() < 1
    assert record.itl is not None
    assert int(record.itl.tokens.sum()) == int((record.requests.output_tokens - 1).sum())
    assert result.lag is not None
    [engine] = result.engines
    assert engine.loaded.kv_tokens == 1_000_000
