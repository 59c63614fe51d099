"""No engine outlives its executor, not even one that hangs.

An engine's process: `python -m maveriq.exec.engine_server --socket PATH --backend NAME`.

The event loop owns the socket and always answers; the engine works in one thread beside it. The process ends when
it is told to, when loading fails, when its engine or one of its child processes breaks, and when the executor is gone.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import TypeAlias

from maveriq.errors import MaveriqError
from maveriq.exec.engine_protocol import BROKEN, NO_PROTOCOL, STOPPED, EngineProtocol
from maveriq.exec.engines.engine import Engine, EngineError, FailureKind, make_engine
from maveriq.exec.messages import (
    ChannelClosedError,
    EngineSpec,
    Failed,
    Finished,
    FromEngine,
    Generate,
    ProtocolError,
    StreamChannel,
    ToEngine,
    decode_to_engine,
)

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def exit_with_parent() -> None:
    """Ask the kernel to kill this process when the one that started it ends; elsewhere than on Linux nothing happens.

    An engine that still listens ends in good order when its socket closes. This is for one that does not any more.
    """
    if not sys.platform.startswith("linux"):
        return
    parent_pid = os.getppid()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it has just ended
        os.kill(os.getpid(), signal.SIGKILL)


_CLOSE_S = 5.0  # for an engine to free everything once its executor is gone

_Job: TypeAlias = Callable[[], None]


class EngineServer:
    """A session in a process: its socket in the event loop, its engine in a thread (it is the session's `Worker`)."""

    def __init__(self, channel: StreamChannel[FromEngine, ToEngine], backend: str) -> None:
        self._channel = channel
        self._backend = backend
        self._loop = asyncio.get_running_loop()
        self._exit: asyncio.Future[int] = self._loop.create_future()
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()  # None ends the thread
        self._engine: Engine | None = None
        self._session = EngineProtocol(pid=os.getpid(), worker=self, send=channel.send, leave=self._end)

    async def run(self) -> int:
        """Serve until the end, and return the exit code."""
        Thread(target=self._work, daemon=True).start()
        if hasattr(os, "waitid"):
            self._loop.add_signal_handler(signal.SIGCHLD, self._child_ended)
        self._session.greet()
        listening = asyncio.create_task(self._listen())
        code = await self._exit
        await self._channel.flush()
        listening.cancel()
        self._jobs.put(None)
        return code

    async def _listen(self) -> None:
        try:
            while True:
                self._session.take(await self._channel.receive())
        except ChannelClosedError:
            self._session.stop(say_bye=False)
            self._loop.call_later(_CLOSE_S, self._end, STOPPED)
        except ProtocolError as error:
            _log(f"the executor does not speak this protocol: {error}")
            self._end(NO_PROTOCOL)

    def _end(self, code: int) -> None:
        if not self._exit.done():
            self._exit.set_result(code)

    def _child_ended(self) -> None:
        """Give up when one of the engine's own processes failed: the others would wait for it forever."""
        if not self._session.serves:
            return
        with contextlib.suppress(ChildProcessError):
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is not None and ended.si_status != 0:
                _log(f"process {ended.si_pid} of this engine is gone (status {ended.si_status})")
                self._end(BROKEN)

    # What the session asks for

    def load(self, spec: EngineSpec) -> None:
        """Begin to load."""
        self._jobs.put(lambda: self._do_load(spec))

    def generate(self, work: Generate) -> None:
        """Begin an execution."""
        self._jobs.put(lambda: self._do_generate(work))

    def close(self, *, say_bye: bool) -> None:
        """Free everything after what is under way."""
        self._jobs.put(lambda: self._do_close(say_bye=say_bye))

    # In the engine's thread; word to the session goes by the loop

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except BaseException:  # whatever it was: nobody knows what state the engine is in
                _log_error()
                self._tell(lambda: self._end(BROKEN))

    def _tell(self, what: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process is about to end
            self._loop.call_soon_threadsafe(what)

    def _do_load(self, spec: EngineSpec) -> None:
        try:
            self._engine = make_engine(self._backend)
            loaded = self._engine.load(spec)
        except Exception as error:  # all is said to the executor, which decides
            _log_error()
            failed = _failed(0, error)
            self._tell(lambda: self._session.load_failed(failed))
        else:
            self._tell(lambda: self._session.loaded(loaded))

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
                self._tell(partial(self._session.stepped, work, number, tokens))
                if self._session.stopping:
                    return
            ended = Finished(
                execution_id=work.execution_id,
                first_token_s=first_token_s,
                service_s=time.monotonic() - started_s,
                outputs=tuple(map(tuple, outputs)),
            )
        except (EngineError, MemoryError) as error:
            _log_error()
            ended = _failed(work.execution_id, error)
        self._tell(lambda: self._session.generated(ended))

    def _do_close(self, *, say_bye: bool) -> None:
        if self._engine is not None:
            self._engine.close()
        self._tell(lambda: self._session.closed(say_bye=say_bye))


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


def _log_error() -> None:
    """Log the exception that is being handled; a disk that is full must not end the engine's thread."""
    with contextlib.suppress(OSError):
        traceback.print_exc()


def _log(line: str) -> None:
    with contextlib.suppress(OSError):
        print(f"maveriq engine: {line}", file=sys.stderr, flush=True)  # noqa: T201


async def _run(socket: str, backend: str) -> int:
    reader, writer = await asyncio.open_unix_connection(socket)
    return await EngineServer(StreamChannel(reader, writer, decode_to_engine), backend).run()


def main() -> None:
    """Be an engine; the only place of an engine's process that exits."""
    parser = argparse.ArgumentParser(
        prog="maveriq.exec.engine_server", description="An engine's process; maveriq starts it."
    )
    parser.add_argument("--socket", required=True, help="where the executor listens")
    parser.add_argument("--backend", required=True, help="which engine to be")
    said = parser.parse_args()
    exit_with_parent()
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
