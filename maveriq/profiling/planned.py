"""Planned profiles of models on this machine: what is wanted by default, the plan, and its measurement."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from maveriq import __version__
from maveriq.domain.cluster import Cluster, Gpu
from maveriq.domain.models import KvType, ModelSpec, WeightType
from maveriq.domain.parallel import ParallelConfig
from maveriq.errors import InputError, MaveriqError
from maveriq.estimate.computed_parts import ComputedParts
from maveriq.estimate.physics import PhysicsEstimator
from maveriq.estimate.profile_file import (
    FORMAT,
    VERSION,
    EngineRecord,
    MachineRecord,
    ModelRecord,
    ProfileFile,
    planning_profile,
)
from maveriq.exec.capabilities import why_not
from maveriq.exec.device import Device
from maveriq.exec.engines.continuous import CONTINUOUS_BACKENDS
from maveriq.exec.gpus import Devices
from maveriq.exec.launcher import ProcessLauncher
from maveriq.exec.local_machine import EMULATED, LocalMachine
from maveriq.exec.model_files import ModelFiles
from maveriq.profiling.execute import Bench, Emulate, Repeats, Report, execute, run_records
from maveriq.profiling.machine import machine_record, measured_sheet, real_time
from maveriq.profiling.measure import Probe
from maveriq.profiling.memory_meter import GpuMemory, MemoryMeter, NoMemory, ProcessMemory
from maveriq.profiling.plan import CPU_NOISE, NOISE, USUAL_REPEATS, Layers, ProfilePlan, Wanted, plan_profile
from maveriq.profiling.session import open_session, session_start
from maveriq.profiling.short_models import ShortModels, check_complete
from maveriq.units import Bytes, bytes_from_gib, gib

_PROMPTS = {Device.CPU: (16, 64, 256), Device.CUDA: (128, 512, 2048, 4096)}
_BATCHES = {Device.CPU: (1, 4, 16), Device.CUDA: (1, 4, 16, 64)}
_MAX_STEP_TOKENS = {Device.CPU: 4096, Device.CUDA: 65_536}
SCRATCH_PREFIX = ".short-models-"
"""How names of folders begin that hold short models while they are measured."""

_SIDE_BY_SIDE = 4  # engines of short models on a CPU
_LEAST_DISK_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileOptions:
    """What the user asks of a planned profile; None for the default of the device.

    Args:
        prompt_tokens: lengths of prompts.
        batch_sizes: sizes of batches.
        output_tokens: tokens of each output.
        formats: of weights and KV cache.
        max_gpus: most GPUs of a deployment.
        layers: numbers of layers to measure with.
        budget_s: most seconds that the plan may take.
        least_repeats: of each batch.
        most_repeats: of each batch.
        kind: name of the kind of GPU.
        memory_gib: memory of one.
        seed: of prompts and random weights.
        real_time: whether engines have the cores before all other processes; not beside engines that serve.
    """

    prompt_tokens: Sequence[int] | None = None
    batch_sizes: Sequence[int] | None = None
    output_tokens: int = 20
    formats: Sequence[tuple[WeightType, KvType]] | None = None
    max_gpus: int | None = None
    layers: Sequence[int] | None = None
    budget_s: float | None = None
    least_repeats: int = 3
    most_repeats: int = 15
    kind: str | None = None
    memory_gib: float | None = None
    seed: int = 42
    real_time: bool = False


@dataclass(frozen=True, slots=True)
class PlannedProfile:
    """A profile of some models on this machine: its plan, and how it is measured.

    Args:
        models: by name, with the path of the `config.json` of those that have files.
        local: the engine, and what it runs on.
        options: what the user asks.
        known_machine: what is known of the machine already; None to look at it.
    """

    models: Mapping[str, tuple[ModelSpec, Path | None]]
    local: LocalMachine
    options: ProfileOptions
    known_machine: MachineRecord | None = None
    machine: MachineRecord = field(init=False)

    def __post_init__(self) -> None:
        options = self.options
        record = self.known_machine or machine_record(self.local, kind=options.kind, memory_gib=options.memory_gib)
        object.__setattr__(self, "machine", record)
        for model, path in self.models.values():
            if path is not None:
                check_complete(model, path)

    @property
    def config_paths(self) -> dict[ModelSpec, Path]:
        """The path of the `config.json` of each model that has files."""
        return {model: path for model, path in self.models.values() if path is not None}

    @property
    def device(self) -> Device:
        """What engines compute on."""
        return Device.CUDA if self.local.meter else Device.CPU

    def parts(self) -> ComputedParts:
        """Return the physics estimates that the plan goes by."""
        backend = self.local.backend
        return ComputedParts(PhysicsEstimator(planning_profile(self.machine, "" if backend == EMULATED else backend)))

    @property
    def side_by_side(self) -> int:
        """How many engines usually run at once and take turns."""
        return _SIDE_BY_SIDE if self.local.meter is None else 1

    def plan(self) -> ProfilePlan:
        """Return what to measure of all models.

        Raises:
            InputError: nothing can be measured.
        """
        parts = self.parts()
        budget_s = None if self.options.budget_s is None else self.options.budget_s / len(self.models)
        plans = [plan_profile(self.wanted(model, parts), parts, budget_s=budget_s) for model, _ in self.models.values()]
        if len(plans) == 1:
            return plans[0]
        return ProfilePlan(
            runs=tuple(run for plan in plans for run in plan.runs),
            error_before=max(plan.error_before for plan in plans),
            error_after=max(plan.error_after for plan in plans),
            estimates=sum(plan.estimates for plan in plans),
            ends="; ".join(dict.fromkeys(plan.ends for plan in plans)),
        )

    def wanted(self, model: ModelSpec, parts: ComputedParts) -> Wanted:
        """Return what estimates are wanted of a model.

        Raises:
            InputError: the engine cannot run it at all.
        """
        options, device = self.options, self.device
        is_noisy = device is Device.CPU and self.local.backend != EMULATED

        def can_run(configuration: ParallelConfig) -> bool:
            if parts.estimator.why_not(model, configuration) is not None:
                return False
            if self.local.backend == EMULATED:
                return True
            refusal = why_not(
                self.local.backend, model, configuration, device, compute_capability=self.local.compute_capability
            )
            return refusal is None

        def fits(layers: Layers) -> bool:
            each = [ParallelConfig(tp=1, pp=1, weights=weights, kv=kv) for weights, kv in formats]
            needed = [
                parts.run_memory(model, layers, configuration) for configuration in each if can_run(configuration)
            ]
            return max(needed, default=0.0) <= bytes_from_gib(self.machine.memory_gib)

        formats = options.formats or [(model.unconverted, KvType.NATIVE)]
        gpus = len(self.local.meter.gpus) if self.local.meter else 1
        plain = ParallelConfig(tp=1, pp=1, weights=model.unconverted)
        if not can_run(plain):
            reason = parts.estimator.why_not(model, plain) or why_not(self.local.backend, model, plain, device)
            raise InputError(f"{model.name} cannot be measured: {reason}")
        for weights, kv in formats:
            asked = replace(plain, weights=weights, kv=kv)
            if (options.max_gpus or gpus) == 1 and not can_run(asked):
                reason = why_not(self.local.backend, model, asked, device) or parts.estimator.why_not(model, asked)
                raise InputError(f"{model.name} cannot be measured in every format of --formats: {reason}")
        return Wanted(
            model=model,
            backend=self.local.backend,
            max_gpus=options.max_gpus or gpus,
            formats=formats,
            batch_sizes=options.batch_sizes or _BATCHES[device],
            prompt_tokens=options.prompt_tokens or _PROMPTS[device],
            output_tokens=options.output_tokens,
            layers=options.layers,
            max_step_tokens=_MAX_STEP_TOKENS[device],
            can_run=can_run,
            fits=fits,
            noise=CPU_NOISE if is_noisy else NOISE,
            # On a CPU medians hardly become as sure as is asked for, so that each batch is repeated to the end.
            repeats=options.most_repeats if is_noisy else min(USUAL_REPEATS, options.most_repeats),
            starting=min(os.cpu_count() or 1, self.side_by_side),
        )

    def records(self) -> tuple[ModelRecord, ...]:
        """Return the models as the profile keeps them."""
        files = ModelFiles(self.config_paths.get)
        return tuple(
            ModelRecord(name=name, config_json=model.config_json, own_weights=bool(files.weights_folder(model)))
            for name, (model, _) in self.models.items()
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a profile is measured beside a service.

    Args:
        devices: of the GPUs to measure on.
        machine_gpus: their numbers on this machine.
        emulate: says how long emulated engines take; None for engines that compute.
    """

    devices: Devices
    machine_gpus: tuple[int, ...]
    emulate: Emulate | None = None


