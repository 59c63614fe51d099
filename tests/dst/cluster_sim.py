"""One simulated run of the executor: users deploy and send, engines fail, and the checks at the end must hold."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field

from fault_injection import FaultRates, RandomDraws
from fixtures import MODEL, TokenSeconds, cluster
from simulated_engines import Machine, token
from virtual_time import run_virtually

from maveriq.control.controller import ControllerSettings, OnFailure
from maveriq.control.queues import QueueDiscipline
from maveriq.domain.cluster import ClusterView, DispatchTiming
from maveriq.domain.deployments import Batching, EndpointSpec, Intent, Objective
from maveriq.domain.models import WeightType
from maveriq.domain.parallel import DeploymentPlan, ParallelConfig
from maveriq.domain.requests import FINAL_STATUSES, RequestStatus
from maveriq.engine.vllm_settings import VllmSettings
from maveriq.exec.executor import Executor
from maveriq.exec.launcher import Launcher
from maveriq.exec.live_cluster import EndpointRequest, Outcome, RequestHandle, Submission
from maveriq.exec.messages import BatchingSpec, EngineSpec
from maveriq.exec.watchdog import SupervisionSettings
from maveriq.policy.policy import Decision, Deploy, Policy, Rejection
from maveriq.scenario.service_times import EstimatedServiceTimes
from maveriq.scenario.system import ServingSystem
from maveriq.units import BYTES_PER_GIB, micros

LONGEST_S = 3_000.0
_TOKEN_S = 0.05
MAX_TOKENS = 20


@dataclass
class RunSummary:
    """Counts of a run."""

    statuses: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    engines: int = 0
    deployments: int = 0
    failures: int = 0
    hangs: int = 0
    simulated_s: float = 0.0


class RandomPlacement:
    """A policy that puts each model on random GPUs with room."""

    name = "anywhere"

    def __init__(self, draws: RandomDraws) -> None:
        self._draws = draws

    def decide(self, endpoint: EndpointSpec, view: ClusterView) -> Decision:
        shard = self._draws.integer(1, 5) * BYTES_PER_GIB
        room = [gpu.gpu_id for gpu in view.gpus if gpu.free_bytes >= shard]
        if not room:
            return Rejection(reason="no room")
        count = self._draws.integer(1, min(3, len(room)))
        for at in range(count):
            other = self._draws.integer(at, len(room) - 1)
            room[at], room[other] = room[other], room[at]
        plan = DeploymentPlan(
            model=MODEL,
            configuration=ParallelConfig(
                tp=1,
                pp=count,
                weights=WeightType.FLOAT16,
                batch_size=endpoint.batch_size,
                layer_split=(MODEL.layers - count + 1, *[1] * (count - 1)),
            ),
            gpu_ids=tuple(room[:count]),
            gpu_bytes=(shard,) * count,
            est_latency_s=1.0,
            est_memory_bytes=shard * count,
        )
        return Deploy(plans=(plan,))


class Users:
    """The users of one executor, and what they receive."""

    def __init__(
        self,
        draws: RandomDraws,
        executor: Executor,
        *,
        break_engines: bool,
        batching: Batching = Batching.EXCLUSIVE,
    ) -> None:
        self._batching = batching
        self._draws = draws
        self._executor = executor
        self._break_engines = break_engines
        self._endpoints: list[int] = []
        self._followers: list[asyncio.Task[Outcome]] = []

    async def run(self) -> list[Outcome]:
        """Run all users, then wait until every request has ended."""
        await asyncio.gather(
            *(self._developer() for _ in range(self._draws.integer(1, 4))), self._break_engines_at_random()
        )
        await self._executor.drained()
        return await asyncio.gather(*self._followers)

    async def _developer(self) -> None:
        """Deploy an endpoint, send requests, and sometimes remove it."""
        await asyncio.sleep(self._draws.between(0, 30))
        requested = EndpointRequest(
            model=MODEL,
            intent=Intent(objective=Objective.MIN_COST),
            output_tokens=MAX_TOKENS,
            batch_size=self._draws.integer(1, 3),
            engine=VllmSettings() if self._batching is Batching.CONTINUOUS else None,
        )
        endpoint_id = self._executor.deploy(requested)
        self._endpoints.append(endpoint_id)
        for _ in range(self._draws.integer(0, 25)):
            await asyncio.sleep(self._draws.wait_s(3))
            self._send(endpoint_id)
        if self._draws.happens(0.3):
            self._executor.remove(endpoint_id)
            self._send(endpoint_id)

    def _send(self, endpoint_id: int) -> None:
        submission = Submission(
            endpoint_id=endpoint_id,
            prompt=tuple(range(self._draws.integer(1, 5))),
            output_tokens=self._draws.integer(1, MAX_TOKENS),
            priority=self._draws.happens(0.1),
        )
        handle = self._executor.submit(submission)
        self._followers.append(asyncio.create_task(follow(handle, submission)))
        if self._draws.happens(0.1):
            delay_s = self._draws.wait_s(2)
            asyncio.get_running_loop().call_later(delay_s, self._executor.cancel, handle.request_id)

    async def _break_engines_at_random(self) -> None:
        """Make engines fail on purpose."""
        while self._break_engines and self._draws.happens(0.5):
            await asyncio.sleep(self._draws.wait_s(20))
            if self._endpoints:
                victims = self._executor.endpoint(self._endpoints[self._draws.integer(0, len(self._endpoints) - 1)])
                for_us = micros(self._draws.between(0, 20)) if self._draws.happens(0.7) else None
                self._executor.inject_fault(victims[0].deployment_id, for_us=for_us)


async def follow(handle: RequestHandle, submission: Submission) -> Outcome:
    """Read the tokens of a request as a client does, and check them."""
    seen = [received async for received in handle.tokens()]
    ended = await handle.outcome()
    right = [token(submission.prompt, at) for at in range(submission.output_tokens)]
    assert seen == right[: len(seen)], f"request {handle.request_id}: wrong tokens: {seen} of {right}"
    assert tuple(seen) == ended.tokens
    assert ended.status in FINAL_STATUSES
    assert (ended.reason == "") == (ended.status is RequestStatus.COMPLETED)
    if ended.status is RequestStatus.COMPLETED:
        assert len(seen) == submission.output_tokens
        assert ended.arrival_us <= ended.start_us <= ended.first_token_us <= ended.finish_us
    return ended


def simulate_cluster(
    seed: int, fault_rates: FaultRates | None = None, *, batching: Batching = Batching.EXCLUSIVE
) -> RunSummary:
    """Simulate a cluster under the faults of a seed, or under given fault rates; all engines batch alike.

    Raises:
        AssertionError: a check failed.
        TimeoutError: something never ended.
    """
    draws = RandomDraws(seed)
    drawn = FaultRates.drawn(draws)
    return run_virtually(_simulate(draws, fault_rates or drawn, batching), longest_s=LONGEST_S)


async def _simulate(draws: RandomDraws, fault_rates: FaultRates, batching: Batching) -> RunSummary:
    machine = Machine(draws, fault_rates)
    executor = executor_on(draws, machine, RandomPlacement(draws), machine)
    standing = asyncio.create_task(machine.stall_at_random())
    users = Users(draws, executor, break_engines=fault_rates.break_engines, batching=batching)
    outcomes = await users.run()
    standing.cancel()
    notes = executor.notes.notes
    await executor.close()
    table = executor.end_requests()
    counts = Counter(outcome.status.label for outcome in outcomes)
    assert {status.label: count for status, count in table.counts().items() if count} == counts
    assert sorted(outcome.request_id for outcome in outcomes) == list(range(1, len(outcomes) + 1))
    assert RequestStatus.UNFINISHED.label not in counts, "drained, but some request has not ended"
    assert not [process.name for process in machine.processes if process.alive], "processes outlive their executor"
    await asyncio.sleep(5)
    assert not machine.lingering
    assert not machine.violations, machine.violations[0]
    assert not machine.runs or max(machine.runs.values()) <= 2, "a request ran more often than twice"
    assert not executor.internal_error.done(), executor.internal_error.exception()
    return RunSummary(
        statuses=counts,
        reasons=Counter(
            " ".join(word for word in outcome.reason.split() if not word.isdigit()) for outcome in outcomes
        ),
        engines=len(machine.processes),
        deployments=sum(1 for record in executor.controller.manager.deployments.values() if record.generation),
        failures=len(notes),
        hangs=sum("heartbeat timeout" in note or "makes no progress" in note for note in notes),
        simulated_s=asyncio.get_running_loop().time(),
    )


def small_batches(endpoint: EndpointSpec, plan: DeploymentPlan) -> BatchingSpec:
    """Return settings with which requests are preempted, and prompts computed in parts."""
    return BatchingSpec(
        kind="simulated",
        arguments={
            "max_num_seqs": 3,
            "max_num_batched_tokens": 4,
            "kv_tokens": 30,
            "step_ms": 0.0,
            "prompt_token_us": 0.0,
        },
    )


def executor_on(draws: RandomDraws, machine: Machine, policy: Policy, launcher: Launcher) -> Executor:
    """Return an executor on a machine; a machine without GPUs gets some."""
    machine.capacity = machine.capacity or [gpu.capacity_bytes for gpu in cluster(draws.integer(1, 5)).gpus]
    system = ServingSystem(
        cluster=cluster(len(machine.capacity)),
        policy=policy,
        settings=ControllerSettings(
            timing=_timing(draws),
            discipline=list(QueueDiscipline)[draws.integer(0, len(QueueDiscipline) - 1)],
            on_failure=OnFailure.REQUEUE if draws.happens(0.7) else OnFailure.FAIL,
        ),
        predict_service_time=lambda *_: micros(1.0),
        service_times=EstimatedServiceTimes(TokenSeconds(_TOKEN_S)),
        load_time=lambda _: micros(draws.between(0.1, 3)),
    )
    executor = Executor(
        system,
        launcher,
        supervision=SupervisionSettings(
            start_timeout_s=15.0,
            heartbeat_interval_s=draws.between(0.2, 1),
            hang_timeout_s=8.0,
            grace_period_s=1.0,
            initial_backoff_s=0.5,
            max_backoff_s=8.0,
            max_restarts=draws.integer(2, 6),
            memory_timeout_s=10.0,
        ),
        memory_probe=machine,
        batching_of=small_batches,
    )

    def memory_of(spec: EngineSpec) -> dict[int, int]:
        plan = executor.controller.manager.deployments[spec.deployment_id].required_plan
        return dict(zip(plan.gpu_ids, plan.gpu_bytes, strict=True))

    machine.memory_of = memory_of
    return executor


def _timing(draws: RandomDraws) -> DispatchTiming:
    if draws.happens(0.5):
        return DispatchTiming()
    return DispatchTiming(
        tick_us=10_300, after_arrival_us=1_400, after_release_us=2_200, registration_delay_us=2_000_000
    )
