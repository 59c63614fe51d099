"""What tests of the executor share: engines under test, one engine process, and an executor on real processes."""

from __future__ import annotations

import asyncio
import os
import resource
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from fixtures import MODEL, FixedPlacement, TokenSeconds, cluster, predict_service_time

from maveriq.control.controller import ControllerSettings
from maveriq.domain.models import ModelSpec
from maveriq.exec.engines.continuous import StepOutput
from maveriq.exec.engines.emulated import EmulatedEngine
from maveriq.exec.engines.emulated_batching import EmulatedContinuousEngine
from maveriq.exec.engines.engine import EngineError, FailureKind
from maveriq.exec.engines.external import ExternalEngine
from maveriq.exec.executor import Executor
from maveriq.exec.gpu_memory_gate import MemoryProbe
from maveriq.exec.gpu_sampling import GpuSampler
from maveriq.exec.gpus import Devices
from maveriq.exec.launcher import EngineConnection, ProcessLauncher
from maveriq.exec.messages import ChannelClosedError, EngineSpec, FromEngine, Generate, Hello, Load, Loaded, ToEngine
from maveriq.exec.messages import PromptSequence as Prompt
from maveriq.exec.model_files import hf_config_json
from maveriq.exec.watchdog import SupervisionSettings
from maveriq.scenario.service_times import EstimatedServiceTimes
from maveriq.scenario.system import ServingSystem

T = TypeVar("T")
TIMEOUT_S = 120.0  # generous: what takes milliseconds, or a library seconds to load, takes longer on a busy machine


@dataclass(frozen=True, kw_only=True)
class EngineCase:
    """A backend under test, with a model that it can load."""

    backend: str
    model: ModelSpec = MODEL
    max_ranks: int = 4

    def spec(self, **more: Any) -> EngineSpec:
        ranks = more.get("tp", 1) * more.get("pp", 1)
        default: dict[str, Any] = {
            "deployment_id": 1,
            "generation": 1,
            "model": self.model.name,
            "config_json": hf_config_json(self.model),
            "tp": 1,
            "pp": 1,
            "layer_split": (self.model.layers,),
            "weights": "float16",
            "kv": "native",
            "batch_size": 4,
            "devices": ("cpu",) * ranks,
        }
        return EngineSpec(**default | more)


ENGINES = [EngineCase(backend="emulated")]
if find_spec("torch") is not None:
    ENGINES.append(EngineCase(backend="torch"))
"""Each backend passes the conformance suite (tests/exec/conformance)."""


class StartedEngine:
    """One engine process, and its messages."""

    def __init__(self, connection: EngineConnection, spec: EngineSpec) -> None:
        self.connection = connection
        self.spec = spec

    def send(self, *messages: ToEngine) -> None:
        for message in messages:
            self.connection.channel.send(message)

    async def receive(self, *kinds: type[FromEngine]) -> Any:
        """Return the next message of one of these kinds (default: of any kind), and skip others before it."""
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                message = await self.connection.channel.receive()
                if not kinds or isinstance(message, kinds):
                    return message

    async def receive_until(self, kind: type[FromEngine]) -> list[Any]:
        """Return all messages up to and including the first of a kind."""
        received = [await self.receive()]
        while not isinstance(received[-1], kind):
            received.append(await self.receive())
        return received

    def send_load(self) -> None:
        self.send(Load(spec=self.spec))

    async def load(self) -> Loaded:
        self.send_load()
        return await self.receive(Loaded)

    async def wait_until_closed(self) -> None:
        try:
            while True:
                await self.receive()
        except ChannelClosedError:
            pass

    async def exit_code(self) -> int:
        async with asyncio.timeout(TIMEOUT_S):
            return await self.connection.wait_exit()


