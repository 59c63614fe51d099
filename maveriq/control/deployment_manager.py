"""Deployments and their states, the GPU memory that they hold, and what each one executes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, TypeAlias

from maveriq.control.events import EngineProgress, EngineUp, StartEngine, StartProfile, StopProfile
from maveriq.control.gpu_sharing import GpuSharing
from maveriq.control.profiles import ProfileQueue
from maveriq.control.utilization import UtilizationWindow, recent_loads, sampling_phases_us
from maveriq.domain.cluster import Cluster, ClusterState, ClusterView, LoadWindow
from maveriq.domain.deployments import Batching, EndpointSpec, ExpectedLoad
from maveriq.domain.parallel import DeploymentPlan, network_hops
from maveriq.domain.progress import DeploymentStatus, GpuStatus
from maveriq.domain.records import NOT_YET, DeploymentRecord
from maveriq.domain.requests import Request
from maveriq.engine.interface import EngineCounters
from maveriq.errors import InvariantError, MaveriqError
from maveriq.policy.policy import Decision, Deploy, Policy, Rejection
from maveriq.units import Bytes, Micros

if TYPE_CHECKING:
    from maveriq.control.utilization import Integers

Batch: TypeAlias = tuple[Micros, tuple[Request, ...]]
"""What a deployment executes: since when, and the requests."""

MAX_REPLACEMENTS = 3
"""How often the deployments of an endpoint are placed anew: what fails everywhere is not the fault of a GPU."""


class DeploymentState(StrEnum):
    """The state of a deployment."""

    WAITING = "waiting"  # its memory is reserved; it loads as soon as all its GPUs are idle
    LOADING = "loading"
    UP = "up"
    DOWN = "down"
    REMOVED = "removed"
    REJECTED = "rejected"


@dataclass(slots=True, kw_only=True)
class Deployment:
    """The controller's state of one deployment.

    `serves`: requests may wait for it, from its first registration until it is removed or lost.
    `returns`: if it is down, it will be up again. `alive`: it has an engine, loading or up, that
    must be stopped. `open_failures`: failures of its engines that are not repaired; failed GPUs do
    not count. `generation` counts its engines and `execution_id` its executions; messages with
    earlier numbers are ignored. `waiting`: the requests that wait for it in the controller. `in_engine`: the requests
    of a continuous engine by ID, in the order in which they were submitted; `held`: those that wait until it is up.
    `assigned`: requests that it
    was given so far. `kv_used_tokens`, `kv_capacity_tokens`: of its KV cache, as its engine last reported;
    `unbegun_tokens`: the prompts in `in_engine` of which it has not begun to compute anything.
    """

    deployment_id: int
    endpoint: EndpointSpec
    plan: DeploymentPlan | None
    state: DeploymentState
    busy: UtilizationWindow
    reason: str = ""
    gpu_ids: tuple[int, ...] = ()
    gpu_mask: int = 0
    ready_us: Micros = NOT_YET
    removed_us: Micros = NOT_YET
    serves: bool = False
    returns: bool = True
    open_failures: int = 0
    alive: bool = False
    generation: int = 0
    execution_id: int = 0
    running: tuple[Request, ...] = ()
    waiting: Sized = ()
    held: dict[int, Request] = field(default_factory=dict)
    in_engine: dict[int, Request] = field(default_factory=dict)
    assigned: int = 0
    kv_used_tokens: int = 0
    kv_capacity_tokens: int = 0
    unbegun_tokens: int = 0
    started_us: Micros = NOT_YET
    completed: int = 0

    @property
    def required_plan(self) -> DeploymentPlan:
        """The plan of a deployment that has one.

        Raises:
            InvariantError: it was rejected.
        """
        if self.plan is None:
            raise InvariantError(f"deployment {self.deployment_id} was rejected and has no plan")
        return self.plan

    @property
    def is_busy(self) -> bool:
        """Whether its engine has requests, since `started_us`."""
        return bool(self.running or self.in_engine)

    @property
    def outstanding(self) -> int:
        """Requests that it was given and that have not ended."""
        return len(self.in_engine) + len(self.held) + len(self.running) + len(self.waiting)

    @property
    def kv_tokens(self) -> int:
        """Tokens of its KV cache that requests hold, and the prompts that it has not begun."""
        return self.kv_used_tokens + self.unbegun_tokens

    @property
    def name(self) -> str:
        """Its number and model, for reasons and messages."""
        return f"deployment {self.deployment_id} ({self.endpoint.model.name})"

    @property
    def gone_for_good(self) -> bool:
        """Whether its engine failed and will not be back."""
        return self.state is DeploymentState.DOWN and not self.returns

    def clear_engine(self) -> bool:
        """Record that it has no engine, and return whether it had one."""
        was_alive, self.alive = self.alive, False
        return was_alive

    def refusal_reason(self) -> str:
        """Return why it refuses requests now."""
        match self.state:
            case DeploymentState.REJECTED:
                return f"{self.name} was rejected"
            case DeploymentState.REMOVED:
                return f"{self.name} was removed"
            case DeploymentState.DOWN:
                return f"{self.name} is down" + (", not for good" if self.returns else " for good")
            case _:
                return f"{self.name} is still {self.state}"

    def record(self) -> DeploymentRecord:
        """Return its row for the records."""
        return DeploymentRecord(
            deployment_id=self.deployment_id,
            endpoint=self.endpoint,
            plan=self.plan,
            ready_us=self.ready_us,
            removed_us=self.removed_us,
            status=self.state.value,
            reason=self.reason,
        )

    def status(self, waiting: int, engine: EngineCounters | None = None) -> DeploymentStatus:
        """Return what live views and the HTTP API show of it; the reason includes the note of its plan.

        Args:
            waiting: requests in the controller's queue for it.
            engine: the state of its continuous engine; requests that this has not admitted wait, too.
        """
        running = None if engine is None else engine.running
        return DeploymentStatus(
            deployment_id=self.deployment_id,
            endpoint_id=self.endpoint.endpoint_id,
            model=self.endpoint.model.name,
            configuration=str(self.plan.configuration) if self.plan else "",
            layer_split=self.plan.layer_split if self.plan else (),
            gpu_ids=self.gpu_ids,
            status=self.state.value,
            waiting=waiting if running is None else waiting + max(0, len(self.in_engine) - running),
            completed=self.completed,
            reason="; ".join(filter(None, (self.reason, self.plan.note if self.plan else ""))),
            restarts=max(0, self.generation - 1),
            running=running,
            kv_use=None if engine is None else engine.kv_use,
        )


class DeploymentManager:
    """All deployments and the cluster that they share.

    Invariants: a GPU executes for one deployment at a time; memory stays reserved from the decision
    to deploy until the engine is stopped or lost for good.
    """

    def __init__(
        self,
        cluster: Cluster,
        policy: Policy,
        window: LoadWindow,
        seed: int,
        *,
        measured_loads: Callable[[], Sequence[float]] | None = None,
    ) -> None:
        self.deployments: dict[int, Deployment] = {}
        self.busy_mask = 0
        self._state = ClusterState(cluster)
        self.profiles = ProfileQueue(self._state)
        self.stopped_profiles: list[int] = []
        self._policy = policy
        self._window = window
        self._phases_us = sampling_phases_us(window, len(cluster), seed)
        self._released_us = [0] * len(cluster)
        self._sharing = GpuSharing(len(cluster))
        self._to_start: list[Deployment] = []
        self._ever_on: list[list[Deployment]] = [[] for _ in range(len(cluster))]
        self._loads: tuple[Micros, list[float]] = (-1, [])  # of an instant at which several endpoints come
        self._measured_loads = measured_loads

    def deploy(self, endpoint: EndpointSpec, now_us: Micros) -> list[Deployment]:
        """Let the policy decide on an endpoint, and return its deployments: with memory reserved, or rejected."""
        decision = self._decide_with_room(endpoint, self._state.view(self.loads(now_us)))
        if isinstance(decision, Rejection):
            return [self.reject(endpoint, decision.reason)]
        return [self._reserve(endpoint, plan) for plan in decision.plans]

    def reject(self, endpoint: EndpointSpec, reason: str) -> Deployment:
        """Return a deployment of an endpoint that was rejected."""
        rejected = self._add(endpoint, None, DeploymentState.REJECTED)
        rejected.reason = reason
        return rejected

    def _decide_with_room(self, endpoint: EndpointSpec, view: ClusterView) -> Decision:
        """Return the policy's decision; what has no room beside profiles takes theirs, and they wait again."""
        decision = self._decide(endpoint, view)
        holding = self.profiles.holding
        if isinstance(decision, Deploy) or not holding:
            return decision
        for shares in holding.values():
            view = view.without_tenant(shares)
        without_profiles = self._decide(endpoint, view)
        if isinstance(without_profiles, Deploy):
            gpu_ids = {gpu_id for plan in without_profiles.plans for gpu_id in plan.gpu_ids}
            self.stopped_profiles += self.profiles.revoke(gpu_ids)
            return without_profiles
        return decision

    def start_profiles(self, now_us: Micros) -> list[StartProfile]:
        """Give free GPUs to the profiles that wait for some."""
        started = self.profiles.start_waiting(self._state.view(self.loads(now_us)).gpus)
        return [StartProfile(profile_id, gpu_ids) for profile_id, gpu_ids in started]

    def stop_profiles(self) -> list[StopProfile]:
        """Return the profiles whose GPUs were taken since the last call."""
        stopped, self.stopped_profiles = self.stopped_profiles, []
        return [StopProfile(profile_id) for profile_id in stopped]

    def _decide(self, endpoint: EndpointSpec, view: ClusterView) -> Decision:
        """Return the policy's decision.

        Raises:
            MaveriqError: it is neither a Deploy nor a Rejection; a user's policy can return anything.
        """
        decision: object = self._policy.decide(endpoint, view)
        if not isinstance(decision, Deploy | Rejection):
            raise MaveriqError(
                f"policy {self._policy.name!r} returned {decision!r:.60}; it must return a Deploy or a Rejection"
            )
        return decision

    def replace(self, lost: Deployment, now_us: Micros, *, wanted: EndpointSpec) -> Deployment | None:
        """Place a deployment that is lost for good anew, and return the new one; None if no other placement fits.

        The policy does not see the GPUs on which engines of this endpoint were given up.

        Args:
            lost: the deployment.
            now_us: the present.
            wanted: what the policy decides on: one replica of its endpoint.
        """
        gone = [
            deployment
            for deployment in self.deployments.values()
            if deployment.endpoint == lost.endpoint and deployment.gone_for_good
        ]
        avoided = {gpu_id for deployment in gone if deployment.open_failures for gpu_id in deployment.gpu_ids}
        view = self._state.view(self.loads(now_us))
        left = ClusterView(gpus=tuple(gpu for gpu in view.gpus if gpu.gpu_id not in avoided))
        if not left.gpus or len(gone) > MAX_REPLACEMENTS:
            return None
        decision = self._decide_with_room(wanted, left)
        if isinstance(decision, Rejection):
            lost.reason += f"; no other placement: {decision.reason}"
            return None
        replacement = self._reserve(lost.endpoint, decision.plans[0])  # one deployment was lost
        lost.reason += f"; replaced by deployment {replacement.deployment_id}"
        return replacement

    def _reserve(self, endpoint: EndpointSpec, plan: DeploymentPlan) -> Deployment:
        gone = [gpu for gpu in plan.gpu_ids if gpu not in range(len(self._released_us)) or self._state.is_down(gpu)]
        if gone:
            raise InvariantError(
                f"policy {self._policy.name!r} put {endpoint.model.name} on GPU {gone[0]}, which is not up"
            )
        plan = self._located(plan)
        deployment = self._add(endpoint, plan, DeploymentState.WAITING)
        is_continuous = endpoint.batching is Batching.CONTINUOUS
        self._state.reserve(deployment.deployment_id, plan.shares, is_continuous=is_continuous)
        deployment.gpu_ids = plan.gpu_ids
        deployment.gpu_mask = sum(1 << gpu_id for gpu_id in plan.gpu_ids)
        for gpu_id in dict.fromkeys(plan.gpu_ids):
            self._ever_on[gpu_id].append(deployment)
        self._to_start.append(deployment)
        return deployment

    def _located(self, plan: DeploymentPlan) -> DeploymentPlan:
        """Return a plan whose configuration says what its GPUs are, whatever the policy wrote there.

        Raises:
            InvariantError: its GPUs are of several kinds, or a stage is on several nodes.
        """
        cluster, mixed = self._state.cluster, self._state.is_mixed
        if not mixed and not self._state.has_network:
            return plan
        gpus, tp = [cluster.gpus[gpu_id] for gpu_id in plan.gpu_ids], plan.configuration.tp
        kinds, nodes = {gpu.kind for gpu in gpus}, [gpu.node for gpu in gpus]
        where = f"policy {self._policy.name!r} put {plan.model.name} on GPUs {plan.gpu_ids}"
        if len(kinds) > 1:
            raise InvariantError(f"{where} of several kinds ({', '.join(sorted(kinds))}); an engine needs one kind")
        if any(len(set(nodes[first : first + tp])) > 1 for first in range(0, len(nodes), tp)):
            raise InvariantError(f"{where}, one stage of them on several nodes; the GPUs of a stage must share a node")
        at = replace(plan.configuration, gpu=gpus[0].kind if mixed else "", network_hops=network_hops(nodes, tp))
        return plan if at == plan.configuration else replace(plan, configuration=at)

    def _add(self, endpoint: EndpointSpec, plan: DeploymentPlan | None, state: DeploymentState) -> Deployment:
        deployment = Deployment(
            deployment_id=len(self.deployments) + 1,
            endpoint=endpoint,
            plan=plan,
            state=state,
            busy=UtilizationWindow(self._window),
        )
        self.deployments[deployment.deployment_id] = deployment
        return deployment

    @property
    def waiting_to_start(self) -> Sequence[Deployment]:
        """Deployments that start once all their GPUs are up and idle."""
        return self._to_start

    def start_waiting(self) -> list[StartEngine]:
        """Start loading each waiting deployment whose GPUs are all up and idle at this instant."""
        if not self._to_start:
            return []
        return [self._start(deployment) for deployment in list(self._to_start) if self._may_start(deployment)]

    def _may_start(self, deployment: Deployment) -> bool:
        down = any(map(self._state.is_down, deployment.gpu_ids))
        return not down and not deployment.gpu_mask & self.busy_mask

    def _start(self, deployment: Deployment) -> StartEngine:
        self._to_start.remove(deployment)
        deployment.state = DeploymentState.LOADING
        deployment.generation += 1
        deployment.alive = True
        return StartEngine(deployment.deployment_id, deployment.generation, deployment.required_plan)

    def engine_registered(self, event: EngineUp, now_us: Micros) -> Deployment | None:
        """Mark an engine as up, and return its deployment; None if the engine was stopped or failed meanwhile."""
        deployment = self.deployments[event.deployment_id]
        if deployment.state is not DeploymentState.LOADING or deployment.generation != event.generation:
            return None
        deployment.kv_capacity_tokens = event.kv_capacity_tokens
        deployment.state = DeploymentState.UP
        deployment.serves = True
        if deployment.reason:
            deployment.reason = f"up again after: {deployment.reason}"
        if deployment.ready_us < 0:
            deployment.ready_us = now_us
        return deployment

    def start_execution(self, deployment: Deployment, requests: tuple[Request, ...], now_us: Micros) -> int:
        """Mark a deployment as executing, and return the ID of the execution."""
        if deployment.gpu_mask & self.busy_mask:
            raise InvariantError(f"{deployment.name} was to execute on GPUs that are busy")
        self.busy_mask |= deployment.gpu_mask
        deployment.running = requests
        deployment.started_us = now_us
        deployment.execution_id += 1
        return deployment.execution_id

    def end_execution(self, deployment: Deployment, now_us: Micros) -> tuple[Request, ...]:
        """Mark a deployment as idle, whether its execution finished or failed, and return what it executed."""
        requests = deployment.running
        if requests:
            self.busy_mask &= ~deployment.gpu_mask
            deployment.running = ()
            deployment.busy.add(deployment.started_us, now_us)
            for gpu_id in deployment.gpu_ids:
                self._released_us[gpu_id] = now_us
        return requests

    def executed_together(
        self, deployment_id: Integers, start_us: Integers, end_us: Integers, running: Mapping[int, Batch]
    ) -> None:
        """Record what exclusive engines did since the last call, for a driver that dispatches by itself.

        Args:
            deployment_id: of each execution that ended, in order of time.
            start_us: when it started.
            end_us: when it ended.
            running: what executes now: by deployment, since when, and the requests.
        """
        for deployment in self.deployments.values():
            of_it = deployment_id == deployment.deployment_id
            if of_it.any():
                deployment.busy.add_together(start_us[of_it], end_us[of_it])
            deployment.started_us, deployment.running = running.get(deployment.deployment_id, (NOT_YET, ()))
        self.busy_mask = sum(self.deployments[number].gpu_mask for number in running)

    def submit(self, deployment: Deployment, request: Request, now_us: Micros) -> None:
        """Record that a continuous engine has a request."""
        if not deployment.in_engine:
            self.turned_busy(deployment, now_us)
        deployment.in_engine[request.request_id] = request
        deployment.unbegun_tokens += request.prompt_tokens

    def progressed(self, deployment: Deployment, event: EngineProgress) -> None:
        """Record what a continuous engine holds, and which requests it has begun; `leave` records those that end."""
        deployment.kv_used_tokens = event.kv_tokens
        for started in event.started:
            if request := deployment.in_engine.get(started.request_id):
                deployment.unbegun_tokens -= request.prompt_tokens

    def leave(self, deployment: Deployment, request_id: int, now_us: Micros, *, has_begun: bool) -> Request | None:
        """Record that a request has left a continuous engine, which had begun it or not.

        Returns:
            The request; None if the engine did not have it.
        """
        request = deployment.in_engine.pop(request_id, None)
        if request is None:
            return None
        if not has_begun:
            deployment.unbegun_tokens -= request.prompt_tokens
        if not deployment.in_engine:
            self.turned_idle(deployment, now_us)
        return request

    def turned_busy(self, deployment: Deployment, now_us: Micros) -> None:
        """Record that a continuous engine has its first request."""
        deployment.started_us = now_us
        self._sharing.began(deployment.gpu_ids, now_us)

    def turned_idle(self, deployment: Deployment, now_us: Micros) -> None:
        """Record that a continuous engine has no request any more."""
        deployment.busy.add(deployment.started_us, now_us)
        self._sharing.ended(deployment.gpu_ids, now_us)

    def lose_all(self, deployment: Deployment, now_us: Micros) -> tuple[Request, ...]:
        """Record that a continuous engine has failed with all it had, and return its requests."""
        requests = tuple(deployment.in_engine.values())
        if requests:
            deployment.in_engine.clear()
            self.turned_idle(deployment, now_us)
        deployment.unbegun_tokens = deployment.kv_used_tokens = 0
        return requests

    def released_us(self, deployment: Deployment) -> Micros:
        """Return when the last of a deployment's GPUs stopped executing; 0 if none ever did."""
        return max(map(self._released_us.__getitem__, deployment.gpu_ids))

    def holds_memory(self, deployment: Deployment) -> bool:
        """Return whether a deployment holds GPU memory."""
        return self._state.holds(deployment.deployment_id)

    def deployments_on_gpu(self, gpu_id: int) -> list[Deployment]:
        """Return the deployments that hold memory on a GPU."""
        return [deployment for deployment in self._ever_on[gpu_id] if self.holds_memory(deployment)]

    def gpu_down(self, gpu_id: int) -> None:
        """Mark a GPU as failed; the caller then calls `engine_down` for each of its deployments."""
        self.stopped_profiles += self.profiles.revoke([gpu_id])
        self._state.set_down(gpu_id, down=True)

    def gpu_up(self, gpu_id: int) -> None:
        """End a failure of a GPU; after the last one, deployments that waited for it start again."""
        self._state.set_down(gpu_id, down=False)
        if not self._state.is_down(gpu_id):
            for deployment in self.deployments_on_gpu(gpu_id):
                self._start_again(deployment)

    def engine_down(self, deployment: Deployment, *, returns: bool, broken: bool, reason: str) -> None:
        """Mark a deployment as down. If it does not return, free its memory.

        Args:
            deployment: whose engine failed; its execution was ended with `end_execution`.
            returns: whether it will be up again.
            broken: whether the engine itself failed, and not one of its GPUs.
            reason: what happened.
        """
        if deployment in self._to_start:
            self._to_start.remove(deployment)
        deployment.state = DeploymentState.DOWN
        deployment.returns = deployment.returns and returns
        deployment.open_failures += broken
        deployment.reason = reason
        if not deployment.returns:
            deployment.serves = False
            self._state.release(deployment.deployment_id)

    def engine_repaired(self, deployment: Deployment) -> None:
        """End a failure of an engine; after the last one, it starts again."""
        deployment.open_failures = max(0, deployment.open_failures - 1)
        self._start_again(deployment)

    def _start_again(self, deployment: Deployment) -> None:
        if deployment.state is DeploymentState.DOWN and deployment.returns and not deployment.open_failures:
            deployment.state = DeploymentState.WAITING
            self._to_start.append(deployment)

    def remove(self, deployment: Deployment) -> None:
        """Stop accepting requests; the caller calls `release` once nothing runs on the deployment."""
        if deployment in self._to_start:
            self._to_start.remove(deployment)
        deployment.state = DeploymentState.REMOVED
        deployment.serves = False

    def release(self, deployment: Deployment, now_us: Micros) -> bool:
        """Free the memory of a removed deployment, and return whether it has an engine to stop."""
        deployment.removed_us = now_us
        if self.holds_memory(deployment):
            self._state.release(deployment.deployment_id)
        return deployment.clear_engine()

    def loads(self, now_us: Micros) -> list[float]:
        """Return each GPU's recent load (0 to 1), in the order of ids."""
        if self._measured_loads is not None:
            return list(self._measured_loads()[: len(self._phases_us)])
        if self._loads[0] != now_us:
            spans = [self._spans(gpu_id, now_us) for gpu_id in range(len(self._phases_us))]
            self._loads = now_us, recent_loads(spans, now_us, self._window, self._phases_us)
        return list(self._loads[1])

    def _spans(self, gpu_id: int, now_us: Micros) -> list[tuple[Micros, Micros]]:
        spans: list[tuple[Micros, Micros]] = []
        for deployment in self._ever_on[gpu_id]:
            spans += deployment.busy.spans
            if deployment.is_busy:
                spans.append((deployment.started_us, now_us))
        return spans

    def engines_working(self, gpu_ids: Iterable[int]) -> int:
        """Return the most continuous engines that have requests on one of these GPUs."""
        return self._sharing.working(gpu_ids)

    def busy_us(self, gpu_id: int, now_us: Micros) -> Micros:
        """Return how long a GPU has executed since the start."""
        return self._sharing.busy_us(gpu_id, now_us) + sum(
            deployment.busy.total_us + (now_us - deployment.started_us if deployment.is_busy else 0)
            for deployment in self._ever_on[gpu_id]
            if deployment.endpoint.batching is Batching.EXCLUSIVE
        )

    def used_bytes(self, gpu_id: int) -> Bytes:
        """Return the memory held on a GPU."""
        return self._state.used_bytes(gpu_id)

    def gpu_statuses(self, now_us: Micros) -> tuple[GpuStatus, ...]:
        """Return what a live view shows of each GPU."""
        return tuple(
            GpuStatus(
                gpu_id=gpu.gpu_id,
                used_bytes=self._state.used_bytes(gpu.gpu_id),
                capacity_bytes=gpu.capacity_bytes,
                load=load,
                down=self._state.is_down(gpu.gpu_id),
            )
            for gpu, load in zip(self._state.cluster.gpus, self.loads(now_us), strict=True)
        )


def share_of_one(endpoint: EndpointSpec, replicas: Sequence[Deployment], measured_rps: float | None) -> EndpointSpec:
    """Return what one new replica of an endpoint is chosen for: its share of the load.

    Args:
        endpoint: the endpoint.
        replicas: all that it ever had.
        measured_rps: the requests a second that it gets, for an endpoint that expected no load; None where none came.
    """
    load = endpoint.load
    if load is None and measured_rps is not None:
        load = ExpectedLoad(
            rps=measured_rps, prompt_tokens=endpoint.prompt_tokens, output_tokens=endpoint.output_tokens
        )
    others = sum(replica.plan is not None and not replica.gone_for_good for replica in replicas)
    return replace(endpoint, replicas=1, load=None if load is None else replace(load, rps=load.rps / (others + 1)))
