"""Profiles that a service measures in the background: one after the other, each in a process of its own.

A profile waits for its turn, is planned, waits for GPUs, and is measured. The controller says on which GPUs, and when
they are needed for something else; then the process stops, and another one goes on later. What was measured is kept
beside the state file, so that a profile also goes on after a restart of the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import msgspec

from maveriq.control.events import ProfileRequested
from maveriq.domain.models import ModelSpec
from maveriq.errors import InputError, MaveriqError
from maveriq.estimate.blended import BlendedEstimator
from maveriq.estimate.estimator import Estimator
from maveriq.estimate.physics import PhysicsEstimator
from maveriq.estimate.profile_file import (
    PROFILE_NAME,
    MachineRecord,
    hardware_profile_of,
    read_profile_file,
)
from maveriq.exec.gpus import Devices
from maveriq.exec.live_cluster import LiveCluster
from maveriq.exec.profile_worker import EmulatedTimes, Measure, ProfileJob, ProfileProcess
from maveriq.files import written_whole
from maveriq.serve.store import StoredModel
from maveriq.tables import read_json
from maveriq.units import bytes_from_gib

_LOG = logging.getLogger(__name__)
_OUTPUT_TOKENS = 20  # of an endpoint that does not say more
_STATUS_NAME, _LOG_NAME = "status.json", "profile.log"

Status: TypeAlias = Literal["queued", "planning", "waiting", "measuring", "complete", "failed", "cancelled"]
STATUSES: tuple[Status, ...] = ("queued", "planning", "waiting", "measuring", "complete", "failed", "cancelled")
"""The states of a profile: it waits for others, is planned, waits for GPUs, is measured; and the three final ones."""

OPEN: tuple[Status, ...] = STATUSES[:4]
"""Those of a profile that has not ended."""


OpenProcess: TypeAlias = Callable[[ProfileJob, Path], ProfileProcess]
"""Makes the process that measures a job; its output goes to the file."""


class ProfileState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far a profile is, and what it has cost.

    Args:
        status: its state.
        detail: how far it is, or why it failed, in one line.
        gpus: on which GPUs it is measured now.
        expected_s: about how long the measurement takes in all; 0 before it is planned.
        measured_s: how long it has held GPUs.
        gpu_s: the same, times the number of GPUs.
        samples: batches that were measured; 0 before it is complete.
    """

    status: Status
    detail: Annotated[str, msgspec.Meta(max_length=10_000)] = ""
    gpus: tuple[int, ...] = ()
    expected_s: float = 0.0
    measured_s: float = 0.0
    gpu_s: float = 0.0
    samples: int = 0

    @property
    def is_open(self) -> bool:
        """Whether it has not ended."""
        return self.status in OPEN


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileSettings:
    """How a service measures profiles.

    Args:
        folder: where profiles are kept, one folder a model.
        profiled: gets the estimator of each model whose profile is complete (mutable; the service's estimates read it).
        machine: the GPUs.
        backend: the engine.
        engine_python: the values of `--engine-python`.
        devices: the devices of the cluster's GPUs.
        machine_gpus: the number on this machine of each of the cluster's GPUs; none on a CPU.
        node_gpus: GPUs of the largest node.
        prompt_tokens: length of a typical prompt, by which the service decides on endpoints.
        max_gpus: most GPUs that an engine is measured on.
        beside_engines: whether GPUs that hold engines are used.
        budget_s: most seconds that a plan may take.
        usd_per_gpu_hour: price of a GPU; None where it is not known.
        emulated: times of emulated engines; None for others.
        seed: of prompts and random weights.
        has_measured: whether the server's profile has measurements of a model.
    """

    folder: Path
    profiled: dict[str, tuple[ModelSpec, Estimator]]
    machine: MachineRecord
    backend: str
    engine_python: tuple[str, ...] = ()
    devices: Devices = field(default_factory=Devices)
    machine_gpus: tuple[int, ...] = ()
    node_gpus: int | None = None
    prompt_tokens: int = 1
    max_gpus: int = 1
    beside_engines: bool = False
    budget_s: float = 120.0
    usd_per_gpu_hour: float | None = None
    emulated: EmulatedTimes | None = None
    seed: int = 42
    has_measured: Callable[[ModelSpec], bool] = lambda _: False

    def usd(self, gpu_s: float) -> float | None:
        """Return the price of GPU-seconds; None where it is not known."""
        return None if self.usd_per_gpu_hour is None else gpu_s / 3600 * self.usd_per_gpu_hour

    @property
    def free_bytes(self) -> int:
        """The memory of a GPU that holds nothing."""
        return bytes_from_gib(self.machine.memory_gib - self.machine.idle_gib)

    def measure_on(self, gpu_ids: tuple[int, ...]) -> Measure:
        """Return what the process of a profile must know of its GPUs."""
        if not self.devices.uuids:
            return Measure()
        return Measure(
            devices=tuple(self.devices.uuids[gpu_id] for gpu_id in gpu_ids),
            machine_gpus=tuple(self.machine_gpus[gpu_id] for gpu_id in gpu_ids),
        )


