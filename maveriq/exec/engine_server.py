"""The process of an engine: `python -m maveriq.exec.engine_server --socket PATH --backend NAME`.

The event loop owns the socket and answers pings at any time. The engine runs in one thread. The process exits after
`Stop`, if loading fails, if the engine or one of its child processes fails, and when the executor has ended.
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
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TypeAlias

from maveriq.errors import InvariantError, MaveriqError
from maveriq.exec.continuous_loop import ContinuousLoop
from maveriq.exec.engine_protocol import BROKEN, NO_PROTOCOL, STOPPED, EngineProtocol
from maveriq.exec.engines.continuous import ContinuousEngine, make_continuous_engine
from maveriq.exec.engines.engine import Engine, EngineError, FailureKind, Inspectable, make_engine
from maveriq.exec.messages import (
    ChannelClosedError,
    EngineSpec,
    Failed,
    Finished,
    FromEngine,
    Generate,
    Inspected,
    Loaded,
    PromptSequence,
    ProtocolError,
    StepReport,
    StreamChannel,
    ToEngine,
    decode_to_engine,
)
from maveriq.exec.processes import ENGINE_ID, children_of, describe_exit, marked_processes

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def exit_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends; on Linux only.

    An engine exits when its socket closes. This is for one that hangs.
    """
    if not sys.platform.startswith("linux"):
        return
    parent_pid = os.getppid()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # the parent ended before the call
        os.kill(os.getpid(), signal.SIGKILL)


_CLOSE_TIMEOUT_S = 5.0  # for an engine to free everything after the executor has ended

_Job: TypeAlias = Callable[[], None]


