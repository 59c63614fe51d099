"""The fast kernel's driver: rare events in Python, with the controller's own objects; all between them compiled.

`FastReplay` has the run of `maveriq.sim.exclusive_kernel` and, for each rare event, brings the controller up to date,
lets it handle the event, and hands back what has changed. `maveriq.sim.kernels` says to what it applies. Import it
late: it imports numba.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from heapq import heappop, heappush
from typing import Any

import numpy as np

from maveriq.compiling import Floats, Integers, address, is_kept
from maveriq.control.controller import Controller, snapshot
from maveriq.control.deployment_manager import Batch, Deployment
from maveriq.control.events import EndpointAdded, EngineUp, Event, StartEngine
from maveriq.control.queues import QueueDiscipline
from maveriq.control.router import Router
from maveriq.domain.progress import Watcher
from maveriq.domain.records import GpuSample, RunRecord
from maveriq.domain.requests import Request, RequestStatus
from maveriq.scenario.service_times import RecordedServiceTimes
from maveriq.scenario.system import ReplaySystem
from maveriq.sim import exclusive_kernel as kernel
from maveriq.units import MICROS_PER_SECOND, Micros
from maveriq.workload.requests import Arrivals, requests_of

_LOG_ROWS = 1 << 16
_SAMPLE_NUMBERS = 1 << 16
_FIRST_TIMES = 1 << 12
_MASK_64 = (1 << 64) - 1


class FastReplay:
    """One run (mutable).

    Args:
        system: what is simulated, with nothing in it that the fast kernel leaves to SimPy.
    """

    def __init__(self, system: ReplaySystem) -> None:
        self._system = system
        self._arrivals = system.workload.arrivals
        self._controller = Controller(system.cluster, system.policy, system.settings, system.predict_service_time)
        self._rare: list[tuple[Micros, int, Event]] = []  # a heap
        self._posted = 0
        self._samples: list[GpuSample] = []
        self._sampled_us: Micros = 0
        self._sampled_busy_us = [0] * len(system.cluster)
        self._reasoned = 0  # rows before this one have their reasons
        self._run: Integers = np.zeros(kernel.K_SIZE, dtype=np.int64)
        self._kept: dict[int, Any] = {}  # arrays whose addresses are in the run, by its field
        self._columns = self._open_columns()
        self._times = _ServiceTimes()
        self._tables = _Tables(system)
        self._begin()

    def run(self, watcher: Watcher | None) -> RunRecord:
        """Simulate from the first event to the end, and return the records."""
        while (outcome := kernel.replay(address(self._run))) > kernel.DEADLINE:
            if outcome == kernel.RARE_EVENT:
                self._handle_rare_events()
            elif outcome == kernel.ENGINE_STARTS:
                self._start_engines()
            elif outcome == kernel.UNKNOWN_TIME:
                self._learn_time()
            else:
                self._empty_buffers()
        ended_us = int(self._run[kernel.K_DEADLINE if outcome == kernel.DEADLINE else kernel.K_NOW])
        return self._record(ended_us, watcher)

    # The beginning

    def _open_columns(self) -> Mapping[str, Any]:
        arrivals = self._arrivals
        self._controller.tracker.arrived_together(
            endpoint_id=arrivals.endpoint_id,
            deployment_id=np.zeros(1, dtype=np.int64).repeat(len(arrivals)),
            arrival_us=arrivals.arrival_us,
            prompt_tokens=arrivals.prompt_tokens,
            output_tokens=arrivals.output_tokens,
            slo_us=arrivals.slo_us,
        )
        return self._controller.tracker.columns()

    def _begin(self) -> None:
        system, run = self._system, self._run
        timing, settings = system.settings.timing, system.settings
        run[kernel.K_DEADLINE] = int(self._arrivals.arrival_us[-1]) + system.drain_us
        run[kernel.K_LAST_ENDPOINT] = max((each.requested_us for each in system.workload.endpoints), default=0)
        run[kernel.K_ROWS] = len(self._arrivals)
        run[kernel.K_TICK], run[kernel.K_AFTER_ARRIVAL] = timing.tick_us, timing.after_arrival_us
        run[kernel.K_AFTER_RELEASE] = timing.after_release_us
        run[kernel.K_LAST_WAKE] = run[kernel.K_NEXT_CALL] = kernel.NEVER
        run[kernel.K_IS_SHARED_ORDER] = settings.discipline is QueueDiscipline.FIFO
        run[kernel.K_MAX_WAIT] = settings.max_wait_us
        stream = (zlib.crc32(b"replicas") << 32 ^ settings.seed) & _MASK_64
        run[kernel.K_PICK] = np.uint64(stream).astype(np.int64)
        run[kernel.K_SAMPLE_US] = run[kernel.K_NEXT_SAMPLE] = system.sample_us
        gpus = len(system.cluster)
        run[kernel.K_MAX_SAMPLES] = max(1, _SAMPLE_NUMBERS // (1 + gpus))
        self._keep(kernel.K_SAMPLES_AT, np.zeros((int(run[kernel.K_MAX_SAMPLES]), 1 + gpus), dtype=np.int64))
        for field, name in (
            (kernel.K_ARRIVAL_AT, "arrival_us"), (kernel.K_ENDPOINT_AT, "endpoint_id"),
            (kernel.K_PROMPT_AT, "prompt_tokens"), (kernel.K_OUTPUT_AT, "output_tokens"),
            (kernel.K_DEPLOYMENT_AT, "deployment_id"), (kernel.K_START_AT, "start_us"),
            (kernel.K_FIRST_TOKEN_AT, "first_token_us"), (kernel.K_FINISH_AT, "finish_us"),
            (kernel.K_STATUS_AT, "status"), (kernel.K_ATTEMPTS_AT, "attempts"),
        ):  # fmt: skip
            self._keep(field, self._columns[name])
        self._keep(kernel.K_BEHIND_AT, np.empty(len(self._arrivals), dtype=np.int32))
        if isinstance(system.service_times, RecordedServiceTimes):
            self._keep(kernel.K_RECORDED_AT, system.service_times.recorded_us)
        self._times.put(self._run)
        self._start_ready()
        for endpoint in system.workload.endpoints:
            if not endpoint.ready_at_start:
                self._post(endpoint.requested_us, EndpointAdded(endpoint))
        self._hand_over()

    def _keep(self, field: int, array: Any) -> None:
        """Put the address of an array into the run."""
        self._kept[field] = array
        self._run[field] = address(array)

    def _start_ready(self) -> None:
        """Start the engines that are up before the first request arrives."""
        added = [EndpointAdded(each) for each in self._system.workload.endpoints if each.ready_at_start]
        if added:
            actions = self._controller.handle(0, added)
            self._controller.handle(
                0,
                [
                    EngineUp(start.deployment_id, start.generation)
                    for start in actions
                    if isinstance(start, StartEngine)
                ],
            )

    def _post(self, time_us: Micros, event: Event) -> None:
        self._posted += 1
        heappush(self._rare, (time_us, self._posted, event))

    # Rare events

    def _handle_rare_events(self) -> None:
        now_us = int(self._run[kernel.K_NOW])
        self._take_back()
        due = []
        while self._rare and self._rare[0][0] == now_us:
            due.append(heappop(self._rare)[2])
        self._controller.apply(now_us, due)
        self._hand_over()

    def _start_engines(self) -> None:
        now_us = int(self._run[kernel.K_NOW])
        self._take_back()
        for start in self._controller.manager.start_waiting():
            up = EngineUp(start.deployment_id, start.generation)
            self._post(now_us + self._system.load_time(start.plan), up)
        self._hand_over()

    def _take_back(self) -> None:
        """Bring the controller's objects up to date."""
        self._empty_buffers()
        self._note_refusals()

    def _hand_over(self) -> None:
        """Bring the run up to date with the controller's objects."""
        self._tables.update(self._run, self._controller)
        self._run[kernel.K_CLOSED_UNTIL] = max(self._run[kernel.K_CLOSED_UNTIL], self._controller.closed_until_us)
        self._run[kernel.K_NEXT_RARE] = self._rare[0][0] if self._rare else kernel.NEVER
        self._make_room()

    def _make_room(self) -> None:
        """Let buffers hold what can happen in an instant."""
        run, deployments = self._run, int(self._run[kernel.K_DEPLOYMENTS])
        of_instant = 2 * deployments * (1 + int(run[kernel.K_MAX_CO_LOCATED])) + 1
        run[kernel.K_EVENTS_OF_INSTANT] = of_instant
        needed = int(run[kernel.K_EVENTS]) + of_instant
        if needed > run[kernel.K_MAX_EVENTS]:
            events = np.zeros((2 * needed, kernel.EVENT_SIZE), dtype=np.int64)
            if run[kernel.K_EVENTS]:
                events[: run[kernel.K_EVENTS]] = self._kept[kernel.K_EVENTS_AT][: run[kernel.K_EVENTS]]
            self._keep(kernel.K_EVENTS_AT, events)
            run[kernel.K_MAX_EVENTS] = len(events)
        if deployments > run[kernel.K_MAX_LOG] - _LOG_ROWS:
            run[kernel.K_MAX_LOG] = _LOG_ROWS + 2 * deployments
            self._keep(kernel.K_LOG_AT, np.zeros((int(run[kernel.K_MAX_LOG]), kernel.LOG_SIZE), dtype=np.int64))

    def _learn_time(self) -> None:
        """Ask for a service time that the run does not know."""
        run = self._run
        number, prompt_tokens, output_tokens, batch = (
            int(run[field])
            for field in (
                kernel.K_ASK_DEPLOYMENT, kernel.K_ASK_PROMPT, kernel.K_ASK_OUTPUT, kernel.K_ASK_BATCH,
            )
        )  # fmt: skip
        deployment = self._controller.manager.deployments[number]
        request = Request(
            request_id=0, endpoint_id=0, arrival_us=0, prompt_tokens=prompt_tokens, output_tokens=output_tokens
        )
        times_us = self._system.service_times.times_us(deployment.required_plan, (request,) * batch)
        self._times.add(run, (output_tokens << 32 | prompt_tokens, number << 32 | batch, *times_us))

    # What the run has noted

    def _empty_buffers(self) -> None:
        """Take over executions and samples of GPUs."""
        run = self._run
        log = self._kept[kernel.K_LOG_AT][: run[kernel.K_LOG]] if run[kernel.K_LOG] else _NO_LOG
        running = self._tables.running(self._arrivals, self._kept)
        self._controller.manager.executed_together(log[:, 0], log[:, 1], log[:, 2], running)
        run[kernel.K_LOG] = 0
        for row in self._kept[kernel.K_SAMPLES_AT][: run[kernel.K_SAMPLES]].tolist():
            self._sample(row[0], row[1:])
        run[kernel.K_SAMPLES] = 0
        self._make_room()

    def _sample(self, now_us: Micros, busy_us: Sequence[Micros]) -> None:
        elapsed_us, manager = now_us - self._sampled_us, self._controller.manager
        self._samples += [
            GpuSample(
                time_us=now_us,
                gpu_id=gpu_id,
                memory_bytes=manager.used_bytes(gpu_id),
                busy_share=(now - before) / elapsed_us,
            )
            for gpu_id, (before, now) in enumerate(zip(self._sampled_busy_us, busy_us, strict=True))
        ]
        self._sampled_us, self._sampled_busy_us = now_us, list(busy_us)

    def _note_refusals(self) -> None:
        """Give their reasons to requests that were refused since deployments last changed."""
        rows = slice(self._reasoned, int(self._run[kernel.K_NEXT_ROW]))
        self._reasoned = rows.stop
        refused = np.flatnonzero(self._columns["status"][rows] == RequestStatus.REFUSED.value) + rows.start
        if not len(refused):
            return
        endpoint_id, deployment_id, prompt_tokens, output_tokens = (
            self._columns[name][refused].astype(np.int64)
            for name in ("endpoint_id", "deployment_id", "prompt_tokens", "output_tokens")
        )
        takes = np.zeros(1 + int(self._run[kernel.K_DEPLOYMENTS]), dtype=bool)
        takes[[number for number, each in self._controller.manager.deployments.items() if each.serves]] = True
        keys = np.where(takes[deployment_id], prompt_tokens + output_tokens, 0) << 24 | deployment_id
        keys = np.where(deployment_id > 0, keys, -endpoint_id)
        _, firsts, places = np.unique(keys, return_index=True, return_inverse=True)
        order = np.argsort(firsts)
        reasons = [
            self._why_refused(int(endpoint_id[at]), int(deployment_id[at]), int(prompt_tokens[at] + output_tokens[at]))
            for at in firsts[order].tolist()
        ]
        rank = np.empty(len(order), dtype=np.int64)
        rank[order] = np.arange(len(order))
        self._controller.tracker.refused_together(refused, reasons, rank[places])

    def _why_refused(self, endpoint_id: int, deployment_id: int, tokens: int) -> str:
        if not deployment_id:
            return f"nothing was deployed for endpoint {endpoint_id}"
        deployment = self._controller.manager.deployments[deployment_id]
        if not deployment.serves:
            return deployment.refusal_reason()
        return self._system.settings.why_too_long(deployment.endpoint, tokens) or ""

    # The end

    def _record(self, ended_us: Micros, watcher: Watcher | None) -> RunRecord:
        self._take_back()
        if ended_us > self._sampled_us:
            self._sample(ended_us, self._tables.busy_us(ended_us))
        controller = self._controller
        controller.tracker.recount()
        if watcher:
            self._restore_queues()
            last_arrival_us = int(self._arrivals.arrival_us[-1])
            watcher.update(snapshot(controller, ended_us, last_arrival_us=last_arrival_us, total=len(self._arrivals)))
        return RunRecord(
            requests=controller.tracker.close(),
            deployments=tuple(deployment.record() for deployment in controller.manager.deployments.values()),
            gpu_samples=tuple(self._samples),
            models={endpoint.endpoint_id: endpoint.model.name for endpoint in self._system.workload.endpoints},
            ended_us=ended_us,
        )

    def _restore_queues(self) -> None:
        """Put the requests that wait into the controller's queue, for a live view."""
        for row in np.flatnonzero(self._columns["status"] == RequestStatus.WAITING.value).tolist():
            request = next(requests_of(self._arrivals, first=row))
            self._controller.queue.push(request, int(self._columns["deployment_id"][row]))
        self._tables.count_completions(self._controller)


