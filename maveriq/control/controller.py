"""The controller, which the simulator and the executor share. It uses no clock, thread or I/O.

A driver (the simulator or the executor) calls `Controller.handle` with the events of an instant,
carries out the actions that it returns, and calls it again at `wake_us` if nothing happens before.
The controller holds the deployments, the queue and the state of every request; the policy and the
predicted service times come from outside.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import TypeAlias, assert_never

from maveriq.control.arrival_rates import ArrivalRates
from maveriq.control.deployment_manager import Deployment, DeploymentManager, DeploymentState, share_of_one
from maveriq.control.dispatch_delays import DispatchDelays
from maveriq.control.events import (
    Abort,
    Action,
    EndpointAdded,
    EndpointRemoved,
    EngineDown,
    EngineProgress,
    EngineRepaired,
    EngineUp,
    Event,
    Execute,
    ExecutionFailed,
    ExecutionFinished,
    GpuDown,
    GpuUp,
    ProfileEnded,
    ProfileRequested,
    RequestArrived,
    RequestCancelled,
    StopEngine,
    Submit,
)
from maveriq.control.queues import DEFAULT_MAX_WAIT_US, QueueDiscipline, RequestQueue
from maveriq.control.request_tracker import RequestTracker
from maveriq.control.router import RequestRouter, Router
from maveriq.control.routing_policies import RoutingRule
from maveriq.domain.cluster import Cluster, DispatchTiming, LoadWindow
from maveriq.domain.deployments import Batching, EndpointSpec
from maveriq.domain.models import ModelSpec
from maveriq.domain.progress import Progress
from maveriq.domain.requests import Request, RequestStatus
from maveriq.engine.interface import EngineCounters
from maveriq.policy.policy import Policy
from maveriq.units import Micros, seconds

ServiceTimePredictor: TypeAlias = Callable[[Deployment, Request], Micros]
"""Predicted service time of a request, from what is known before it runs; for `sjf` and `least-work`."""

CLIENT_GONE = "the client went away"


class OnFailure(StrEnum):
    """What happens to a request when its engine fails."""

    REQUEUE = "requeue"  # retry it once, before all others; after a second failure it fails
    FAIL = "fail"


class OnLoss(StrEnum):
    """What happens to an endpoint whose deployment is lost for good."""

    KEEP = "keep"  # the deployment stays down
    REPLACE = "replace"  # the policy decides again, without the GPUs on which it was lost


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerSettings:
    """The settings of the controller, except the policy.

    `router` None routes by `DEFAULT_RULES`. `refuse_beyond_context` refuses requests that are longer than their
    model's context. `engine_tokens` returns how many tokens the engines keep of one sequence of a model, None for no
    such limit; longer requests are refused.
    """

    timing: DispatchTiming = field(default_factory=DispatchTiming)
    discipline: QueueDiscipline = QueueDiscipline.FIFO
    max_wait_us: Micros = DEFAULT_MAX_WAIT_US
    on_failure: OnFailure = OnFailure.REQUEUE
    on_loss: OnLoss = OnLoss.KEEP
    router: RoutingRule | RequestRouter | None = None
    seed: int = 42
    load_window: LoadWindow = field(default_factory=LoadWindow)
    refuse_beyond_context: bool = True
    engine_tokens: Callable[[ModelSpec], int | None] | None = None

    def max_sequence_tokens(self, endpoint: EndpointSpec) -> int | None:
        """Return the longest sequence of an endpoint that is served, prompt and output; None for no limit."""
        limits = (endpoint.model.context_tokens if self.refuse_beyond_context else None, self._kept_tokens(endpoint))
        return min((limit for limit in limits if limit is not None), default=None)

    def why_too_long(self, endpoint: EndpointSpec, tokens: int) -> str | None:
        """Return why a sequence of so many tokens, prompt and output, is refused; None if it is not."""
        too_long = endpoint.model.why_too_long(tokens) if self.refuse_beyond_context else None
        if too_long is not None:
            return too_long
        kept = self._kept_tokens(endpoint)
        if kept is None or tokens <= kept:
            return None
        return f"a sequence of {tokens} tokens is longer than the {kept} that the engine's KV cache keeps of one"

    def _kept_tokens(self, endpoint: EndpointSpec) -> int | None:
        """Return how many tokens of one sequence an endpoint's engines keep; None for no limit."""
        if endpoint.sequence_tokens is not None or self.engine_tokens is None:
            return endpoint.sequence_tokens
        return self.engine_tokens(endpoint.model)


