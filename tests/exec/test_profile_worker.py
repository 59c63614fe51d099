"""The process that measures a profile beside a service."""

import asyncio
import os
import signal
from pathlib import Path

import pytest

from maveriq.estimate.profile_file import PROFILE_NAME, MachineRecord, read_profile_file
from maveriq.exec.profile_worker import EmulatedTimes, Measure, Measured, ProfileError, ProfileJob, ProfileProcess


def job(folder: Path, model: str = "qwen3-8b") -> ProfileJob:
    return ProfileJob(
        model=model,
        folder=str(folder / "p"),
        backend="emulated",
        machine=MachineRecord(kind="A6000", memory_gib=48),
        max_gpus=1,
        budget_s=10,
        seed=1,
        emulated=EmulatedTimes(gpus="1xA6000", profile="a6000-short", service_times="physics", time_scale=0.01),
    )


@pytest.mark.heavy
def test_a_profile_goes_on_where_its_process_was_killed(tmp_path: Path) -> None:
    async def killed() -> None:
        process = ProfileProcess(job(tmp_path), tmp_path / "log")
        planned = await process.plan()

        def on_progress(text: str) -> None:
            if "samples" in text:
                os.kill(process.pid, signal.SIGKILL)

        with pytest.raises(ProfileError, match="ended with"):
            await process.measure(Measure(), planned.expected_s, on_progress)

    async def complete() -> Measured:
        process = ProfileProcess(job(tmp_path), tmp_path / "log")
        planned = await process.plan()
        lines: list[str] = []
        measured = await process.measure(Measure(), planned.expected_s, lines.append)
        assert "going on with what was measured before" in lines
        return measured

    async def main() -> Measured:
        await killed()
        return await complete()

    measured = asyncio.run(main())
    file = read_profile_file(tmp_path / "p" / PROFILE_NAME)
    assert measured.samples == sum(len(case.first_s) for run in file.runs for case in run.cases) > 0


@pytest.mark.heavy
def test_what_cannot_be_measured_is_one_line(tmp_path: Path) -> None:
    async def main() -> None:
        process = ProfileProcess(job(tmp_path, "nothing-known"), tmp_path / "log")
        try:
            with pytest.raises(ProfileError, match="unknown model") as caught:
                await process.plan()
            assert "\n" not in str(caught.value)
        finally:
            await process.stop()

    asyncio.run(main())
