"""A service that is killed and restarted several times on one state file: every accepted request must end."""

from __future__ import annotations

import asyncio
import sqlite3
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cluster_sim import LONGEST_S, MAX_TOKENS, RandomPlacement, RunSummary, executor_on
from fault_injection import FaultRates, RandomDraws
from fixtures import MODEL
from simulated_engines import Connection, Machine
from virtual_time import run_virtually

from maveriq.domain.deployments import Intent, Objective
from maveriq.domain.requests import FINAL_STATUSES
from maveriq.exec.live_cluster import EndpointRequest, Submission
from maveriq.exec.messages import EngineSpec
from maveriq.policy.pinned import PinnedPlacementPolicy
from maveriq.serve.errors import ApiError
from maveriq.serve.job_writer import Prepare, StoreError
from maveriq.serve.model_registry import ModelRegistry
from maveriq.serve.requests import AcceptedRequest
from maveriq.serve.service import Service
from maveriq.serve.settings import ServeSettings
from maveriq.serve.store import Store

_T = TypeVar("_T")
_FINAL = {status.label for status in FINAL_STATUSES}


class Disk:
    """A state file with delays and random failures; it keeps what was committed."""

    def __init__(self, draws: RandomDraws, full: float) -> None:
        self._draws = draws
        self._full = full
        self.faulty = True
        self._file = sqlite3.connect(":memory:", isolation_level=None)

    def close(self) -> None:
        self._file.close()

    def open(self, power: ServicePower) -> Callable[[Path, Prepare], File]:
        """Return the `open_writer` of a store for one run of the service."""

        def opened(_: Path, prepare: Prepare) -> File:
            prepare(self._file)
            return File(self, power)

        return opened

    async def do(self, work: Callable[[sqlite3.Connection], _T], power: ServicePower) -> _T:
        await asyncio.sleep(self._draws.wait_s(0.01))
        await power.on()
        if self.faulty and self._draws.happens(self._full):
            raise StoreError("the disk is full")
        self._file.execute("BEGIN")
        result = work(self._file)
        self._file.execute("COMMIT")
        await asyncio.sleep(self._draws.wait_s(0.01))
        await power.on()
        return result


