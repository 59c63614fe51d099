"""Laws of profiles beside serving: memory is conserved, deployments go first, and no request is lost."""

from dataclasses import dataclass, replace

import hypothesis.strategies as st
import pytest
from fixtures import cluster, endpoint_spec, plan, predict_service_time
from hypothesis import given, settings

from maveriq.control.controller import Controller, ControllerSettings
from maveriq.control.events import (
    Action,
    EndpointAdded,
    EndpointRemoved,
    EngineDown,
    EngineUp,
    Event,
    Execute,
    ExecutionFinished,
    GpuDown,
    GpuUp,
    ProfileEnded,
    ProfileRequested,
    RequestArrived,
    RequestCancelled,
    StartEngine,
    StartProfile,
    StopProfile,
)
from maveriq.control.queues import QueueDiscipline
from maveriq.domain.cluster import ClusterView
from maveriq.domain.deployments import Batching, EndpointSpec
from maveriq.domain.requests import FINAL_STATUSES, Request, RequestStatus
from maveriq.policy.policy import Decision, Deploy, Rejection
from maveriq.units import BYTES_PER_GIB

GPUS = 3


@dataclass(frozen=True)
class FirstFit:
    """Puts every endpoint on the first GPU with `gib` free."""

    gib: int = 3
    name: str = "first-fit"

    def decide(self, endpoint: EndpointSpec, view: ClusterView) -> Decision:
        needed = self.gib * BYTES_PER_GIB
        for gpu in view.gpus:
            if gpu.free_bytes >= needed:
                one = plan((gpu.gpu_id,))
                return Deploy(plans=(replace(one, gpu_bytes=(needed,), est_memory_bytes=needed),))
        return Rejection(reason=f"no GPU has {self.gib} GiB")