class ProfileJobs:
    """The profiles of a service. Call everything from its event loop.

    Args:
        cluster: gives GPUs.
        settings: how profiles are measured; None where the service measures none.
        open_process: makes the process of a profile.
    """

    def __init__(
        self, cluster: LiveCluster, settings: ProfileSettings | None, open_process: OpenProcess = ProfileProcess
    ) -> None:
        self._cluster = cluster
        self._open_process = open_process
        self._settings = settings
        self._states: dict[int, ProfileState] = {}
        self._queue: dict[int, StoredModel] = {}
        self._current: _Job | None = None
        self._closed = False
        self.total_s = self.total_gpu_s = 0.0

    @property
    def enabled(self) -> bool:
        """Whether the service measures profiles."""
        return self._settings is not None

    def state(self, model_id: int) -> ProfileState | None:
        """Return how far the profile of a model is; None where none was asked for."""
        self._count()
        return self._states.get(model_id)

    def states(self) -> Iterable[ProfileState]:
        """Return the state of each profile."""
        self._count()
        return self._states.values()

    def _count(self) -> None:
        """Count what the profile that is measured now has cost so far."""
        if self._current is not None:
            self._current.count()

    def is_open(self, model_id: int) -> bool:
        """Return whether a profile of a model has been asked for and has not ended."""
        state = self._states.get(model_id)
        return state is not None and state.is_open

    def why_given_up(self, model_id: int) -> str:
        """Return why a profile that has ended cannot be used; "" if it is complete."""
        state = self._states.get(model_id)
        if state is None:
            return "this server measures no profile of its model"
        if state.status == "complete":
            return ""
        return f"the profile that it waited for {'was ' if state.status == 'cancelled' else ''}{state.status}" + (
            f": {state.detail}" if state.detail else ""
        )

    def usd(self, state: ProfileState) -> float | None:
        """Return what a profile has cost; None where the price is not known."""
        return None if self._settings is None else self._settings.usd(state.gpu_s)

    def is_wanted_for(self, model: StoredModel) -> bool:
        """Return whether a new model is measured without being asked: nothing of it was measured yet."""
        return self._settings is not None and not self._settings.has_measured(model.spec)

    def restore(self, models: Iterable[StoredModel]) -> None:
        """Read the profiles of registered models, and go on with those that have not ended."""
        if self._settings is None:
            return
        for model in models:
            path = self._folder(model.model_id) / _STATUS_NAME
            if not path.is_file():
                continue
            try:
                state = read_json(path, ProfileState, what="status of a profile")
                if state.status == "complete":
                    self._settings.profiled[model.spec.name] = (model.spec, _estimator(self._settings, model))
            except MaveriqError as error:
                _LOG.warning("profile of %s: %s", model.spec.name, error)
                state = ProfileState(status="failed", detail=str(error))
            if state.is_open:
                self._queue[model.model_id] = model
                state = msgspec.structs.replace(state, status="queued", gpus=())
            self._states[model.model_id] = state
        self._start_next()

    def request(self, model: StoredModel) -> None:
        """Measure a model, unless its profile is under way; one that was measured before is dropped.

        Raises:
            InputError: the service measures no profiles.
        """
        if self._settings is None:
            raise InputError("this server measures no profiles; start it with --profile-on-register")
        if self.is_open(model.model_id):
            return
        self._drop(model)
        self._states[model.model_id] = ProfileState(status="queued")
        self._save(model.model_id)
        self._queue[model.model_id] = model
        self._start_next()

    async def cancel(self, model_id: int) -> None:
        """Give up a profile that has not ended, with what was measured; endpoints that wait for it are rejected."""
        if not self.is_open(model_id):
            return
        self._queue.pop(model_id, None)
        if self._current is not None and self._current.model.model_id == model_id:
            await self._current.cancel()
        if self.is_open(model_id):  # it did not end in the meantime
            await asyncio.to_thread(shutil.rmtree, self._folder(model_id), ignore_errors=True)
            self._end(model_id, "cancelled")
        self._start_next()

    async def forget(self, model: StoredModel) -> None:
        """Drop the profile of a model that is not registered any more."""
        await self.cancel(model.model_id)
        if self._settings is not None and self._states.pop(model.model_id, None) is not None:
            self._drop(model)
            await asyncio.to_thread(shutil.rmtree, self._folder(model.model_id), ignore_errors=True)

    async def close(self) -> None:
        """Stop measuring; what has not ended goes on with the next start of the server."""
        self._closed = True
        if self._current is not None:
            await self._current.cancel()

    def _start_next(self) -> None:
        if self._settings is None or self._closed or self._current is not None or not self._queue:
            return
        model = self._queue.pop(next(iter(self._queue)))
        begun = self._states[model.model_id]
        job = self._current = _Job(model, self._settings, self._cluster, self._update, self._open_process, begun)
        job.task = asyncio.get_running_loop().create_task(job.run())
        job.task.add_done_callback(lambda task: self._job_ended(job, task))

    def _job_ended(self, job: _Job, task: asyncio.Task[tuple[int, Estimator]]) -> None:
        self._current = None
        model_id = job.model.model_id
        if task.cancelled():
            if not self._closed:  # `cancel` does the rest
                return
            self._save(model_id)
            return
        try:
            samples, estimator = task.result()
        except MaveriqError as failure:
            self._fail(job.model, str(failure))
        except Exception as failure:
            _LOG.exception("profile of %s", job.model.spec.name)
            self._fail(job.model, f"this is a bug in maveriq: {type(failure).__name__}: {failure}")
        else:
            self._required().profiled[job.model.spec.name] = (job.model.spec, estimator)
            self._update(model_id, samples=samples)
            self._end(model_id, "complete")
        self._start_next()

    def _drop(self, model: StoredModel) -> None:
        """Let the profile of a model answer no longer."""
        settings = self._required()
        settings.profiled.pop(model.spec.name, None)
        with contextlib.suppress(OSError):
            (self._folder(model.model_id) / PROFILE_NAME).unlink()

    def _fail(self, model: StoredModel, reason: str) -> None:
        _LOG.warning("profile of %s failed: %s", model.spec.name, reason)
        self._end(model.model_id, "failed", reason)

    def _end(self, model_id: int, status: Status, detail: str = "") -> None:
        """Set the final state of a profile, and let the endpoints that wait for it be deployed, or rejected."""
        self._update(model_id, status=status, detail=detail, gpus=())
        self._save(model_id)
        self._cluster.end_profile(model_id, self.why_given_up(model_id))

    def _update(self, model_id: int, **changes: object) -> None:
        state = msgspec.structs.replace(self._states[model_id], **changes)
        before = self._states[model_id]
        self.total_s += state.measured_s - before.measured_s
        self.total_gpu_s += state.gpu_s - before.gpu_s
        self._states[model_id] = state

    def _save(self, model_id: int) -> None:
        """Store a state; without it, the profile is asked for again after a restart."""
        folder = self._folder(model_id)
        try:
            for made in (folder.parent, folder):
                made.mkdir(mode=0o700, parents=True, exist_ok=True)
            with written_whole(folder / _STATUS_NAME, what="status of a profile", overwrite=True) as partial:
                partial.write_bytes(msgspec.json.encode(self._states[model_id]))
        except (OSError, MaveriqError) as error:
            _LOG.warning("status of profile %d: %s", model_id, error)

    def _folder(self, model_id: int) -> Path:
        return self._required().folder / str(model_id)

    def _required(self) -> ProfileSettings:
        if self._settings is None:
            raise InputError("this server measures no profiles; start it with --profile-on-register")
        return self._settings


