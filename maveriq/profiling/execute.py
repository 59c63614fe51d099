"""Measures what a plan says: engine by engine, until the samples of each batch agree, and into the log.

Engines of different layers take turns where they can run side by side: the time of a layer is the difference of two
measurements, and a machine that grows slower meanwhile must not pass for one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TypeAlias

from maveriq.domain.models import ModelSpec
from maveriq.domain.parallel import ParallelConfig
from maveriq.estimate.profile_file import CaseRecord, RunRecord, noise_of_median
from maveriq.exec.gpus import Devices
from maveriq.exec.launcher import Launcher
from maveriq.profiling.measure import BatchClient, EmulatedBatches, Probe, SampleTimes, StartedEngine, started_engine
from maveriq.profiling.measure_steps import StepClient, steps_of
from maveriq.profiling.memory_meter import MemoryMeter
from maveriq.profiling.plan import PlannedCase, PlannedRun
from maveriq.profiling.session import EngineStarted, RunEnded, Sample, Session
from maveriq.profiling.short_models import ShortModels
from maveriq.streams import generator

Report: TypeAlias = Callable[[str], None]
Emulate: TypeAlias = Callable[[ModelSpec, ParallelConfig], EmulatedBatches]


@dataclass(frozen=True, slots=True, kw_only=True)
class Repeats:
    """How often a batch is measured.

    Args:
        least: at least.
        most: at most.
        spread: until the standard error of both medians is at most this share of them.
    """

    least: int = 3
    most: int = 15
    spread: float = 0.01

    def enough(self, samples: Sequence[Sample]) -> bool:
        """Return whether a batch needs no further sample."""
        if not self.least <= len(samples) < self.most:
            return len(samples) >= self.most
        times = (tuple(getattr(sample, name) for sample in samples) for name in ("first_s", "each_s"))
        return all(noise_of_median(each) <= self.spread for each in times)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What is measured with.

    Args:
        launcher: starts engines.
        devices: the devices behind GPU numbers.
        probe: seed and timeouts.
        short_models: makes the models that engines load.
        memory: reads what engines hold.
        repeats: how often each batch is measured.
        side_by_side: how many engines share devices: more than one where they take no more memory than they need.
        by_steps: whether engines batch continuously, and report steps.
        emulate: says how long emulated engines take; None for engines that compute.
    """

    launcher: Launcher
    devices: Devices
    probe: Probe
    short_models: ShortModels
    memory: MemoryMeter
    repeats: Repeats
    side_by_side: int
    by_steps: bool = False
    emulate: Emulate | None = None


async def execute(session: Session, models: dict[str, ModelSpec], bench: Bench, report: Report) -> None:
    """Measure what is missing of a session.

    Raises:
        ProfilingError: an engine does not start, or fails.
        MaveriqError: the log cannot be written.
    """
    runs = enumerate(session.start.plan.runs)
    for _, of_split in groupby(runs, key=lambda run: (run[1].model, run[1].tp, run[1].pp)):
        waiting = [(number, run) for number, run in of_split if number not in session.ended]
        for first in range(0, len(waiting), bench.side_by_side):
            await _execute_group(session, waiting[first : first + bench.side_by_side], models, bench, report)


async def _execute_group(
    session: Session,
    runs: Sequence[tuple[int, PlannedRun]],
    models: dict[str, ModelSpec],
    bench: Bench,
    report: Report,
) -> None:
    """Measure engines that run side by side."""
    gpu_ids = tuple(range(runs[0][1].configuration.gpus))
    plan = session.start.plan
    async with AsyncExitStack() as stack:
        report(f"{', '.join(_name(run) for _, run in runs)}: starting; {_left(session, bench.repeats)}")
        before = bench.memory.before(gpu_ids)

        async def start(number: int, run: PlannedRun) -> StartedEngine[BatchClient | StepClient]:
            short, files = bench.short_models.make(models[run.model], run.layers)
            engine: StartedEngine[BatchClient | StepClient] = await stack.enter_async_context(
                started_engine(
                    bench.launcher,
                    short,
                    run.configuration,
                    batch=engine_batch(run, by_steps=bench.by_steps),
                    gpu_ids=gpu_ids,
                    devices=bench.devices,
                    probe=replace(bench.probe, files=files),
                    what=_name(run),
                    make_client=StepClient if bench.by_steps else BatchClient,
                    batching=steps_of([case.sizes for case in run.cases]) if bench.by_steps else None,
                    number=number + 1,
                )
            )
            if bench.emulate is not None and isinstance(engine.client, BatchClient):
                engine.client.emulated = bench.emulate(short, run.configuration)
            return engine

        # All are awaited also where one fails, so that the others are stopped in order.
        started = await asyncio.gather(*(start(number, run) for number, run in runs), return_exceptions=True)
        engines: dict[int, StartedEngine[BatchClient | StepClient]] = {}
        for (number, _), engine_or_error in zip(runs, started, strict=True):
            if isinstance(engine_or_error, BaseException):
                raise engine_or_error
            engines[number] = engine_or_error
        for number, run in runs:
            engine = engines[number]
            session.add(
                EngineStarted(
                    run=number,
                    start_s=engine.start_s,
                    version=engine.loaded.version,
                    weights_bytes=engine.loaded.weights_bytes,
                    kv_cache_bytes=engine.loaded.kv_cache_bytes,
                    kv_tokens=engine.loaded.kv_tokens,
                    memory_before_bytes=before,
                )
            )
            for case in run.cases:
                await _sample(engine, models[run.model], case, bench.probe.seed, "warm-up")
        for number, at, case, repeat in _open_cases(session, runs, bench.repeats):
            run = plan.runs[number]
            name = f"run {number} case {at} repeat {repeat}"
            times = await _sample(engines[number], models[run.model], case, bench.probe.seed, name)
            at_s = round(time.time(), 3)
            session.add(Sample(run=number, case=at, repeat=repeat, at_s=at_s, **times._asdict()))
            samples = session.samples[number, at]
            if bench.repeats.enough(samples):
                report(f"  {_name(run)}, {_result(case, samples)}; {_left(session, bench.repeats)}")
        for number, _ in runs:
            after, peak = bench.memory.held(engines[number].pid, gpu_ids)
            session.add(RunEnded(run=number, memory_after_bytes=after, memory_peak_bytes=peak))