def measure_plan(
    profile: PlannedProfile,
    plan: ProfilePlan,
    folder: Path,
    report: Report,
    *,
    side_by_side: int | None = None,
    place: Place | None = None,
) -> ProfileFile:
    """Measure what is missing of a plan, with the log in a folder, and return the whole profile.

    Args:
        profile: the models, the machine and the options.
        plan: what to measure.
        folder: where the log is.
        report: takes lines about progress.
        side_by_side: engines that run at once and take turns; None for the device's usual number.
        place: where, beside a service; None for the first GPUs of this machine, where nothing else runs.

    Raises:
        InputError: the folder holds the log of other options.
        MaveriqError: an engine failed, or memory or disk are short.
    """
    _check_room(profile, plan, folder)
    local, options = profile.local, profile.options
    machine = profile.machine
    if machine.sheet is not None and profile.known_machine is None:
        machine = msgspec.structs.replace(machine, sheet=measured_sheet(machine.cores, machine.memory_gib))
    start = session_start(
        options=options_text(profile),
        made_at=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=machine,
        engine=EngineRecord(name=local.backend),
        models=profile.records(),
        plan=plan,
    )
    devices = (
        local.devices(_cluster(profile.machine, max(run.configuration.gpus for run in plan.runs)))
        if place is None
        else place.devices
    )
    with (
        open_session(folder, start) as session,
        tempfile.TemporaryDirectory(prefix="maveriq-profile-") as logs,
        tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX, dir=folder) as scratch,
        real_time() if options.real_time else contextlib.nullcontext(),
        ProcessLauncher(local.backend, logs=Path(logs), devices=devices, python=local.python_path) as launcher,
    ):
        for left in folder.glob(f"{SCRATCH_PREFIX}*"):  # of a process that was killed
            if left != Path(scratch):
                shutil.rmtree(left, ignore_errors=True)
        if session.resumed:
            report("going on with what was measured before")
        bench = Bench(
            launcher=launcher,
            devices=devices,
            probe=Probe(seed=options.seed),
            short_models=ShortModels(profile.config_paths, local.backend, Path(scratch)),
            memory=_memory_meter(local, () if place is None else place.machine_gpus),
            repeats=Repeats(least=options.least_repeats, most=max(options.least_repeats, options.most_repeats)),
            side_by_side=side_by_side or profile.side_by_side,
            by_steps=local.backend in CONTINUOUS_BACKENDS and local.backend != EMULATED,
            emulate=None if place is None else place.emulate,
        )
        models = {name: model for name, (model, _) in profile.models.items()}
        asyncio.run(execute(session, models, bench, report))
        begun = session.start
        return ProfileFile(
            format=FORMAT,
            version=VERSION,
            name=folder.resolve().name,
            made_at=begun.made_at,
            made_by=__version__,
            machine=begun.machine,
            engine=msgspec.structs.replace(begun.engine, version=next(iter(session.engines.values())).version),
            models=begun.models,
            runs=run_records(session),
        )


