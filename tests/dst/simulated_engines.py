"""Simulated engines: the real session of an engine's process, on simulated time, channels and devices."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import msgspec
from fault_injection import FaultRates, RandomDraws

from maveriq.exec.continuous_loop import ContinuousLoop
from maveriq.exec.engine_protocol import BROKEN, EngineProtocol
from maveriq.exec.engines.emulated_batching import EmulatedContinuousEngine
from maveriq.exec.engines.engine import EngineError, FailureKind
from maveriq.exec.launcher import LaunchError
from maveriq.exec.messages import (
    Bye,
    ChannelClosedError,
    EngineSpec,
    Failed,
    Finished,
    FromEngine,
    Generate,
    Hello,
    Loaded,
    NewTokens,
    Pong,
    PromptSequence,
    ProtocolError,
    StepProgress,
    StepReport,
    ToEngine,
)

_M = TypeVar("_M")


def token(prompt: Sequence[int], position: int) -> int:
    """What every engine generates, so that a token out of place is seen."""
    return (sum(prompt) * 31 + position * 7) % 1000


class Machine:
    """GPUs and the processes on them, and what must never be seen there."""

    def __init__(self, draws: RandomDraws, fault_rates: FaultRates) -> None:
        self.draws = draws
        self.fault_rates = fault_rates
        self.loop = asyncio.get_running_loop()
        self.processes: list[Process] = []
        self.memory_of: Callable[[EngineSpec], dict[int, int]] = lambda _: {}
        self.capacity: list[int] = []
        self.lingering: list[dict[int, int]] = []  # memory of processes that are gone and is not back yet
        self.runs: Counter[int] = Counter()  # executions that each request was in
        self.violations: list[str] = []
        self._pids = 0

    @property
    def faulty(self) -> bool:
        return self.loop.time() < self.fault_rates.until_s

    def fault_occurs(self, probability: float) -> bool:
        return self.faulty and self.draws.happens(probability)

    def delay_s(self) -> float:
        return self.draws.wait_s(self.fault_rates.mean_delay_s) if self.faulty else 0.0005

    async def stall_at_random(self) -> None:
        """Let nothing get on for a while, the executor first of all: stopped, or without a processor."""
        while self.faulty and self.fault_rates.stall_rate > 0:
            await asyncio.sleep(self.draws.wait_s(1 / self.fault_rates.stall_rate))
            self.loop.stall(self.draws.wait_s(10))

    def next_pid(self) -> int:
        self._pids += 1
        return self._pids

    def device_of(self, gpu_id: int) -> int:
        """`MemoryProbe`: each GPU is a device."""
        return gpu_id

    def free_bytes(self, gpu_id: int) -> int:
        """`MemoryProbe`: what nvidia-smi would show."""
        held = [process.memory for process in self.processes if process.alive and process.holds_memory]
        return self.capacity[gpu_id] - sum(memory.get(gpu_id, 0) for memory in (*held, *self.lingering))

    def check_memory(self) -> None:
        for gpu_id in range(len(self.capacity)):
            if self.free_bytes(gpu_id) < 0:
                self.violations.append(f"{self.loop.time():.3f} s: GPU {gpu_id} holds more than it has")

    def check_alone(self, newcomer: Process) -> None:
        if newcomer.ending:
            return  # a late message to an engine that is being killed
        for other in self.processes:
            shared = set(other.gpu_ids) & set(newcomer.gpu_ids)
            if other is not newcomer and other.executing and not other.ending and shared:
                self.violations.append(
                    f"{self.loop.time():.3f} s: engines {other.name} and {newcomer.name} execute on GPU {min(shared)}"
                )

    def check_left(self, spec: EngineSpec, gpu_ids: Sequence[int]) -> None:
        for other in self.processes:
            if other.alive and other.ending and set(other.gpu_ids) & set(gpu_ids):
                starts = f"{spec.deployment_id}.{spec.generation} starts"
                self.violations.append(f"{self.loop.time():.3f} s: {starts} while {other.name} is leaving")

    def orphan_all(self) -> None:
        """Let the processes' executor be gone; the kernel sees to them (`maveriq.exec.engine_server`)."""
        for process in self.processes:
            if process.alive:
                process.orphaned()

    def gone(self, process: Process) -> None:
        """Let the memory of a process come back, which takes a while."""
        if process.holds_memory:
            self.lingering.append(process.memory)
            self.loop.call_later(self.draws.between(0, 2), self.lingering.remove, process.memory)

    async def launch(self, spec: EngineSpec, gpu_ids: Sequence[int]) -> Connection:
        """`Launcher.launch`."""
        self.check_left(spec, gpu_ids)
        await asyncio.sleep(self.delay_s())
        if self.fault_occurs(self.fault_rates.no_process):
            raise LaunchError("no process today")
        if self.fault_occurs(self.fault_rates.never_connects):
            await asyncio.get_running_loop().create_future()
        process = Process(self, spec, tuple(gpu_ids))
        self.processes.append(process)
        return Connection(process)