class _Job:
    """The profile of one model, from its plan to its end. It is a `maveriq.exec.live_cluster.ProfileRunner`.

    Args:
        model: what is measured.
        settings: how.
        cluster: gives GPUs.
        update: called with the model's ID and what has changed of its state.
        open_process: makes its process.
        begun: its state, with what it has cost before the server's last start.
    """

    def __init__(
        self,
        model: StoredModel,
        settings: ProfileSettings,
        cluster: LiveCluster,
        update: Callable[..., None],
        open_process: OpenProcess,
        begun: ProfileState,
    ) -> None:
        self.model = model
        self.task: asyncio.Task[tuple[int, Estimator]] | None = None
        self._settings = settings
        self._cluster = cluster
        self._report = update
        self._gpu_ids: tuple[int, ...] = ()
        self._granted = asyncio.Event()
        self._revoked = asyncio.Event()
        self._open_process = open_process
        self._measured_s, self._gpu_s = begun.measured_s, begun.gpu_s
        self._counted_s: float | None = None  # when costs were last counted; None without GPUs

    def start(self, gpu_ids: tuple[int, ...]) -> None:
        """Measure on these GPUs."""
        self._gpu_ids = gpu_ids
        self._granted.set()

    def stop(self) -> None:
        """Stop measuring: the GPUs are needed."""
        self._granted.clear()
        self._revoked.set()

    async def cancel(self) -> None:
        """Stop for good."""
        if self.task is not None:
            self.task.cancel()
            await asyncio.wait([self.task])

    async def run(self) -> tuple[int, Estimator]:
        """Measure the profile, and return how many batches were measured and the estimator that follows.

        Raises:
            MaveriqError: it cannot be measured.
        """
        samples = None
        while samples is None:
            process = self._open_process(self._job(), self._folder / _LOG_NAME)
            try:
                samples = await self._measure(process)
            finally:
                await asyncio.shield(process.stop())
        return samples, await asyncio.to_thread(_warm_estimator, self._settings, self.model)

    async def _measure(self, process: ProfileProcess) -> int | None:
        """Measure as long as there are GPUs; None if they are needed for something else."""
        self._update(status="planning", gpus=(), detail="")
        planned = await process.plan()
        beside = self._settings.beside_engines
        gpus = f"{planned.gpus} GPU{'s' if planned.gpus > 1 else ''}"
        self._update(
            status="waiting",
            expected_s=planned.expected_s,
            detail=f"for {gpus} {'with room' if beside else 'without engines'}",
        )
        # GPUs that hold nothing are given whole; whether they are large enough is checked when it is measured.
        needed = min(planned.bytes_per_gpu, self._settings.free_bytes) if beside else 0
        self._cluster.request_profile(ProfileRequested(self.model.model_id, planned.gpus, needed, beside), self)
        await self._granted.wait()
        self._revoked.clear()
        gpu_ids, self._counted_s = self._gpu_ids, time.monotonic()
        self._update(status="measuring", gpus=gpu_ids, detail="")
        measuring = asyncio.ensure_future(
            process.measure(
                self._settings.measure_on(gpu_ids), planned.expected_s, lambda detail: self._update(detail=detail)
            )
        )
        revoked = asyncio.ensure_future(self._revoked.wait())
        try:
            await asyncio.wait([measuring, revoked], return_when=asyncio.FIRST_COMPLETED)
            return measuring.result().samples if measuring.done() else None
        finally:
            revoked.cancel()
            measuring.cancel()
            with contextlib.suppress(asyncio.CancelledError, MaveriqError):
                await measuring
            self.count()
            self._counted_s = None

    def count(self) -> None:
        """Add the time since the last call to what the profile has cost, if it holds GPUs."""
        if self._counted_s is None:
            return
        now_s = time.monotonic()
        self._measured_s += now_s - self._counted_s
        self._gpu_s += (now_s - self._counted_s) * len(self._gpu_ids)
        self._counted_s = now_s
        self._update(measured_s=self._measured_s, gpu_s=self._gpu_s)

    def _update(self, **changes: object) -> None:
        self._report(self.model.model_id, **changes)

    @property
    def _folder(self) -> Path:
        return self._settings.folder / str(self.model.model_id)

    def _job(self) -> ProfileJob:
        settings, model = self._settings, self.model
        return ProfileJob(
            model=str(Path(model.folder) / "config.json") if model.folder else model.spec.name,
            folder=str(self._folder),
            backend=settings.backend,
            engine_python=settings.engine_python,
            machine=settings.machine,
            max_gpus=settings.max_gpus,
            budget_s=settings.budget_s,
            seed=settings.seed,
            emulated=settings.emulated,
        )