def _memory_meter(local: LocalMachine, machine_gpus: Sequence[int]) -> MemoryMeter:
    if local.backend == EMULATED:
        return NoMemory()
    return GpuMemory(local.meter, machine_gpus) if local.meter else ProcessMemory()


def plan_bytes(profile: PlannedProfile, plan: ProfilePlan) -> Bytes:
    """Return about the most that a plan's engines hold of one GPU, with those that run side by side."""
    parts, held = profile.parts(), 0
    each = [
        parts.run_memory(profile.models[run.model][0], run.layers, run.configuration) / run.configuration.gpus
        for run in plan.runs
    ]
    for first in range(0, len(each), profile.side_by_side):
        held = max(held, math.ceil(sum(each[first : first + profile.side_by_side])))
    return held


def options_text(profile: PlannedProfile) -> str:
    """Return what the choice of measurements depends on, as one text."""
    options = replace(profile.options, kind=None, real_time=False)
    models = [msgspec.to_builtins(record) for record in profile.records()]
    machine = {"kind": profile.machine.kind, "device": profile.machine.device, "gib": profile.machine.memory_gib}
    given = {name: repr(getattr(options, name)) for name in options.__dataclass_fields__}
    return json.dumps({"backend": profile.local.backend, "models": models, "machine": machine, **given}, sort_keys=True)


def _cluster(machine: MachineRecord, gpus: int) -> Cluster:
    capacity = bytes_from_gib(machine.memory_gib)
    return Cluster(
        name="measured",
        gpus=tuple(Gpu(gpu_id=i, node=0, kind=machine.kind, capacity_bytes=capacity) for i in range(gpus)),
    )


def _check_room(profile: PlannedProfile, plan: ProfilePlan, folder: Path) -> None:
    """Check that the largest engine fits the memory, and the log the disk.

    Raises:
        MaveriqError: one is too small.
    """
    parent = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(parent).free
    if free < _LEAST_DISK_BYTES:
        raise MaveriqError(
            f"disk of {str(folder)!r}: {free >> 20} MiB are free, and the log of a profile takes up to "
            f"{_LEAST_DISK_BYTES >> 20} MiB; name another folder"
        )
    parts = profile.parts()
    for run in plan.runs:
        needed = gib(
            round(
                parts.run_memory(profile.models[run.model][0], run.layers, run.configuration) / run.configuration.gpus
            )
        )
        if needed > profile.machine.memory_gib:
            raise MaveriqError(
                f"{run.model} with {len(run.layers)} layers, {run.configuration}, takes about {needed:.1f} GiB on each "
                f"GPU, which has {profile.machine.memory_gib:g} GiB; leave the format out, or on a CPU raise "
                "--memory-gib"
            )
