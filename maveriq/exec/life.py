"""One engine from its start to its end: launch, handshake, load, watch, stop.

A life is a state machine over what comes in (messages, the end of the process, the ticks of a clock). Whatever happens
first ends it; then its process group is made to go, by word, by SIGTERM, by SIGKILL. Nothing here reads a clock
but the event loop's, so that tests run it on a loop whose time is simulated.
"""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial
from typing import Any, Protocol

import msgspec

from maveriq.exec.channel import ChannelClosedError
from maveriq.exec.engines.base import FailureKind
from maveriq.exec.ground import Ground
from maveriq.exec.launcher import EngineConnection, Launcher, LaunchError, exit_words
from maveriq.exec.messages import (
    PROTOCOL_VERSION,
    Failed,
    Finished,
    FromEngine,
    Generate,
    Hello,
    Load,
    Loaded,
    Ping,
    Pong,
    Progress,
    ProtocolError,
    Stop,
)
from maveriq.exec.orders import Ending, Order, SupervisionSettings
from maveriq.exec.patience import Patience
from maveriq.exec.putdown import put_down
from maveriq.exec.underway import UnderWay


class LifeListener(Protocol):
    """Who is told what happens to an engine. Calls come from the event loop, never from within a call to a life."""

    def loaded(self, life: Life, loaded: Loaded) -> None:
        """It serves."""

    def stepped(self, life: Life, progress: Progress) -> None:
        """The next step of its execution is done; steps come in order, each once, some perhaps not at all."""

    def executed(self, life: Life, ended: Finished | Failed) -> None:
        """Its execution is over."""

    def noticed(self, life: Life, warning: str) -> None:
        """Something that a reader of the results should know."""

    def ended(self, life: Life, ending: Ending) -> None:
        """It is over with the engine, which may yet be going; told once."""


class Life:
    """One engine. `run` it in a task of its own."""

    def __init__(
        self, order: Order, *, launcher: Launcher, listener: LifeListener, settings: SupervisionSettings, ground: Ground
    ) -> None:
        self.order = order
        self._launcher = launcher
        self._listener = listener
        self._settings = settings
        self._ground = ground
        self._loop = asyncio.get_running_loop()
        self._asked_s = self._loop.time()
        self._ending: asyncio.Future[Ending] = self._loop.create_future()
        self._connection: EngineConnection | None = None
        self._let_in = False  # to memory that it has not taken yet
        self._loaded = False
        self._under_way: UnderWay | None = None
        self._patience = Patience(settings, self._asked_s)
        self._pings = 0

    # What the supervisor asks for

    def execute(self, work: Generate, expected_s: float) -> None:
        """Let the engine execute; `expected_s` is how long that should take, in real seconds."""
        allowed_s = self._settings.hang_s + self._settings.stretch * expected_s
        self._under_way = UnderWay(work, now_s=self._loop.time(), allowed_s=allowed_s, pings=self._pings)
        self._send(work)

    def stop(self) -> None:
        """Stop the engine."""
        self._end(Ending(reason="stopped", failed=False))

    def break_off(self, reason: str, *, final: bool) -> None:
        """Kill the engine, as if it had failed: this is how faults are made on purpose."""
        self._end(Ending(reason=reason, final=final))

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
            self._ground.leave(gpu_ids)
            self._listener.ended(self, ending)
            if self._connection is not None:
                await self._put_down(self._connection, ending)
            await self._ground.gone(gpu_ids)
        except BaseException:  # a bug, or the loop is being closed: leave no process behind
            if self._connection is not None:
                self._connection.kill()
            raise

    async def _live(self) -> Ending:
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
        warning = await self._ground.clear(self.order.needed, self._settings.memory_back_s)
        self._let_in = True
        if warning:
            self._listener.noticed(self, warning)
        self._patience = Patience(self._settings, self._loop.time())  # it begins with the launch
        try:
            async with asyncio.timeout(self._settings.start_s):
                self._connection = await self._launcher.launch(self.order.spec, tuple(self.order.needed))
        except TimeoutError:
            self._end(Ending(reason=self._patience.too_slow()))
        except LaunchError as error:
            self._end(Ending(reason=str(error)))

    async def _listen(self, connection: EngineConnection) -> None:
        try:
            while True:
                self._take(await connection.channel.receive())
        except ProtocolError as error:
            self._end(Ending(reason=f"its engine does not speak the protocol: {error}"))
        except ChannelClosedError:
            await asyncio.sleep(self._settings.stop_s)  # the end of the process says more
            self._end(Ending(reason="its engine closed the channel"))

    async def _await_exit(self, connection: EngineConnection) -> None:
        code = await connection.wait_exit()
        await asyncio.sleep(0.05)  # what it said last is still to be read
        words = connection.last_words()
        if words:
            self._listener.noticed(self, f"the last words of its engine: {words}")
        self._end(Ending(reason=f"its engine ended with {exit_words(code)}"))

    def _take(self, message: FromEngine) -> None:
        if self._ending.done():
            return
        self._patience.heard(self._loop.time())
        match message:
            case Hello(protocol=protocol):
                self._greeted(protocol)
            case Loaded():
                self._now_loaded(message)
            case Failed(execution_id=0):
                final = message.kind in (FailureKind.OUT_OF_MEMORY, FailureKind.UNSUPPORTED)
                self._end(Ending(reason=f"its engine could not load ({message.kind}): {message.message}", final=final))
            case Progress():
                self._stepped(message)
            case Finished() | Failed():
                self._executed(message)
            case Pong():
                self._answered(message)

    def _greeted(self, protocol: int) -> None:
        if protocol != PROTOCOL_VERSION:
            reason = f"its engine speaks version {protocol} of the protocol, not {PROTOCOL_VERSION}"
            self._end(Ending(reason=reason, final=True))
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
            self._ground.settled(self.order.needed)

    def _stepped(self, progress: Progress) -> None:
        under_way = self._under_way
        if under_way is None or not under_way.concerns(progress.execution_id):
            return
        if complaint := under_way.complaint(progress):
            self._end(Ending(reason=f"its engine gave {complaint}"))
        elif under_way.take_step(progress, self._loop.time()):
            self._listener.stepped(self, progress)

    def _executed(self, ended: Finished | Failed) -> None:
        under_way = self._under_way
        if under_way is None or not under_way.concerns(ended.execution_id):
            return
        if isinstance(ended, Finished) and (complaint := under_way.complaint(ended)):
            self._end(Ending(reason=f"its engine gave {complaint}"))
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
                self._patience.excuse(now_s - due_s, now_s, self._under_way)
            if reason := self._patience.complaint(now_s, loaded=self._loaded, under_way=self._under_way):
                self._end(Ending(reason=reason))
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
                self._end(Ending(reason=str(error), final=True))

    def _end(self, ending: Ending) -> None:
        if not self._ending.done():
            self._ending.set_result(ending)

    async def _put_down(self, connection: EngineConnection, ending: Ending) -> None:
        ask = None if ending.failed else partial(self._send, Stop())
        if not await put_down(connection, stop_s=self._settings.stop_s, ask=ask):
            self._listener.noticed(self, f"process group {connection.pid} cannot be killed")
