"""Profiles that a service measures in the background: their states, costs, interruptions and failures."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from maveriq.control.events import ProfileRequested
from maveriq.domain.models import KvType, WeightType, known_models
from maveriq.errors import InputError
from maveriq.estimate.profile_file import (
    FORMAT,
    PROFILE_NAME,
    VERSION,
    CaseRecord,
    EngineRecord,
    MachineRecord,
    ModelRecord,
    ProfileFile,
    RunRecord,
)
from maveriq.exec.profile_worker import Measure, Measured, Planned, ProfileError, ProfileJob
from maveriq.serve.profile_jobs import ProfileJobs, ProfileSettings
from maveriq.serve.store import StoredModel

A, B = (
    StoredModel(model_id=number, spec=known_models()[name], folder="")
    for number, name in ((1, "qwen3-8b"), (2, "qwen3-14b"))
)
MACHINE = MachineRecord(kind="A6000", memory_gib=48)


def write_profile(folder: Path, model: str) -> None:
    case = CaseRecord(batch=1, prompt_tokens=128, output_tokens=20, first_s=(0.1,), each_s=(0.01,))
    run = RunRecord(
        model=model, layers=(0,), tp=1, pp=1, weights=WeightType.FLOAT16, kv=KvType.NATIVE, start_s=1, cases=(case,)
    )
    file = ProfileFile(
        format=FORMAT, version=VERSION, name="p", made_at="", made_by="", machine=MACHINE,
        engine=EngineRecord(name="emulated"), models=(ModelRecord(name=model),), runs=(run,),
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PROFILE_NAME).write_bytes(msgspec.json.encode(file))


class Processes:
    """Stands for the processes of profiles: each measures until `done` or `fails` is set."""

    def __init__(self) -> None:
        self.opened: list[str] = []
        self.running = self.stopped = 0
        self.done = asyncio.Event()
        self.fails = ""
        self.bytes_per_gpu = 1

    def __call__(self, job: ProfileJob, log: Path) -> "Processes":
        del log
        self.opened.append(job.model)
        self.job = job
        self.running += 1
        assert self.running == 1  # one at a time
        return self

    async def plan(self) -> Planned:
        return Planned(gpus=1, bytes_per_gpu=self.bytes_per_gpu, expected_s=5)

    async def measure(self, measure: Measure, expected_s: float, on_progress: Callable[[str], None]) -> Measured:
        del measure, expected_s
        on_progress("half of it")
        if self.fails:
            raise ProfileError(self.fails)
        await self.done.wait()
        write_profile(Path(self.job.folder), self.job.model)
        return Measured(samples=3)

    async def stop(self) -> None:
        self.running -= 1
        self.stopped += 1


class Gpus:
    """Stands for the cluster: gives a GPU at once."""

    def __init__(self) -> None:
        self.runners: dict[int, object] = {}
        self.requested: list[ProfileRequested] = []
        self.ended: list[tuple[int, str]] = []

    def request_profile(self, profile: ProfileRequested, runner) -> None:
        self.runners[profile.profile_id] = runner
        self.requested.append(profile)
        runner.start((3,))

    def end_profile(self, profile_id: int, reason: str = "") -> None:
        self.ended.append((profile_id, reason))


def settings(folder: Path, *, beside_engines: bool) -> ProfileSettings:
    return ProfileSettings(
        folder=folder,
        profiled={},
        machine=MACHINE,
        backend="emulated",
        usd_per_gpu_hour=3600.0,
        beside_engines=beside_engines,
    )


def with_jobs(folder: Path, test: Callable[..., Awaitable[None]], *, beside_engines: bool = False) -> None:
    async def main() -> None:
        gpus, processes, how = Gpus(), Processes(), settings(folder, beside_engines=beside_engines)
        jobs = ProfileJobs(gpus, how, processes)  # type: ignore[arg-type]
        await test(jobs, gpus, processes, how)
        await jobs.close()

    asyncio.run(asyncio.wait_for(main(), 30))


async def until(holds: Callable[[], bool]) -> None:
    while not holds():
        await asyncio.sleep(0.001)


def status(jobs: ProfileJobs, model: StoredModel = A) -> str:
    state = jobs.state(model.model_id)
    return state.status if state is not None else ""


def test_profiles_are_measured_one_after_the_other_and_then_answer_for_their_models(tmp_path: Path) -> None:
    async def test(jobs, gpus, processes, how) -> None:
        jobs.request(A)
        jobs.request(B)
        jobs.request(A)  # under way already
        await until(lambda: status(jobs) == "measuring")
        assert jobs.state(1).gpus == (3,)
        assert jobs.state(1).detail == "half of it"
        assert status(jobs, B) == "queued"
        assert not how.profiled
        processes.done.set()
        await until(lambda: status(jobs, B) == "complete")
        assert processes.opened == ["qwen3-8b", "qwen3-14b"]
        assert gpus.ended == [(1, ""), (2, "")]
        model, estimator = how.profiled["qwen3-8b"]
        assert (model, estimator.name) == (A.spec, "blended")
        state = jobs.state(1)
        assert state.samples == 3
        assert state.gpu_s == state.measured_s > 0
        assert jobs.usd(state) == pytest.approx(state.gpu_s)
        assert jobs.total_gpu_s == pytest.approx(state.gpu_s + jobs.state(2).gpu_s)

    with_jobs(tmp_path, test)


def test_a_profile_whose_gpus_are_needed_stops_and_goes_on(tmp_path: Path) -> None:
    async def test(jobs, gpus, processes, how) -> None:
        del how
        jobs.request(A)
        await until(lambda: status(jobs) == "measuring")
        gpus.runners[1].stop()
        await until(lambda: len(processes.opened) == 2)
        assert not gpus.ended
        processes.done.set()
        await until(lambda: status(jobs) == "complete")
        assert processes.stopped == 2

    with_jobs(tmp_path, test)


def test_a_profile_that_fails_says_why_and_the_next_goes_on(tmp_path: Path) -> None:
    async def test(jobs, gpus, processes, how) -> None:
        del how
        processes.fails = "no such layer"
        jobs.request(A)
        jobs.request(B)
        await until(lambda: status(jobs) == "failed")
        processes.fails = ""
        processes.done.set()
        assert gpus.ended[0] == (1, "the profile that it waited for failed: no such layer")
        await until(lambda: not jobs.is_open(2))

    with_jobs(tmp_path, test)


@pytest.mark.parametrize("other", [A, B])
def test_a_cancelled_profile_ends_whether_it_runs_or_waits(tmp_path: Path, other: StoredModel) -> None:
    async def test(jobs, gpus, processes, how) -> None:
        del how
        jobs.request(A)
        jobs.request(B)
        await until(lambda: status(jobs) == "measuring")
        await jobs.cancel(other.model_id)
        assert status(jobs, other) == "cancelled"
        assert gpus.ended == [(other.model_id, "the profile that it waited for was cancelled")]
        processes.done.set()
        await until(lambda: not jobs.is_open(1) and not jobs.is_open(2))
        jobs.request(other)  # again
        await until(lambda: status(jobs, other) == "complete")

    with_jobs(tmp_path, test)


def test_profiles_go_on_after_a_restart_and_complete_ones_are_read(tmp_path: Path) -> None:
    async def first(jobs, gpus, processes, how) -> None:
        del how, gpus
        jobs.request(A)
        processes.done.set()
        await until(lambda: status(jobs) == "complete")
        processes.done.clear()
        jobs.request(B)
        await until(lambda: status(jobs, B) == "measuring")

    async def second(jobs, gpus, processes, how) -> None:
        del gpus
        jobs.restore([A, B])
        assert how.profiled.keys() == {"qwen3-8b"}
        await until(lambda: status(jobs, B) == "measuring")
        assert jobs.state(2).measured_s > 0  # also what the first server spent
        processes.done.set()
        await until(lambda: status(jobs, B) == "complete")

    with_jobs(tmp_path, first)
    with_jobs(tmp_path, second)


@pytest.mark.parametrize("text", ["", "{}", "[]", json.dumps({"status": "complete"}), '{"status": "odd"}', "\0" * 99])
def test_a_damaged_state_is_a_profile_that_failed(tmp_path: Path, text: str) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "status.json").write_text(text)

    async def test(jobs, gpus, processes, how) -> None:
        del gpus, processes, how
        jobs.restore([A])
        assert status(jobs) == "failed"
        assert "\n" not in jobs.state(1).detail

    with_jobs(tmp_path, test)


@pytest.mark.parametrize("beside", [False, True])
def test_a_profile_larger_than_a_gpu_does_not_wait_for_ever(tmp_path: Path, *, beside: bool) -> None:
    async def test(jobs, gpus, processes, how) -> None:
        del how
        processes.bytes_per_gpu = 1 << 50
        jobs.request(A)
        await until(lambda: status(jobs) == "measuring")  # where one line says that it does not fit
        assert gpus.requested[0].bytes_per_gpu <= 48 << 30
        assert gpus.requested[0].beside_engines == beside

    with_jobs(tmp_path, test, beside_engines=beside)


def test_a_server_without_profiles_says_how_to_get_them() -> None:
    jobs = ProfileJobs(Gpus(), None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="--profile-on-register"):
        jobs.request(A)