@dataclass
class File:
    """Stands in for `maveriq.serve.job_writer.JobWriter` during one run of the service."""

    disk: Disk
    power: ServicePower

    async def run(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        return await self.disk.do(work, self.power)

    def problem(self) -> str:
        return ""

    def close(self) -> None:
        pass


class ServicePower:
    """Blocks all tasks of a run of the service once that run is killed."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._cut = False

    async def on(self) -> None:
        if self._cut:
            await asyncio.get_running_loop().create_future()

    def cut(self) -> None:
        self._cut = True
        self._machine.orphan_all()

    async def launch(self, spec: EngineSpec, gpu_ids: Sequence[int]) -> Connection:
        """`Launcher.launch`."""
        await self.on()
        return await self._machine.launch(spec, gpu_ids)


class Clients:
    """The clients of the service over all its runs, and the statuses they received."""

    def __init__(self, draws: RandomDraws) -> None:
        self._draws = draws
        self.reported: dict[str, str | None] = {}  # by request: the status that its client received
        self.endpoints: set[int] = set()
        self._uncertain: set[int] = set()

    async def use(self, service: Service) -> None:
        """Deploy, send and remove in parallel, until done or killed."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(self._draws.integer(1, 4)):
                tasks.create_task(self._use_as_client(service))

    async def _use_as_client(self, service: Service) -> None:
        await asyncio.sleep(self._draws.between(0, 10))
        endpoint_id = await self._deploy(service)
        async with asyncio.TaskGroup() as followers:
            for _ in range(self._draws.integer(0, 20)):
                await asyncio.sleep(self._draws.wait_s(2))
                endpoints = service.endpoints()
                if endpoints:
                    target = endpoints[self._draws.integer(0, len(endpoints) - 1)].endpoint_id
                    await self._send(service, target, followers)
        if endpoint_id and self._draws.happens(0.3):
            await self._remove(service, endpoint_id)

    async def _deploy(self, service: Service) -> int | None:
        requested = EndpointRequest(
            model=MODEL, intent=Intent(objective=Objective.MIN_COST), output_tokens=MAX_TOKENS, batch_size=2
        )
        try:
            endpoint = await service.create_endpoint(next(iter(service.models)), requested, "")
        except (StoreError, ApiError):
            return None
        self.endpoints.add(endpoint.endpoint_id)
        return endpoint.endpoint_id

    async def _remove(self, service: Service, endpoint_id: int) -> None:
        self._uncertain.add(endpoint_id)  # if killed meanwhile, it may be there or not
        try:
            await service.remove_endpoint(endpoint_id)
        except ApiError:  # another client was first
            pass
        except StoreError:
            return
        self.endpoints.discard(endpoint_id)

    async def _send(self, service: Service, endpoint_id: int, followers: asyncio.TaskGroup) -> None:
        submission = Submission(
            endpoint_id=endpoint_id,
            prompt=tuple(range(self._draws.integer(1, 5))),
            output_tokens=self._draws.integer(1, MAX_TOKENS),
        )
        try:
            accepted = await service.requests.accept(MODEL.name, submission, None)
        except ApiError:
            return
        self.reported[accepted.row.request_id] = None
        followers.create_task(self._follow(accepted, service))

    async def _follow(self, accepted: AcceptedRequest, service: Service) -> None:
        if self._draws.happens(0.1):
            service.requests.cancel(accepted)
        ended = await asyncio.shield(accepted.outcome)
        self.reported[accepted.row.request_id] = ended.status.label

    def certain(self, endpoints: set[int]) -> set[int]:
        return endpoints - self._uncertain


def simulate_restarts(seed: int) -> RunSummary:
    """Simulate a service that is killed and restarted several times.

    Raises:
        AssertionError: a check failed.
        TimeoutError: something never ended.
    """
    return run_virtually(_simulate(RandomDraws(seed)), longest_s=LONGEST_S)


async def _simulate(draws: RandomDraws) -> RunSummary:
    machine = Machine(draws, FaultRates.drawn(draws))
    disk = Disk(draws, full=draws.between(0, 0.1) if draws.happens(0.5) else 0.0)
    clients = Clients(draws)
    try:
        for _ in range(draws.integer(1, 3)):
            await _run_and_kill(draws, machine, disk, clients)
        statuses = await _final_run(draws, machine, disk, clients)
    finally:
        disk.close()
    return RunSummary(statuses=statuses, engines=len(machine.processes), simulated_s=machine.loop.time())


async def _run_and_kill(draws: RandomDraws, machine: Machine, disk: Disk, clients: Clients) -> None:
    """Start a service, use it, and kill it at a random time."""
    power = ServicePower(machine)
    before = asyncio.all_tasks()

    async def one_run() -> None:
        service = _service(draws, machine, disk, power)
        if await _starts(service):
            await clients.use(service)
        await asyncio.get_running_loop().create_future()

    running = asyncio.create_task(one_run())
    await asyncio.wait({running}, timeout=draws.wait_s(40))
    power.cut()
    left = asyncio.all_tasks() - before
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)
    await asyncio.sleep(0.2 + draws.wait_s(1))


async def _final_run(draws: RandomDraws, machine: Machine, disk: Disk, clients: Clients) -> Counter[str]:
    """Start the service again, repair its disk, stop it, and check the stored requests."""
    service = _service(draws, machine, disk, ServicePower(machine))
    while not await _starts(service):
        service = _service(draws, machine, disk, ServicePower(machine))
    back = {endpoint.endpoint_id for endpoint in service.endpoints() if endpoint.deployments}
    assert clients.certain(clients.endpoints) <= back, "an endpoint is lost"
    await clients.use(service)
    disk.faulty = False
    await service.requests.drained()
    rows = {row.request_id: row for row in await service.store.requests(status=None, limit=100_000)}
    await service.stop()
    await asyncio.sleep(5)
    for request_id, reported in clients.reported.items():
        assert request_id in rows, "an accepted request is not stored"
        assert reported in (None, rows[request_id].status), f"reported {reported}, stored {rows[request_id].status}"
    assert {row.status for row in rows.values()} <= _FINAL, "an accepted request has no final status"
    assert not [process.name for process in machine.processes if process.alive], "processes outlive their executor"
    assert not machine.violations, machine.violations[0]
    return Counter(row.status for row in rows.values())


async def _starts(service: Service) -> bool:
    """Start a service; return False if it cannot read its state."""
    try:
        if not await service.store.models():
            await service.store.add_model(MODEL, "")
        await service.start()
    except StoreError:
        return False
    return True


def _service(draws: RandomDraws, machine: Machine, disk: Disk, power: ServicePower) -> Service:
    placements = PinnedPlacementPolicy(default=RandomPlacement(draws))
    executor = executor_on(draws, machine, placements, power)
    store = Store(Path("state"), open_writer=disk.open(power))
    models = ModelRegistry(store, folder=None, max_models=ServeSettings().max_models)
    return Service(executor, store, ServeSettings(), placements, models)