def _estimator(settings: ProfileSettings, model: StoredModel) -> BlendedEstimator:
    """Return the estimator of a complete profile.

    Raises:
        InputError: the profile cannot be read, or is of another model.
    """
    path = settings.folder / str(model.model_id) / PROFILE_NAME
    profile = hardware_profile_of(read_profile_file(path), f"profile {str(path)!r}")
    if not profile.has_measured(model.spec):
        raise InputError(f"profile {str(path)!r} is not of {model.spec.name}; measure it again")
    return BlendedEstimator(profile, PhysicsEstimator(profile, node_gpus=settings.node_gpus))


def _warm_estimator(settings: ProfileSettings, model: StoredModel) -> BlendedEstimator:
    """Return the estimator of a complete profile, and let it compute what the first decision on the model asks.

    That takes a second of a core, and would hold up the server's event loop.

    Raises:
        InputError: as `_estimator`.
    """
    estimator = _estimator(settings, model)
    for configuration in estimator.configurations(model.spec, gpus=settings.node_gpus or 1, batch_size=1):
        if estimator.why_not(model.spec, configuration) is None:
            estimator.memory(model.spec, configuration)
            estimator.service(
                model.spec, configuration, prompt_tokens=settings.prompt_tokens, output_tokens=_OUTPUT_TOKENS, batch=1
            )
    return estimator
