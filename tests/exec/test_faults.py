"""Real faults of engine processes: what happens to their requests and to other engines."""

import asyncio
import dataclasses
import os
import re
import signal
from pathlib import Path

import pytest
from engine_fixtures import QUICK, alive_in_group, run_async, running_executor, until
from fixtures import MODEL

from maveriq.domain.deployments import Intent, Objective
from maveriq.domain.requests import RequestStatus
from maveriq.exec.executor import Executor
from maveriq.exec.gpus import Devices
from maveriq.exec.in_flight import LiveRequestHandle
from maveriq.exec.live_cluster import EndpointRequest, Submission

COMPLETED, FAILED, REFUSED = RequestStatus.COMPLETED, RequestStatus.FAILED, RequestStatus.REFUSED


async def up(executor: Executor, endpoints: int = 1) -> None:
    """Deploy endpoints 1, 2, ... and wait until all of them serve."""
    for _ in range(endpoints):
        executor.deploy(EndpointRequest(model=MODEL, intent=Intent(objective=Objective.MIN_COST), output_tokens=1))
    for endpoint_id in range(1, endpoints + 1):
        await until(lambda: status(executor, endpoint_id) == "up")  # noqa: B023


def status(executor: Executor, endpoint_id: int = 1) -> str:
    return executor.endpoint(endpoint_id)[0].status


def send(
    executor: Executor, endpoint_id: int = 1, tokens: int = 1, prompt: tuple[int, ...] = (1, 2, 3), **more
) -> LiveRequestHandle:
    return executor.submit(Submission(endpoint_id=endpoint_id, prompt=prompt, output_tokens=tokens, **more))


def pid_of(executor: Executor, deployment_id: int = 1) -> int:
    engine = executor._supervisors[deployment_id]._engine
    assert engine is not None
    assert engine._connection is not None
    return engine._connection.pid


async def first_token(handle: LiveRequestHandle) -> int:
    async for token in handle.tokens():
        return token
    raise AssertionError("the request ended without a token")


def test_a_killed_engine_restarts_and_its_request_runs_again(tmp_path) -> None:
    async def check() -> None:
        async with running_executor({1: [(0,)], 2: [(1,)]}, tmp_path, token_s=0.005) as executor:
            await up(executor, 2)
            handle, other = send(executor, tokens=200), send(executor, 2, tokens=300)
            first = await first_token(handle)
            os.kill(pid_of(executor), signal.SIGKILL)
            streamed = [token async for token in handle.tokens()]
            ended = await handle.outcome()
            assert (ended.status, ended.reason) == (COMPLETED, "")
            assert list(ended.tokens) == streamed
            assert len(streamed) == 200
            assert streamed[0] == first
            assert executor.controller.manager.deployments[1].generation == 2
            assert (await other.outcome()).status is COMPLETED
            assert executor.controller.manager.deployments[2].generation == 1
            assert any("signal SIGKILL" in note for note in executor.notes.notes)

    run_async(check)


def test_a_request_that_kills_its_engine_twice_fails_and_the_next_is_served(tmp_path) -> None:
    async def check() -> None:
        async with running_executor({1: [(0,)]}, tmp_path, token_s=0.01) as executor:
            await up(executor)
            handle, after = send(executor, tokens=100), send(executor)
            for generation in (1, 2):
                await until(lambda: executor.controller.manager.deployments[1].generation == generation)  # noqa: B023
                await until(lambda: executor.controller.manager.deployments[1].running)
                os.kill(pid_of(executor), signal.SIGKILL)
                await until(lambda: not executor.controller.manager.deployments[1].running)
            ended = await handle.outcome()
            assert (ended.status, ended.reason) == (
                FAILED,
                "deployment 1 (tiny): its engine ended with signal SIGKILL",
            )
            assert (await after.outcome()).status is COMPLETED

    run_async(check)


