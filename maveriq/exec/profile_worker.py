"""The process that measures a profile beside a service, seen from the service: its messages, its start and its end.

`python -m maveriq.profiling.background` reads a `ProfileJob` and answers `Planned`; then it reads a `Measure` and
answers `Progressed` until `Measured`. `Failed` may come at any time. Each message is a line of JSON. SIGINT stops the
process in order, and so does the end of its input; the next one goes on where it stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeAlias

import msgspec

from maveriq.errors import MaveriqError
from maveriq.estimate.profile_file import MachineRecord
from maveriq.exec.engine_python import NOT_INHERITED
from maveriq.exec.engines.interpreter import module_command
from maveriq.exec.messages import one_line
from maveriq.exec.processes import describe_exit

_MODULE = "maveriq.profiling.background"
_MAX_LINE_BYTES = 1 << 20
_STOP_S = 25.0  # the engines get 10 s to stop, and 10 s more after SIGTERM
_PLAN_S = 600.0
_LEAST_S, _SLOWER = 900.0, 5.0  # a measurement may take so much longer than expected
_MAX_MESSAGE = 2_000

_Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=10_000_000)]


class EmulatedTimes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """By what the emulated engines of a service go: `--gpus`, `--profile`, `--service-times` and its clock."""

    gpus: str
    profile: str
    service_times: str | None
    time_scale: float


class ProfileJob(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to measure.

    Args:
        model: a known model's name, or the path of a `config.json`.
        folder: of the log and the profile; it is made if it does not exist.
        backend: the engine.
        engine_python: the values of `--engine-python`.
        machine: the GPUs as the service's estimates know them.
        max_gpus: most GPUs that an engine is measured on.
        budget_s: most seconds that the plan may take.
        seed: of prompts and random weights.
        emulated: the times of emulated engines; None for engines that compute.
    """

    model: str
    folder: str
    backend: str
    engine_python: tuple[str, ...] = ()
    machine: MachineRecord
    max_gpus: int
    budget_s: float
    seed: int
    emulated: EmulatedTimes | None = None


class Measure(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The GPUs to measure on: their devices, and their numbers on this machine. Both are empty on a CPU."""

    devices: tuple[str, ...] = ()
    machine_gpus: tuple[int, ...] = ()


class Planned(msgspec.Struct, frozen=True, kw_only=True, tag="planned"):
    """What the plan takes: GPUs, bytes of each, and about how many seconds from now."""

    gpus: Annotated[int, msgspec.Meta(ge=1, le=1024)]
    bytes_per_gpu: Annotated[int, msgspec.Meta(ge=0, le=2**53)]
    expected_s: _Seconds


class Progressed(msgspec.Struct, frozen=True, kw_only=True, tag="progress"):
    """How far it is, in one line."""

    text: Annotated[str, msgspec.Meta(max_length=_MAX_MESSAGE)]


class Measured(msgspec.Struct, frozen=True, kw_only=True, tag="measured"):
    """The profile is written."""

    samples: _Count


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """It cannot be measured, and why, in one line."""

    message: Annotated[str, msgspec.Meta(max_length=_MAX_MESSAGE)]


Answer: TypeAlias = Planned | Progressed | Measured | Failed
_ANSWERS: msgspec.json.Decoder[Answer] = msgspec.json.Decoder(Answer)


class ProfileError(MaveriqError):
    """A profile could not be measured."""


class ProfileProcess:
    """A process that measures one profile. `stop` ends it at any time; the next process goes on.

    Args:
        job: what to measure.
        log: file for what the process prints.
    """

    def __init__(self, job: ProfileJob, log: Path) -> None:
        self._job = job
        self._log = log
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        """The process ID; 0 before it is started."""
        return 0 if self._process is None else self._process.pid

    async def plan(self) -> Planned:
        """Start the process and return what its plan takes.

        Raises:
            ProfileError: nothing can be measured.
        """
        environment = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
        try:
            self._log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with open(self._log, "ab", opener=_private) as log:
                self._process = await asyncio.create_subprocess_exec(
                    *module_command(sys.executable, _MODULE),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=log,
                    env=environment,
                    limit=_MAX_LINE_BYTES,
                    start_new_session=True,
                )
        except (OSError, RuntimeError) as error:
            raise ProfileError(f"no process can be started for it: {error}") from None
        self._send(self._job)
        answer = await self._answer(_PLAN_S, "plan")
        if not isinstance(answer, Planned):
            raise ProfileError("its process gave no plan")
        return answer

    async def measure(self, measure: Measure, expected_s: float, on_progress: Callable[[str], None]) -> Measured:
        """Measure what is missing of the profile, and return when the process has ended.

        Raises:
            ProfileError: an engine failed, or it takes far longer than expected.
        """
        self._send(measure)
        limit_s = max(_LEAST_S, _SLOWER * expected_s)
        ends_s = asyncio.get_running_loop().time() + limit_s
        while True:
            left_s = max(0.0, ends_s - asyncio.get_running_loop().time())
            match await self._answer(left_s, f"measure it within {limit_s:.0f} s"):
                case Progressed(text=text):
                    on_progress(text)
                case Measured() as measured:
                    await self.stop()
                    return measured
                case Planned():
                    raise ProfileError("its process planned twice")

    async def stop(self) -> None:
        """End the process in order, and its engines with it; may be called twice."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        if process.stdin is not None:
            process.stdin.close()
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT)
        try:
            async with asyncio.timeout(_STOP_S):
                await process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()  # its engines see their sockets close, and exit
            await process.wait()

    def _send(self, message: msgspec.Struct) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.write(msgspec.json.encode(message) + b"\n")

    async def _answer(self, timeout_s: float, do: str) -> Answer:
        """Return the next message.

        Raises:
            ProfileError: it is `Failed`, none comes in time, or the process ended or wrote something else.
        """
        process = self._process
        if process is None or process.stdout is None:
            raise ProfileError("its process was not started")
        try:
            async with asyncio.timeout(timeout_s):
                line = await process.stdout.readline()
        except TimeoutError:
            raise ProfileError(f"its process did not {do}; see {str(self._log)!r}") from None
        except ValueError:
            raise ProfileError("its process sent a line that is too long") from None
        if not line:
            ended = describe_exit(await process.wait())
            raise ProfileError(f"its process ended with {ended}; see {str(self._log)!r}")
        try:
            answer = _ANSWERS.decode(line)
        except msgspec.DecodeError:
            raise ProfileError(f"its process sent {one_line(repr(line))[:80]}") from None
        if isinstance(answer, Failed):
            raise ProfileError(answer.message)
        return answer


def shortened(text: str) -> str:
    """Return a text as one line that fits a message."""
    return one_line(text)[:_MAX_MESSAGE]


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
