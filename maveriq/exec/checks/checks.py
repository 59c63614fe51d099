"""The checks of `maveriq engines check`, in order: the library, the starts, what serves, and what ends engines."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import count, takewhile
from pathlib import Path
from typing import TypeAlias

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion

from maveriq.errors import MaveriqError
from maveriq.exec.capabilities import engine_facts
from maveriq.exec.checks.engines import CheckedEngine, CheckedEngines, EngineDownError
from maveriq.exec.checks.plan import PlannedEngine
from maveriq.exec.checks.processes import can_look, describe, resident_bytes, still_running
from maveriq.exec.checks.runner import Check, Outcome, failed, passed, skipped
from maveriq.exec.device import Device
from maveriq.exec.engine_protocol import STOPPED
from maveriq.exec.engines.engine import FailureKind
from maveriq.exec.gpus import GpuMeter
from maveriq.exec.local_machine import EMULATED
from maveriq.exec.messages import Inspected, PromptSequence
from maveriq.exec.processes import ProcessStat, describe_exit
from maveriq.units import Bytes, gib

_LIMIT_S = 90.0
_NOTICE_LIMIT_S = 20.0  # a lost rank is noticed in less than 2 s; the check says in how many
_FREED_LIMIT_S = 30.0  # drivers take a moment
_PROMPTS = (tuple(range(3, 19)), tuple(range(40, 47)))
_TOKENS = 8
_POLL_S = 0.1
_FREED_TOLERANCE_BYTES: Bytes = 64 << 20  # the driver's own figures move by some MiB
_SEEDED = (EMULATED, "torch")  # whose random weights are the same however they are split
_ELEMENT_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
_NEEDED, _FREE = re.compile(r"needs [\d.]+ \w+"), re.compile(r"[\d.]+ \w+ free")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckContext:
    """What checks look at.

    Args:
        backend: a key of the capability matrix.
        engines: the engines, started.
        inspection: how the engine's library answers the spec of each engine.
        gpu_ids: the GPUs in use.
        meter: reads them, None without GPUs.
        used_before: memory in use on each GPU before anything started.
    """

    backend: str
    engines: CheckedEngines
    inspection: asyncio.Task[list[Inspected]]
    gpu_ids: tuple[int, ...]
    meter: GpuMeter | None = None
    used_before: tuple[Bytes, ...] = ()

    def smallest_up(self, *, ranks: int = 1) -> CheckedEngine | None:
        """Return the engine with the fewest ranks, at least so many, of those that serve."""
        fitting = [engine for engine in self.engines.matrix_up() if engine.planned.configuration.gpus >= ranks]
        return min(fitting, key=_ranks, default=None)

    def largest_up(self) -> CheckedEngine | None:
        """Return the engine with the most ranks of those that serve."""
        return max(self.engines.matrix_up(), key=_ranks, default=None)


def _ranks(engine: CheckedEngine) -> int:
    return engine.planned.configuration.gpus


EngineCheck: TypeAlias = Check[CheckContext]


def checks_for(engines: CheckedEngines) -> list[EngineCheck]:
    """Return all checks of these engines, in the order in which they must run."""
    start_limit_s = engines.setup.settings.start_timeout_s
    return [
        Check(
            name="version",
            proves="the installed library has a version that maveriq supports",
            limit_s=start_limit_s,
            run=_version,
        ),
        Check(
            name="arguments",
            proves="the installed classes know every argument that maveriq passes, for each format and split",
            limit_s=start_limit_s,
            run=_arguments,
        ),
        *(
            Check(
                name=f"start {planned.label}",
                proves="an engine of this format and split loads and serves, beside the others",
                limit_s=start_limit_s,
                run=partial(_start, planned=planned),
            )
            for planned in engines.plan.matrix
        ),
        Check(
            name="second engine",
            proves="two engines on one GPU serve at the same time and give the same tokens",
            limit_s=start_limit_s,
            run=_second_engine,
        ),
        Check(
            name="too large",
            proves="a model that does not fit is refused as out of memory, with what it needs and what is free",
            limit_s=start_limit_s,
            run=_too_large,
        ),
        *_checks_of_serving_engines(),
        *_checks_that_end_engines(),
    ]


def _checks_of_serving_engines() -> Iterator[EngineCheck]:
    yield Check(
        name="tokens",
        proves="each engine gives as many tokens as asked for, of its vocabulary, and the same ones again",
        limit_s=_LIMIT_S,
        run=_tokens,
    )
    yield Check(
        name="tokens of splits",
        proves="all splits of a model give the same tokens",
        limit_s=_LIMIT_S,
        run=_tokens_of_splits,
    )
    yield Check(
        name="layers per stage",
        proves="each stage holds as many layers as planned",
        limit_s=_LIMIT_S,
        run=_layers,
    )
    yield Check(
        name="parameter bytes",
        proves="each rank stores its weights in the format and shard that were asked for",
        limit_s=_LIMIT_S,
        run=_parameter_bytes,
    )
    yield Check(
        name="stop token",
        proves="a stop token ends a sequence and is its last token",
        limit_s=_LIMIT_S,
        run=_stop_token,
    )
    yield Check(
        name="full length",
        proves="a sequence as long as the model's context is served to its end",
        limit_s=_LIMIT_S,
        run=_full_length,
    )


def _checks_that_end_engines() -> Iterator[EngineCheck]:
    yield Check(
        name="abort",
        proves="an engine that is stopped in the middle of an execution frees everything and exits by itself",
        limit_s=_LIMIT_S,
        run=_abort,
    )
    yield Check(
        name="killed worker",
        proves="the loss of one rank of an idle engine is noticed",
        limit_s=_NOTICE_LIMIT_S,
        run=_killed_worker,
    )
    yield Check(
        name="killed group",
        proves="killing an engine leaves none of its processes",
        limit_s=_LIMIT_S,
        run=_killed_group,
    )
    yield Check(
        name="memory returned",
        proves="after the last engine has ended, GPU memory and shared memory are as before the first",
        limit_s=_LIMIT_S,
        run=_memory_returned,
    )


# The library


async def _version(context: CheckContext) -> Outcome:
    version = (await asyncio.shield(context.inspection))[0].version
    facts = engine_facts(context.backend)
    if not facts.requirements:
        return passed(f"{version}, part of maveriq")
    package = facts.packages[0]
    bounds = _bounds(package, facts.requirements)
    try:
        supported = bounds.contains(version, prereleases=True)
    except InvalidVersion:
        supported = False
    text = f"{package} {version or 'of unknown version'}"
    return passed(f"{text} ({bounds})") if supported else failed(f"{text} is not {bounds}")


def _bounds(package: str, requirements: Sequence[str]) -> SpecifierSet:
    """Return the versions of a package that an engine may have."""
    wanted = canonicalize_name(package)
    required = (parsed for parsed in map(Requirement, requirements) if canonicalize_name(parsed.name) == wanted)
    return next((parsed.specifier for parsed in required), SpecifierSet())


async def _arguments(context: CheckContext) -> Outcome:
    try:
        inspected = await asyncio.shield(context.inspection)
    except MaveriqError as error:
        return skipped(f"the library cannot be inspected: {error}")
    unknown = sorted({name for found in inspected for name in found.unknown_arguments})
    if unknown:
        return failed(f"not known to version {inspected[0].version}: {', '.join(unknown)}")
    return passed(f"all known, for {len(inspected)} engines")


# Starts


async def _start(context: CheckContext, *, planned: PlannedEngine) -> Outcome:
    if planned.why_not:
        return skipped(planned.why_not)
    engine = context.engines.by_label[planned.label]
    loaded = await engine.wait_loaded()
    processes = await engine.processes()
    held = loaded.weights_bytes + loaded.kv_cache_bytes
    memory = f", {held / (1 << 20):,.1f} MiB of weights and KV cache" if held else ""
    on = f"GPU {' '.join(map(str, planned.gpu_ids))}" if context.meter else "the CPU"
    count_text = f", {len(processes)} processes" if processes else ""
    return passed(f"on {on}{count_text}{memory}")


async def _second_engine(context: CheckContext) -> Outcome:
    first, second = (context.engines.by_label.get(planned.label) for planned in _pair(context))
    if first is None or second is None or not first.is_up:
        return skipped("the first engine does not serve")
    await second.wait_loaded()
    await second.processes()
    prompt = _sequence(_PROMPTS[0], _TOKENS)
    outputs = await asyncio.gather(first.run(prompt), second.run(prompt))
    if outputs[0] != outputs[1]:
        return failed(f"they give different tokens for one prompt: {outputs[0][0]} and {outputs[1][0]}")
    await second.stop()
    return passed(f"both on GPU {first.planned.gpu_ids[0]}")


def _pair(context: CheckContext) -> tuple[PlannedEngine, PlannedEngine]:
    plan = context.engines.plan
    return plan.matrix[0], plan.second


async def _too_large(context: CheckContext) -> Outcome:
    if context.backend == EMULATED:
        return skipped("an emulated engine holds no memory")
    engine = context.engines.by_label.get(context.engines.plan.too_large.label)
    if engine is None:
        return skipped("this backend does not run the model")
    try:
        await engine.wait_loaded()
    except EngineDownError as error:
        reason = str(error)
    else:
        return failed(f"it was loaded: a model of {engine.planned.model.vocab_size:,} tokens of vocabulary")
    if FailureKind.OUT_OF_MEMORY.value not in reason:
        return failed(f"it was refused, but not as out of memory: {reason}")
    if not _NEEDED.search(reason) or (context.engines.plan.device is Device.CUDA and not _FREE.search(reason)):
        return failed(f"the reason does not say what it needs and what is free: {reason}")
    return passed(reason)


# What serves


def _sequence(prompt: tuple[int, ...], output_tokens: int, *, stop: tuple[int, ...] = ()) -> PromptSequence:
    return PromptSequence(request_id=1, prompt=prompt, output_tokens=output_tokens, stop_token_ids=stop)


def _summary(context: CheckContext, problems: list[str], good: str) -> Outcome:
    """Return the outcome of a check on all engines of the matrix that serve."""
    if problems:
        return failed("; ".join(problems))
    serving = len(context.engines.matrix_up())
    return passed(f"{good}, on {serving} engines") if serving else skipped("no engine serves")


async def _tokens(context: CheckContext) -> Outcome:
    batch = tuple(_sequence(prompt, _TOKENS) for prompt in _PROMPTS)

    async def problem(engine: CheckedEngine) -> str:
        vocabulary = engine.planned.model.vocab_size
        outputs = await engine.run(*batch)
        if lengths := [len(tokens) for tokens in outputs if len(tokens) != _TOKENS]:
            return f"{lengths[0]} tokens instead of {_TOKENS}"
        if strange := [token for tokens in outputs for token in tokens if not 0 <= token < vocabulary]:
            return f"token {strange[0]} is not in its vocabulary of {vocabulary}"
        again = await engine.run(*batch)
        return "" if again == outputs else "other tokens when the same batch is repeated"

    problems = await context.engines.on_all(problem)
    return _summary(context, problems, f"{_TOKENS} tokens for each of {len(_PROMPTS)} prompts, twice")


async def _tokens_of_splits(context: CheckContext) -> Outcome:
    if context.backend not in _SEEDED:
        return skipped(f"{context.backend} draws random weights for each rank, so splits are different models")
    if context.engines.plan.device is Device.CUDA:
        return skipped("with 16 bits on a GPU, splits add up in another order, and equal tokens are not certain")
    outputs: dict[str, tuple[tuple[int, ...], ...]] = {}
    first = context.engines.plan.matrix[0].configuration

    async def compare(engine: CheckedEngine) -> str:
        cfg = engine.planned.configuration
        if (cfg.weights, cfg.kv) == (first.weights, first.kv):
            outputs[engine.label] = await engine.run(_sequence(_PROMPTS[0], _TOKENS))
        return ""

    problems = await context.engines.on_all(compare)
    if problems:
        return failed("; ".join(problems))
    if len(outputs) < 2:
        return skipped("there are no two splits to compare")
    if len(set(outputs.values())) > 1:
        return failed("; ".join(f"{label}: {tokens[0]}" for label, tokens in outputs.items()))
    return passed(f"equal on {', '.join(outputs)}")


async def _layers(context: CheckContext) -> Outcome:
    async def problem(engine: CheckedEngine) -> str:
        cfg, shards = engine.planned.configuration, engine.facts.shards
        planned = [layers for layers in engine.launch_spec.spec.layer_split for _ in range(cfg.tp)]
        held = [shard.layers for shard in shards]
        return f"ranks hold {held} layers, not {planned}" if shards and held != planned else ""

    return await _of_shards(context, await context.engines.on_all(problem), "as planned")


async def _parameter_bytes(context: CheckContext) -> Outcome:
    async def problem(engine: CheckedEngine) -> str:
        for rank, shard in enumerate(engine.facts.shards):
            element_bytes = _ELEMENT_BYTES.get(shard.dtype)
            if element_bytes is None or (context.engines.plan.device is Device.CUDA and element_bytes != 2):
                return f"rank {rank} computes with {shard.dtype}"
            least, most = engine.planned.parameter_bytes(rank, element_bytes=element_bytes)
            if not least <= shard.weights_bytes <= most:
                return f"rank {rank} holds {shard.weights_bytes:,} bytes, expected are {least:,} to {most:,}"
        return ""

    return await _of_shards(context, await context.engines.on_all(problem), "within the bounds of each format")


async def _of_shards(context: CheckContext, problems: list[str], good: str) -> Outcome:
    if not problems and not any(engine.facts.shards for engine in context.engines.matrix_up()):
        return skipped("its engines do not report what their ranks hold")
    return _summary(context, problems, good)


async def _stop_token(context: CheckContext) -> Outcome:
    async def problem(engine: CheckedEngine) -> str:
        (free,) = await engine.run(_sequence(_PROMPTS[0], _TOKENS))
        stop = free[len(free) // 2]
        expected = (*takewhile(lambda token: token != stop, free), stop)
        (stopped,) = await engine.run(_sequence(_PROMPTS[0], _TOKENS, stop=(stop,)))
        return "" if stopped == expected else f"stop token {stop} gives {stopped}, not {expected}"

    return _summary(context, await context.engines.on_all(problem), "sequences end with it")


async def _full_length(context: CheckContext) -> Outcome:
    context_tokens = context.engines.plan.matrix[0].model.context_tokens or 0
    prompt = tuple(3 + position % 500 for position in range(context_tokens - _TOKENS))

    async def problem(engine: CheckedEngine) -> str:
        (tokens,) = await engine.run(_sequence(prompt, _TOKENS))
        return "" if len(tokens) == _TOKENS else f"it ended after {len(tokens)} of {_TOKENS} tokens"

    return _summary(context, await context.engines.on_all(problem), f"{context_tokens} tokens in all")


# What ends engines


async def _abort(context: CheckContext) -> Outcome:
    engine = context.smallest_up()
    if engine is None:
        return skipped("no engine serves")
    await engine.processes()
    output_tokens = (engine.planned.model.context_tokens or 0) - len(_PROMPTS[0])
    await engine.run_until_first_step(_sequence(_PROMPTS[0], output_tokens))
    started_s = asyncio.get_running_loop().time()
    await engine.stop()
    code = await engine.exit_code()
    took_s = asyncio.get_running_loop().time() - started_s
    if code != STOPPED:
        ended = "nothing" if code is None else describe_exit(code)
        return failed(f"{engine.label} did not exit by itself; it ended with {ended} after {took_s:.1f} s")
    return passed(f"{engine.label} exited {took_s:.1f} s after the request to stop")


async def _killed_worker(context: CheckContext) -> Outcome:
    engine = context.smallest_up(ranks=2)
    if engine is None or not can_look():
        return skipped("no engine of several ranks serves" if engine is None else "this machine has no /proc")
    others = [process for process in await engine.processes() if process.pid != engine.leader_pid]
    if not others:
        return failed(f"{engine.label} has no process beside its leader")
    worker = max(others, key=resident_bytes)
    started_s = asyncio.get_running_loop().time()
    with suppress(ProcessLookupError):
        os.kill(worker.pid, signal.SIGKILL)
    reason = await engine.wait_down()
    return passed(f"{describe(worker)} noticed after {asyncio.get_running_loop().time() - started_s:.1f} s: {reason}")


async def _killed_group(context: CheckContext) -> Outcome:
    engine = context.largest_up()
    if engine is None or not can_look():
        return skipped("no engine serves" if engine is None else "this machine has no /proc")
    processes = await engine.processes()
    await engine.kill()
    left = await _wait_gone(processes)
    if left:
        return failed(f"still running: {', '.join(map(describe, left))}")
    return passed(f"all {len(processes)} processes of {engine.label} ended")


async def _wait_gone(processes: list[ProcessStat], polls: int = 20) -> list[ProcessStat]:
    """Wait a little for processes to end, and return those that have not."""
    left = processes
    for _ in range(polls):
        left = await asyncio.to_thread(still_running, left)
        if not left:
            break
        await asyncio.sleep(_POLL_S)
    return left


async def _memory_returned(context: CheckContext) -> Outcome:
    await context.engines.close()
    shared = {path for engine in context.engines.by_label.values() for path in engine.shared_memory}
    if left := sorted(path for path in shared if Path(path).exists()):
        return failed(f"left in shared memory: {', '.join(left)}")
    if context.meter is None:
        return passed(f"{len(shared)} files of shared memory are gone") if shared else skipped("there is no GPU")
    for attempt in count(1):
        more = await _more_in_use(context, context.meter)
        if not more:
            break
        if attempt * _POLL_S > _FREED_LIMIT_S:
            return failed(f"more in use than before: {', '.join(more)}")
        await asyncio.sleep(_POLL_S)
    return passed(f"as before on {len(context.gpu_ids)} GPUs")


async def _more_in_use(context: CheckContext, meter: GpuMeter) -> list[str]:
    """Return the GPUs that have more memory in use than before the checks, and how much more."""
    readings = await asyncio.to_thread(meter.read)
    grown = {gpu_id: readings[gpu_id].used_bytes - context.used_before[gpu_id] for gpu_id in context.gpu_ids}
    return [f"GPU {gpu_id} {gib(more):.2f} GiB" for gpu_id, more in grown.items() if more > _FREED_TOLERANCE_BYTES]