def test_a_hanging_engine_is_killed_and_restarts(tmp_path) -> None:
    async def check() -> None:
        quick = dataclasses.replace(QUICK, hang_timeout_s=1.0)
        async with running_executor({1: [(0,)], 2: [(1,)]}, tmp_path, token_s=0.005, supervision=quick) as executor:
            await up(executor, 2)
            handle = send(executor, tokens=200)
            await first_token(handle)
            stopped = pid_of(executor)
            os.kill(stopped, signal.SIGSTOP)
            assert (await send(executor, 2).outcome()).status is COMPLETED
            assert (await handle.outcome()).status is COMPLETED
            assert executor.controller.manager.deployments[1].generation >= 2  # more on a machine that starves engines
            assert any("sent nothing for 1 s" in note for note in executor.notes.notes)
            await until(lambda: not alive_in_group(stopped))

    run_async(check)


def test_an_engine_restarts_when_one_stage_dies(tmp_path) -> None:
    async def check() -> None:
        async with running_executor({1: [(0, 1, 2)]}, tmp_path, token_s=0.005) as executor:
            await up(executor)
            handle = send(executor, tokens=200)
            await first_token(handle)
            leader, group = pid_of(executor), alive_in_group(pid_of(executor))
            assert len(group) == 3
            os.kill(next(pid for pid in group if pid != leader), signal.SIGKILL)
            assert (await handle.outcome()).status is COMPLETED
            assert executor.controller.manager.deployments[1].generation == 2
            await until(lambda: not alive_in_group(leader))

    run_async(check)


def test_out_of_memory_at_start_is_not_retried(tmp_path) -> None:
    async def check() -> None:
        async with running_executor(
            {1: [(0,)], 2: [(1,)]}, tmp_path, backend="engine_fixtures:OutOfMemory"
        ) as executor:
            await up(executor)
            executor.deploy(EndpointRequest(model=MODEL, intent=Intent(objective=Objective.MIN_COST), output_tokens=1))
            await until(lambda: status(executor, 2) == "down")
            deployment = executor.controller.manager.deployments[2]
            assert deployment.generation == 1
            assert deployment.reason == "its engine could not load (out-of-memory): out of memory"
            assert not executor.controller.manager.holds_memory(deployment)
            ended = await send(executor, 2).outcome()
            assert (ended.status, ended.reason) == (REFUSED, "deployment 2 (tiny) is down for good")
            assert (await send(executor).outcome()).status is COMPLETED

    run_async(check)


class HalfFree:
    """GPUs that all have as much free memory, but GPU 3, which has less."""

    def device_of(self, gpu_id: int) -> int:
        return gpu_id

    def free_bytes(self, device: int) -> int:
        return (1 << 30) if device == 3 else (5 << 30)


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (
            1,
            r"\(out-of-memory on GPU 2\): trtllm: needs 2.50 GiB, 1.25 GiB free .RuntimeError: CUDA out",
        ),
        (
            2,
            r"\(out-of-memory\): trtllm: RuntimeError: Executor creation failed due to insufficient GPU memory.; SHORT",
        ),
        (3, r"\(out-of-memory\): trtllm: RuntimeError: CUDA error: out of memory; SHORT"),
        (4, r"\(error\): trtllm: RuntimeError: Executor worker returned error; caused by RuntimeError: no such layer"),
    ],
)
def test_the_status_says_which_gpu_lacks_how_much_memory(tmp_path, number: int, reason: str) -> None:
    short = r"GPU 3 had 1\.00 GiB free for the planned \d\.\d\d GiB"

    async def check() -> None:
        async with running_executor(
            {endpoint_id: [(3, 2)] for endpoint_id in range(1, 5)},
            tmp_path,
            backend="engine_fixtures:WrappedOutOfMemory",
            devices=Devices(uuids=("GPU-a", "GPU-b", "GPU-c", "GPU-d")),
            memory_probe=HalfFree(),
        ) as executor:
            for endpoint_id in range(1, number + 1):
                executor.deploy(
                    EndpointRequest(model=MODEL, intent=Intent(objective=Objective.MIN_COST), output_tokens=1)
                )
                await until(lambda: status(executor, endpoint_id) == "down")  # noqa: B023
            found = executor.controller.manager.deployments[number].reason
            assert re.match("its engine could not load " + reason.replace("SHORT", short), found), found

    run_async(check)


