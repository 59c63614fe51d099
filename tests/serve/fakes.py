"""An in-memory `LiveCluster` for tests."""

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from maveriq.domain.cluster import Cluster, ClusterState, Gpu
from maveriq.domain.deployments import EndpointSpec
from maveriq.domain.models import WeightType
from maveriq.domain.parallel import DeploymentPlan, ParallelConfig
from maveriq.domain.progress import DeploymentStatus, GpuStatus, Progress
from maveriq.domain.requests import RequestStatus
from maveriq.errors import InputError
from maveriq.exec.live_cluster import EndpointRequest, Outcome, Submission
from maveriq.policy.pinned import PinnedPlacementPolicy
from maveriq.policy.policy import Decision, Deploy, Rejection

GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class OneGpu:
    """A policy that puts a model whole on the roomiest GPU, or on the last one that has room."""

    name: str = "one-gpu"
    last: bool = False

    def decide(self, endpoint: EndpointSpec, view: object) -> Decision:
        needs = endpoint.model.layers * endpoint.model.hidden_size * 100_000
        room = [gpu for gpu in view.by_free_memory() if gpu.free_bytes >= needs]  # type: ignore[attr-defined]
        if not room:
            return Rejection(reason=f"{endpoint.model.name} needs {needs} bytes on one GPU")
        plan = DeploymentPlan(
            model=endpoint.model,
            configuration=ParallelConfig(tp=1, pp=1, weights=WeightType.FLOAT16, batch_size=endpoint.batch_size),
            gpu_ids=(max(gpu.gpu_id for gpu in room) if self.last else room[0].gpu_id,),
            gpu_bytes=(needs,),
            est_latency_s=1.0,
            est_memory_bytes=needs,
        )
        return Deploy(plans=(plan,))


def placements() -> PinnedPlacementPolicy:
    return PinnedPlacementPolicy(default=OneGpu(), by_name={"first": OneGpu(), "last": OneGpu(name="last", last=True)})


def gpus(count: int = 4) -> Cluster:
    return Cluster(
        name="fake",
        gpus=tuple(Gpu(gpu_id=i, node=0, kind="fake", capacity_bytes=48 * GIB, idle_bytes=GIB) for i in range(count)),
    )


def token(prompt: tuple[int, ...], position: int, vocab_size: int) -> int:
    """Return a token of the fake engine, a function of prompt and position."""
    return hashlib.sha256(f"{prompt}{position}".encode()).digest()[0] % min(vocab_size, 96) + 35


class FakeRequestHandle:
    def __init__(self, request_id: int, submission: Submission, arrival_us: int) -> None:
        self.request_id = request_id
        self.submission = submission
        self.arrival_us = arrival_us
        self.start_us = self.first_us = -1
        self.got: list[int] = []
        self.ended: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self.news = asyncio.Event()

    async def tokens(self) -> AsyncIterator[int]:
        sent = 0
        while True:
            while sent < len(self.got):
                yield self.got[sent]
                sent += 1
            if self.ended.done():
                return
            self.news.clear()
            await self.news.wait()

    async def outcome(self) -> Outcome:
        return await asyncio.shield(self.ended)


@dataclass
class FakeEndpoint:
    requested: EndpointRequest
    endpoint_id: int
    deployment_id: int
    plan: DeploymentPlan | None
    reason: str = ""
    status: str = "loading"
    waiting: list[FakeRequestHandle] = field(default_factory=list)
    running: FakeRequestHandle | None = None
    completed: int = 0
    restarts: int = 0
    news: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None


