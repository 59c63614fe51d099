"""Measures an engine alone: load a configuration, send the same batches a few times, stop it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Generic, NamedTuple, Protocol, TypeVar

from maveriq.domain.models import ModelSpec
from maveriq.domain.parallel import ParallelConfig
from maveriq.errors import MaveriqError
from maveriq.exec import messages
from maveriq.exec.gpus import Devices
from maveriq.exec.launcher import EngineConnection, Launcher, LaunchError
from maveriq.exec.messages import (
    BatchingSpec,
    ChannelClosedError,
    EngineSpec,
    Failed,
    Finished,
    Generate,
    Hello,
    Load,
    Loaded,
    Stop,
)
from maveriq.exec.model_files import ModelFiles
from maveriq.exec.processes import describe_exit
from maveriq.streams import generator
from maveriq.units import BYTES_PER_GIB

_STOP_S = 10.0
_EXIT_S = 5.0
_MAX_OUTPUT = 300
_WARM_UPS = 1


class ProfilingError(MaveriqError):
    """An engine could not be measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasurementCase:
    """A batch to measure: `batch` prompts of equal length and the output tokens of each."""

    batch: int
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a configuration took; medians over the repeats. `ttft_s` is the intercept at zero output tokens."""

    model: ModelSpec
    configuration: ParallelConfig
    case: MeasurementCase
    ttft_s: float
    tpot_s: float
    memory_gib: float
    start_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """How to measure.

    Args:
        files: where the files of models are.
        repeats: of each question, after one that does not count.
        timeout_s: for a start, and for an execution.
        seed: of random weights and prompts.
    """

    files: ModelFiles = field(default_factory=ModelFiles)
    repeats: int = 5
    timeout_s: float = 600.0
    seed: int = 42


async def measure(
    launcher: Launcher,
    model: ModelSpec,
    configuration: ParallelConfig,
    cases: Sequence[MeasurementCase],
    *,
    devices: Devices,
    probe: Probe,
) -> list[Measured]:
    """Start an engine on the first GPUs, measure every batch, and stop it.

    Raises:
        ProfilingError: it does not start, cannot do this, or takes longer than it may.
    """
    gpu_ids = tuple(range(configuration.gpus))
    what = f"{model.name} with {configuration}"
    batch = max(case.batch for case in cases)
    async with started_engine(
        launcher, model, configuration, batch=batch, gpu_ids=gpu_ids, devices=devices, probe=probe, what=what,
        make_client=BatchClient,
    ) as engine:  # fmt: skip
        memory_gib = (engine.loaded.weights_bytes + engine.loaded.kv_cache_bytes) / BYTES_PER_GIB
        if not memory_gib:
            raise ProfilingError(f"{what}: backend {engine.loaded.backend} does not know what memory it holds")
        timed = await _run_cases(engine.client, model, cases, probe)
    return [
        Measured(
            model=model,
            configuration=configuration,
            case=case,
            ttft_s=first_s - each_s,
            tpot_s=each_s,
            memory_gib=memory_gib,
            start_s=engine.start_s,
        )
        for case, (first_s, each_s) in zip(cases, timed, strict=True)
    ]


class SampleTimes(NamedTuple):
    """What a batch took, in seconds.

    Args:
        first_s: until the first tokens; of an engine that batches continuously, the step with all prompts.
        each_s: for each further token.
        mixed_s: a step with a further prompt beside decoding sequences; 0 where there was none.
        admission_s: from the submission to the report of the first token, without that step; 0 where it is part of it.
    """

    first_s: float
    each_s: float
    mixed_s: float = 0.0
    admission_s: float = 0.0


LEAST_S = 1e-9
"""The least that a token takes."""


class EngineClient:
    """The connection to an engine with one client. The socket loses no message."""

    def __init__(self, connection: EngineConnection, what: str, timeout_s: float) -> None:
        self._connection = connection
        self._channel = connection.channel
        self._what = what
        self._timeout_s = timeout_s

    async def load(self, spec: EngineSpec) -> Loaded:
        """Let the engine load a model.

        Raises:
            ProfilingError: it cannot, or takes longer than it may.
        """
        async with self._within("load"):
            while True:
                match await self._channel.receive():
                    case Hello():
                        self._channel.send(Load(spec=spec))
                    case Loaded() as loaded:
                        return loaded
                    case Failed() as failed:
                        raise ProfilingError(f"{self._what}: {failed.message}")

    @contextlib.asynccontextmanager
    async def _within(self, do: str) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._timeout_s):
                yield
        except TimeoutError:
            raise ProfilingError(f"{self._what}: its engine did not {do} within {self._timeout_s:g} s") from None
        except ChannelClosedError:
            raise ProfilingError(f"{self._what}: its engine {await self._ending()}") from None

    async def _ending(self) -> str:
        """Return how the engine ended, with the last line of its log."""
        ended = "ended"
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_EXIT_S):
                ended = f"ended with {describe_exit(await self._connection.wait_exit())}"
        output = self._connection.last_output()
        return f"{ended} ({output[:_MAX_OUTPUT]})" if output else ended


class EmulatedBatches(Protocol):
    """How long an emulated engine takes for batches of one model in one configuration."""

    @property
    def time_scale(self) -> float:
        """Real seconds per second of its clock."""

    def times_s(self, batch: int, prompt_tokens: int, output_tokens: int) -> tuple[float, float]:
        """Return the seconds to the first and to the last token of a batch."""


class BatchClient(EngineClient):
    """The connection to an engine that takes one execution at a time (mutable).

    `emulated`: says how long an emulated engine takes, which it cannot know; None for an engine that computes.
    """

    _execution_id = 0
    emulated: EmulatedBatches | None = None

    async def run(
        self, sequences: tuple[messages.PromptSequence, ...], *, first_token_s: float = 0.0, service_s: float = 0.0
    ) -> Finished:
        """Let the engine run a batch; an emulated one takes so many seconds to its first and last token.

        Raises:
            ProfilingError: it cannot, or takes longer than it may.
        """
        self._execution_id += 1
        async with self._within("answer"):
            self._channel.send(
                Generate(
                    execution_id=self._execution_id,
                    sequences=sequences,
                    first_token_s=first_token_s,
                    service_s=service_s,
                )
            )
            while True:
                match await self._channel.receive():
                    case Finished() as finished:
                        return finished
                    case Failed() as failed:
                        raise ProfilingError(f"{self._what}: {failed.message}")

    async def sample(self, prompts: Sequence[Sequence[int]], extra: Sequence[int], output_tokens: int) -> SampleTimes:
        """Measure a batch; `extra` is left out, since no prompt joins a batch that runs.

        Raises:
            ProfilingError: as `run`.
        """
        del extra
        scale, first_token_s, service_s = 1.0, 0.0, 0.0
        if self.emulated is not None:
            scale = self.emulated.time_scale
            first_token_s, service_s = self.emulated.times_s(len(prompts), len(prompts[0]), output_tokens)
        finished = await self.run(
            sequences_of(prompts, output_tokens), first_token_s=scale * first_token_s, service_s=scale * service_s
        )
        rest_s = finished.service_s - finished.first_token_s
        if finished.first_token_s <= 0 or rest_s < 0:
            raise ProfilingError(f"{self._what}: its engine reports a first token after {finished.first_token_s:g} s")
        each_s = max(rest_s / max(1, output_tokens - 1), LEAST_S)
        return SampleTimes(finished.first_token_s / scale, each_s / scale)


C = TypeVar("C", bound=EngineClient)


@dataclass(frozen=True, slots=True, kw_only=True)
class StartedEngine(Generic[C]):
    """An engine that serves: its client, what it reported, the seconds it took to start, and its process."""

    client: C
    loaded: Loaded
    start_s: float
    pid: int


@contextlib.asynccontextmanager
async def started_engine(
    launcher: Launcher,
    model: ModelSpec,
    configuration: ParallelConfig,
    *,
    batch: int,
    gpu_ids: tuple[int, ...],
    devices: Devices,
    probe: Probe,
    what: str,
    make_client: Callable[[EngineConnection, str, float], C],
    number: int = 1,
    batching: BatchingSpec | None = None,
) -> AsyncIterator[StartedEngine[C]]:
    """Start an engine for batches of at most `batch` prompts, and stop it at the end of the block.

    Engines that run at the same time have different numbers. `batching` is that of `ModelFiles.engine_spec`.

    Raises:
        ProfilingError: it does not start, or takes longer than it may.
    """
    spec = probe.files.engine_spec(
        model,
        configuration,
        batch_size=batch,
        devices=devices.names(gpu_ids),
        deployment_id=number,
        seed=probe.seed,
        batching=batching,
    )
    loop = asyncio.get_running_loop()
    started_s = loop.time()
    try:
        async with asyncio.timeout(probe.timeout_s):
            connection = await launcher.launch(spec, gpu_ids)
    except TimeoutError:
        raise ProfilingError(f"{what}: no engine within {probe.timeout_s:g} s") from None
    except LaunchError as error:
        raise ProfilingError(f"{what}: {error}") from None
    try:
        client = make_client(connection, what, probe.timeout_s)
        loaded = await client.load(spec)
        yield StartedEngine(client=client, loaded=loaded, start_s=loop.time() - started_s, pid=connection.pid)
    finally:
        await _stop(connection)


async def _run_cases(
    client: BatchClient, model: ModelSpec, cases: Sequence[MeasurementCase], probe: Probe
) -> list[tuple[float, float]]:
    """Return until the first token and per token after it, medians over the repeats.

    Question by question and then all again, so that a moment's noise falls on one repeat of each, not on all of one.
    """
    draw = generator(probe.seed, "profiling prompts")
    first_s: list[list[float]] = [[] for _ in cases]
    each_s: list[list[float]] = [[] for _ in cases]
    for number in range(_WARM_UPS + probe.repeats):
        for at, case in enumerate(cases):
            prompts = draw.integers(0, model.vocab_size, (case.batch, case.prompt_tokens)).tolist()
            finished = await client.run(sequences_of(prompts, case.output_tokens))
            if number >= _WARM_UPS:
                first_s[at].append(finished.first_token_s)
                rest_s = finished.service_s - finished.first_token_s
                each_s[at].append(rest_s / max(1, case.output_tokens - 1))
    return [(median(first), median(each)) for first, each in zip(first_s, each_s, strict=True)]


def sequences_of(prompts: Sequence[Sequence[int]], output_tokens: int) -> tuple[messages.PromptSequence, ...]:
    """Return prompts as an engine takes them."""
    return tuple(
        messages.PromptSequence(request_id=number, prompt=tuple(prompt), output_tokens=output_tokens)
        for number, prompt in enumerate(prompts, 1)
    )


async def _stop(connection: EngineConnection) -> None:
    connection.channel.send(Stop())
    for stop in (connection.terminate, connection.kill):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_STOP_S):
                await connection.wait_gone()
                break
        stop()
    connection.channel.close()