_NO_LOG = np.zeros((0, kernel.LOG_SIZE), dtype=np.int64)


class _ServiceTimes:
    """The service times that a run knows: an open hash table, at most half full (mutable)."""

    def __init__(self) -> None:
        self._rows: Integers = np.zeros((_FIRST_TIMES, kernel.TIMES_SIZE), dtype=np.int64)
        self._count = 0

    def put(self, run: Integers) -> None:
        """Put the address of the table into the run."""
        run[kernel.K_TIMES_AT], run[kernel.K_TIMES_MASK] = address(self._rows), len(self._rows) - 1

    def add(self, run: Integers, row: tuple[int, int, int, int]) -> None:
        """Add the times of a question that is not in it."""
        self._count += 1
        if 2 * self._count > len(self._rows):
            known = self._rows[self._rows[:, 1] != 0]
            self._rows = np.zeros((4 * len(self._rows), kernel.TIMES_SIZE), dtype=np.int64)
            self._insert(known)
            self.put(run)
        self._insert(np.array([row], dtype=np.int64))

    def _insert(self, rows: Integers) -> None:
        last = len(self._rows) - 1
        for row, place in zip(rows, (kernel.places_of(rows[:, 0], rows[:, 1]) & last).tolist(), strict=True):
            free = place
            while self._rows[free, 1]:
                free = (free + 1) & last
            self._rows[free] = row


