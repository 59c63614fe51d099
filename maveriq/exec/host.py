"""An engine's process: `python -m maveriq.exec.host --socket PATH --backend NAME`.

The event loop owns the socket and always answers; the engine works in one thread beside it. The process ends when
it is told to, when loading fails, when its engine or one of its child processes breaks, and when the executor is gone.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread
from typing import TypeAlias

from maveriq.errors import MaveriqError
from maveriq.exec.channel import ChannelClosedError, StreamChannel
from maveriq.exec.engines.base import Engine, EngineError, FailureKind, Step
from maveriq.exec.engines.catalog import make_engine
from maveriq.exec.messages import (
    PROTOCOL_VERSION,
    Bye,
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
    Progress,
    ProtocolError,
    Stop,
    ToEngine,
    decode_to_engine,
)

STOPPED, LOAD_FAILED, NO_PROTOCOL, BROKEN = 0, 1, 3, 4
"""Exit codes; 2 is for a wrong command line."""

_CLOSE_S = 5.0  # for an engine to free everything once its executor is gone

_Job: TypeAlias = Callable[[], None]


class Host:
    """What the loop knows of the engine, and the rules for messages that come twice or late."""

    def __init__(self, channel: StreamChannel[FromEngine, ToEngine], backend: str) -> None:
        self._channel = channel
        self._backend = backend
        self._loop = asyncio.get_running_loop()
        self._exit: asyncio.Future[int] = self._loop.create_future()
        self._jobs: SimpleQueue[_Job] = SimpleQueue()
        self._engine: Engine | None = None
        self._spec: EngineSpec | None = None
        self._loaded: Loaded | None = None
        self._under_way = 0  # the execution that the engine is at
        self._steps = 0
        self._ended: Finished | Failed | None = None  # how the last execution ended
        self._stopping = False

    async def run(self) -> int:
        """Serve until the end, and return the exit code."""
        Thread(target=self._work, daemon=True).start()
        if hasattr(os, "waitid"):
            self._loop.add_signal_handler(signal.SIGCHLD, self._child_ended)
        self._hello()
        listening = asyncio.create_task(self._listen())
        code = await self._exit
        await self._channel.flush()
        listening.cancel()
        return code

    def _hello(self) -> None:
        self._channel.send(Hello(protocol=PROTOCOL_VERSION, pid=os.getpid()))

    async def _listen(self) -> None:
        try:
            while True:
                self._take(await self._channel.receive())
        except ChannelClosedError:
            self._stop(say_bye=False)
            self._loop.call_later(_CLOSE_S, self._end, STOPPED)
        except ProtocolError as error:
            _log(f"the executor does not speak this protocol: {error}")
            self._end(NO_PROTOCOL)

    def _end(self, code: int) -> None:
        if not self._exit.done():
            self._exit.set_result(code)

    def _take(self, message: ToEngine) -> None:
        match message:
            case Ping(number=number):
                if self._spec is None:
                    self._hello()
                self._channel.send(Pong(number=number, execution_id=self._under_way, steps=self._steps))
            case Load(spec=spec):
                self._load(spec)
            case Generate():
                self._generate(message)
            case Stop():
                self._stop(say_bye=True)

    def _load(self, spec: EngineSpec) -> None:
        if self._loaded is not None:
            self._channel.send(self._loaded)
        elif self._spec is None:
            self._spec = spec
            self._jobs.put(lambda: self._do_load(spec))

    def _generate(self, work: Generate) -> None:
        execution_id = work.execution_id
        if self._ended is not None and execution_id == self._ended.execution_id:
            self._channel.send(self._ended)
        elif execution_id <= self._under_way or (self._ended and execution_id < self._ended.execution_id):
            return  # it is at it, or that is long over
        elif why_not := self._why_not(work):
            self._channel.send(Failed(execution_id=execution_id, kind=FailureKind.ERROR.value, message=why_not))
        else:
            self._under_way, self._steps = execution_id, 0
            self._jobs.put(lambda: self._do_generate(work))

    def _why_not(self, work: Generate) -> str:
        if self._spec is None or self._loaded is None:
            return "nothing is loaded"
        if self._under_way:
            return f"execution {self._under_way} is under way"
        if len(work.sequences) > self._spec.batch_size:
            return f"{len(work.sequences)} sequences, where batches are of {self._spec.batch_size} at most"
        return ""

    def _stop(self, *, say_bye: bool) -> None:
        if not self._stopping:
            self._stopping = True  # an execution ends at its next step
            self._jobs.put(lambda: self._do_close(say_bye=say_bye))

    def _child_ended(self) -> None:
        """Give up when one of the engine's own processes failed: the others would wait for it forever."""
        if self._loaded is None or self._stopping:
            return
        with contextlib.suppress(ChildProcessError):
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is not None and ended.si_status != 0:
                _log(f"process {ended.si_pid} of this engine is gone (status {ended.si_status})")
                self._end(BROKEN)

    # In the engine's thread; word to the loop goes by `call_soon_threadsafe`

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            try:
                job()
            except BaseException:  # whatever it was: nobody knows what state the engine is in
                traceback.print_exc()
                self._tell(lambda: self._end(BROKEN))

    def _tell(self, what: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process is about to end
            self._loop.call_soon_threadsafe(what)

    def _do_load(self, spec: EngineSpec) -> None:
        try:
            self._engine = make_engine(self._backend)
            loaded = self._engine.load(spec)
        except Exception as error:  # all is said to the executor, which decides
            traceback.print_exc()
            failed = _failed(0, error)
            self._tell(lambda: self._load_failed(failed))
        else:
            self._tell(lambda: self._did_load(loaded))

    def _load_failed(self, failed: Failed) -> None:
        self._channel.send(failed)
        self._end(LOAD_FAILED)

    def _did_load(self, loaded: Loaded) -> None:
        self._loaded = loaded
        self._channel.send(loaded)

    def _do_generate(self, work: Generate) -> None:
        engine = self._engine
        if engine is None:
            return
        started_s = time.monotonic()
        first_token_s = 0.0
        outputs: list[list[int]] = [[] for _ in work.sequences]
        ended: Finished | Failed
        try:
            for number, tokens in enumerate(engine.generate(work), 1):
                if number == 1:
                    first_token_s = time.monotonic() - started_s
                for output, token in zip(outputs, tokens, strict=True):
                    if token >= 0:
                        output.append(token)
                self._tell(lambda number=number, tokens=tokens: self._stepped(work, number, tokens))  # type: ignore[misc]
                if self._stopping:
                    return
            ended = Finished(
                execution_id=work.execution_id,
                first_token_s=first_token_s,
                service_s=time.monotonic() - started_s,
                outputs=tuple(map(tuple, outputs)),
            )
        except (EngineError, MemoryError) as error:
            traceback.print_exc()
            ended = _failed(work.execution_id, error)
        self._tell(lambda: self._did_generate(ended))

    def _stepped(self, work: Generate, number: int, tokens: Step) -> None:
        self._steps = number
        self._channel.send(Progress(execution_id=work.execution_id, step=number, tokens=tuple(tokens)))

    def _did_generate(self, ended: Finished | Failed) -> None:
        self._ended = ended
        self._under_way = self._steps = 0
        self._channel.send(ended)

    def _do_close(self, *, say_bye: bool) -> None:
        if self._engine is not None:
            self._engine.close()
        self._tell(lambda: self._did_close(say_bye=say_bye))

    def _did_close(self, *, say_bye: bool) -> None:
        if say_bye:
            self._channel.send(Bye())
        self._end(STOPPED)


def _failed(execution_id: int, error: BaseException) -> Failed:
    """Return an error as a message."""
    if isinstance(error, EngineError):
        return Failed(execution_id=execution_id, kind=error.kind.value, message=str(error))
    if isinstance(error, MemoryError):
        kind, told = FailureKind.OUT_OF_MEMORY, "out of memory"
    elif isinstance(error, ImportError):
        kind, told = FailureKind.UNSUPPORTED, f"something is not installed: {error}"
    elif isinstance(error, MaveriqError):
        kind, told = FailureKind.ERROR, str(error)
    else:
        kind, told = FailureKind.ERROR, f"{type(error).__name__}: {error}"
    return Failed(execution_id=execution_id, kind=kind.value, message=told)


def _log(line: str) -> None:
    with contextlib.suppress(OSError):
        print(f"maveriq engine: {line}", file=sys.stderr, flush=True)  # noqa: T201


async def _run(socket: str, backend: str) -> int:
    reader, writer = await asyncio.open_unix_connection(socket)
    return await Host(StreamChannel(reader, writer, decode_to_engine), backend).run()


def main() -> None:
    """Be an engine; the only place of an engine's process that exits."""
    parser = argparse.ArgumentParser(prog="maveriq.exec.host", description="An engine's process; maveriq starts it.")
    parser.add_argument("--socket", required=True, help="where the executor listens")
    parser.add_argument("--backend", required=True, help="which engine to be")
    said = parser.parse_args()
    try:
        code = asyncio.run(_run(said.socket, said.backend))
    except OSError as error:
        _log(f"the executor cannot be reached at {said.socket}: {error.strerror or error}")
        code = BROKEN
    _exit(code)


def _exit(code: int) -> None:
    """End at once, whatever the engine's thread is at, and with it the engine's other processes."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    if os.getpgrp() == os.getpid():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.killpg(0, signal.SIGTERM)
    os._exit(code)


if __name__ == "__main__":
    main()
