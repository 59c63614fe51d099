"""Small continuous engines on a clock, with made-up step times, for tests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import msgspec
from fixtures import scenario

from maveriq.control.engine_recorder import EngineRecorder
from maveriq.control.engine_series import TokenGaps
from maveriq.domain.deployments import Batching
from maveriq.domain.requests import Request
from maveriq.engine.reading import read_engine_settings
from maveriq.engine.settings import EngineHost
from maveriq.estimate.engine_presets import engine_preset
from maveriq.estimate.pipeline_timer import PipelineTimer, StageModel
from maveriq.estimate.step_timer import StepTimer
from maveriq.scenario.continuous_engines import EngineParts, admission_delay
from maveriq.scenario.stepped_engine import SteppedEngine
from maveriq.scenario.system import ReplaySystem
from maveriq.workload.requests import Arrivals


class RoundSteps:
    """Stands for a step model: kernels take 100 µs, more for each sequence and token, and more beyond 50 tokens."""

    contexts = (1, 50, 100_000)

    def gpu_us(self, *, decodes, context_tokens, chunks=()):
        mean = context_tokens / decodes if decodes else 0
        tokens = sum(chunk_tokens + past / 8 for chunk_tokens, past in chunks)
        return 100 + 3.3 * decodes + 0.37 * context_tokens + 0.9 * decodes * max(0, mean - 50) + 11.7 * tokens


TIMER = StepTimer(RoundSteps(), engine_preset("vllm-0.23.0"), layers=1)  # type: ignore[arg-type]


def stepped(
    settings: dict[str, object],
    blocks: int,
    *,
    context: int = 256,
    delay_us: int = 0,
    delay_of_each_us: int = 0,
    deployment_id: int = 1,
    skips_steps: bool = True,
    sample_us: int = 1_000_000,
    timer: StepTimer | PipelineTimer = TIMER,
) -> SteppedEngine:
    """Return an engine of a model with so long a context, which records intervals of `sample_us`.

    Requests reach its queue after `delay_us`, and `delay_of_each_us` more for each that runs.
    """
    resolved = read_engine_settings(settings).resolve(EngineHost(context_tokens=context))
    preset = msgspec.structs.replace(
        engine_preset("vllm-0.23.0"), api_us=delay_us, api_token_us=0, api_sequence_us=delay_of_each_us
    )
    delay = admission_delay(preset, max_num_seqs=resolved.max_num_seqs)
    parts = EngineParts(engine=resolved.make_engine(blocks), timer=timer, admission_delay_us=delay)
    recorder = EngineRecorder(sample_us, TokenGaps())
    return SteppedEngine(parts, deployment_id, 1, recorder=recorder, skips_steps=skips_steps)


@dataclass
class History:
    """What became of each request, by ID, in µs."""

    started: dict[int, int] = field(default_factory=dict)
    first_token: dict[int, int] = field(default_factory=dict)
    finished: dict[int, tuple[int, int]] = field(default_factory=dict)
    preempted: list[int] = field(default_factory=list)
    cached: dict[int, int] = field(default_factory=dict)
    steps: dict[int, int] = field(default_factory=dict)
    events: int = 0
    ended_us: int = 0


def run(engine: SteppedEngine, requests: Sequence[Request], aborts: Iterable[tuple[int, int]] = ()) -> History:
    """Run an engine until nothing is left to do; `aborts` are (time, request ID)."""
    history = History()
    due = sorted([*((request.arrival_us, 0, request) for request in requests)], key=lambda entry: entry[0])
    ends = sorted(aborts)
    while due or ends or engine.next_us is not None:
        times = [due[0][0] if due else None, ends[0][0] if ends else None, engine.next_us]
        now_us = min(time for time in times if time is not None)
        progress = engine.finish(now_us)
        history.events += 1
        history.ended_us = now_us
        for started in progress.started:
            assert started.request_id not in history.started
            history.started[started.request_id] = started.start_us
            history.cached[started.request_id] = started.cached_tokens
        history.preempted += progress.preempted
        for request_id in progress.first_tokens:
            assert request_id not in history.first_token
            history.first_token[request_id] = now_us
        for request_id, tokens, steps in progress.finished:
            history.steps[request_id] = steps
            assert request_id not in history.finished
            history.finished[request_id] = (now_us, tokens)
        while due and due[0][0] == now_us:
            engine.submit(now_us, due.pop(0)[2])
        while ends and ends[0][0] == now_us:
            engine.abort(now_us, ends.pop(0)[1])
        engine.compose(now_us)
    return history


def request(request_id: int, arrival_us: int, prompt_tokens: int, output_tokens: int, prompt_id: int = 0) -> Request:
    return Request(
        request_id=request_id,
        endpoint_id=1,
        arrival_us=arrival_us,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        prompt_id=prompt_id,
    )


def pipeline(*shares: float) -> PipelineTimer:
    """Return the times of a pipeline, each stage of which has a share of all kernels."""
    preset = engine_preset("vllm-0.23.0")
    return PipelineTimer(
        [StageModel(steps=_Share(share), layers=1, hand_over_us=lambda _: 0.0) for share in shares], preset
    )


@dataclass(frozen=True)
class _Share:
    share: float

    def gpu_us(self, **step):
        return self.share * RoundSteps().gpu_us(**step)


@dataclass(frozen=True)
class SmallEngines:
    """Makes such engines for a simulation."""

    settings: dict[str, object]
    blocks: int
    context: int = 4_096

    def parts(self, endpoint, plan):
        resolved = read_engine_settings(self.settings).resolve(EngineHost(context_tokens=self.context))
        return EngineParts(engine=resolved.make_engine(self.blocks), timer=TIMER, admission_delay_us=lambda *_: 0)


def system(
    requests: Arrivals, gpus_of: dict[int, list[tuple[int, ...]]], *, engines: SmallEngines, **options
) -> ReplaySystem:
    """Return a system of such engines, placed as `FixedPlacement` does; options are those of `fixtures.scenario`."""
    made = scenario(requests, gpus_of, **options)
    endpoints = tuple(replace(endpoint, batching=Batching.CONTINUOUS) for endpoint in made.workload.endpoints)
    return replace(made, workload=replace(made.workload, endpoints=endpoints), engines=engines)