class _Tables:
    """What there is in a run: endpoints, deployments, GPUs and nodes (mutable)."""

    def __init__(self, system: ReplaySystem) -> None:
        self._system = system
        self._contention = system.service_times.contention
        self._node_of_gpu = [gpu.node for gpu in system.cluster.gpus]
        self._last_endpoint = int(system.workload.arrivals.endpoint_id.max())
        self._gpus: Integers = np.zeros((len(system.cluster), kernel.G_SIZE), dtype=np.int64)
        self._nodes: Integers = np.zeros((1 + max(self._node_of_gpu), kernel.N_SIZE), dtype=np.int64)
        self._deployments: Integers = np.zeros((1, kernel.D_SIZE), dtype=np.int64)
        self._shares: Floats = np.zeros((1, kernel.S_SIZE))
        self._active: Integers = np.zeros(1, dtype=np.int64)
        self._on_node: Integers = np.zeros(1, dtype=np.int64)
        self._delays_us: Floats = np.zeros(1)
        self._kept: dict[int, Any] = {}

    def update(self, run: Integers, controller: Controller) -> None:
        """Bring the tables up to date with the controller, and put their addresses into the run."""
        deployments = controller.manager.deployments
        if len(deployments) >= len(self._deployments):
            self._add(list(deployments.values())[len(self._deployments) - 1 :], controller)
            self._lay_out(deployments)
        self._route(controller)
        to_start = [each.deployment_id for each in controller.manager.waiting_to_start]
        self._keep(kernel.K_TO_START_AT, to_start)
        run[kernel.K_TO_START] = len(to_start)
        run[kernel.K_DEPLOYMENTS], run[kernel.K_GPUS] = len(deployments), len(self._gpus)
        run[kernel.K_MAX_CO_LOCATED] = self._delays_us.size // len(self._deployments)
        for field, table in (
            (kernel.K_DEPLOYMENTS_AT, self._deployments), (kernel.K_SHARES_AT, self._shares),
            (kernel.K_GPUS_AT, self._gpus), (kernel.K_NODES_AT, self._nodes), (kernel.K_ACTIVE_AT, self._active),
            (kernel.K_ON_NODE_AT, self._on_node), (kernel.K_DELAYS_AT, self._delays_us), *self._kept.items(),
        ):  # fmt: skip
            run[field] = address(table)

    def _keep(self, field: int, numbers: Sequence[int]) -> None:
        self._kept[field] = np.array([*numbers, 0], dtype=np.int64)  # never empty

    def _add(self, added: Sequence[Deployment], controller: Controller) -> None:
        """Add rows for deployments."""
        rows = np.zeros((len(added), kernel.D_SIZE), dtype=np.int64)
        for row, deployment in zip(rows, added, strict=True):
            row[kernel.D_HEAD] = row[kernel.D_TAIL] = row[kernel.D_ACTIVE] = row[kernel.D_NODE] = -1
            row[kernel.D_LONGEST] = min(controller.longest_sequence(deployment), kernel.NEVER)
            row[kernel.D_BUSY_GPUS] = self._gpus[list(deployment.gpu_ids), kernel.G_IS_BUSY].sum()
            if deployment.plan is None:
                continue
            row[kernel.D_MAX_BATCH] = deployment.plan.configuration.batch_size
            if self._contention is not None and self._contention.shares_process(deployment.plan.configuration):
                row[kernel.D_NODE] = self._node_of_gpu[deployment.gpu_ids[0]]
        self._deployments = np.concatenate([self._deployments, rows])
        self._shares = np.concatenate([self._shares, np.zeros((len(added), kernel.S_SIZE))])
        self._active = np.concatenate([self._active, np.zeros(len(added), dtype=np.int64)])

    def _lay_out(self, deployments: Mapping[int, Deployment]) -> None:
        """Lay out anew what has a part for each deployment: their GPUs, and the deployments of GPUs and of nodes."""
        rows, gpus_of = self._deployments, list[int]()
        on_gpu: list[list[int]] = [[] for _ in self._gpus]
        for number, deployment in deployments.items():
            rows[number, kernel.D_GPUS], rows[number, kernel.D_GPUS_FROM] = len(deployment.gpu_ids), len(gpus_of)
            gpus_of += deployment.gpu_ids
            for gpu_id in deployment.gpu_ids:
                on_gpu[gpu_id].append(number)
        self._keep(kernel.K_GPUS_OF_AT, gpus_of)
        self._gpus[:, kernel.G_ON] = [len(numbers) for numbers in on_gpu]
        self._gpus[:, kernel.G_ON_FROM] = _starts(self._gpus[:, kernel.G_ON])
        self._keep(kernel.K_ON_GPU_AT, [number for numbers in on_gpu for number in numbers])
        nodes = rows[:, kernel.D_NODE]
        sharing = np.bincount(nodes[1:][nodes[1:] >= 0], minlength=len(self._nodes))
        before, self._on_node = self._on_node, np.zeros(1 + int(sharing.sum()), dtype=np.int64)
        froms = _starts(sharing)
        for node, start in zip(self._nodes, froms.tolist(), strict=True):
            count = node[kernel.N_RUNNING]
            self._on_node[start : start + count] = before[node[kernel.N_FROM] : node[kernel.N_FROM] + count]
            node[kernel.N_FROM] = start
        most = max(1, int(sharing.max()))
        self._delays_us = np.zeros((len(rows), most))
        for number, deployment in deployments.items():
            if rows[number, kernel.D_NODE] >= 0:
                self._delays_us[number, 1:] = [self._delay_us(deployment, count) for count in range(1, most)]

    def _delay_us(self, deployment: Deployment, co_located: int) -> float:
        plan = deployment.required_plan
        assert self._contention is not None  # noqa: S101  # else nothing is shared
        delay_s = self._contention.contention_delay_s(plan.model, plan.configuration, co_located=co_located)
        return delay_s * MICROS_PER_SECOND

    def _route(self, controller: Controller) -> None:
        """Note which replicas of each endpoint take requests."""
        endpoints = np.zeros((1 + self._last_endpoint, kernel.E_SIZE), dtype=np.int64)
        replicas: list[int] = []
        for endpoint_id in controller.endpoint_ids:
            if endpoint_id > self._last_endpoint:
                continue  # no request is addressed to it
            ready = Router.ready(controller.deployments_of(endpoint_id))
            endpoints[endpoint_id] = len(replicas), len(ready), ready[0].serves
            replicas += [each.deployment_id for each in ready]
        self._kept[kernel.K_ENDPOINTS_AT] = endpoints
        self._keep(kernel.K_REPLICAS_AT, replicas)

    def running(self, arrivals: Arrivals, kept: Mapping[int, Any]) -> dict[int, Batch]:
        """Return what deployments execute."""
        behind = kept[kernel.K_BEHIND_AT]
        found = {}
        for number in np.flatnonzero(self._deployments[:, kernel.D_RUNNING]).tolist():
            row = self._deployments[number]
            rows = _rows_from(int(row[kernel.D_FIRST_ROW]), int(row[kernel.D_RUNNING]), behind)
            requests = tuple(next(requests_of(arrivals, first=at)) for at in rows)
            found[number] = (int(row[kernel.D_STARTED]), requests)
        return found

    def busy_us(self, now_us: Micros) -> list[Micros]:
        """Return how long each GPU has executed."""
        gpus = self._gpus
        since_us = np.where(gpus[:, kernel.G_IS_BUSY] > 0, now_us - gpus[:, kernel.G_STARTED], 0)
        total_us: list[Micros] = (gpus[:, kernel.G_BUSY_US] + since_us).tolist()
        return total_us

    def count_completions(self, controller: Controller) -> None:
        """Tell deployments how many requests they were given and completed."""
        for number, deployment in controller.manager.deployments.items():
            deployment.completed = int(self._deployments[number, kernel.D_COMPLETED])
            deployment.assigned = int(self._deployments[number, kernel.D_ASSIGNED])


def _starts(lengths: Integers) -> Integers:
    """Return where each of some lists starts if one follows the other."""
    return np.cumsum(lengths) - lengths


def _rows_from(row: int, count: int, behind: Any) -> Iterator[int]:
    for _ in range(count):
        yield row
        row = int(behind[row])


def keeps_machine_code() -> bool:
    """Return whether machine code is kept on disk, so that only the first process compiles."""
    return is_kept(kernel.replay)


def load_kernel() -> None:
    """Load the machine code, or compile it where none is kept."""
    run = np.zeros(kernel.K_SIZE, dtype=np.int64)
    run[kernel.K_DEADLINE] = -1
    kernel.replay(address(run))