class FakeCluster:
    """One request at a time per endpoint; `token_s` per token, `load_s` until an engine is up.

    `breaks` is how many of the next executions fail. With `permits` each token takes one, so that a test decides when
    tokens come.
    """

    def __init__(
        self,
        policy: PinnedPlacementPolicy,
        *,
        token_s: float = 0.0,
        load_s: float = 0.0,
        cluster: Cluster | None = None,
    ):
        self.policy = policy
        self.token_s = token_s
        self.load_s = load_s
        self.breaks = 0
        self.permits: asyncio.Semaphore | None = None
        self.cancelled: list[int] = []
        self.submitted: list[Submission] = []
        self.closed = False
        self._cluster = cluster or gpus()
        self._state = ClusterState(self._cluster)
        self._endpoints: dict[int, FakeEndpoint] = {}
        self._gone: set[asyncio.Task[None]] = set()
        self._handles = 0
        self._ends = [0] * len(RequestStatus)
        self._loop = asyncio.get_running_loop()
        self._started_s = self._loop.time()

    @property
    def now_us(self) -> int:
        return int((self._loop.time() - self._started_s) * 1e6)

    def request_profile(self, profile: object, runner: object) -> None:
        raise NotImplementedError

    def end_profile(self, profile_id: int, reason: str = "") -> None:
        raise NotImplementedError

    def deploy(self, endpoint: EndpointRequest, *, endpoint_id: int | None = None, after_profile: int = 0) -> int:
        assert not after_profile
        number = endpoint_id or len(self._endpoints) + 1
        spec = EndpointSpec(
            endpoint_id=number, model=endpoint.model, intent=endpoint.intent, requested_us=self.now_us,
            prompt_tokens=8, output_tokens=endpoint.output_tokens, batch_size=endpoint.batch_size,
        )  # fmt: skip
        decision = self.policy.decide(spec, self._state.view([0.0] * len(self._cluster)))
        fake = FakeEndpoint(endpoint, number, len(self._endpoints) + 1, None)
        self._endpoints[number] = fake
        if isinstance(decision, Rejection):
            fake.status, fake.reason = "rejected", decision.reason
            return number
        [fake.plan] = decision.plans
        shares = dict(zip(fake.plan.gpu_ids, fake.plan.gpu_bytes, strict=True))
        self._state.reserve(fake.deployment_id, shares)
        fake.task = asyncio.create_task(self._serve(fake))
        return number

    def remove(self, endpoint_id: int) -> None:
        endpoint = self._found(endpoint_id)
        if endpoint.status == "removed":
            return
        if endpoint.plan is not None:
            self._state.release(endpoint.deployment_id)
        endpoint.status = "removed"
        for handle in endpoint.waiting:
            self._end(handle, RequestStatus.REFUSED, f"deployment {endpoint.deployment_id} was removed")
        endpoint.waiting.clear()
        endpoint.news.set()

    def endpoint(self, endpoint_id: int) -> tuple[DeploymentStatus, ...]:
        return (self._status(self._found(endpoint_id)),)

    def why_too_long(self, endpoint_id: int, tokens: int) -> str | None:
        return self._found(endpoint_id).requested.model.why_too_long(tokens)

    def max_sequence_tokens(self, endpoint_id: int) -> int | None:
        return self._found(endpoint_id).requested.model.context_tokens

    def submit(self, submission: Submission) -> FakeRequestHandle:
        endpoint = self._found(submission.endpoint_id)
        self._handles += 1
        self.submitted.append(submission)
        handle = FakeRequestHandle(self._handles, submission, self.now_us)
        if self.closed:
            self._end(handle, RequestStatus.UNFINISHED, "the cluster is closed")
        elif endpoint.status != "up":
            self._end(handle, RequestStatus.REFUSED, f"deployment {endpoint.deployment_id} is still {endpoint.status}")
        else:
            endpoint.waiting.insert(0 if submission.priority else len(endpoint.waiting), handle)
            endpoint.news.set()
        return handle

    def cancel(self, request_id: int) -> None:
        self.cancelled.append(request_id)
        for endpoint in self._endpoints.values():
            for handle in endpoint.waiting:
                if handle.request_id == request_id:
                    endpoint.waiting.remove(handle)
                    self._end(handle, RequestStatus.FAILED, "the client disconnected")
                    return

    def progress(self) -> Progress:
        endpoints = self._endpoints.values()
        waiting = sum(len(endpoint.waiting) for endpoint in endpoints)
        return Progress(
            now_us=self.now_us, last_arrival_us=self.now_us, total=self._handles, arrived=self._handles,
            waiting=waiting, running=sum(endpoint.running is not None for endpoint in endpoints),
            completed=self._ends[RequestStatus.COMPLETED], refused=self._ends[RequestStatus.REFUSED],
            failed=self._ends[RequestStatus.FAILED], recent_p50_s=None, recent_p95_s=None, recent_slo_attainment=None,
            deployments=tuple(map(self._status, endpoints)),
            gpus=tuple(
                GpuStatus(
                    gpu_id=gpu.gpu_id, used_bytes=self._state.used_bytes(gpu.gpu_id),
                    capacity_bytes=gpu.capacity_bytes, load=0.25, down=False,
                )
                for gpu in self._cluster.gpus
            ),
        )  # fmt: skip

    async def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        for endpoint in self._endpoints.values():
            if endpoint.task:
                endpoint.task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await endpoint.task
            for handle in [*endpoint.waiting, *([endpoint.running] if endpoint.running else [])]:
                self._end(handle, RequestStatus.UNFINISHED, "the cluster was closed")
            endpoint.waiting.clear()

    def lose_engine(self, endpoint_id: int, status: str = "down") -> None:
        endpoint = self._found(endpoint_id)
        if endpoint.status == "removed":
            return
        endpoint.status, endpoint.reason, endpoint.restarts = status, "its engine failed", endpoint.restarts + 1

    async def _serve(self, endpoint: FakeEndpoint) -> None:
        await asyncio.sleep(self.load_s)
        if endpoint.status == "loading":
            endpoint.status = "up"
        while True:
            while not endpoint.waiting:
                endpoint.news.clear()
                await endpoint.news.wait()
            endpoint.running = handle = endpoint.waiting.pop(0)
            await self._execute(endpoint, handle)
            endpoint.running = None

    async def _execute(self, endpoint: FakeEndpoint, handle: FakeRequestHandle) -> None:
        handle.start_us = self.now_us
        for position in range(handle.submission.output_tokens):
            await asyncio.sleep(self.token_s)
            if self.permits is not None:
                await self.permits.acquire()
            if self.breaks:
                self.breaks -= 1
                self._end(handle, RequestStatus.FAILED, "its engine failed twice")
                return
            if handle.first_us < 0:
                handle.first_us = self.now_us
            handle.got.append(token(handle.submission.prompt, position, endpoint.requested.model.vocab_size))
            handle.news.set()
            if handle.got[-1] in handle.submission.stop_token_ids:
                break
        endpoint.completed += 1
        self._end(handle, RequestStatus.COMPLETED, "")

    def _end(self, handle: FakeRequestHandle, status: RequestStatus, reason: str) -> None:
        self._ends[status] += 1
        handle.ended.set_result(
            Outcome(
                request_id=handle.request_id,
                status=status,
                reason=reason,
                tokens=tuple(handle.got),
                arrival_us=handle.arrival_us,
                start_us=handle.start_us,
                first_token_us=handle.first_us,
                finish_us=self.now_us,
            )
        )
        handle.news.set()

    def _found(self, endpoint_id: int) -> FakeEndpoint:
        if endpoint_id not in self._endpoints:
            raise InputError(f"there is no endpoint {endpoint_id}")
        return self._endpoints[endpoint_id]

    def _status(self, endpoint: FakeEndpoint) -> DeploymentStatus:
        plan = endpoint.plan
        return DeploymentStatus(
            deployment_id=endpoint.deployment_id,
            endpoint_id=endpoint.endpoint_id,
            model=endpoint.requested.model.name,
            configuration=str(plan.configuration) if plan else "",
            layer_split=plan.layer_split if plan else (),
            gpu_ids=plan.gpu_ids if plan else (),
            status=endpoint.status,
            waiting=len(endpoint.waiting),
            completed=endpoint.completed,
            reason=endpoint.reason,
            restarts=endpoint.restarts,
        )