def test_an_engine_that_cannot_load_is_given_up_and_others_continue(tmp_path) -> None:
    async def check() -> None:
        async with running_executor({1: [(0,)], 2: [(0,)]}, tmp_path, backend="engine_fixtures:CannotLoad") as executor:
            await up(executor)
            executor.deploy(EndpointRequest(model=MODEL, intent=Intent(objective=Objective.MIN_COST), output_tokens=1))
            deployment = executor.controller.manager.deployments[2]
            await until(lambda: deployment.state == "down" and not deployment.returns)
            assert deployment.generation == QUICK.max_restarts
            assert deployment.reason == "its engine ended with exit code 9; given up after 3 failures in a row"
            assert (await send(executor).outcome()).status is COMPLETED

    run_async(check)


def test_a_failed_execution_keeps_its_engine(tmp_path) -> None:
    async def check() -> None:
        async with running_executor({1: [(0,)]}, tmp_path, backend="engine_fixtures:CannotGenerate") as executor:
            await up(executor)
            bad, good = send(executor, prompt=(13, 1)), send(executor)
            ended = await bad.outcome()
            assert ended.status is FAILED
            assert ended.reason == (
                "deployment 1 (tiny): its engine could not do it (out-of-memory): no room for the KV cache of this one"
            )
            assert (await good.outcome()).status is COMPLETED
            assert executor.controller.manager.deployments[1].generation == 1

    run_async(check)


def test_removal_stops_the_engine_and_all_its_ranks(tmp_path) -> None:
    async def check() -> None:
        async with running_executor({1: [(0, 1)]}, tmp_path, token_s=0.005) as executor:
            await up(executor)
            running, waiting = send(executor, tokens=200), send(executor)
            await first_token(running)
            group = pid_of(executor)
            executor.remove(1)
            assert (await waiting.outcome()).reason == "deployment 1 (tiny) was removed"
            assert (await running.outcome()).status is COMPLETED
            await until(lambda: not alive_in_group(group))

    run_async(check)


def test_the_next_engine_waits_until_the_previous_one_leaves_its_gpus(tmp_path) -> None:
    async def check() -> None:
        async with running_executor({1: [(0,)], 2: [(0,)]}, tmp_path) as executor:
            await up(executor)
            old = pid_of(executor)
            os.kill(old, signal.SIGSTOP)  # it reacts neither to a message nor to SIGTERM
            executor.remove(1)
            executor.deploy(EndpointRequest(model=MODEL, intent=Intent(objective=Objective.MIN_COST), output_tokens=1))
            await asyncio.sleep(0.5)
            assert status(executor, 2) == "loading"
            assert alive_in_group(old)
            os.kill(old, signal.SIGCONT)
            await until(lambda: status(executor, 2) == "up")
            assert not alive_in_group(old)

    run_async(check)


def test_closing_ends_every_request_and_every_process(tmp_path) -> None:
    async def check() -> None:
        async with running_executor({1: [(0, 1)]}, tmp_path) as executor:
            await up(executor)
            handles = [send(executor, tokens=100_000) for _ in range(3)]
            await first_token(handles[0])
            group = pid_of(executor)
            await executor.close()
            assert not alive_in_group(group)
            ends = [await handle.outcome() for handle in handles]
            assert {(end.status, end.reason) for end in ends} == {
                (RequestStatus.UNFINISHED, "the run ended first"),
            }

    run_async(check)


@pytest.mark.parametrize("when_s", [0.0, 0.03, 0.1])
def test_closing_while_an_engine_starts_leaves_nothing_behind(tmp_path, when_s: float) -> None:
    async def check() -> None:
        async with running_executor({1: [(0, 1)]}, tmp_path) as executor:
            executor.deploy(EndpointRequest(model=MODEL, intent=Intent(objective=Objective.MIN_COST), output_tokens=1))
            await asyncio.sleep(when_s)
            await executor.close()
        assert not children()

    run_async(check)


def children() -> list[str]:
    """Return the running child processes of this process."""
    pids = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [pid for pid in pids if alive_in_group(int(pid))]