def _open_cases(
    session: Session, runs: Sequence[tuple[int, PlannedRun]], repeats: Repeats
) -> Iterator[tuple[int, int, PlannedCase, int]]:
    """Yield what is to be sampled: each batch once on every engine, and then all again while samples disagree."""
    for repeat in range(repeats.most):
        for at in range(max(len(run.cases) for _, run in runs)):
            for number, run in runs:
                if at >= len(run.cases):
                    continue
                samples = session.samples.get((number, at), [])
                if len(samples) == repeat and not repeats.enough(samples):
                    yield number, at, run.cases[at], repeat


async def _sample(
    engine: StartedEngine[BatchClient | StepClient], model: ModelSpec, case: PlannedCase, seed: int, name: str
) -> SampleTimes:
    """Return what a batch takes; the prompts depend on the sample's name alone."""
    draw = generator(seed, f"profile {name}")
    prompts = draw.integers(0, model.vocab_size, (case.batch, case.prompt_tokens)).tolist()
    extra = draw.integers(0, model.vocab_size, case.prompt_tokens).tolist()
    return await engine.client.sample(prompts, extra, case.output_tokens)


def engine_batch(run: PlannedRun, *, by_steps: bool) -> int:
    """Return the requests that an engine holds at once: those of the largest batch, and one that joins."""
    return max(case.batch for case in run.cases) + by_steps


def _name(run: PlannedRun) -> str:
    layers = "1 layer" if len(run.layers) == 1 else f"{len(run.layers)} layers"
    return f"{run.model} with {layers}, {run.configuration}"


def _result(case: PlannedCase, samples: Sequence[Sample]) -> str:
    from statistics import median

    first_s, each_s = (median(getattr(sample, name) for sample in samples) for name in ("first_s", "each_s"))
    return (
        f"batch {case.batch}, prompts of {case.prompt_tokens}: {1e3 * first_s:.1f} ms, then {1e3 * each_s:.2f} ms each "
        f"({len(samples)} samples)"
    )


def _left(session: Session, repeats: Repeats) -> str:
    """Return about how long the rest takes: what is expected of it, at the pace so far."""
    left_s = 0.0
    for number, run in enumerate(session.start.plan.runs):
        if number in session.ended:
            continue
        left_s += 0.0 if number in session.engines else run.start_s
        for at, case in enumerate(run.cases):
            samples = session.samples.get((number, at), [])
            if not repeats.enough(samples):
                left_s += case.expected_s / (repeats.least + 2) * max(1, repeats.least - len(samples))
    return f"about {left_s:.0f} s left"


def run_records(session: Session) -> tuple[RunRecord, ...]:
    """Return what was measured, as a profile keeps it."""
    return tuple(
        RunRecord(
            model=run.model,
            layers=run.layers,
            tp=run.tp,
            pp=run.pp,
            weights=run.weights,
            kv=run.kv,
            start_s=session.engines[number].start_s,
            weights_bytes=session.engines[number].weights_bytes,
            kv_cache_bytes=session.engines[number].kv_cache_bytes,
            memory_before_bytes=session.engines[number].memory_before_bytes,
            memory_after_bytes=session.ended[number].memory_after_bytes,
            memory_peak_bytes=session.ended[number].memory_peak_bytes,
            kv_tokens=session.engines[number].kv_tokens,
            admission_s=_admissions(session, number, run),
            cases=tuple(
                CaseRecord(
                    batch=case.batch,
                    prompt_tokens=case.prompt_tokens,
                    output_tokens=case.output_tokens,
                    first_s=tuple(sample.first_s for sample in session.samples[number, at]),
                    each_s=tuple(sample.each_s for sample in session.samples[number, at]),
                    mixed_s=tuple(sample.mixed_s for sample in session.samples[number, at] if sample.mixed_s),
                    at_s=tuple(sample.at_s for sample in session.samples[number, at]),
                )
                for at, case in enumerate(run.cases)
            ),
        )
        for number, run in enumerate(session.start.plan.runs)
    )


def _admissions(session: Session, number: int, run: PlannedRun) -> tuple[float, ...]:
    """Return what requests took beside their steps, in the smallest batches: larger ones wait for each other."""
    smallest = min(case.batch for case in run.cases)
    return tuple(
        sample.admission_s
        for at, case in enumerate(run.cases)
        for sample in session.samples[number, at]
        if case.batch == smallest and sample.admission_s
    )