@asynccontextmanager
async def started_engine(
    case: EngineCase, folder: Path, *, load: bool = True, python: Path | None = None, **spec: Any
) -> AsyncIterator[StartedEngine]:
    """Start an engine process, load its model unless `load` is False, and kill it at the end."""
    with ProcessLauncher(case.backend, logs=folder, environment=environment(), python=python) as launcher:
        requested = case.spec(**spec)
        connection = await launcher.launch(requested, range(requested.tp * requested.pp))
        try:
            engine = StartedEngine(connection, requested)
            assert isinstance(await engine.receive(), Hello)
            if load:
                await engine.load()
            yield engine
        finally:
            connection.kill()
            await connection.wait_exit()
            connection.channel.close()


def environment() -> dict[str, str]:
    """Return an environment in which engine processes can import this module."""
    here = str(Path(__file__).parent)
    return os.environ | {"PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])}


def batch_of(number: int = 1, *prompts: Sequence[int], tokens: int | Sequence[int] = 4, **more: Any) -> Generate:
    """Return a batch of these prompts (default: one prompt)."""
    requested = prompts or ([7, 8, 9],)
    counts = [tokens] * len(requested) if isinstance(tokens, int) else tokens
    stop = more.pop("stop", ())
    return Generate(
        execution_id=number,
        sequences=tuple(
            Prompt(request_id=index, prompt=tuple(prompt), output_tokens=count, stop_token_ids=stop)
            for index, (prompt, count) in enumerate(zip(requested, counts, strict=True), 1)
        ),
        **more,
    )


def alive_in_group(pgid: int) -> list[int]:
    """Return the running processes of a group, without zombies."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[2]) == pgid and fields[0] not in "ZX":
                found.append(int(folder.name))
    return sorted(found)


async def until(true: Callable[[], object], *, every_s: float = 0.005) -> None:
    """Wait until a condition is true."""
    async with asyncio.timeout(TIMEOUT_S):
        while not true():
            await asyncio.sleep(every_s)


def run_async(test: Callable[[], Awaitable[T]]) -> T:
    async def bounded() -> T:
        async with asyncio.timeout(3 * TIMEOUT_S):
            return await test()

    return asyncio.run(bounded())


QUICK = SupervisionSettings(
    start_timeout_s=TIMEOUT_S,
    heartbeat_interval_s=0.05,
    hang_timeout_s=TIMEOUT_S,
    grace_period_s=TIMEOUT_S,
    initial_backoff_s=0.02,
    max_backoff_s=0.1,
    max_restarts=3,
)


@asynccontextmanager
async def running_executor(
    gpus_of: dict[int, list[tuple[int, ...]]],
    folder: Path,
    *,
    backend: str = "emulated",
    token_s: float = 0.001,
    supervision: SupervisionSettings = QUICK,
    batch_size: int = 1,
    sampler: GpuSampler | None = None,
    devices: Devices | None = None,
    memory_probe: MemoryProbe | None = None,
    **settings: Any,
) -> AsyncIterator[Executor]:
    """Run an executor that places the endpoints on given GPUs; a token takes `token_s`."""
    system = ServingSystem(
        cluster=cluster(4),
        policy=FixedPlacement(gpus_of, batch_size),
        settings=ControllerSettings(**settings),
        predict_service_time=predict_service_time,
        service_times=EstimatedServiceTimes(TokenSeconds(token_s)),
        load_time=lambda _plan: 1,
    )
    with ProcessLauncher(backend, logs=folder, devices=devices, environment=environment()) as launcher:
        executor = Executor(
            system,
            launcher,
            devices=devices,
            supervision=supervision,
            memory_probe=memory_probe,
            measured_loads=sampler.loads if sampler else None,
        )
        try:
            yield executor
        finally:
            await executor.close()
            assert not executor.internal_error.done() or executor.internal_error.exception() is None


class Minimal:
    """An engine with no more than the three members that it must have."""

    def load(self, spec: EngineSpec) -> Loaded:
        return Loaded(backend="minimal", version="1")

    def generate(self, batch: Generate) -> Any:
        return iter(())

    def close(self) -> None:
        """Nothing to free."""


class FaultyEngine(EmulatedEngine):
    """An engine for tests of failures: in subclasses, the deployment id decides what fails.

    Deployment 1 is healthy.
    """

    def load(self, spec: EngineSpec) -> Loaded:
        self.deployment_id = spec.deployment_id
        return super().load(spec)


class OutOfMemory(FaultyEngine):
    """Deployment 2 really allocates more memory than its process may have."""

    def load(self, spec: EngineSpec) -> Loaded:
        if spec.deployment_id == 2:
            resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
            self.weights = bytearray(1 << 33)
        return super().load(spec)


class WrappedOutOfMemory(ExternalEngine):
    """Fails to load as TensorRT-LLM does: the worker's exception is the cause of the leader's.

    Its message depends on the deployment.
    """

    name = "trtllm"
    messages: ClassVar = {
        1: "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 1 has a total capacity of 47.41 GiB of which 1.25 GiB "
        "is free.",
        2: "Executor creation failed due to insufficient GPU memory.",
        3: "CUDA error: out of memory",
        4: "no such layer",
    }

    def _load(self, spec: EngineSpec, folder: Path) -> Loaded:
        raise RuntimeError("Executor worker returned error") from RuntimeError(self.messages[spec.deployment_id])

    def _steps(self, sequences: tuple[Prompt, ...]) -> Any:
        raise NotImplementedError

    def _shut_down(self) -> None:
        pass


class CannotLoad(FaultyEngine):
    """The process of deployment 2 exits during each load."""

    def load(self, spec: EngineSpec) -> Loaded:
        if spec.deployment_id == 2:
            os._exit(9)
        return super().load(spec)


class CannotGenerate(FaultyEngine):
    """Prompts that begin with token 13 fail."""

    def generate(self, batch: Generate) -> Any:
        if any(sequence.prompt[0] == 13 for sequence in batch.sequences):
            raise EngineError(FailureKind.OUT_OF_MEMORY, "no room for the KV cache of this one")
        return super().generate(batch)


class Crashes(FaultyEngine):
    """Raises an unexpected error at its first execution."""

    def generate(self, batch: Generate) -> Any:
        raise ZeroDivisionError("unexpected")


class CrashesInStep(EmulatedContinuousEngine):
    """A continuous engine that raises an unexpected error as soon as it has a request with a prompt of 13 tokens."""

    def step(self) -> StepOutput:
        if any(len(entry.request.prompt) == 13 for entry in (*self._running, *self._waiting)):
            raise ZeroDivisionError("unexpected")
        return super().step()


class FloodsLog(FaultyEngine):
    """Prints much."""

    def generate(self, batch: Generate) -> Any:
        os.write(2, b"chatter " * 4_000 + b"\nchatter, chatter, the last\n")
        return super().generate(batch)


class EndsEarly(FaultyEngine):
    """Generates three tokens at most."""

    def generate(self, batch: Generate) -> Any:
        for step, tokens in enumerate(super().generate(batch)):
            if step == 3:
                return
            yield tokens


FIRST_S, EACH_S = 0.03, 0.01


class Paced(EmulatedEngine):
    """An engine of known pace: the first token takes `FIRST_S` for each sequence of a batch, every other `EACH_S`."""

    def load(self, spec: EngineSpec) -> Loaded:
        super().load(spec)
        return Loaded(backend="paced", version="1", weights_bytes=3 << 30, kv_cache_bytes=1 << 30)

    def generate(self, batch: Generate) -> Any:
        first_s = time.monotonic() + FIRST_S * len(batch.sequences)
        for step in range(max(sequence.output_tokens for sequence in batch.sequences)):
            time.sleep(max(0.0, first_s + step * EACH_S - time.monotonic()))
            yield [step] * len(batch.sequences)
