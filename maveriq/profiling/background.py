"""The process that measures a profile beside a service: `python -m maveriq.profiling.background`.

The service talks to it by lines of JSON (`maveriq.exec.profile_worker`). It is a process of its own, so that planning
takes no time from the service's event loop, and that a hostile or broken model ends nothing but its profile. It runs
at a lower priority, and its engines with it: where processor cores are short, requests go first.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import queue
import signal
import sys
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path

import msgspec

from maveriq.domain.models import ModelSpec, config_path, load_model
from maveriq.domain.parallel import DeploymentPlan, ParallelConfig
from maveriq.domain.requests import Request
from maveriq.errors import InputError, MaveriqError
from maveriq.estimate.profile_file import PROFILE_NAME
from maveriq.exec.gpus import Devices
from maveriq.exec.local_machine import LocalMachine
from maveriq.exec.profile_worker import (
    Answer,
    EmulatedTimes,
    Failed,
    Measure,
    Measured,
    Planned,
    ProfileJob,
    Progressed,
    shortened,
)
from maveriq.files import written_whole
from maveriq.profiling.execute import Emulate
from maveriq.profiling.plan import ProfilePlan
from maveriq.profiling.planned import Place, PlannedProfile, ProfileOptions, measure_plan, options_text, plan_bytes
from maveriq.profiling.session import LOG_NAME, begun_session
from maveriq.scenario.build import build_live_system
from maveriq.scenario.options import Options
from maveriq.scenario.service_times import ServiceTimes
from maveriq.units import seconds

_NICENESS = 10
_LOCK_NAME = "lock"
_EMULATED_PROMPTS, _EMULATED_BATCHES = (128, 512, 2048), (1, 4, 16)


@dataclass(frozen=True, slots=True)
class EmulatedEngine:
    """The times that an emulated engine takes (`maveriq.profiling.measure.EmulatedBatches`).

    Args:
        service_times: those of the service.
        time_scale: real seconds per second of the service.
        plan: what the engine runs.
    """

    service_times: ServiceTimes
    time_scale: float
    plan: DeploymentPlan

    def times_s(self, batch: int, prompt_tokens: int, output_tokens: int) -> tuple[float, float]:
        """Return the seconds to the first and to the last token of a batch, on the service's clock."""
        requests = [
            Request(
                request_id=number,
                endpoint_id=1,
                arrival_us=0,
                prompt_tokens=prompt_tokens,
                output_tokens=output_tokens,
            )
            for number in range(1, batch + 1)
        ]
        first_us, service_us = self.service_times.times_us(self.plan, requests)
        return seconds(first_us), seconds(service_us)


def main() -> None:
    """Measure the profile that stdin names."""
    with contextlib.suppress(OSError):
        os.nice(_NICENESS)
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(lines,), daemon=True).start()
    try:
        _measure(lines)
    except KeyboardInterrupt:
        sys.exit(130)
    except MaveriqError as error:
        _send(Failed(message=shortened(str(error))))
        sys.exit(1)
    except Exception as error:
        traceback.print_exc()
        _send(Failed(message=shortened(f"this is a bug in maveriq: {type(error).__name__}: {error}")))
        sys.exit(1)


def _read(lines: queue.SimpleQueue[bytes]) -> None:
    """Queue the lines of stdin; when it ends, the service is gone or wants this process to stop."""
    rest = b""
    while chunk := os.read(sys.stdin.fileno(), 1 << 16):  # a buffered reader may not be in use when Python ends
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            lines.put(line)
    os.kill(os.getpid(), signal.SIGINT)


def _send(answer: Answer) -> None:
    with contextlib.suppress(OSError):  # the service is gone
        sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
        sys.stdout.buffer.flush()


def _measure(lines: queue.SimpleQueue[bytes]) -> None:
    job = msgspec.json.decode(lines.get(), type=ProfileJob)
    model = load_model(job.model)
    models = {model.name: (model, config_path(Path(job.model)).resolve() if model.config_json else None)}
    folder = Path(job.folder)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (
        (folder / _LOCK_NAME).open("w") as lock,
        contextlib.closing(LocalMachine(job.backend, job.engine_python)) as local,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)  # the process of a server that was killed may still stop its engines
        profile = PlannedProfile(models, local, _options(job), job.machine)
        plan = _plan(profile, folder)
        gpus = max(run.configuration.gpus for run in plan.runs)
        _send(Planned(gpus=gpus, bytes_per_gpu=plan_bytes(profile, plan), expected_s=plan.expected_s))
        where = msgspec.json.decode(lines.get(), type=Measure)
        place = Place(
            devices=Devices(uuids=where.devices),
            machine_gpus=where.machine_gpus,
            emulate=None if job.emulated is None else _emulate(job.emulated),
        )
        file = measure_plan(profile, plan, folder, lambda text: _send(Progressed(text=shortened(text))), place=place)
    with written_whole(folder / PROFILE_NAME, what="profile", overwrite=True) as partial:
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(file), indent=1) + b"\n")
    (folder / LOG_NAME).unlink(missing_ok=True)
    _send(Measured(samples=sum(len(case.first_s) for run in file.runs for case in run.cases)))


def _plan(profile: PlannedProfile, folder: Path) -> ProfilePlan:
    """Return the plan that was begun in a folder, or a new one; a log of other options or versions is removed."""
    try:
        begun = begun_session(folder)
    except InputError:
        begun = None
    if begun is not None and begun.options == options_text(profile):
        return begun.plan
    (folder / LOG_NAME).unlink(missing_ok=True)
    return profile.plan()


def _options(job: ProfileJob) -> ProfileOptions:
    is_emulated = job.emulated is not None
    return ProfileOptions(
        prompt_tokens=_EMULATED_PROMPTS if is_emulated else None,
        batch_sizes=_EMULATED_BATCHES if is_emulated else None,
        max_gpus=job.max_gpus,
        budget_s=job.budget_s,
        kind=job.machine.kind,
        memory_gib=job.machine.memory_gib,
        seed=job.seed,
    )


def _emulate(times: EmulatedTimes) -> Emulate:
    options = Options(gpus=times.gpus, profile=times.profile, service_times=times.service_times)
    system, _ = build_live_system(options, profiled={})  # the same defaults as the service

    def emulate(model: ModelSpec, configuration: ParallelConfig) -> EmulatedEngine:
        plan = DeploymentPlan(
            model=model,
            configuration=configuration,
            gpu_ids=tuple(range(configuration.gpus)),
            gpu_bytes=(1,) * configuration.gpus,  # times do not depend on it
            est_latency_s=0.0,
            est_memory_bytes=configuration.gpus,
        )
        return EmulatedEngine(system.service_times, times.time_scale, plan)

    return emulate


if __name__ == "__main__":
    main()