class Controller:
    """Decides what is deployed where, and which request runs next.

    Args:
        cluster: its GPUs.
        policy: decides configurations and placement.
        settings: see there.
        predict_service_time: see `ServiceTimePredictor`.
        measured_loads: returns the recent load of each GPU, where it is measured; None to compute it from executions.
        on_request_end: called with the ID of each request that ends before the run does.
    """

    def __init__(
        self,
        cluster: Cluster,
        policy: Policy,
        settings: ControllerSettings,
        predict_service_time: ServiceTimePredictor,
        *,
        measured_loads: Callable[[], Sequence[float]] | None = None,
        on_request_end: Callable[[int], None] | None = None,
    ) -> None:
        self.tracker = RequestTracker(on_end=on_request_end)
        self.manager = DeploymentManager(
            cluster, policy, settings.load_window, settings.seed, measured_loads=measured_loads
        )
        self.queue = RequestQueue(settings.discipline, settings.max_wait_us)
        self.wake_us: Micros | None = None
        self.settings = settings
        router, predicts = settings.router, settings.discipline.uses_service_time
        if router is None or isinstance(router, RoutingRule):
            self.router: RequestRouter = Router(router, settings.seed)
            predicts |= router is RoutingRule.LEAST_WORK
        else:
            self.router, predicts = router, True
        self._predict_service_time = predict_service_time if predicts else None
        self._clock = DispatchDelays(settings.timing)
        self.rates = ArrivalRates()
        self._endpoints: dict[int, list[Deployment]] = {}
        self._longest_sequence: dict[int, int] = {}  # tokens that a deployment takes, once that is known
        self._now_us: Micros = 0
        self._actions: list[Action] = []
        self._cancelled_ids: set[int] = set()  # cancelled requests that still run

    def handle(self, now_us: Micros, events: Sequence[Event]) -> list[Action]:
        """Handle the events of an instant, and return the actions to carry out.

        Args:
            now_us: the instant; never earlier than in the last call.
            events: in any order; empty at `wake_us`.
        """
        self.apply(now_us, events)
        if self.manager.stopped_profiles:
            self._actions.extend(self.manager.stop_profiles())
        self._actions.extend(self.manager.start_waiting())
        if self.manager.profiles.any_waiting:
            self._actions.extend(self.manager.start_profiles(now_us))
        self._dispatch()
        return self._actions

    def apply(self, now_us: Micros, events: Sequence[Event]) -> None:
        """Let events change the state, and start and dispatch nothing: for a driver that does these itself."""
        self._now_us = now_us
        self._actions = []
        for event in events if len(events) < 2 else sorted(events, key=_order):
            self._handle(event)

    def _handle(self, event: Event) -> None:
        match event:
            case RequestArrived():
                self._arrived(event.request)
            case ExecutionFinished():
                self._finished(event)
            case EngineProgress() | ExecutionFailed():
                self._engine_reported(event)
            case RequestCancelled():
                self._cancelled(event.request_id)
            case EndpointAdded() | ProfileRequested() | ProfileEnded():
                self._wanted(event)
            case EngineUp():
                self._registered(event)
            case EndpointRemoved():
                self._remove(event.endpoint_id)
            case GpuDown() | GpuUp():
                self._gpu_changed(event)
            case EngineDown() | EngineRepaired():
                self._engine_changed(event)
            case _ as never:
                assert_never(never)

    # Requests

    def _arrived(self, request: Request) -> None:
        self.tracker.arrived(request)
        self.rates.arrived(request.endpoint_id, self._now_us)
        self._assign(request)

    def _assign(self, request: Request, *, first: bool = False) -> None:
        """Queue a request for a deployment of its endpoint, before all others if `first`, or refuse it."""
        replicas = self._endpoints.get(request.endpoint_id)
        if not replicas and self.manager.profiles.is_waiting(request.endpoint_id):
            self.manager.profiles.add_request(request)
            return
        if not replicas:
            self.tracker.refused(request, f"nothing was deployed for endpoint {request.endpoint_id}")
            return
        deployment = replicas[0] if len(replicas) == 1 else self.router.choose(replicas, request)
        self.tracker.assigned(request, deployment.deployment_id)
        if not deployment.serves:
            self.tracker.refused(request, deployment.refusal_reason())
            return
        too_long = self._why_too_long(deployment, request)
        if too_long is not None:
            self.tracker.refused(request, too_long)
            return
        service_us = self._predict_service_time(deployment, request) if self._predict_service_time else 0
        self.router.sent(deployment, request, self._now_us, service_us)
        deployment.assigned += 1
        if deployment.endpoint.batching is Batching.CONTINUOUS:
            self._submit(deployment, request)
        elif first:
            self.queue.push_front(request, deployment.deployment_id)
        else:
            self.queue.push(request, deployment.deployment_id, service_us)

    def _submit(self, deployment: Deployment, request: Request) -> None:
        """Hand a request to a continuous engine, or hold it until the engine is up."""
        if deployment.state is DeploymentState.UP:
            self.manager.submit(deployment, request, self._now_us)
            self._actions.append(Submit(deployment.deployment_id, request))
        else:
            deployment.held[request.request_id] = request

    def longest_sequence(self, deployment: Deployment) -> int:
        """Return the prompt and output tokens of the longest request that a deployment's engine takes."""
        longest = self._longest_sequence.get(deployment.deployment_id)
        if longest is None:  # looking a model up takes longer than all else of an arrival
            limit = self.settings.max_sequence_tokens(deployment.endpoint)
            longest = self._longest_sequence[deployment.deployment_id] = sys.maxsize if limit is None else limit
        return longest

    def _why_too_long(self, deployment: Deployment, request: Request) -> str | None:
        """Return why a deployment's engine takes no request of this length; None if it does."""
        tokens = request.prompt_tokens + request.output_tokens
        if tokens <= self.longest_sequence(deployment):
            return None
        return self.settings.why_too_long(deployment.endpoint, tokens)

    def _engine_reported(self, event: ExecutionFailed | EngineProgress) -> None:
        if isinstance(event, EngineProgress):
            self._progressed(event)
        else:
            self._execution_failed(event)

    def _finished(self, event: ExecutionFinished) -> None:
        deployment = self.manager.deployments[event.deployment_id]
        if not deployment.running or deployment.execution_id != event.execution_id:
            return
        requests = self.manager.end_execution(deployment, self._now_us)
        self._forget(requests)
        deployment.completed += len(requests)
        if event.output_tokens is not None:
            for request, output_tokens in zip(requests, event.output_tokens, strict=True):
                self.tracker.generated(request, output_tokens)
        for request in requests:
            self.tracker.completed(request, event.first_token_us, self._now_us)
        if deployment.state is DeploymentState.REMOVED:
            self._stop(deployment)

    def _progressed(self, event: EngineProgress) -> None:
        deployment = self.manager.deployments[event.deployment_id]
        if deployment.generation != event.generation or not deployment.alive:
            return
        self.tracker.progressed(event, deployment.in_engine, self._now_us)
        self.manager.progressed(deployment, event)
        for request_id, output_tokens, steps in event.finished:
            if request := self.manager.leave(deployment, request_id, self._now_us, has_begun=True):
                deployment.completed += 1
                self.tracker.generated(request, output_tokens, steps)
                self.tracker.completed(request, None, self._now_us)
        for request_id, reason in event.failed:
            has_begun = self.tracker.is_running(request_id)
            if self.manager.leave(deployment, request_id, self._now_us, has_begun=has_begun):
                self.tracker.failed(request_id, f"{deployment.name}: {reason}")
        if deployment.state is DeploymentState.REMOVED and not deployment.is_busy:
            self._stop(deployment)

    def _execution_failed(self, event: ExecutionFailed) -> None:
        """Fail the requests. The engine works, so they would fail again."""
        deployment = self.manager.deployments[event.deployment_id]
        if not deployment.running or deployment.execution_id != event.execution_id:
            return
        requests = self.manager.end_execution(deployment, self._now_us)
        self._forget(requests)
        for request in requests:
            self.tracker.failed(request.request_id, f"{deployment.name}: {event.reason}")
        if deployment.state is DeploymentState.REMOVED:
            self._stop(deployment)

    def _cancelled(self, request_id: int) -> None:
        deployment = self.manager.deployments.get(self.tracker.deployment_of(request_id))
        has_begun = self.tracker.is_running(request_id)
        if deployment is not None and self.manager.leave(deployment, request_id, self._now_us, has_begun=has_begun):
            self.tracker.failed(request_id, CLIENT_GONE)
            self._actions.append(Abort(deployment.deployment_id, request_id))
            if deployment.state is DeploymentState.REMOVED and not deployment.is_busy:
                self._stop(deployment)
        elif self.manager.profiles.remove_request(request_id) or (
            deployment is not None and self._stops_waiting(deployment, request_id)
        ):
            self.tracker.failed(request_id, CLIENT_GONE)
        elif self.tracker.is_running(request_id):
            self._cancelled_ids.add(request_id)

    def _stops_waiting(self, deployment: Deployment, request_id: int) -> bool:
        """Return whether a request waited for a deployment, which it now does no longer."""
        held = deployment.held.pop(request_id, None)
        return held is not None or self.queue.remove(request_id, deployment.deployment_id)

    def _forget(self, requests: tuple[Request, ...]) -> None:
        """Drop requests that no longer run from the cancelled ones."""
        if self._cancelled_ids:
            self._cancelled_ids.difference_update(request.request_id for request in requests)

    def _dispatch(self) -> None:
        """Dispatch all requests that may go now, and set `wake_us` to when the next one may."""
        self.wake_us = None
        later_mask = 0  # GPUs of requests that may go later
        while head := self.queue.next(self._now_us, self.manager.busy_mask | later_mask):
            deployment = self.manager.deployments[head.queue.deployment_id]
            go_us = self._clock.earliest_us(head.request.arrival_us, self.manager.released_us(deployment))
            if go_us > self._now_us:
                self.wake_us = go_us if self.wake_us is None else min(self.wake_us, go_us)
                later_mask |= deployment.gpu_mask
                continue
            requests = self.queue.take(head, deployment.required_plan.configuration.batch_size)
            execution_id = self.manager.start_execution(deployment, requests, self._now_us)
            self._clock.sent(self._now_us)
            for request in requests:
                self.tracker.started(request, self._now_us)
            self._actions.append(Execute(deployment.deployment_id, execution_id, requests))

    @property
    def closed_until_us(self) -> Micros:
        """When the dispatcher goes on, after engines registered or a request was sent."""
        return self._clock.closed_until_us

    # Deployments

    @property
    def endpoint_ids(self) -> Iterable[int]:
        """The endpoints that were added."""
        return self._endpoints.keys()

    def deployments_of(self, endpoint_id: int) -> tuple[Deployment, ...]:
        """Return all deployments that an endpoint ever had; none for an unknown endpoint."""
        return tuple(self._endpoints.get(endpoint_id, ()))

    def knows(self, endpoint_id: int) -> bool:
        """Return whether an endpoint was added, and not removed while it waited for a profile."""
        return endpoint_id in self._endpoints

    def _wanted(self, event: EndpointAdded | ProfileRequested | ProfileEnded) -> None:
        """Handle what is to be deployed or measured."""
        profiles = self.manager.profiles
        match event:
            case EndpointAdded(endpoint, after_profile):
                replicas = self._endpoints.setdefault(endpoint.endpoint_id, [])
                if after_profile:
                    profiles.add_endpoint(endpoint, after_profile)
                else:
                    replicas += self.manager.deploy(endpoint, self._now_us)
            case ProfileRequested():
                profiles.request(event)
            case ProfileEnded(profile_id, reason):
                profiles.end(profile_id)
                for endpoint in profiles.endpoints_of(profile_id):
                    self._deploy_after_profile(endpoint, reason)

    def _deploy_after_profile(self, endpoint: EndpointSpec, reason: str) -> None:
        """Decide on an endpoint that waited for a profile, or reject it where there is a reason.

        Its requests wait until an engine is up; requests to other endpoints are refused so early.
        """
        requests = self.manager.profiles.remove_endpoint(endpoint.endpoint_id)
        replicas = self._endpoints[endpoint.endpoint_id]
        if reason:
            replicas.append(self.manager.reject(endpoint, reason))
        else:
            replicas += self.manager.deploy(endpoint, self._now_us)
        for deployment in replicas:
            if deployment.plan is not None:
                self._let_wait(deployment)
        for request in requests:
            self._assign(request)

    def _let_wait(self, deployment: Deployment) -> None:
        """Let requests wait for a deployment before its engine is up for the first time."""
        deployment.serves = True
        if deployment.endpoint.batching is Batching.EXCLUSIVE:
            deployment.waiting = self.queue.open_queue(deployment.deployment_id, deployment.gpu_mask)
            self.queue.pause(deployment.deployment_id)

    def _registered(self, event: EngineUp) -> None:
        deployment = self.manager.engine_registered(event, self._now_us)
        if deployment is None:
            return
        if deployment.endpoint.batching is Batching.CONTINUOUS:
            self._route_held(deployment.endpoint.endpoint_id)
            return
        self._clock.pause(self._now_us)
        if self.queue.has_queue(deployment.deployment_id):
            self.queue.resume(deployment.deployment_id)
        else:
            deployment.waiting = self.queue.open_queue(deployment.deployment_id, deployment.gpu_mask)

    def _route_held(self, endpoint_id: int) -> None:
        """Route the requests that wait for any continuous engine of an endpoint, now that one of them is up."""
        held: list[Request] = []
        for replica in self._endpoints[endpoint_id]:
            held += replica.held.values()
            replica.held.clear()
        for request in sorted(held, key=lambda request: request.request_id):
            self._assign(request)

    def _gpu_changed(self, event: GpuDown | GpuUp) -> None:
        if isinstance(event, GpuUp):
            self.manager.gpu_up(event.gpu_id)
            return
        self.manager.gpu_down(event.gpu_id)
        for deployment in self.manager.deployments_on_gpu(event.gpu_id):
            self._engine_down(deployment, f"GPU {event.gpu_id} failed", returns=event.returns, broken=False)

    def _engine_changed(self, event: EngineDown | EngineRepaired) -> None:
        deployment = self.manager.deployments.get(event.deployment_id)
        if deployment is None:
            return
        if isinstance(event, EngineRepaired):
            self.manager.engine_repaired(deployment)
        else:
            self._engine_down(deployment, event.reason, returns=event.returns, broken=True)

    def _engine_down(self, deployment: Deployment, what: str, *, returns: bool, broken: bool) -> None:
        """Handle the failure of an engine: requeue or fail its running requests, and keep or move its waiting ones.

        Args:
            deployment: whose engine failed.
            what: what happened, for the reason of requests that fail.
            returns: whether it will be up again.
            broken: whether the engine itself failed, and not one of its GPUs.
        """
        if not self.manager.holds_memory(deployment):
            return  # rejected, removed, or lost for good before
        if deployment.clear_engine() and not broken:
            # One of its GPUs failed; its processes on the others must be stopped.
            self._actions.append(StopEngine(deployment.deployment_id))
        interrupted = self.manager.end_execution(deployment, self._now_us)
        interrupted += self._lose_all(deployment)
        reason = f"{deployment.name}: {what}"
        if deployment.state is DeploymentState.REMOVED:
            for request in interrupted:
                self.tracker.failed(request.request_id, reason)
            self._forget(interrupted)
            self._stop(deployment)
            return
        self.manager.engine_down(deployment, returns=returns, broken=broken, reason=what)
        if deployment.gone_for_good and self.settings.on_loss is OnLoss.REPLACE:
            self._replace(deployment)
        again = [request for request in interrupted if self._may_retry(request, reason)]
        self._forget(interrupted)
        for request in again:
            if self.tracker.is_running(request.request_id):
                self.tracker.requeued(request)
        if deployment.endpoint.batching is Batching.CONTINUOUS:
            self._move(deployment, again)
        elif self.queue.has_queue(deployment.deployment_id):
            self._keep_or_move(deployment, again)

    def _lose_all(self, deployment: Deployment) -> tuple[Request, ...]:
        """Return the requests of a continuous engine that failed, also those that it has not been given yet."""
        requests = self.manager.lose_all(deployment, self._now_us)
        if requests:
            self._actions = [
                action
                for action in self._actions
                if not (isinstance(action, Submit) and action.deployment_id == deployment.deployment_id)
            ]
        return requests

    def _replace(self, lost: Deployment) -> None:
        """Place a deployment that is lost for good anew; requests wait for the new one if the lost one served."""
        replicas = self._endpoints[lost.endpoint.endpoint_id]
        rps = self.rates.rps(lost.endpoint.endpoint_id, self._now_us)
        replacement = self.manager.replace(lost, self._now_us, wanted=share_of_one(lost.endpoint, replicas, rps))
        if replacement is None:
            return
        replicas.append(replacement)
        replacement.serves = lost.endpoint.batching is Batching.CONTINUOUS and lost.ready_us >= 0
        if self.queue.has_queue(lost.deployment_id):
            self._let_wait(replacement)

    def _keep_or_move(self, deployment: Deployment, again: list[Request]) -> None:
        """Keep requests until the engine is back, those it was running first, or move them to another deployment."""
        if deployment.returns:
            self.queue.pause(deployment.deployment_id)
            for request in again:
                self.queue.push_front(request, deployment.deployment_id)
            return
        waiting, deployment.waiting = self.queue.close_queue(deployment.deployment_id), ()
        for request in again:
            self._assign(request, first=True)
        for request in waiting:
            self._assign(request)

    def _move(self, deployment: Deployment, again: list[Request]) -> None:
        """Route the requests of a continuous engine that failed: to another that is up, else they wait for one."""
        if not deployment.returns:
            again += deployment.held.values()
            deployment.held.clear()
        for request in again:
            self._assign(request)

    def _may_retry(self, request: Request, reason: str) -> bool:
        cancelled = request.request_id in self._cancelled_ids
        if self.settings.on_failure is OnFailure.REQUEUE and self.tracker.attempts(request) < 2 and not cancelled:
            return True
        self.tracker.failed(request.request_id, f"{reason}; {CLIENT_GONE}" if cancelled else reason)
        return False

    def _remove(self, endpoint_id: int) -> None:
        if self.manager.profiles.is_waiting(endpoint_id):
            del self._endpoints[endpoint_id]
            for request in self.manager.profiles.remove_endpoint(endpoint_id):
                self.tracker.refused(request, f"endpoint {endpoint_id} was removed")
        for deployment in self._endpoints.get(endpoint_id, []):
            if deployment.state in (DeploymentState.REJECTED, DeploymentState.REMOVED):
                continue
            self.manager.remove(deployment)
            for request in deployment.held.values():
                self.tracker.refused(request, deployment.refusal_reason())
            deployment.held.clear()
            if self.queue.has_queue(deployment.deployment_id):
                waiting, deployment.waiting = self.queue.close_queue(deployment.deployment_id), ()
                for request in waiting:
                    self.tracker.refused(request, deployment.refusal_reason())
            if not deployment.is_busy:
                self._stop(deployment)

    def _stop(self, deployment: Deployment) -> None:
        if self.manager.release(deployment, self._now_us):
            self._actions.append(StopEngine(deployment.deployment_id))


