"""`maveriq profile`: measures models on the engines of this machine and writes a hardware profile."""

from __future__ import annotations

import asyncio
import contextlib
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from maveriq.cli.options import JsonFlag, OverwriteFlag
from maveriq.cli.profile_plan import Target, check_profile_folder, profile_by_plan
from maveriq.domain.cluster import Cluster, Gpu
from maveriq.domain.models import KvType, ModelSpec, WeightType, config_path, load_model
from maveriq.domain.parallel import ParallelConfig, format_of
from maveriq.errors import InputError
from maveriq.exec.capabilities import why_not
from maveriq.exec.device import Device
from maveriq.exec.launcher import ProcessLauncher
from maveriq.exec.local_machine import EMULATED, LocalMachine
from maveriq.exec.model_files import ModelFiles
from maveriq.profiling.folder import PROFILE_FILES, Machine, write_profile
from maveriq.profiling.measure import Measured, MeasurementCase, Probe, measure
from maveriq.profiling.planned import PlannedProfile, ProfileOptions
from maveriq.report.run_folder import check_writable
from maveriq.report.terminal import open_console
from maveriq.units import bytes_from_gib, gib

_CONFIGURATION = re.compile(r"(?:(?P<model>.+)=)?(?P<tp>\d{1,3})x(?P<pp>\d{1,3})(?::(?P<weights>\w+))?(?P<kv>\+kv8)?")
_CPU_MEMORY_GIB = 4.0
_MAX_PROMPT_TOKENS, _MAX_BATCH, _MAX_LAYERS = 100_000, 1_000, 10_000
_REPEATS, _LEAST_REPEATS = 5, 3