class Inbox:
    """The receiving end of a channel."""

    def __init__(self) -> None:
        self._messages: deque[FromEngine | ProtocolError] = deque()
        self._news = asyncio.Event()
        self._closed = False

    def put(self, message: FromEngine | ProtocolError) -> None:
        if not self._closed:
            self._messages.append(message)
            self._news.set()

    def close(self) -> None:
        self._closed = True
        self._news.set()

    async def get(self) -> FromEngine:
        while not self._messages:
            if self._closed:
                raise ChannelClosedError("the other side has closed the channel")
            self._news.clear()
            await self._news.wait()
        message = self._messages.popleft()
        if isinstance(message, ProtocolError):
            raise message
        return message


class Connection:
    """The executor's side: an `EngineConnection` that is its own `Channel`."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._open = True

    @property
    def channel(self) -> Connection:
        return self

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: ToEngine) -> None:
        if self._open:
            self._process.post(message, self._process.take)

    async def receive(self) -> FromEngine:
        return await self._process.inbox.get()

    def close(self) -> None:
        if self._open:
            self._open = False
            self._process.executor_gone()

    @property
    def rank_lost(self) -> asyncio.Future[str]:
        return self._process.rank_lost

    def engine_loaded(self, rank_pids: Sequence[int]) -> None:
        pass

    async def wait_exit(self) -> int:
        return await asyncio.shield(self._process.exited)

    async def wait_gone(self) -> None:
        await self.wait_exit()

    def terminate(self) -> None:
        self._process.signalled(-15)

    def kill(self) -> None:
        self._process.signalled(-9)

    def last_output(self) -> str:
        return ""


STEP_S = 0.05
"""A step of a continuous engine."""


class InstantSteps(EmulatedContinuousEngine):
    """A continuous engine whose steps take no time of their own, and which cannot do some requests."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self._machine = machine

    def _tokens_of(self, sequence: PromptSequence) -> Iterator[int]:
        return (token(sequence.prompt, at) for at in range(sequence.output_tokens))

    def submit(self, sequence: PromptSequence, *, is_urgent: bool) -> None:
        if self._machine.fault_occurs(self._machine.fault_rates.cannot_execute):
            raise EngineError(FailureKind.ERROR, "no")
        super().submit(sequence, is_urgent=is_urgent)