def _order(event: Event) -> tuple[int, int]:
    """Return the sort key of an event among those of its instant."""
    return event.rank, event.key


def snapshot(
    controller: Controller,
    now_us: Micros,
    *,
    last_arrival_us: Micros,
    total: int,
    engines: Mapping[int, EngineCounters] = MappingProxyType({}),
) -> Progress:
    """Return the figures of a live view.

    Args:
        controller: of the run.
        now_us: the present.
        last_arrival_us: when the last request of the workload arrives.
        total: requests of the workload.
        engines: the state of the continuous engines, by deployment.
    """
    tracker, manager = controller.tracker, controller.manager
    recent = tracker.recent_rows()
    latencies = sorted(latency_us for latency_us, _ in recent)
    met = [latency_us <= slo_us for latency_us, slo_us in recent if slo_us]
    return Progress(
        now_us=now_us,
        last_arrival_us=last_arrival_us,
        total=total,
        arrived=len(tracker),
        waiting=tracker.count(RequestStatus.WAITING),
        running=tracker.count(RequestStatus.RUNNING),
        completed=tracker.count(RequestStatus.COMPLETED),
        refused=tracker.count(RequestStatus.REFUSED),
        failed=tracker.count(RequestStatus.FAILED),
        recent_p50_s=_quantile_s(latencies, 0.50),
        recent_p95_s=_quantile_s(latencies, 0.95),
        recent_slo_attainment=sum(met) / len(met) if met else None,
        deployments=tuple(
            deployment.status(controller.queue.waiting(deployment_id), engines.get(deployment_id))
            for deployment_id, deployment in manager.deployments.items()
        ),
        gpus=manager.gpu_statuses(now_us),
    )


def _quantile_s(ordered_us: list[Micros], share: float) -> float | None:
    """Return the nearest-rank quantile of sorted durations, in seconds."""
    return seconds(ordered_us[min(len(ordered_us) - 1, int(share * len(ordered_us)))]) if ordered_us else None
