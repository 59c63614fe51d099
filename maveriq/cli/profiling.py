"""The work behind `maveriq profile`."""

from __future__ import annotations

import asyncio
import contextlib
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from maveriq.cli.engine_site import EMULATED, Site
from maveriq.domain.cluster import Cluster, Gpu
from maveriq.domain.models import KvType, ModelSpec, WeightType, load_model
from maveriq.domain.parallel import ParallelConfig
from maveriq.errors import InputError
from maveriq.exec.capabilities import Device, why_not
from maveriq.exec.launcher import ProcessLauncher
from maveriq.profiling.folder import PROFILE_FILES, Machine, write_profile
from maveriq.profiling.measure import Measured, MeasurementCase, Probe, measure
from maveriq.report.run_folder import check_writable
from maveriq.units import bytes_from_gib, gib

_CONFIGURATION = re.compile(r"(?:(?P<model>.+)=)?(?P<tp>\d{1,3})x(?P<pp>\d{1,3})(?::(?P<weights>\w+))?(?P<kv>\+kv8)?")
_CPU_GIB = 4.0
_LONGEST_PROMPT, _LARGEST_BATCH = 100_000, 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a user wants measured; fields as the options of `maveriq profile`."""

    models: tuple[str, ...]
    configurations: tuple[str, ...]
    backend: str
    prompt_tokens: str
    output_tokens: int
    batch_sizes: str
    repeats: int
    memory_gib: float | None
    kind: str | None

    def __post_init__(self) -> None:
        if self.backend == EMULATED:
            raise InputError("an emulated engine takes the time it is told; there is nothing to measure")
        if self.memory_gib is not None and not 0 < self.memory_gib < 1e6:
            raise InputError(f"--memory-gib must be a positive number, not {self.memory_gib}")

    def questions(self) -> list[MeasurementCase]:
        """Return every batch with every prompt."""
        batches = _counts("--batch-size", self.batch_sizes, _LARGEST_BATCH)
        prompts = _counts("--prompt-tokens", self.prompt_tokens, _LONGEST_PROMPT)
        return [
            MeasurementCase(batch=batch, prompt_tokens=tokens, output_tokens=self.output_tokens)
            for batch, tokens in product(batches, prompts)
        ]

    def engines(self) -> list[tuple[ModelSpec, ParallelConfig]]:
        """Return which model is to be measured under which configuration."""
        models = {model.name: model for model in map(load_model, self.models)}
        found: dict[tuple[str, ParallelConfig], ModelSpec] = {}
        for text in self.configurations:
            name, configuration = _configuration(text)
            if name is not None and name not in models:
                raise InputError(f"--configuration {text!r}: {name!r} is not among the models ({', '.join(models)})")
            for model in models.values() if name is None else [models[name]]:
                found[model.name, configuration] = model
        return [(model, configuration) for (_, configuration), model in found.items()]


def measure_and_write(wanted: Wanted, out: Path) -> None:
    """Measure, write the profile, say what was found.

    Raises:
        InputError: bad input, or what this machine or backend cannot do.
        ProfilingError: an engine failed.
    """
    check_writable(out, files=PROFILE_FILES)
    engines, questions = wanted.engines(), wanted.questions()
    with contextlib.closing(Site(wanted.backend)) as site:
        for model, configuration in engines:
            _refuse(wanted.backend, model, configuration, Device.CUDA if site.meter else Device.CPU)
        machine = _machine(wanted, site)
        cluster = _cluster(machine, max(configuration.gpus for _, configuration in engines))
        measured = asyncio.run(_measure_all(wanted, site, cluster, engines, questions))
    write_profile(out, machine, measured)
    profile = out / "profile.toml"
    Console().print(
        f"profile: {profile}\nuse it: --profile {profile} --estimator measured --service-times measured",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip


async def _measure_all(
    wanted: Wanted,
    site: Site,
    cluster: Cluster,
    engines: Sequence[tuple[ModelSpec, ParallelConfig]],
    questions: Sequence[MeasurementCase],
) -> list[Measured]:
    console, devices = Console(stderr=True), site.devices(cluster)
    probe = Probe(repeats=wanted.repeats)
    found: list[Measured] = []
    with (
        tempfile.TemporaryDirectory(prefix="maveriq-profile-") as logs,
        ProcessLauncher(wanted.backend, logs=Path(logs), devices=devices) as launcher,
    ):
        for number, (model, configuration) in enumerate(engines, 1):
            console.print(f"{number} of {len(engines)}: {escape(model.name)} with {configuration}", highlight=False)
            new = await measure(launcher, model, configuration, questions, devices=devices, probe=probe)
            console.print("\n".join(_lines(new)), highlight=False)
            found += new
    return found


def _lines(measured: Sequence[Measured]) -> Iterator[str]:
    for one in measured:
        yield (
            f"  batch {one.question.batch}, prompts of {one.question.prompt_tokens}: first token after "
            f"{1e3 * (one.ttft_s + one.tpot_s):.1f} ms, then {1e3 * one.tpot_s:.2f} ms each"
        )


def _refuse(backend: str, model: ModelSpec, configuration: ParallelConfig, device: Device) -> None:
    if configuration.pp > model.layers:
        raise InputError(f"{model.name} has {model.layers} layers, too few for {configuration.pp} stages")
    refusal = why_not(backend, model, configuration, device)
    if refusal is not None:
        raise InputError(str(refusal))


def _machine(wanted: Wanted, site: Site) -> Machine:
    if site.meter is None:
        return Machine(kind=wanted.kind or "cpu", memory_gib=wanted.memory_gib or _CPU_GIB, idle_gib=0.0)
    gpu = site.meter.gpus[0]
    idle_gib = round(gib(site.meter.read()[0].used_bytes), 3)
    return Machine(
        kind=wanted.kind or gpu.name.removeprefix("NVIDIA ").replace(" ", "-"),
        memory_gib=wanted.memory_gib or round(gib(gpu.memory_bytes), 3),
        idle_gib=0.0 if wanted.memory_gib else idle_gib,
    )


def _cluster(machine: Machine, gpus: int) -> Cluster:
    capacity = bytes_from_gib(machine.memory_gib)
    return Cluster(
        name="measured",
        gpus=tuple(Gpu(gpu_id=i, node=0, kind=machine.kind, capacity_bytes=capacity) for i in range(gpus)),
    )


def _counts(option: str, text: str, maximum: int) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and 1 <= int(word) <= maximum for word in words):
        raise InputError(f"{option} must be whole numbers from 1 to {maximum:,} with commas between, not {text!r}")
    return sorted({int(word) for word in words})


def _configuration(text: str) -> tuple[str | None, ParallelConfig]:
    match = _CONFIGURATION.fullmatch(text)
    if match is None:
        raise InputError(f"--configuration {text!r} is none; write TPxPP, as 2x1, 1x3:int8 or NAME=4x1:int8+kv8")
    weights = match["weights"] or WeightType.FLOAT16.value
    if weights not in list(WeightType):
        raise InputError(f"--configuration {text!r}: weights must be one of {', '.join(WeightType)}, not {weights!r}")
    configuration = ParallelConfig(
        tp=int(match["tp"]),
        pp=int(match["pp"]),
        weights=WeightType(weights),
        kv=KvType.INT8 if match["kv"] else KvType.NATIVE,
    )
    return match["model"], configuration