class Process:
    """An engine's process: an `EngineProtocol` and its `EngineWorker`."""

    def __init__(self, machine: Machine, spec: EngineSpec, gpu_ids: tuple[int, ...]) -> None:
        self.machine = machine
        self.gpu_ids = gpu_ids
        self.memory = machine.memory_of(spec)
        self.name = f"{spec.deployment_id}.{spec.generation}"
        self.pid = machine.next_pid()
        self.inbox = Inbox()
        self.exited: asyncio.Future[int] = machine.loop.create_future()
        self.rank_lost: asyncio.Future[str] = machine.loop.create_future()
        self.holds_memory = False
        self.executing = False
        self.ending = False  # it must exit
        self.unreachable = False  # its executor is gone: no message and no signal arrives
        self._hangs = False
        self._at = 0  # the last execution it received
        self._work: list[asyncio.TimerHandle] = []
        self._batch: ContinuousLoop | None = None
        self._steps = False  # of a continuous engine: one runs
        self._protocol = EngineProtocol(pid=self.pid, worker=self, send=self._send, exit_process=self._exit)
        self._fate()
        self._protocol.send_hello()

    @property
    def alive(self) -> bool:
        return not self.exited.done()

    def _fate(self) -> None:
        machine = self.machine
        for rate, strike in (
            (machine.fault_rates.crash_rate, self._crash),
            (machine.fault_rates.hang_rate, self._hang),
        ):
            if rate > 0:
                machine.loop.call_later(machine.draws.wait_s(1 / rate), strike)

    def _crash(self) -> None:
        if self.machine.faulty:
            self._exit(-11)

    def _hang(self) -> None:
        if self.machine.faulty and self.alive:
            self._hangs = True
            self._drop_work()

    # Channels

    def post(self, message: _M, deliver: Callable[[_M], None]) -> None:
        """Deliver a message after a delay; it may be lost, repeated, or overtaken by later messages."""
        machine = self.machine
        if machine.fault_occurs(machine.fault_rates.lost):
            return
        for _ in range(2 if machine.fault_occurs(machine.fault_rates.repeated) else 1):
            machine.loop.call_later(machine.delay_s(), deliver, message)

    def _send(self, message: FromEngine) -> None:
        if self.alive:
            garbled = self.machine.fault_occurs(self.machine.fault_rates.garbled)
            self.post(self._garbage() if garbled else message, self.inbox.put)

    def _garbage(self) -> FromEngine | ProtocolError:
        """Return a message of a faulty engine that is recognizably invalid."""
        about = self._at
        answers: list[FromEngine | ProtocolError] = [
            ProtocolError("not a message"),
            Hello(protocol=10**6, pid=0),
            Failed(execution_id=about and 2**53, kind="whatever", message="\0" * 1000),
            Finished(execution_id=about, first_token_s=1e9, service_s=0.0, outputs=()),
            StepProgress(execution_id=about, step=1, tokens=(1,) * 99),
            StepProgress(execution_id=about, step=2**53, tokens=()),
            Pong(number=2**53, execution_id=0, steps=0),
            Pong(number=0, execution_id=about, steps=2**53),
            Pong(number=0, execution_id=0, steps=0, accepted=2**53),
            StepReport(number=2**53, tokens=(NewTokens(1, (1,)),)),
            Loaded(backend="\n", version=""),
            Bye(),
        ]
        return answers[self.machine.draws.integer(0, len(answers) - 1)]

    def take(self, message: ToEngine) -> None:
        if self.alive and not self._hangs and not self.unreachable:
            self._protocol.on_message(message)

    def orphaned(self) -> None:
        self.unreachable = self.ending = True
        self.machine.loop.call_later(self.machine.draws.between(0, 0.1), self._exit, -9)

    def executor_gone(self) -> None:
        if self.alive and not self._hangs and not self.unreachable:
            self._protocol.stop(send_bye=False)

    # Signals and the end

    def signalled(self, code: int) -> None:
        if self.unreachable:
            return
        self.ending = True
        ignored = code == -15 and (self._hangs or self.machine.fault_occurs(self.machine.fault_rates.ignores_sigterm))
        if not ignored:
            self.machine.loop.call_later(self.machine.draws.between(0, 0.3), self._exit, code)

    def _exit(self, code: int) -> None:
        if not self.alive:
            return
        self._drop_work()
        self.exited.set_result(code)
        self.machine.gone(self)
        self.machine.loop.call_later(self.machine.delay_s(), self.inbox.close)

    def _drop_work(self) -> None:
        for timer in self._work:
            timer.cancel()
        self._work.clear()
        # A hanging engine may still be executing; no other engine may run on its GPUs until it exits.
        self.executing = self.executing and self._hangs

    # `EngineWorker`

    def load(self, spec: EngineSpec) -> None:
        if spec.batching is not None:
            engine = InstantSteps(self.machine)
            engine.load(msgspec.structs.replace(spec, load_s=0.0, tp=1, pp=1))  # the device's time is simulated
            self._batch = ContinuousLoop(engine, self._protocol.on_report, clock=self.machine.loop.time)
        self._later(spec.load_s * spec.time_scale, self._loaded)

    def _loaded(self) -> None:
        if self.machine.fault_occurs(self.machine.fault_rates.too_large):
            self._protocol.on_load_failed(Failed(execution_id=0, kind="out-of-memory", message="too large today"))
            return
        self.holds_memory = True
        self.machine.check_memory()
        self._protocol.on_loaded(Loaded(backend="simulated", version="0"))

    def generate(self, batch: Generate) -> None:
        self.executing, self._at = True, batch.execution_id
        self.machine.check_alone(self)
        self.machine.runs.update(sequence.request_id for sequence in batch.sequences)
        if self.machine.fault_occurs(self.machine.fault_rates.cannot_execute):
            self._later(0.01, lambda: self._over(Failed(execution_id=batch.execution_id, kind="error", message="no")))
            return
        steps = max(sequence.output_tokens for sequence in batch.sequences)
        each_s = (batch.service_s - batch.first_token_s) / max(1, steps - 1)
        for step in range(1, steps + 1):
            self._later(batch.first_token_s + (step - 1) * each_s, lambda step=step: self._step(batch, step))
        outputs = tuple(
            tuple(token(sequence.prompt, at) for at in range(sequence.output_tokens)) for sequence in batch.sequences
        )
        done = Finished(
            execution_id=batch.execution_id,
            first_token_s=batch.first_token_s,
            service_s=batch.service_s,
            outputs=outputs,
        )
        self._later(batch.service_s, lambda: self._over(done))

    def _step(self, batch: Generate, step: int) -> None:
        tokens = [
            token(sequence.prompt, step - 1) if step <= sequence.output_tokens else -1 for sequence in batch.sequences
        ]
        self._protocol.on_step(batch, step, tokens)

    def _over(self, ended: Finished | Failed) -> None:
        self.executing = False
        self._work.clear()
        self._protocol.on_execution_end(ended)

    def submit(self, sequence: PromptSequence, *, is_urgent: bool) -> None:
        assert self._batch is not None
        self._batch.submit(sequence, is_urgent=is_urgent)
        self._next_step()

    def abort(self, request_id: int) -> None:
        assert self._batch is not None
        self._batch.abort(request_id)

    def _next_step(self) -> None:
        if self._batch is not None and self._batch.has_requests and not self._steps:
            self._steps = True
            self._later(STEP_S, self._step_over)

    def _step_over(self) -> None:
        assert self._batch is not None
        self._steps = False
        if self._batch.has_requests:
            self._batch.step()
        self._next_step()

    def close(self, *, send_bye: bool) -> None:
        self.ending = True
        self._drop_work()
        self.executing = False
        self._later(self.machine.draws.between(0, 0.5), lambda: self._protocol.on_closed(send_bye=send_bye))

    def _later(self, delay_s: float, what: Callable[[], None]) -> None:
        self._work.append(self.machine.loop.call_later(delay_s, self._if_able, what))

    def _if_able(self, what: Callable[[], None]) -> None:
        if not self.alive or self._hangs:
            return
        try:
            what()
        except Exception:
            self._exit(BROKEN)
            raise