def profile(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Names, or paths of config.json.")],
    *,
    out: Annotated[Path | None, typer.Option(help="Folder for the profile.")] = None,
    configuration: Annotated[
        list[str] | None,
        typer.Option(
            "--configuration",
            "-c",
            metavar="[MODEL=]TPxPP[:WEIGHTS][+kv8]",
            help="What to measure, such as 2x1, 1x3:int8+kv8, or MODEL=4x1; repeatable.",
            show_default="planned",
        ),
    ] = None,
    backend: Annotated[str, typer.Option(metavar="torch|vllm|trtllm", help="The engine.")] = "torch",
    prompt_tokens: Annotated[
        str | None, typer.Option(help="Lengths of prompts, separated by commas.", show_default="by the device")
    ] = None,
    output_tokens: Annotated[int, typer.Option(min=2, max=100_000, help="Tokens to generate.")] = 20,
    batch_size: Annotated[
        str | None, typer.Option(help="Batch sizes, separated by commas.", show_default="by the device; with -c 1")
    ] = None,
    repeats: Annotated[
        int | None,
        typer.Option(min=1, max=1000, help="Repetitions of each measurement, at least.", show_default="3; with -c 5"),
    ] = None,
    most_repeats: Annotated[
        int, typer.Option(min=1, max=1000, help="Repetitions at most, until the medians are sure to 1 %.")
    ] = 15,
    formats: Annotated[
        str | None,
        typer.Option(
            metavar="WEIGHTS[+kv8],...", help="Formats that estimates are wanted for.", show_default="the model's"
        ),
    ] = None,
    max_gpus: Annotated[
        int | None,
        typer.Option(min=1, max=1024, help="Most GPUs of a deployment.", show_default="the machine's, or 1"),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Layers of the models that are measured, separated by commas.",
            show_default="planned: of 1, 2, 4 and 8",
        ),
    ] = None,
    budget_s: Annotated[
        float | None, typer.Option(min=1, max=1e6, help="Most seconds that the plan may take.", show_default="none")
    ] = None,
    real_time: Annotated[
        bool, typer.Option("--real-time", help="Run engines on a CPU before all other processes (root).")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan, and measure nothing.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of prompts and of random weights.")] = 42,
    memory_gib: Annotated[
        float | None,
        typer.Option(help="Memory of one GPU, or of one process on a CPU.", show_default="the GPU's, or 4"),
    ] = None,
    engine_python: Annotated[
        list[str] | None, typer.Option(metavar="ENGINE=PATH", help="The interpreter that runs the engine; repeatable.")
    ] = None,
    kind: Annotated[str | None, typer.Option(help="Name of the GPU kind.", show_default="the GPU's, or cpu")] = None,
    overwrite: OverwriteFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Measure models on this machine's engines.

    Plans the fewest measurements that estimates need, of a few layers of the
    model, shows the plan and measures it. An interrupted profile goes on
    when the same command runs again. maveriq plan, sim, run, serve and place
    take --profile FOLDER.

    With -c: measures whole models under the configurations that you choose,
    for --estimator measured.
    """
    if backend == EMULATED:
        raise InputError("an emulated engine takes the estimated time; there is nothing to measure")
    if memory_gib is not None and not 0 < memory_gib < 1e6:
        raise InputError(f"--memory-gib must be a positive number, not {memory_gib}")
    chosen = _models(models)
    if configuration is None:
        options = ProfileOptions(
            prompt_tokens=_counts_or_none("--prompt-tokens", prompt_tokens, _MAX_PROMPT_TOKENS),
            batch_sizes=_counts_or_none("--batch-size", batch_size, _MAX_BATCH),
            output_tokens=output_tokens,
            formats=None if formats is None else [format_of(text) for text in formats.split(",")],
            max_gpus=max_gpus,
            layers=_counts_or_none("--layers", layers, _MAX_LAYERS),
            budget_s=budget_s,
            least_repeats=repeats or _LEAST_REPEATS,
            most_repeats=most_repeats,
            kind=kind,
            memory_gib=memory_gib,
            seed=seed,
            real_time=real_time,
        )
        _plan(chosen, options, backend, engine_python or (), out, overwrite=overwrite, dry_run=dry_run, as_json=as_json)
        return
    if (formats, max_gpus, layers, budget_s) != (None, None, None, None) or real_time or dry_run or as_json:
        raise InputError(
            "these plan; leave them out with -c: --formats, --max-gpus, --layers, --budget-s, --real-time, --dry-run, "
            "--json"
        )
    if out is None:
        raise InputError("name a folder for the profile: --out FOLDER")
    check_writable(out, files=PROFILE_FILES, overwrite=overwrite)
    engines = _engines(chosen, configuration)
    files = ModelFiles({model: path for model, path in chosen.values() if path is not None}.get)
    cases = _cases(batch_size or "1", prompt_tokens or "16,64,256", output_tokens)
    with contextlib.closing(LocalMachine(backend, engine_python or ())) as local:
        for model, parallel_config in engines:
            _check_supported(local, model, parallel_config)
        machine = _machine(local, kind, memory_gib)
        job = _Job(
            local=local,
            machine=machine,
            engines=engines,
            cases=cases,
            probe=Probe(files=files, repeats=repeats or _REPEATS, seed=seed),
        )
        measured = asyncio.run(_measure_all(job))
    file = write_profile(out, machine, measured, overwrite=overwrite) / "profile.toml"
    open_console().print(
        f"profile: {file}\nuse it: --profile {file} --estimator measured --service-times measured",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _plan(
    models: Mapping[str, tuple[ModelSpec, Path | None]],
    options: ProfileOptions,
    backend: str,
    engine_python: Sequence[str],
    out: Path | None,
    *,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    if out is None and not dry_run:
        raise InputError("name a folder for the profile: --out FOLDER; or --dry-run shows the plan alone")
    target = None if out is None else Target(folder=out, overwrite=overwrite)
    if target is not None and not dry_run:
        check_profile_folder(target)
    with contextlib.closing(LocalMachine(backend, engine_python)) as local:
        profile_by_plan(PlannedProfile(models, local, options), target, dry_run=dry_run, as_json=as_json)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    local: LocalMachine
    machine: Machine
    engines: Sequence[tuple[ModelSpec, ParallelConfig]]
    cases: Sequence[MeasurementCase]
    probe: Probe


async def _measure_all(job: _Job) -> list[Measured]:
    """Measure one engine after the other, and report each on stderr.

    Raises:
        ProfilingError: an engine failed.
    """
    console = open_console(stderr=True)
    devices = job.local.devices(_cluster(job.machine, max(config.gpus for _, config in job.engines)))
    found: list[Measured] = []
    with (
        tempfile.TemporaryDirectory(prefix="maveriq-profile-") as logs,
        ProcessLauncher(job.local.backend, logs=Path(logs), devices=devices, python=job.local.python_path) as launcher,
    ):
        for number, (model, config) in enumerate(job.engines, 1):
            console.print(f"{number} of {len(job.engines)}: {escape(model.name)} with {config}", highlight=False)
            measured = await measure(launcher, model, config, job.cases, devices=devices, probe=job.probe)
            console.print("\n".join(_lines(measured)), highlight=False)
            found += measured
    return found


def _lines(measured: Sequence[Measured]) -> Iterator[str]:
    for measurement in measured:
        case = measurement.case
        yield (
            f"  batch {case.batch}, prompts of {case.prompt_tokens}: first token after "
            f"{1e3 * (measurement.ttft_s + measurement.tpot_s):.1f} ms, then {1e3 * measurement.tpot_s:.2f} ms each"
        )


def _cases(batch_sizes: str, prompt_tokens: str, output_tokens: int) -> list[MeasurementCase]:
    """Return every combination of a batch size and a prompt length."""
    batches = _counts("--batch-size", batch_sizes, _MAX_BATCH)
    prompts = _counts("--prompt-tokens", prompt_tokens, _MAX_PROMPT_TOKENS)
    return [
        MeasurementCase(batch=batch, prompt_tokens=tokens, output_tokens=output_tokens)
        for batch, tokens in product(batches, prompts)
    ]


def _counts_or_none(option: str, text: str | None, maximum: int) -> list[int] | None:
    return None if text is None else _counts(option, text, maximum)


def _counts(option: str, text: str, maximum: int) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and 1 <= int(part) <= maximum for part in parts):
        raise InputError(f"{option} must be whole numbers from 1 to {maximum:,} with commas between, not {text!r}")
    return sorted({int(part) for part in parts})


def _models(names: Sequence[str]) -> dict[str, tuple[ModelSpec, Path | None]]:
    """Return each model by its name, with the path of its configuration, None for a known model.

    Raises:
        InputError: a model cannot be read, or two models have one name.
    """
    found: dict[str, tuple[ModelSpec, Path | None]] = {}
    for name in names:
        model = load_model(name)
        entry = (model, config_path(Path(name)).resolve() if model.config_json else None)
        if found.setdefault(model.name, entry) != entry:
            raise InputError(f"two models are called {model.name}; set _name_or_path to tell them apart")
    return found


def _engines(
    models: Mapping[str, tuple[ModelSpec, Path | None]], configurations: Sequence[str]
) -> list[tuple[ModelSpec, ParallelConfig]]:
    """Return each model with each of its configurations."""
    found: dict[tuple[str, ParallelConfig], ModelSpec] = {}
    for text in configurations:
        name, configuration = _configuration(text)
        if name is not None and name not in models:
            raise InputError(f"--configuration {text!r}: {name!r} is not among the models ({', '.join(models)})")
        for model, _ in models.values() if name is None else [models[name]]:
            found[model.name, configuration] = model
    return [(model, configuration) for (_, configuration), model in found.items()]


def _configuration(text: str) -> tuple[str | None, ParallelConfig]:
    """Return the model, if the text names one, and the configuration."""
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


def _check_supported(local: LocalMachine, model: ModelSpec, configuration: ParallelConfig) -> None:
    if configuration.pp > model.layers:
        raise InputError(f"{model.name} has {model.layers} layers, too few for {configuration.pp} stages")
    device = Device.CUDA if local.meter else Device.CPU
    refusal = why_not(local.backend, model, configuration, device, compute_capability=local.compute_capability)
    if refusal is not None:
        raise InputError(str(refusal))


def _machine(local: LocalMachine, kind: str | None, memory_gib: float | None) -> Machine:
    """Return what the profile says about the GPU; on a CPU one process stands for one GPU."""
    if local.meter is None:
        return Machine(kind=kind or "cpu", memory_gib=memory_gib or _CPU_MEMORY_GIB, idle_gib=0.0)
    gpu = local.meter.gpus[0]
    idle_gib = round(gib(local.meter.read()[0].used_bytes), 3)
    return Machine(
        kind=kind or gpu.name.removeprefix("NVIDIA ").replace(" ", "-"),
        memory_gib=memory_gib or round(gib(gpu.memory_bytes), 3),
        idle_gib=0.0 if memory_gib else idle_gib,
    )


def _cluster(machine: Machine, gpus: int) -> Cluster:
    capacity = bytes_from_gib(machine.memory_gib)
    return Cluster(
        name="measured",
        gpus=tuple(Gpu(gpu_id=i, node=0, kind=machine.kind, capacity_bytes=capacity) for i in range(gpus)),
    )
