"""Runs a model's tokenizer in a process of its own, with limits and a deadline (`maveriq.serve.tokenizer_worker`)."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from maveriq.errors import InputError, MaveriqError
from maveriq.exec.messages import ChannelClosedError, ProtocolError, read_frame
from maveriq.serve.tokenizer_worker import (
    ANSWERS,
    Answer,
    Call,
    CallFailed,
    Decoded,
    DecodeTokens,
    EncodeChat,
    Encoded,
    EncodeText,
    LoadTokenizer,
    TokenizerLoaded,
    encode,
)

_MAX_ANSWER_BYTES = 32 * 1024 * 1024
_MODULE = "maveriq.serve.tokenizer_worker"
# Nothing secret: MAVERIQ_TOKEN stays in the server.
_INHERITED = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "VIRTUAL_ENV", "SYSTEMROOT")


class TokenizerFailedError(MaveriqError):
    """A model's tokenizer took too long, needed too much memory, or crashed."""


class NoTokenizerProcessError(TokenizerFailedError):
    """No process can be started for a tokenizer now; the tokenizer may be fine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerLimits:
    """Limits of a tokenizer's process.

    Args:
        load_s: deadline for starting the process and loading the tokenizer.
        call_s: deadline for encoding a prompt, or for decoding tokens.
        cpu_s: CPU time of a call.
        memory_bytes: address space of the process.
        idle_s: time without a call after which the process is stopped; the next call starts it again.
    """

    load_s: float = 60.0
    call_s: float = 10.0
    cpu_s: int = 20
    memory_bytes: int = 2 * 1024**3
    idle_s: float = 300.0


class TokenizerPool:
    """Bounds how many tokenizers of a service run at a time; another one stops the one that was idle longest.

    Args:
        limits: of each process.
        max_processes: processes at a time.
    """

    def __init__(self, limits: TokenizerLimits | None = None, *, max_processes: int = 16) -> None:
        self.limits = limits or TokenizerLimits()
        self._max_processes = max_processes
        self._running: dict[TokenizerProcess, None] = {}  # the last used last

    def make_room(self) -> None:
        """Stop the tokenizer that was idle longest if all processes are in use.

        Raises:
            NoTokenizerProcessError: all tokenizers are busy.
        """
        if len(self._running) < self._max_processes:
            return
        idle = next((tokenizer for tokenizer in self._running if not tokenizer.is_busy), None)
        if idle is None:
            raise NoTokenizerProcessError(f"{self._max_processes} tokenizers are busy; try again later")
        idle.stop()

    def used(self, tokenizer: TokenizerProcess) -> None:
        """Note that a tokenizer gets a call."""
        self._running.pop(tokenizer, None)
        self._running[tokenizer] = None

    def stopped(self, tokenizer: TokenizerProcess) -> None:
        """Note that a tokenizer has no process any more."""
        self._running.pop(tokenizer, None)


class TokenizerProcess:
    """One model's tokenizer. The process starts with the first call, and again after it was stopped or killed.

    Calls of one kind (encoding, decoding) follow one another, so that the deadline of a call does not include others.
    """

    def __init__(self, folder: str, pool: TokenizerPool) -> None:
        self._folder = folder
        self._pool = pool
        self._limits = pool.limits
        self._numbers = itertools.count(1)
        self._outputs = itertools.count(1)
        self._starting = asyncio.Lock()
        self._encoding = asyncio.Lock()
        self._decoding = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._waiting: dict[int, asyncio.Future[Answer]] = {}
        self._prompt: asyncio.Future[Answer] | None = None  # the answer to the prompt that is being encoded
        self._refuses_prompts = False
        self._idle: asyncio.TimerHandle | None = None
        self._stop_token_ids: tuple[int, ...] = ()

    @property
    def pid(self) -> int | None:
        """The process ID, None where no process runs."""
        return None if self._process is None else self._process.pid

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens with which the model ends a text."""
        return self._stop_token_ids

    @property
    def is_busy(self) -> bool:
        """Whether a call is running."""
        return bool(self._waiting)

    async def start(self) -> None:
        """Start the process and load the tokenizer, unless it runs.

        Raises:
            InputError: a file cannot be read.
            TokenizerFailedError: it took too long, or crashed.
        """
        async with self._starting:
            if self._process is not None:
                return
            deadline_s = self._limits.load_s
            try:
                async with asyncio.timeout(deadline_s):
                    await self._spawn()
                    load = LoadTokenizer(
                        number=next(self._numbers),
                        folder=self._folder,
                        cpu_s=self._limits.cpu_s,
                        memory_bytes=self._limits.memory_bytes,
                    )
                    answer = await self._answer(load)
            except TimeoutError:
                self.stop()
                raise TokenizerFailedError(f"{self._folder}: its tokenizer did not load in {deadline_s:g} s") from None
            except BaseException:
                self.stop()
                raise
            if not isinstance(answer, TokenizerLoaded):
                self.stop()
                raise TokenizerFailedError(f"{self._folder}: its tokenizer gave no answer")
            self._stop_token_ids = answer.stop_token_ids

    async def encode(self, text: str) -> tuple[int, ...]:
        """Return the token IDs of a text.

        Raises:
            InputError: the text cannot be encoded.
            TokenizerFailedError: it took too long, or the process crashed.
        """
        return _ids(await self._call(EncodeText(number=next(self._numbers), text=text), self._encoding))

    async def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """Return the token IDs of messages with `role` and `content`, followed by the assistant's turn.

        Raises:
            InputError: the template cannot format them.
            TokenizerFailedError: it took too long, or the process crashed.
        """
        call = EncodeChat(number=next(self._numbers), messages=[dict(message) for message in messages])
        return _ids(await self._call(call, self._encoding))

    def refuse_prompts(self) -> None:
        """Encode no more prompts, and fail the one that is being encoded; outputs are still decoded."""
        self._refuses_prompts = True
        if self._prompt is not None and not self._prompt.done():
            self._prompt.set_exception(TokenizerFailedError("the server is stopping"))

    def stream(self) -> _OutputStream:
        """Return a new decoder for one output."""
        return _OutputStream(self, next(self._outputs))

    async def decode(self, output: int, token_ids: Sequence[int], *, last: bool) -> list[str]:
        """Return the text that each of the next tokens of an output completes.

        Raises:
            TokenizerFailedError: it took too long, or the process crashed.
        """
        call = DecodeTokens(number=next(self._numbers), output=output, token_ids=list(token_ids), last=last)
        answer = await self._call(call, self._decoding)
        if not isinstance(answer, Decoded) or len(answer.texts) != len(token_ids):
            raise TokenizerFailedError("the tokenizer gave a wrong answer")
        return answer.texts

    async def close(self) -> None:
        """Kill the process, if it runs, and wait for its end; calls that wait for it fail."""
        self.stop()
        if self._reader is not None:
            await self._reader

    def stop(self) -> None:
        """Kill the process, if it runs; calls that wait for it fail."""
        process, self._process = self._process, None
        self._pool.stopped(self)
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        self._fail_waiting()

    async def _call(self, call: Call, turn: asyncio.Lock) -> Answer:
        async with turn:
            if self._refuses_prompts and turn is self._encoding:
                raise TokenizerFailedError("the server is stopping")
            await self.start()
            try:
                async with asyncio.timeout(self._limits.call_s):
                    return await self._answer(call)
            except TimeoutError:
                self.stop()
                raise TokenizerFailedError(
                    f"{self._folder}: its tokenizer or chat template took more than {self._limits.call_s:g} s"
                ) from None

    async def _answer(self, call: Call) -> Answer:
        process = self._process
        if process is None or process.stdin is None:
            raise TokenizerFailedError(f"{self._folder}: its tokenizer has stopped")
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting[call.number] = future
        if not isinstance(call, DecodeTokens):
            self._prompt = future
        self._restart_idle_timer()
        self._pool.used(self)
        try:
            process.stdin.write(_frame(call))
            with contextlib.suppress(ConnectionError):  # it has ended; the reader reports it
                await process.stdin.drain()
            answer = await future
        finally:
            self._waiting.pop(call.number, None)
        if isinstance(answer, CallFailed):
            raise InputError(answer.reason)
        return answer

    async def _spawn(self) -> None:
        self._pool.make_room()
        package = str(Path(__file__).resolve().parents[2])
        environment = {name: os.environ[name] for name in _INHERITED if name in os.environ}
        environment |= {
            "PYTHONPATH": os.pathsep.join(filter(None, (package, environment.get("PYTHONPATH")))),
            "TOKENIZERS_PARALLELISM": "false",
            "MALLOC_ARENA_MAX": "2",
        }
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-m", _MODULE,
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
                env=environment, start_new_session=True,
            )  # fmt: skip
        except (OSError, RuntimeError) as error:  # RuntimeError: no thread that waits for its end
            reason = error.strerror if isinstance(error, OSError) else None
            raise NoTokenizerProcessError(
                f"no process for a tokenizer can be started: {reason or error}; try again later"
            ) from None
        self._reader = asyncio.create_task(self._read(self._process))

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        """Hand answers to the calls that wait for them, until the process ends."""
        if process.stdout is None:
            return
        try:
            while True:
                answer = ANSWERS.decode(await read_frame(process.stdout, max_bytes=_MAX_ANSWER_BYTES))
                future = self._waiting.get(answer.number)
                if future is not None and not future.done():
                    future.set_result(answer)
        except (ChannelClosedError, ProtocolError, ValueError):  # it ended, or sent something that is not an answer
            pass
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        await process.wait()
        if self._process is process:
            self.stop()

    def _fail_waiting(self) -> None:
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(
                    TokenizerFailedError(f"{self._folder}: its tokenizer crashed, perhaps out of memory or CPU time")
                )

    def _restart_idle_timer(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
        self._idle = asyncio.get_running_loop().call_later(self._limits.idle_s, self._stop_if_idle)

    def _stop_if_idle(self) -> None:
        if self._waiting:
            self._restart_idle_timer()
        else:
            self.stop()


def _frame(call: Call) -> bytes:
    try:
        return encode(call)
    except UnicodeEncodeError:
        raise InputError("the text is not valid Unicode") from None


def _ids(answer: Answer) -> tuple[int, ...]:
    if not isinstance(answer, Encoded):
        raise TokenizerFailedError("the tokenizer gave a wrong answer")
    return answer.token_ids


@dataclass(frozen=True, slots=True)
class _OutputStream:
    """Decodes one output (`maveriq.serve.tokenizers.TextStream`)."""

    process: TokenizerProcess
    output: int

    async def feed(self, token_ids: Sequence[int]) -> list[str]:
        return await self.process.decode(self.output, token_ids, last=False)

    async def flush(self) -> str:
        await self.process.decode(self.output, (), last=True)
        return ""
