"""Measures the engines of a study on this machine: the one place that starts engines for it."""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from maveriq.domain.cluster import Cluster, Gpu
from maveriq.domain.models import ModelSpec
from maveriq.exec.capabilities import why_not
from maveriq.exec.device import Device
from maveriq.exec.launcher import ProcessLauncher
from maveriq.exec.local_machine import LocalMachine
from maveriq.exec.model_files import ModelFiles
from maveriq.profiling.machine import machine_record
from maveriq.profiling.measure import Measured, MeasurementCase, Probe, measure
from maveriq.profiling.short_models import ShortModels
from maveriq.study.grid import EngineKey, Point
from maveriq.study.masks import pruning_method
from maveriq.study.measurement_log import MeasuredPoint, MeasurementLog, Subject
from maveriq.units import bytes_from_gib

Report: TypeAlias = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What a study measures with.

    Args:
        local: this machine and its engine.
        model: the whole model.
        config_path: its `config.json`, with its weights beside it if there are any.
        scratch: an existing folder for models that are made on the way.
        repeats: of each measurement, after a warm-up.
        report: receives a line on each engine.
    """

    local: LocalMachine
    model: ModelSpec
    config_path: Path
    scratch: Path
    repeats: int
    report: Report
    _made: dict[tuple[int, str], tuple[ModelSpec, ModelFiles]] = field(default_factory=dict, init=False)

    def subject(self, study: str) -> Subject:
        """Return what a study measures here."""
        machine = machine_record(self.local, kind=None, memory_gib=None)
        config = self.config_path.read_bytes()
        return Subject(
            study=study,
            model=self.model.name,
            config_digest=hashlib.sha256(config).hexdigest()[:16],
            backend=self.local.backend,
            machine=f"{machine.device}, {machine.cores} cores" if self.local.meter is None else machine.device,
            repeats=self.repeats,
        )

    def why_not(self, engine: EngineKey) -> str | None:
        """Return why an engine cannot run here, None if it can."""
        configuration = engine.configuration
        if self.local.meter is not None and configuration.gpus > len(self.local.meter.gpus):
            return f"needs {configuration.gpus} GPUs, this machine has {len(self.local.meter.gpus)}"
        device = Device.CUDA if self.local.meter else Device.CPU
        refusal = why_not(
            self.local.backend, self.model, configuration, device, compute_capability=self.local.compute_capability
        )
        return None if refusal is None else str(refusal)

    def measure_all(self, points: Iterable[Point], log: MeasurementLog) -> None:
        """Measure the points that a log lacks, engine by engine, each into the log at once.

        Raises:
            ProfilingError: an engine failed.
            MaveriqError: the log cannot be written.
        """
        engines: dict[EngineKey, list[Point]] = {}
        for point in points:
            if point not in log.points:
                engines.setdefault(point.engine, []).append(point)
        if engines:
            asyncio.run(self._measure_engines(engines, log))

    async def _measure_engines(self, engines: dict[EngineKey, list[Point]], log: MeasurementLog) -> None:
        devices = self.local.devices(self._cluster(max(engine.configuration.gpus for engine in engines)))
        with (
            tempfile.TemporaryDirectory(prefix="maveriq-study-") as logs,
            ProcessLauncher(
                self.local.backend, logs=Path(logs), devices=devices, python=self.local.python_path
            ) as launcher,
        ):
            for number, (engine, points) in enumerate(engines.items(), 1):
                configuration = engine.configuration
                pruned = f", {engine.pruning}" if engine.pruning else ""
                layers = "1 layer" if engine.layers == 1 else f"{engine.layers} layers"
                what = f"{configuration.describe(engine.layers)}, {layers}{pruned}"
                self.report(f"{number} of {len(engines)}: {what}")
                started_s = time.monotonic()
                model, files = self._model(engine)
                built_s = time.monotonic()
                found = await measure(
                    launcher,
                    model,
                    configuration,
                    [_case(point) for point in points],
                    devices=devices,
                    probe=Probe(files=files, repeats=self.repeats),
                )
                run_s = time.monotonic() - built_s - found[0].start_s
                log.add(_measured(points, found, model_build_s=built_s - started_s, run_s=run_s))

    def _model(self, engine: EngineKey) -> tuple[ModelSpec, ModelFiles]:
        """Return the model that an engine runs, with its files; a pruned one is written."""
        key = engine.layers, engine.pruning
        if key not in self._made:
            path = self._pruned(engine) if engine.pruning else self.config_path
            short = ShortModels({self.model: path}, self.local.backend, self.scratch)
            self._made[key] = short.make(self.model, tuple(range(engine.layers)))
        return self._made[key]

    def _pruned(self, engine: EngineKey) -> Path:
        """Write the model with pruned weights, random ones if it has none; return its `config.json`."""
        from maveriq.profiling.fingerprint import write_fingerprint
        from maveriq.study.pruned_model import input_norms_of, needs_norms, write_pruned

        source = self.config_path.parent
        if not ModelFiles(lambda _: self.config_path).weights_folder(self.model):
            source = self.scratch / "whole"
            if not source.exists():
                write_fingerprint(self.config_path, layers=self.model.layers, out=source)
        method, out = pruning_method(engine.pruning), self.scratch / engine.pruning.replace(":", "of")
        norms = input_norms_of(source) if needs_norms(method) else None
        pruned = write_pruned(source, method, out, input_norms=norms)
        self.report(f"  {pruned.matrices} matrices, {100 * pruned.sparsity:.1f} % of their weights are zero")
        return out / "config.json"

    def _cluster(self, gpus: int) -> Cluster:
        machine = machine_record(self.local, kind=None, memory_gib=None)
        capacity = bytes_from_gib(machine.memory_gib)
        return Cluster(
            name="measured",
            gpus=tuple(Gpu(gpu_id=i, node=0, kind=machine.kind, capacity_bytes=capacity) for i in range(gpus)),
        )


def _case(point: Point) -> MeasurementCase:
    return MeasurementCase(
        batch=point.engine.batch, prompt_tokens=point.prompt_tokens, output_tokens=point.output_tokens
    )


def _measured(
    points: Sequence[Point], found: Sequence[Measured], *, model_build_s: float, run_s: float
) -> list[MeasuredPoint]:
    return [
        MeasuredPoint(
            point=point,
            first_s=measured.ttft_s + measured.tpot_s,
            each_s=measured.tpot_s,
            memory_gib=measured.memory_gib,
            model_build_s=round(model_build_s, 4),
            engine_build_s=round(measured.start_s, 4),
            run_s=round(max(0.0, run_s) / len(points), 4),
        )
        for point, measured in zip(points, found, strict=True)
    ]