class EngineServer:
    """Connects the protocol to a process: the socket in the event loop, the engine in a thread (`EngineWorker`)."""

    def __init__(self, channel: StreamChannel[FromEngine, ToEngine], backend: str) -> None:
        self._channel = channel
        self._backend = backend
        self._loop = asyncio.get_running_loop()
        self._exit: asyncio.Future[int] = self._loop.create_future()
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()  # None ends the thread
        self._engine: Engine | None = None  # that takes one execution at a time
        self._batch: ContinuousLoop | None = None  # of an engine that batches continuously
        self._close_engine: Callable[[], None] = lambda: None
        self._children: set[int] = set()  # that run since the engine has loaded
        self._protocol = EngineProtocol(pid=os.getpid(), worker=self, send=channel.send, exit_process=self._end)

    async def run(self) -> int:
        """Serve until the end, and return the exit code."""
        Thread(target=self._run_jobs, daemon=True).start()
        if hasattr(os, "waitid"):
            self._loop.add_signal_handler(signal.SIGCHLD, self._on_child_exit)
        self._protocol.send_hello()
        listening = asyncio.create_task(self._listen())
        code = await self._exit
        await self._channel.flush()
        listening.cancel()
        self._jobs.put(None)
        return code

    async def _listen(self) -> None:
        try:
            while True:
                self._protocol.on_message(await self._channel.receive())
        except ChannelClosedError:
            self._protocol.stop(send_bye=False)
            self._loop.call_later(_CLOSE_TIMEOUT_S, self._end, STOPPED)
        except ProtocolError as error:
            _log(f"the executor does not speak this protocol: {error}")
            self._end(NO_PROTOCOL)

    def _end(self, code: int) -> None:
        if not self._exit.done():
            self._exit.set_result(code)

    def _on_child_exit(self) -> None:
        """Exit if one of the engine's own processes failed: the others would wait for it forever.

        Each child is asked for by its PID. A wait for any of them returns the same one again until the engine itself
        waits for it, and hides the others.
        """
        for pid in tuple(self._children):
            try:
                ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:  # the engine has waited for it
                self._children.discard(pid)
                continue
            if ended is None:
                continue
            self._children.discard(pid)
            code = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
            if code != 0 and self._protocol.is_serving:
                _log(f"process {pid} of this engine ended with {describe_exit(code)}")
                self._end(BROKEN)

    def _on_loaded(self, loaded: Loaded, children: list[int]) -> None:
        self._protocol.on_loaded(loaded)
        self._children = set(children)
        self._on_child_exit()  # of one that ended meanwhile

    # `EngineWorker`

    def load(self, spec: EngineSpec) -> None:
        """Begin to load."""
        self._jobs.put(lambda: self._do_load(spec))

    def inspect(self, spec: EngineSpec) -> None:
        """Begin to inspect the engine's library."""
        self._jobs.put(lambda: self._do_inspect(spec))

    def generate(self, batch: Generate) -> None:
        """Begin an execution."""
        self._jobs.put(lambda: self._do_generate(batch))

    def submit(self, sequence: PromptSequence, *, is_urgent: bool) -> None:
        """Put a request into the queue of a continuous engine."""
        self._jobs.put(lambda: self._loaded_batch().submit(sequence, is_urgent=is_urgent))

    def abort(self, request_id: int) -> None:
        """End a request of a continuous engine."""
        self._jobs.put(lambda: self._loaded_batch().abort(request_id))

    def close(self, *, send_bye: bool) -> None:
        """Free everything after the current execution, or the current step."""
        self._jobs.put(lambda: self._do_close(send_bye=send_bye))

    # In the engine's thread

    def _run_jobs(self) -> None:
        while (job := self._next_job()) is not None:
            try:
                job()
            except BaseException:  # the state of the engine is unknown
                _log_error()
                self._call_in_loop(lambda: self._end(BROKEN))

    def _next_job(self) -> _Job | None:
        """Return what was asked for, or the next step of a continuous engine that has requests; else wait."""
        batch = self._batch
        if batch is None or not batch.has_requests or self._protocol.is_stopping:
            return self._jobs.get()
        try:
            return self._jobs.get_nowait()
        except Empty:
            return batch.step

    def _loaded_batch(self) -> ContinuousLoop:
        if self._batch is None:
            raise InvariantError("no engine that batches continuously is loaded")
        return self._batch

    def _on_report(self, report: StepReport) -> None:
        self._call_in_loop(lambda: self._protocol.on_report(report))

    def _call_in_loop(self, function: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process is about to end
            self._loop.call_soon_threadsafe(function)

    def _do_load(self, spec: EngineSpec) -> None:
        try:
            loaded = self._make_engine(spec).load(spec)
        except Exception as error:  # the executor decides what to do about it
            _log_error()
            failed = _failed(0, error)
            self._call_in_loop(lambda: self._protocol.on_load_failed(failed))
        else:
            children = children_of(os.getpid())
            self._call_in_loop(lambda: self._on_loaded(loaded, children))

    def _make_engine(self, spec: EngineSpec) -> Engine | ContinuousEngine:
        engine: Engine | ContinuousEngine
        if spec.batching is None:
            engine = self._engine = make_engine(self._backend)
        else:
            engine = make_continuous_engine(self._backend)
            self._batch = ContinuousLoop(engine, self._on_report)
        self._close_engine = engine.close
        return engine

    def _do_inspect(self, spec: EngineSpec) -> None:
        try:
            engine = make_engine(self._backend)
            inspected = engine.inspect(spec) if isinstance(engine, Inspectable) else Inspected(version="")
        except Exception as error:  # as in loading
            _log_error()
            failed = _failed(0, error)
            self._call_in_loop(lambda: self._protocol.on_load_failed(failed))
        else:
            self._call_in_loop(lambda: self._protocol.on_inspected(inspected))

    def _do_generate(self, batch: Generate) -> None:
        engine = self._engine
        if engine is None:
            return
        started_s = time.monotonic()
        first_token_s = 0.0
        outputs: list[list[int]] = [[] for _ in batch.sequences]
        result: Finished | Failed
        try:
            for step, tokens in enumerate(engine.generate(batch), 1):
                if step == 1:
                    first_token_s = time.monotonic() - started_s
                for output, token in zip(outputs, tokens, strict=True):
                    if token >= 0:
                        output.append(token)
                self._call_in_loop(partial(self._protocol.on_step, batch, step, tokens))
                if self._protocol.is_stopping:
                    return
            result = Finished(
                execution_id=batch.execution_id,
                first_token_s=first_token_s,
                service_s=time.monotonic() - started_s,
                outputs=tuple(map(tuple, outputs)),
            )
        except (EngineError, MemoryError) as error:
            _log_error()
            result = _failed(batch.execution_id, error)
        self._call_in_loop(lambda: self._protocol.on_execution_end(result))

    def _do_close(self, *, send_bye: bool) -> None:
        self._close_engine()
        self._call_in_loop(lambda: self._protocol.on_closed(send_bye=send_bye))


def _failed(execution_id: int, error: BaseException) -> Failed:
    """Return an error as a message."""
    if isinstance(error, EngineError):
        return Failed(execution_id=execution_id, kind=error.kind.value, message=str(error), device=error.device)
    if isinstance(error, MemoryError):
        kind, message = FailureKind.OUT_OF_MEMORY, "out of memory"
    elif isinstance(error, ImportError):
        kind, message = FailureKind.UNSUPPORTED, f"something is not installed: {error}"
    elif isinstance(error, MaveriqError):
        kind, message = FailureKind.ERROR, str(error)
    else:
        kind, message = FailureKind.ERROR, f"{type(error).__name__}: {error}"
    return Failed(execution_id=execution_id, kind=kind.value, message=message)


def _log_error() -> None:
    """Log the exception that is being handled. A full disk must not end the engine's thread."""
    with contextlib.suppress(OSError):
        traceback.print_exc()


def _log(line: str) -> None:
    with contextlib.suppress(OSError):
        print(f"maveriq engine: {line}", file=sys.stderr, flush=True)  # noqa: T201


async def _run(socket: str, backend: str) -> int:
    reader, writer = await asyncio.open_unix_connection(socket)
    return await EngineServer(StreamChannel(reader, writer, decode_to_engine), backend).run()


def main() -> None:
    """Run an engine until it exits."""
    parser = argparse.ArgumentParser(
        prog="maveriq.exec.engine_server", description="An engine's process; maveriq starts it."
    )
    parser.add_argument("--socket", required=True, help="where the executor listens")
    parser.add_argument("--backend", required=True, help="which engine to run")
    arguments = parser.parse_args()
    exit_with_parent()
    try:
        code = asyncio.run(_run(arguments.socket, arguments.backend))
    except OSError as error:
        _log(f"the executor cannot be reached at {arguments.socket}: {error.strerror or error}")
        code = BROKEN
    _exit(code)


def _exit(code: int) -> None:
    """Exit at once, without waiting for the engine's thread, and end the engine's other processes.

    The executor does the same when it sees this process exit; it may have ended itself.
    """
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    if os.getpgrp() == os.getpid():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.killpg(0, signal.SIGTERM)
    if engine_id := os.environ.get(ENGINE_ID):
        for pid in marked_processes(engine_id):  # also those in groups of their own
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGTERM)
    os._exit(code)


if __name__ == "__main__":
    main()
