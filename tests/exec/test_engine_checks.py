"""The checks of engines: a healthy engine passes every check, and a fault of an engine fails its check alone."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from engine_fixtures import alive_in_group, environment, run_async, until
from faulty_check_engines import FOLDER, SimulatedDriver

from maveriq.domain.models import KvType, WeightType
from maveriq.domain.parallel import ParallelConfig
from maveriq.errors import InputError
from maveriq.exec.checks.checks import EngineCheck, checks_for
from maveriq.exec.checks.engines import SUPERVISION, CheckedEngines, EngineSetup
from maveriq.exec.checks.plan import PlannedEngine, parse_gpu_ids, plan_checks
from maveriq.exec.checks.runner import Check, CheckResult, Outcome, Status, failed, passed, run_checks
from maveriq.exec.checks.session import check_engines
from maveriq.exec.device import Device
from maveriq.exec.gpus import GpuIdentity
from maveriq.exec.launcher import ProcessLauncher

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")

FORMATS = ((WeightType.FLOAT16, KvType.NATIVE), (WeightType.INT8, KvType.NATIVE))
PLAN = plan_checks("torch", range(4), formats=FORMATS)


async def check(
    engine: str, folder: Path, *, driver: bool = True, results: list[CheckResult] | None = None
) -> list[CheckResult]:
    """Check an engine of `faulty_check_engines` as the torch backend, and return the results."""
    found = [] if results is None else results
    logs = folder / "logs"
    logs.mkdir()
    hangs = engine == "HangsWhenAborted"
    with ProcessLauncher(
        f"faulty_check_engines:{engine}", logs=logs, environment=environment() | {FOLDER: str(folder)}
    ) as launcher:
        settings = replace(SUPERVISION, grace_period_s=2.0) if hangs else SUPERVISION
        await check_engines(
            "torch",
            PLAN,
            EngineSetup(launcher=launcher, logs=logs, settings=settings),
            gpu_ids=range(4),
            on_result=found.append,
            meter=SimulatedDriver(folder) if driver else None,
        )
    return found


def statuses(results: list[CheckResult], status: Status) -> list[str]:
    return [result.name for result in results if result.outcome.status is status]


def test_a_healthy_engine_passes_every_check(tmp_path: Path) -> None:
    results = run_async(lambda: check("Healthy", tmp_path))
    assert [(result.name, result.outcome) for result in results if result.outcome.status is not Status.PASSED] == []
    assert len(results) == len(PLAN.matrix) + 14


FAULTS = [
    ("version", "WrongVersion", "torch 1.0 is not <3,>=2.6"),
    pytest.param("arguments", "UnknownArgument", "swap_space", marks=pytest.mark.heavy),
    pytest.param("start TP 1 x PP 1 int8", "CannotLoadInt8", "no kernel for int8", marks=pytest.mark.heavy),
    pytest.param("second engine", "CannotShareGpu", "exclusive mode", marks=pytest.mark.heavy),
    pytest.param("second engine", "CrossTalk", "different tokens", marks=pytest.mark.heavy),
    pytest.param("too large", "LoadsTooMuch", "it was loaded", marks=pytest.mark.heavy),
    pytest.param("too large", "RefusesWithoutKind", "not as out of memory", marks=pytest.mark.heavy),
    pytest.param("too large", "RefusesWithoutSizes", "does not say what it needs", marks=pytest.mark.heavy),
    ("tokens", "EndsEarly", "5 tokens instead of 8"),
    pytest.param("tokens", "OutOfVocabulary", "token 1000000", marks=pytest.mark.heavy),
    pytest.param("tokens", "NotDeterministic", "other tokens", marks=pytest.mark.heavy),
    pytest.param("tokens", "FailsInBatches", "a kernel failed", marks=pytest.mark.heavy),
    pytest.param("tokens of splits", "DependsOnSplit", "TP 2 x PP 2", marks=pytest.mark.heavy),
    pytest.param("layers per stage", "EvenSplit", "[2, 2, 2, 2] layers, not [3, 3, 1, 1]", marks=pytest.mark.heavy),
    ("parameter bytes", "Int8IsNotInt8", "TP 1 x PP 1 int8: rank 0 holds"),
    pytest.param("stop token", "IgnoresStopTokens", "stop token", marks=pytest.mark.heavy),
    pytest.param("stop token", "SwallowsStopTokens", "stop token", marks=pytest.mark.heavy),
    pytest.param("full length", "CutsLongSequences", "after 4 of 8 tokens", marks=pytest.mark.heavy),
    pytest.param(
        "abort", "HangsWhenAborted", "did not exit by itself; it ended with signal SIGTERM", marks=pytest.mark.heavy
    ),
    pytest.param("killed worker", "LosesWorkers", "not done within 3 s", marks=pytest.mark.heavy),
    pytest.param("killed group", "LeavesProcess", "still running: sleep", marks=pytest.mark.heavy),
    pytest.param("memory returned", "LeaksGpuMemory", "GPU 0 0.25 GiB", marks=pytest.mark.heavy),
    pytest.param("memory returned", "LeaksSharedMemory", "shm/maveriq-test-", marks=pytest.mark.heavy),
]


@pytest.mark.parametrize(("name", "engine", "reason"), FAULTS)
def test_a_fault_of_an_engine_fails_its_check_alone(
    name: str, engine: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maveriq.exec.checks.checks._NOTICE_LIMIT_S", 3.0 if engine == "LosesWorkers" else 60.0)
    monkeypatch.setattr("maveriq.exec.checks.checks._FREED_LIMIT_S", 1.0 if engine == "LeaksGpuMemory" else 60.0)
    try:
        results = run_async(lambda: check(engine, tmp_path))
    finally:
        clean_up(tmp_path)
    assert statuses(results, Status.FAILED) == [name]
    assert reason in next(result.outcome.text for result in results if result.name == name)


def clean_up(folder: Path) -> None:
    """End what faults leave behind."""
    for file in folder.glob("hidden.pid"):
        with suppress(ProcessLookupError):
            os.kill(int(file.read_text()), signal.SIGKILL)
    for left in Path("/dev/shm").glob("maveriq-test-*"):  # noqa: S108
        if left.stat().st_uid == os.getuid():
            left.unlink(missing_ok=True)


def all_checks(folder: Path) -> list[EngineCheck]:
    async def list_them() -> list[EngineCheck]:
        with ProcessLauncher("emulated", logs=folder) as launcher:
            return checks_for(CheckedEngines(PLAN, EngineSetup(launcher=launcher, logs=folder)))

    return run_async(list_them)


def test_every_check_has_a_fault(tmp_path: Path) -> None:
    untested = {check.name for check in all_checks(tmp_path)} - {getattr(fault, "values", fault)[0] for fault in FAULTS}
    assert untested == {f"start {planned.label}" for planned in PLAN.matrix} - {"start TP 1 x PP 1 int8"}


def test_the_document_lists_every_check(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "engines.md").read_text()
    expected = dict.fromkeys(
        f"| `{check.name}` | {check.proves} |"
        if not check.name.startswith("start ")
        else f"| `start ...`, one for each format and split | {check.proves} |"
        for check in all_checks(tmp_path)
    )
    table = [line for line in page.splitlines() if line in expected]
    assert table == list(expected)


def test_without_a_gpu_the_checks_of_its_memory_are_skipped(tmp_path: Path) -> None:
    results = run_async(lambda: check("Healthy", tmp_path, driver=False))
    assert statuses(results, Status.FAILED) == []
    assert statuses(results, Status.SKIPPED) == ["memory returned"]


def test_a_cancelled_check_leaves_no_process(tmp_path: Path) -> None:
    async def cancel() -> None:
        results: list[CheckResult] = []
        checking = asyncio.create_task(check("Healthy", tmp_path, results=results))
        await until(lambda: len(results) > 3)
        checking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await checking

    run_async(cancel)
    leaders = [int(file.stem) for file in tmp_path.glob("*.gpu")]
    assert leaders
    assert [pid for pid in leaders if alive_in_group(pid)] == []


# The runner


def run(*checks: Check[None], limit_s: float = 60.0) -> list[tuple[str, Outcome]]:
    found: list[CheckResult] = []
    run_async(lambda: run_checks(checks, None, limit_s=limit_s, on_result=found.append))
    return [(result.name, result.outcome) for result in found]


def a_check(name: str, action: object = None, *, limit_s: float = 60.0) -> Check[None]:
    async def act(_: None) -> Outcome:
        if isinstance(action, Exception):
            raise action
        if isinstance(action, float):
            await asyncio.sleep(action)
        return passed("seen")

    return Check(name=name, proves="something", limit_s=limit_s, run=act)


def test_a_failure_or_a_bug_does_not_stop_the_other_checks() -> None:
    assert run(a_check("a", InputError("no")), a_check("b", ZeroDivisionError("bug")), a_check("c")) == [
        ("a", failed("no")),
        ("b", failed("ZeroDivisionError: bug")),
        ("c", passed("seen")),
    ]


def test_a_check_and_all_checks_have_limits() -> None:
    slow = a_check("slow", 600.0, limit_s=0.05)
    assert run(slow, a_check("next")) == [("slow", failed("not done within 0 s")), ("next", passed("seen"))]
    over = failed("not run: all checks together may take 0.05 s, which are over")
    assert run(a_check("slow", 600.0), a_check("next"), limit_s=0.05)[1] == ("next", over)


# The plan

GPUS = [GpuIdentity(uuid=f"GPU-{number}", name="A100", memory_bytes=80 << 30, compute_capability=8.0)
        for number in range(8)]  # fmt: skip


def test_gpus_get_every_format_with_every_split() -> None:
    plan = plan_checks("torch", range(8), gpus=GPUS)
    started = {(engine.configuration.weights, engine.configuration.kv) for engine in plan.matrix if not engine.why_not}
    assert started == {(weights, KvType.NATIVE) for weights in ("float16", "int8", "int4")} | {("float16", "int8")}
    for weights, kv in started:
        gpus = [
            engine.configuration.gpus
            for engine in plan.matrix
            if (engine.configuration.weights, engine.configuration.kv) == (weights, kv)
        ]
        assert gpus == [1, 2, 4]
    per_gpu = [sum(gpu in engine.gpu_ids for engine in plan.matrix) for gpu in range(8)]
    assert max(per_gpu) - min(per_gpu) <= 1
    table = plan.too_large.model.vocab_size * plan.too_large.model.hidden_size * 2
    assert table > 80 << 30


def test_what_a_machine_or_backend_cannot_run_is_listed_once() -> None:
    few = {engine.label: engine.why_not for engine in plan_checks("torch", (0, 1), gpus=GPUS[:2]).matrix}
    assert few["TP 2 x PP 2 float16 (3+1 layers)"] == "it needs 4 GPUs, and 2 are to be used"
    assert "float16, int8 or int4, not int4_gptq" in few["TP 1 x PP 1 int4_gptq"]
    assert "TP 2 x PP 1 int4_gptq" not in few
    old, new = (
        {engine.label: engine.why_not for engine in plan_checks("vllm", range(8), gpus=gpus).matrix}
        for gpus in (GPUS, [replace(gpu, compute_capability=9.0) for gpu in GPUS])
    )
    assert "8.0" in old["TP 1 x PP 1 fp8"]
    assert new["TP 1 x PP 1 fp8"] == ""
    slices = plan_checks("torch", range(8), gpus=[replace(gpu, is_slice=True) for gpu in GPUS])
    assert {engine.configuration.gpus for engine in slices.engines} == {1}


@pytest.mark.parametrize("device", list(Device))
@pytest.mark.parametrize(("tp", "split"), [(1, (4,)), (2, (4,)), (2, (3, 1))])
def test_bytes_of_formats_do_not_overlap(device: Device, tp: int, split: tuple[int, ...]) -> None:
    model = plan_checks("torch", range(8), gpus=GPUS if device is Device.CUDA else ()).matrix[0].model
    element_bytes = 2 if device is Device.CUDA else 4
    for rank in range(tp * len(split)):
        ranges = [
            PlannedEngine(
                label="", model=model,
                configuration=ParallelConfig(tp=tp, pp=len(split), layer_split=split, weights=weights),
            ).parameter_bytes(rank, element_bytes=element_bytes)
            for weights in (WeightType.INT4, WeightType.INT8, WeightType.FLOAT16)
        ]  # fmt: skip
        assert ranges[0][1] < ranges[1][0]
        assert ranges[1][1] < ranges[2][0]


@pytest.mark.parametrize(
    ("text", "gpu_ids"), [("0-3", (0, 1, 2, 3)), ("6, 0-1", (0, 1, 6)), ("2", (2,)), ("1,1", (1,))]
)
def test_gpu_ids(text: str, gpu_ids: tuple[int, ...]) -> None:
    assert parse_gpu_ids(text) == gpu_ids


@pytest.mark.parametrize("text", ["", "a", "3-1", "0-", "-1", "0-9999", "1;2", "0,,1", "٣"])
def test_wrong_gpu_ids(text: str) -> None:
    with pytest.raises(InputError, match="--gpus"):
        parse_gpu_ids(text)


def test_results_are_json(tmp_path: Path) -> None:
    from maveriq.report.engine_checks import results_json

    results = [CheckResult(name="a", proves="b", outcome=failed("c"), seconds=1.25)]
    report = json.loads(json.dumps(results_json("torch", (0, 1), results, interrupted=False)))
    assert report["passed"] is False
    assert report["checks"] == [{"name": "a", "proves": "b", "result": "failed", "text": "c", "seconds": 1.25}]
    assert results_json("torch", (), [], interrupted=True)["passed"] is False