class Scripted:
    """Sends scripted events to a controller, and starts and stops what it says."""

    def __init__(self, **more) -> None:
        self.ended: list[int] = []
        self.controller = Controller(
            cluster(GPUS),
            FirstFit(),
            ControllerSettings(**more),
            predict_service_time,
            on_request_end=self.ended.append,
        )
        self.now_us = self.arrived = self.endpoints = 0
        self.started: dict[int, StartEngine] = {}
        self.executions: dict[int, Execute] = {}
        self.measuring: dict[int, tuple[int, ...]] = {}

    def send(self, *events: Event) -> list[Action]:
        self.now_us += 1
        actions = self.controller.handle(self.now_us, events)
        for action in actions:
            match action:
                case StartEngine():
                    self.started[action.deployment_id] = action
                case Execute():
                    self.executions[action.deployment_id] = action
                case StopProfile(profile_id):
                    del self.measuring[profile_id]
                case StartProfile(profile_id, gpu_ids):
                    assert profile_id not in self.measuring
                    self.measuring[profile_id] = gpu_ids
        return actions

    def add(self, *, after_profile: int = 0, continuous: bool = False) -> list[Action]:
        self.endpoints += 1
        spec = replace(
            endpoint_spec(self.endpoints), batching=Batching.CONTINUOUS if continuous else Batching.EXCLUSIVE
        )
        return self.send(EndpointAdded(spec, after_profile))

    def arrive(self, endpoint_id: int) -> None:
        self.arrived += 1
        self.send(
            RequestArrived(
                Request(
                    request_id=self.arrived,
                    endpoint_id=endpoint_id,
                    arrival_us=self.now_us + 1,
                    prompt_tokens=1,
                    output_tokens=3,
                )
            )
        )

    def perform(self, what: str, number: int) -> None:
        match what:
            case "arrive":
                self.arrive(1 + number % max(1, self.endpoints))
            case "await" | "await continuous":
                self.add(after_profile=1 + number % 3, continuous=what == "await continuous")
            case "deploy":
                self.add()
            case "remove":
                self.send(EndpointRemoved(1 + number % max(1, self.endpoints)))
            case "measure":
                self.send(
                    ProfileRequested(1 + number % 3, 1 + number % 2, number * BYTES_PER_GIB // 8, number % 5 == 0)
                )
            case "end" | "give up":
                self.measuring.pop(1 + number % 3, None)
                self.send(ProfileEnded(1 + number % 3, "" if what == "end" else "it failed"))
            case "cancel":
                self.send(RequestCancelled(1 + number % max(1, self.arrived)))
            case "no gpu":
                self.send(GpuDown(number % GPUS, returns=True))
            case "gpu":
                self.send(GpuUp(number % GPUS))
            case _:
                self._of_engine(what, number)

    def _of_engine(self, what: str, number: int) -> None:
        if not self.started:
            return
        deployment_id = sorted(self.started)[number % len(self.started)]
        match what:
            case "up":
                self.send(EngineUp(deployment_id, self.started[deployment_id].generation))
            case "lost":
                self.send(EngineDown(deployment_id, returns=False))
            case "finish" if deployment_id in self.executions:
                self.send(ExecutionFinished(deployment_id, self.executions[deployment_id].execution_id, self.now_us))

    def check(self) -> None:
        manager, tracker = self.controller.manager, self.controller.tracker
        holding = manager.profiles.holding
        assert {number: set(shares) for number, shares in holding.items()} == {
            number: set(gpu_ids) for number, gpu_ids in self.measuring.items()
        }
        for gpu in range(GPUS):
            held = sum(
                dict(zip(deployment.gpu_ids, deployment.required_plan.gpu_bytes, strict=True))[gpu]
                for deployment in manager.deployments_on_gpu(gpu)
            )
            held += sum(shares.get(gpu, 0) for shares in holding.values())
            assert manager.used_bytes(gpu) == held <= 8 * BYTES_PER_GIB
            assert sum(gpu in shares for shares in holding.values()) <= 1
        waiting, running = (tracker.count(status) for status in (RequestStatus.WAITING, RequestStatus.RUNNING))
        assert len(self.ended) + waiting + running == self.arrived
        assert len(set(self.ended)) == len(self.ended)


STEPS = st.sampled_from(
    ["arrive"] * 4
    + ["await", "await", "await continuous", "deploy", "remove", "measure", "measure", "end", "give up", "cancel"]
    + ["up", "up", "up", "lost", "finish", "finish", "no gpu", "gpu"]
)


@given(st.lists(st.tuples(STEPS, st.integers(0, 30)), max_size=80), st.sampled_from(QueueDiscipline))
@settings(max_examples=150, deadline=None)
def test_memory_is_conserved_and_no_request_is_lost_whatever_profiles_do(script, discipline) -> None:
    scripted = Scripted(discipline=discipline, max_wait_us=20)
    for what, number in script:
        scripted.perform(what, number)
        scripted.check()
    table = scripted.controller.tracker.close()
    assert set(table.status.tolist()) <= {status.value for status in FINAL_STATUSES}
    assert sum(table.counts().values()) == scripted.arrived


def statuses(scripted: Scripted) -> list[str]:
    return [RequestStatus(value).label for value in scripted.controller.tracker.close().status]


def test_a_profile_takes_the_last_gpu_that_holds_nothing_and_gives_it_back() -> None:
    scripted = Scripted()
    scripted.send(ProfileRequested(1, 1, BYTES_PER_GIB))
    assert scripted.measuring == {1: (2,)}
    scripted.send(ProfileRequested(2, 2, BYTES_PER_GIB))
    assert scripted.measuring == {1: (2,), 2: (0, 1)}
    scripted.send(ProfileRequested(3, 1, BYTES_PER_GIB))
    assert 3 not in scripted.measuring
    scripted.send(ProfileEnded(1))
    assert scripted.controller.manager.profiles.holding.keys() == {2, 3}


def test_beside_engines_a_profile_takes_only_what_it_needs() -> None:
    scripted = Scripted()
    for _ in range(GPUS * 2):
        scripted.add()  # 6 of 8 GiB everywhere
    scripted.send(ProfileRequested(1, 1, BYTES_PER_GIB))
    assert not scripted.measuring
    scripted.send(ProfileEnded(1), ProfileRequested(2, 1, BYTES_PER_GIB, beside_engines=True))
    assert scripted.controller.manager.profiles.holding == {2: {scripted.measuring[2][0]: BYTES_PER_GIB}}
    scripted.send(ProfileRequested(3, 1, 3 * BYTES_PER_GIB, beside_engines=True))
    assert 3 not in scripted.measuring


def test_a_deployment_without_room_takes_the_gpus_of_a_profile_which_goes_on_later() -> None:
    scripted = Scripted()
    for _ in range(4):
        scripted.add()  # on GPUs 0 and 1
    scripted.send(ProfileRequested(1, 1, BYTES_PER_GIB))
    assert scripted.measuring == {1: (2,)}
    actions = scripted.add()
    assert [type(action) for action in actions] == [StopProfile, StartEngine]
    assert scripted.controller.manager.deployments[5].gpu_ids == (2,)
    assert not scripted.measuring
    scripted.send(EndpointRemoved(5))
    assert scripted.measuring == {1: (2,)}


def test_a_profile_leaves_a_gpu_that_fails() -> None:
    scripted = Scripted()
    scripted.send(ProfileRequested(1, 1, BYTES_PER_GIB))
    scripted.send(GpuDown(2, returns=True))
    assert scripted.measuring == {1: (1,)}


@pytest.mark.parametrize("reason", ["", "the model is broken"])
def test_requests_wait_with_their_endpoint_until_the_profile_has_ended(reason: str) -> None:
    scripted = Scripted()
    scripted.send(ProfileRequested(7, 1, BYTES_PER_GIB))
    scripted.add(after_profile=7)
    for _ in range(2):
        scripted.arrive(1)
    assert scripted.controller.tracker.count(RequestStatus.WAITING) == 2
    scripted.send(ProfileEnded(7, reason))
    if reason:
        assert scripted.controller.manager.deployments[1].reason == reason
        assert statuses(scripted) == ["refused", "refused"]
        return
    scripted.send(EngineUp(1, 1))
    scripted.send(ExecutionFinished(1, 1, scripted.now_us))
    scripted.send(ExecutionFinished(1, 2, scripted.now_us))
    assert statuses(scripted) == ["completed", "completed"]


def test_requests_that_wait_can_be_cancelled_and_end_with_their_endpoint() -> None:
    scripted = Scripted()
    scripted.add(after_profile=7)
    scripted.add(after_profile=7)
    for endpoint in (1, 1, 2):
        scripted.arrive(endpoint)
    scripted.send(RequestCancelled(1))
    scripted.send(EndpointRemoved(1))
    assert not scripted.controller.knows(1)
    assert statuses(scripted) == ["failed", "refused", "unfinished"]
