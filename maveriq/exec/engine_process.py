"""What is said about one engine beside its messages: what to start, how long to be patient with it, why it ended.

Judging an engine by the clock: whether it starts, answers, and gets on.
The execution that an engine was asked for, as far as word of it has come.
Making an engine's process group go: by word, by SIGTERM, by SIGKILL.
One engine from its start to its end: launch, handshake, load, watch, stop.

A life is a state machine over what comes in (messages, the end of the process, the ticks of a clock). Whatever happens
first ends it; then its process group is made to go, by word, by SIGTERM, by SIGKILL. Nothing here reads a clock
but the event loop's, so that tests run it on a loop whose time is simulated.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import msgspec

from maveriq.exec.engines.engine import FailureKind
from maveriq.exec.gpu_memory_gate import GpuMemoryGate
from maveriq.exec.launcher import EngineConnection, Launcher, LaunchError, describe_exit
from maveriq.exec.messages import (
    PROTOCOL_VERSION,
    ChannelClosedError,
    EngineSpec,
    Failed,
    Finished,
    FromEngine,
    Generate,
    Hello,
    Load,
    Loaded,
    Ping,
    Pong,
    ProtocolError,
    StepProgress,
    Stop,
)
from maveriq.units import Bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchSpec:
    """What engine to start: its specification, and the memory it needs on each of its GPUs, in rank order."""

    spec: EngineSpec
    needed: Mapping[int, Bytes]
    load_s: float  # of the run, as estimated


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisionSettings:
    """How long to be patient with engines; all in real seconds.

    `start_s` is for launch, handshake and load together. An engine that serves and is not heard for `hang_timeout_s`, or does
    not get on with an execution for that and `stretch` times its estimated service, hangs. A stopped one is
    asked by word, after `stop_s` by SIGTERM, after as long again by SIGKILL. The n-th failure in a row is mended after
    `backoff_s` * 2^(n-1), at most `longest_backoff_s`; the `max_restarts`-th is the last.
    """

    start_s: float = 900.0
    ping_s: float = 1.0
    hang_timeout_s: float = 30.0
    stretch: float = 3.0
    stop_s: float = 5.0
    backoff_s: float = 1.0
    longest_backoff_s: float = 60.0
    max_restarts: int = 5
    memory_back_s: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitReason:
    """Why a life ended. `failed` is False for one that was told to stop, `final` True for one that no repeat mends."""

    reason: str
    failed: bool = True
    final: bool = False


class Watchdog:
    """What is left of it with one engine. Times are the event loop's, in seconds.

    Args:
        settings: how much there is.
        now_s: when the engine is launched.
    """

    def __init__(self, settings: SupervisionSettings, now_s: float) -> None:
        self._settings = settings
        self._launched_s = self._heard_s = now_s

    def heard(self, now_s: float) -> None:
        """Note a sign of life."""
        self._heard_s = now_s

    def excuse(self, late_s: float, now_s: float, under_way: CurrentExecution | None) -> None:
        """Hold nothing against the engine: it was the executor that stood still (stopped, or short of a processor)."""
        self._launched_s += late_s
        self._heard_s = min(now_s, self._heard_s + late_s)
        if under_way is not None:
            under_way.excuse(late_s, now_s)

    def complaint(self, now_s: float, *, loaded: bool, under_way: CurrentExecution | None) -> str:
        """Return why there is no patience left; empty while there is."""
        if not loaded:
            return self.too_slow() if now_s - self._launched_s > self._settings.start_s else ""
        if now_s - self._heard_s > self._settings.hang_timeout_s:
            return f"its engine was not heard for {self._settings.hang_timeout_s:g} s"
        if under_way is not None and under_way.stands_still(now_s):
            return "its engine did not get on with an execution"
        return ""

    def too_slow(self) -> str:
        """Return what to say of an engine that takes too long to start."""
        return f"its engine did not start within {self._settings.start_s:g} s"


class CurrentExecution:
    """Which steps were handed on, and whether the engine gets on.

    Args:
        work: what was asked for.
        now_s: when.
        allowed_s: how long it may take from one step to the next.
        pings: how many pings had been sent by then.
    """

    def __init__(self, work: Generate, *, now_s: float, allowed_s: float, pings: int) -> None:
        self.work = work
        self._allowed_s = allowed_s
        self._pings = pings
        self._handed_on = 0  # steps
        self._heard_of = 0
        self._moved_s = now_s

    def concerns(self, execution_id: int) -> bool:
        """Say whether a message is about it."""
        return execution_id == self.work.execution_id

    def take_step(self, progress: StepProgress, now_s: float) -> bool:
        """Note a step; says whether it is the next one to hand on, and not late, twice, or after one that was lost."""
        if progress.step != self._handed_on + 1:
            return False
        self._handed_on = progress.step
        self.got_to(progress.step, now_s)
        return True

    def got_to(self, step: int, now_s: float) -> None:
        """Note that so many steps are done, though word of some may have been lost."""
        if step > self._heard_of:
            self._heard_of = step
            self._moved_s = now_s

    def to_be_repeated(self, ping: int) -> bool:
        """Say whether an engine that answers this ping and is not at it must be told again: word was lost."""
        return ping > self._pings

    def excuse(self, late_s: float, now_s: float) -> None:
        """Note that nobody listened for a while."""
        self._moved_s = min(now_s, self._moved_s + late_s)

    def stands_still(self, now_s: float) -> bool:
        """Say whether the engine does not get on with it."""
        return now_s - self._moved_s > self._allowed_s

    def complaint(self, said: StepProgress | Finished) -> str:
        """Return what is wrong with what an engine says of it, empty if nothing is."""
        given = said.tokens if isinstance(said, StepProgress) else said.outputs
        if len(given) != len(self.work.sequences):
            return "tokens for another number of sequences"
        maximum = [sequence.output_tokens for sequence in self.work.sequences]
        if isinstance(said, StepProgress):
            too_many = any(said.step > count and token >= 0 for count, token in zip(maximum, said.tokens, strict=True))
        else:
            too_many = any(len(output) > count for count, output in zip(maximum, said.outputs, strict=True))
        return "more tokens than were asked for" if too_many else ""


async def terminate(connection: EngineConnection, *, stop_s: float, ask: Callable[[], None] | None) -> bool:
    """Return once the group is gone, and its channel closed; False if it could not be killed.

    Args:
        connection: to the group.
        stop_s: time for each step.
        ask: asks it to stop in order; None for one that is not worth asking.
    """
    try:
        for step in (ask, connection.terminate) if ask else ():
            step()
            if await _gone(connection, stop_s):
                return True
        connection.kill()
        return await _gone(connection, stop_s)
    finally:
        connection.channel.close()


async def _gone(connection: EngineConnection, within_s: float) -> bool:
    try:
        async with asyncio.timeout(within_s):
            await connection.wait_exit()
    except TimeoutError:
        return False
    return True


class EngineCallbacks(Protocol):
    """Who is told what happens to an engine. Calls come from the event loop, never from within a call to a life."""

    def loaded(self, life: EngineProcess, loaded: Loaded) -> None:
        """It serves."""

    def stepped(self, life: EngineProcess, progress: StepProgress) -> None:
        """The next step of its execution is done; steps come in order, each once, some perhaps not at all."""

    def executed(self, life: EngineProcess, ended: Finished | Failed) -> None:
        """Its execution is over."""

    def noticed(self, life: EngineProcess, warning: str) -> None:
        """Something that a reader of the results should know."""

    def ended(self, life: EngineProcess, ending: ExitReason) -> None:
        """It is over with the engine, which may yet be going; told once."""


class EngineProcess:
    """One engine. `run` it in a task of its own."""

    def __init__(
        self,
        order: LaunchSpec,
        *,
        launcher: Launcher,
        listener: EngineCallbacks,
        settings: SupervisionSettings,
        gate: GpuMemoryGate,
    ) -> None:
        self.order = order
        self._launcher = launcher
        self._listener = listener
        self._settings = settings
        self._gate = gate
        self._loop = asyncio.get_running_loop()
        self._asked_s = self._loop.time()
        self._ending: asyncio.Future[ExitReason] = self._loop.create_future()
        self._connection: EngineConnection | None = None
        self._let_in = False  # to memory that it has not taken yet
        self._loaded = False
        self._under_way: CurrentExecution | None = None
        self._watchdog = Watchdog(settings, self._asked_s)
        self._pings = 0

    # What the supervisor asks for

    def execute(self, work: Generate, expected_s: float) -> None:
        """Let the engine execute; `expected_s` is how long that should take, in real seconds."""
        allowed_s = self._settings.hang_timeout_s + self._settings.stretch * expected_s
        self._under_way = CurrentExecution(work, now_s=self._loop.time(), allowed_s=allowed_s, pings=self._pings)
        self._send(work)

    def stop(self) -> None:
        """Stop the engine."""
        self._end(ExitReason(reason="stopped", failed=False))

    def abort(self, reason: str, *, final: bool) -> None:
        """Kill the engine, as if it had failed: this is how faults are made on purpose."""
        self._end(ExitReason(reason=reason, final=final))

    @property
    def is_over(self) -> bool:
        """Whether its end has come."""
        return self._ending.done()

    # The life

    async def run(self) -> None:
        """Live until the engine's processes are gone."""
        gpu_ids = tuple(self.order.needed)
        try:
            ending = await self._live()
            self._settle()
            self._gate.leave(gpu_ids)
            self._listener.ended(self, ending)
            if self._connection is not None:
                await self._put_down(self._connection, ending)
            await self._gate.gone(gpu_ids)
        except BaseException:  # a bug, or the loop is being closed: leave no process behind
            if self._connection is not None:
                self._connection.kill()
            raise

    async def _live(self) -> ExitReason:
        """Return why it ended, once that is known."""
        starting = asyncio.create_task(self._launch())
        either: tuple[asyncio.Future[Any], ...] = (starting, self._ending)
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await starting
        connection = self._connection
        if connection is None:
            return await self._ending
        doings = (self._listen(connection), self._tick(), self._await_exit(connection))
        tasks = [asyncio.create_task(doing) for doing in doings]
        for task in tasks:
            task.add_done_callback(self._check)
        try:
            return await self._ending
        finally:
            for task in tasks:
                task.cancel()

    def _check(self, task: asyncio.Task[None]) -> None:
        """Let an error of one of its tasks come up where the life is awaited."""
        if not task.cancelled() and (error := task.exception()) and not self._ending.done():
            self._ending.set_exception(error)

    async def _launch(self) -> None:
        warning = await self._gate.clear(self.order.needed, self._settings.memory_back_s)
        self._let_in = True
        if warning:
            self._listener.noticed(self, warning)
        self._watchdog = Watchdog(self._settings, self._loop.time())  # it begins with the launch
        try:
            async with asyncio.timeout(self._settings.start_s):
                self._connection = await self._launcher.launch(self.order.spec, tuple(self.order.needed))
        except TimeoutError:
            self._end(ExitReason(reason=self._watchdog.too_slow()))
        except LaunchError as error:
            self._end(ExitReason(reason=str(error)))

    async def _listen(self, connection: EngineConnection) -> None:
        try:
            while True:
                self._take(await connection.channel.receive())
        except ProtocolError as error:
            self._end(ExitReason(reason=f"its engine does not speak the protocol: {error}"))
        except ChannelClosedError:
            await asyncio.sleep(self._settings.stop_s)  # the end of the process says more
            self._end(ExitReason(reason="its engine closed the channel"))

    async def _await_exit(self, connection: EngineConnection) -> None:
        code = await connection.wait_exit()
        await asyncio.sleep(0.05)  # what it said last is still to be read
        words = connection.last_output()
        if words:
            self._listener.noticed(self, f"the last words of its engine: {words}")
        self._end(ExitReason(reason=f"its engine ended with {describe_exit(code)}"))

    def _take(self, message: FromEngine) -> None:
        if self._ending.done():
            return
        self._watchdog.heard(self._loop.time())
        match message:
            case Hello(protocol=protocol):
                self._greeted(protocol)
            case Loaded():
                self._now_loaded(message)
            case Failed(execution_id=0):
                final = message.kind in (FailureKind.OUT_OF_MEMORY, FailureKind.UNSUPPORTED)
                self._end(
                    ExitReason(reason=f"its engine could not load ({message.kind}): {message.message}", final=final)
                )
            case StepProgress():
                self._stepped(message)
            case Finished() | Failed():
                self._executed(message)
            case Pong():
                self._answered(message)

    def _greeted(self, protocol: int) -> None:
        if protocol != PROTOCOL_VERSION:
            reason = f"its engine speaks version {protocol} of the protocol, not {PROTOCOL_VERSION}"
            self._end(ExitReason(reason=reason, final=True))
        else:
            self._send_load()

    def _send_load(self) -> None:
        spec = self.order.spec
        past_s = (self._loop.time() - self._asked_s) / spec.time_scale
        self._send(Load(spec=msgspec.structs.replace(spec, load_s=max(0.0, self.order.load_s - past_s))))

    def _now_loaded(self, loaded: Loaded) -> None:
        if not self._loaded:
            self._loaded = True
            self._settle()
            self._listener.loaded(self, loaded)

    def _settle(self) -> None:
        if self._let_in:
            self._let_in = False
            self._gate.settled(self.order.needed)

    def _stepped(self, progress: StepProgress) -> None:
        under_way = self._under_way
        if under_way is None or not under_way.concerns(progress.execution_id):
            return
        if complaint := under_way.complaint(progress):
            self._end(ExitReason(reason=f"its engine gave {complaint}"))
        elif under_way.take_step(progress, self._loop.time()):
            self._listener.stepped(self, progress)

    def _executed(self, ended: Finished | Failed) -> None:
        under_way = self._under_way
        if under_way is None or not under_way.concerns(ended.execution_id):
            return
        if isinstance(ended, Finished) and (complaint := under_way.complaint(ended)):
            self._end(ExitReason(reason=f"its engine gave {complaint}"))
            return
        self._under_way = None
        self._listener.executed(self, ended)

    def _answered(self, pong: Pong) -> None:
        under_way = self._under_way
        if under_way is None:
            return
        if under_way.concerns(pong.execution_id):
            under_way.got_to(pong.steps, self._loop.time())
        elif under_way.to_be_repeated(pong.number):
            self._send(under_way.work)

    async def _tick(self) -> None:
        """Ask for a sign of life, again and again."""
        while True:
            due_s = self._loop.time() + self._settings.ping_s
            await asyncio.sleep(self._settings.ping_s)
            now_s = self._loop.time()
            if now_s - due_s > self._settings.ping_s:
                self._watchdog.excuse(now_s - due_s, now_s, self._under_way)
            if reason := self._watchdog.complaint(now_s, loaded=self._loaded, under_way=self._under_way):
                self._end(ExitReason(reason=reason))
            self._pings += 1
            self._send(Ping(number=self._pings))
            if not self._loaded and self._pings > 1:
                self._send_load()

    def _send(self, message: Load | Generate | Ping | Stop) -> None:
        if self._connection is None:
            return
        try:
            self._connection.channel.send(message)
        except ProtocolError as error:
            # Too long a message is no failure of the engine; whoever made it hears of it as of one that cannot be done.
            if isinstance(message, Generate):
                told = Failed(execution_id=message.execution_id, kind=FailureKind.ERROR.value, message=str(error))
                self._loop.call_soon(self._executed, told)
            else:
                self._end(ExitReason(reason=str(error), final=True))

    def _end(self, ending: ExitReason) -> None:
        if not self._ending.done():
            self._ending.set_result(ending)

    async def _put_down(self, connection: EngineConnection, ending: ExitReason) -> None:
        ask = None if ending.failed else partial(self._send, Stop())
        if not await terminate(connection, stop_s=self._settings.stop_s, ask=ask):
            self._listener.noticed(self, f"process group {connection.pid} cannot be killed")
