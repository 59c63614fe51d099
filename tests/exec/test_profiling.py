"""Measurements of engines, and the profile that they give."""

import asyncio
from pathlib import Path

import pytest
from engine_fixtures import EACH_S, FIRST_S, environment
from fixtures import MODEL

from maveriq.domain.models import WeightType
from maveriq.domain.parallel import ParallelConfig, even_split
from maveriq.errors import InputError
from maveriq.estimate.hardware_profile import load_profile
from maveriq.estimate.measured import MeasuredEstimator
from maveriq.exec.gpus import Devices
from maveriq.exec.launcher import ProcessLauncher
from maveriq.profiling.folder import Machine, write_profile
from maveriq.profiling.measure import Measured, MeasurementCase, Probe, ProfilingError, measure

TP2 = ParallelConfig(tp=2, pp=1, weights=WeightType.INT8)
TRIES = 10  # some fail on a busy machine
QUESTIONS = [
    MeasurementCase(batch=batch, prompt_tokens=prompt, output_tokens=6) for batch in (1, 2) for prompt in (4, 8)
]


def measured(folder: Path, backend: str = "engine_fixtures:Paced", **probe) -> list[Measured]:
    with ProcessLauncher(backend, logs=folder, environment=environment()) as launcher:
        found = measure(launcher, MODEL, TP2, QUESTIONS, devices=Devices(), probe=Probe(repeats=3, **probe))
        return asyncio.run(found)


def at_pace(point: Measured) -> bool:
    """Return whether the measured times are those of the engine."""
    first_s = pytest.approx(FIRST_S * point.case.batch, rel=0.3)
    return point.ttft_s + point.tpot_s == first_s and point.tpot_s == pytest.approx(EACH_S, rel=0.3)


def test_the_profile_gives_back_the_measured_times(tmp_path: Path) -> None:
    for _ in range(TRIES):
        found = measured(tmp_path)
        if all(at_pace(point) for point in found):
            break
    assert [point.case for point in found] == QUESTIONS
    assert all(at_pace(point) and point.memory_gib == 4 for point in found)
    folder = tmp_path / "mine"
    write_profile(folder, Machine(kind="paced", memory_gib=8, idle_gib=0), found)
    write_profile(folder, Machine(kind="paced", memory_gib=8, idle_gib=0), found, overwrite=True)
    profile = load_profile(str(folder / "profile.toml"))
    assert (profile.gpu_kind, profile.prompt_tokens, profile.timing.tick_us) == ("paced", 4, 0)
    known = MeasuredEstimator(profile)
    for point in found:
        case = point.case
        service = known.service(
            MODEL, TP2, prompt_tokens=case.prompt_tokens, output_tokens=case.output_tokens, batch=case.batch
        )
        assert service.latency_s == pytest.approx(point.ttft_s + 6 * point.tpot_s, abs=1e-5)


@pytest.mark.parametrize(
    ("backend", "probe", "message"),
    [
        ("emulated", {}, "does not know what memory it holds"),
        ("engine_fixtures:Paced", {"timeout_s": 1e-3}, "no engine within 0.001 s"),
        ("engine_fixtures:CannotLoad1", {}, "no attribute 'CannotLoad1'"),
    ],
)
def test_failed_measurements_are_profiling_errors(
    tmp_path: Path, backend: str, probe: dict[str, float], message: str
) -> None:
    with pytest.raises(ProfilingError, match=message):
        measured(tmp_path, backend, **probe)


def test_names_with_quotes_and_backslashes_round_trip(tmp_path: Path) -> None:
    point = Measured(
        model=MODEL, configuration=TP2, case=QUESTIONS[0], ttft_s=0.1, tpot_s=0.1, memory_gib=1.0, start_s=1.0
    )
    folder = tmp_path / 'the "new" one \\'
    write_profile(folder, Machine(kind='H100 "big"', memory_gib=8, idle_gib=0), [point])
    profile = load_profile(str(folder / "profile.toml"))
    assert (profile.name, profile.gpu_kind) == (folder.name, 'H100 "big"')


def test_a_folder_with_other_files_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(InputError, match=r"holds files that are no folder with profile\.toml"):
        write_profile(tmp_path, Machine(kind="x", memory_gib=1, idle_gib=0), [_one()], overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_a_folder_with_other_files_is_left_and_the_profile_goes_beside_it(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "precious").write_text("mine")
    written = write_profile(taken, Machine(kind="x", memory_gib=1, idle_gib=0), [_one()])
    assert written != taken
    assert (written / "profile.toml").is_file()
    assert [path.name for path in taken.iterdir()] == ["precious"]


def _one() -> Measured:
    return Measured(model=MODEL, configuration=TP2, case=QUESTIONS[0], ttft_s=1, tpot_s=1, memory_gib=1, start_s=1)


@pytest.mark.parametrize(("layers", "stages", "split"), [(8, 3, (3, 3, 2)), (4, 4, (1, 1, 1, 1)), (5, 2, (3, 2))])
def test_even_splits(layers: int, stages: int, split: tuple[int, ...]) -> None:
    assert even_split(layers, stages) == split
