"""Planned profiles: measured, interrupted and gone on with, written, read, and planned with."""

import asyncio
import json
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from fixtures import MODEL
from profile_engines import MACHINE, PLAIN, Interrupted, KnownSteps, KnownTimes, TrueMemory, parts, truth, wanted

import maveriq
from maveriq.domain.models import ModelSpec, load_model
from maveriq.errors import InputError
from maveriq.estimate.blended_steps import continuous_estimator
from maveriq.estimate.engine_presets import engine_preset
from maveriq.estimate.fitted_profile import load_any_profile
from maveriq.estimate.profile_file import (
    FORMAT,
    VERSION,
    CaseRecord,
    EngineRecord,
    ModelRecord,
    ProfileFile,
    read_profile_file,
)
from maveriq.exec.engines.continuous import CONTINUOUS_BACKENDS
from maveriq.exec.gpus import Devices
from maveriq.exec.model_files import hf_config_json
from maveriq.planning import PlanOptions, rank_configurations
from maveriq.policy.alpaserve.problem import GroupShape
from maveriq.profiling.execute import Bench, Repeats, execute, run_records
from maveriq.profiling.measure import Probe
from maveriq.profiling.plan import plan_profile
from maveriq.profiling.session import LOG_NAME, Session, open_session, session_start
from maveriq.profiling.short_models import ShortModels
from maveriq.scenario.placement_problems import load_problem
from maveriq.streams import generator

OPTIONS = "options"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(hf_config_json(replace(MODEL, context_tokens=1024)))
    return load_model(str(folder))


def measure(
    folder: Path, model: ModelSpec, launcher: KnownTimes, options: str = OPTIONS, backend: str = "torch", **more: Any
) -> ProfileFile:
    """Measure a plan of a model in a folder, or go on with it."""
    start = session_start(
        options=options,
        made_at="2026-11-28T12:00:00+00:00",
        machine=MACHINE,
        engine=EngineRecord(name=backend),
        models=(ModelRecord(name=model.name, config_json=model.config_json),),
        plan=plan_profile(wanted(model, **more), parts()),
    )
    bench = Bench(
        launcher=launcher,
        devices=Devices(),
        probe=Probe(),
        short_models=ShortModels({}, backend, folder),
        memory=TrueMemory(),
        repeats=Repeats(),
        side_by_side=4,
        by_steps=backend in CONTINUOUS_BACKENDS,
    )
    with open_session(folder, start) as session:
        asyncio.run(execute(session, {model.name: model}, bench, lambda _text: None))
        return profile_of(session)


def profile_of(session: Session) -> ProfileFile:
    start = session.start
    return ProfileFile(
        format=FORMAT, version=VERSION, name="mine", made_at=start.made_at, made_by="test", machine=start.machine,
        engine=start.engine, models=start.models, runs=run_records(session),
    )  # fmt: skip


def sampled(profile: ProfileFile) -> list[list[CaseRecord]]:
    """Return what was measured, but not when."""
    return [[msgspec.structs.replace(case, at_s=()) for case in run.cases] for run in profile.runs]


def test_a_measured_plan_answers_for_the_whole_model(tmp_path: Path, model: ModelSpec) -> None:
    profile = measure(tmp_path, model, KnownTimes(model))
    path = tmp_path / "profile.json"
    path.write_bytes(msgspec.json.encode(profile))
    assert read_profile_file(path) == profile
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(model.config_json), "_name_or_path": model.name}))
    options = PlanOptions(profile=str(path), gpus="1xcpu", prompt_tokens=64, output_tokens=20, float16_only=True)
    ranked = rank_configurations(config, options)
    assert ranked.estimator == "blended"
    assert not ranked.failure
    best = ranked.ranking.candidates[0]
    right = truth().service(model, best.configuration, prompt_tokens=64, output_tokens=20, batch=1)
    assert best.service.latency_s == pytest.approx(right.latency_s, rel=0.05)


def test_engines_that_batch_continuously_are_measured_step_by_step(tmp_path: Path, model: ModelSpec) -> None:
    launcher = KnownSteps(model)
    profile = measure(tmp_path, model, launcher, backend="vllm", prompt_tokens=(16, 64))
    path = tmp_path / "profile.json"
    profile = msgspec.structs.replace(profile, engine=EngineRecord(name="vllm", version="0.32.0"))
    path.write_bytes(msgspec.json.encode(profile))
    spec = SimpleNamespace(config_json=model.config_json)
    for run in profile.runs:
        spec.config_json = json.dumps({**json.loads(model.config_json), "num_hidden_layers": len(run.layers)})
        for case in run.cases:
            prompts = [case.prompt_tokens] * case.batch
            assert case.first_s[0] == pytest.approx(launcher.step_s(spec, [], prompts))  # type: ignore[arg-type]
            decoding = [case.prompt_tokens + case.output_tokens // 2] * case.batch
            assert case.each_s[0] == pytest.approx(launcher.step_s(spec, decoding, []), rel=0.01)  # type: ignore[arg-type]
            mixed_s = launcher.step_s(spec, decoding, prompts[:1])  # type: ignore[arg-type]
            assert case.mixed_s[0] == pytest.approx(mixed_s, rel=0.02)
    read = load_any_profile(str(path))
    assert 0.9 * KnownSteps.ADMISSION_S < read.admission_s < 1  # more where this process had to wait for a core
    timer = continuous_estimator(read, engine_preset("vllm-0.32.0"), node_gpus=None).step_timer(model, PLAIN)
    true = launcher.steps.step_timer(model, PLAIN)
    for step in ((1, 100, ()), (4, 300, ()), (0, 0, [(50, 0)]), (3, 120, [(60, 0)])):
        assert timer.step(*step) == pytest.approx(true.step(*step), rel=0.1)


@pytest.mark.heavy
def test_a_run_says_whose_steps_are_computed_and_whose_are_measured(tmp_path: Path, model: ModelSpec) -> None:
    profile = measure(tmp_path, model, KnownSteps(model), backend="vllm", prompt_tokens=(16, 64))
    profile = msgspec.structs.replace(profile, engine=EngineRecord(name="vllm", version="0.32.0"))
    (tmp_path / "mine.json").write_bytes(msgspec.json.encode(profile))
    (tmp_path / "config.json").write_text(model.config_json)
    runs = {}
    for version in ("0.31.0", "0.12.0"):
        (tmp_path / "set.toml").write_text(
            f'name = "mine"\n[[models]]\nmodel = "config.json"\ntp = 1\n[models.engine]\nkind = "vllm"\n'
            f'version = "{version}"\n'
        )
        runs[version] = maveriq.simulate(
            models=str(tmp_path / "set.toml"), gpus="1xcpu", profile=str(tmp_path / "mine.json"), trace="synthetic",
            rate=2, duration_s=5, prompt_tokens=100, output_tokens=20,
        )  # fmt: skip
    notes = {version: " ".join(run.meta["notes"]) for version, run in runs.items()}
    assert "steps of vllm-0.12.0 are computed: profile mine measured vllm-0.32.0" in notes["0.12.0"]
    assert "are computed: profile" not in notes["0.31.0"]


@pytest.mark.parametrize("seed", range(20))
def test_interrupted_anywhere_it_goes_on_with_the_same_plan_and_the_same_samples(
    tmp_path: Path, model: ModelSpec, seed: int
) -> None:
    whole = KnownTimes(model)
    expected = measure(tmp_path / "whole", model, whole)
    stop_after = int(generator(seed, "interruptions").integers(0, len(whole.answers)))
    folder = tmp_path / "interrupted"
    with pytest.raises(Interrupted):
        measure(folder, model, KnownTimes(model, stop_after=stop_after))
    log = folder / LOG_NAME
    if seed % 2:  # as after kill -9 while a line was written
        log.write_bytes(log.read_bytes() + b'{"type":"sample","run":0,"ca')
    rest = KnownTimes(model)
    found = measure(folder, model, rest)
    assert sampled(found) == sampled(expected)
    assert set(rest.answers) <= set(whole.answers)


def test_a_log_of_other_options_is_not_continued(tmp_path: Path, model: ModelSpec) -> None:
    with pytest.raises(Interrupted):
        measure(tmp_path, model, KnownTimes(model, stop_after=3))
    with pytest.raises(InputError, match="holds an unfinished profile of other options"):
        measure(tmp_path, model, KnownTimes(model), options="others")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "must be 1|Invalid enum value 2|version"),
        ({"more": 1}, "unknown key `more`"),
        ({"models": []}, "a run is of model .*, which is not among its models"),
        ({"machine": {"kind": "../../etc", "memory_gib": 4}}, "kind"),
        ({"machine": {"kind": "cpu", "memory_gib": 4}}, "has no data sheet, and the profile no speeds"),
        ({"engine": {"name": "other"}}, "unknown engine 'other'"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, model: ModelSpec, change: dict[str, object], message: str) -> None:
    profile = msgspec.to_builtins(measure(tmp_path, model, KnownTimes(model)))
    path = tmp_path / "changed.json"
    path.write_text(json.dumps({**profile, **change}))
    with pytest.raises(InputError, match=message):
        load_any_profile(str(path))


@pytest.mark.heavy
@pytest.mark.skipif(find_spec("torch") is None, reason="needs torch")
def test_killed_twenty_times_a_profile_of_torch_engines_goes_on(tmp_path: Path) -> None:
    config = {**json.loads(hf_config_json(MODEL)), "max_position_embeddings": 512}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    folder, draw = tmp_path / "mine", generator(0, "kills")
    command = [
        sys.executable, "-m", "maveriq", "profile", str(tmp_path / "model"), "--prompt-tokens", "8,32",
        "--batch-size", "1,2", "--repeats", "12", "--most-repeats", "12", "--out", str(folder),
    ]  # fmt: skip
    plans = set()
    for _ in range(20):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            lines = lines_of(folder / LOG_NAME) + int(draw.integers(1, 8))
            while process.poll() is None and lines_of(folder / LOG_NAME) < lines:
                time.sleep(0.01)
            process.kill()
        if not (folder / LOG_NAME).exists():
            break
        plans.add((folder / LOG_NAME).read_text().partition("\n")[0])
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    profile = read_profile_file(folder / "profile.json")
    plan = msgspec.json.decode(plans.pop())["plan"]
    assert not plans
    assert [run["layers"] for run in plan["runs"]] == [list(run.layers) for run in profile.runs]
    chosen = [[case["prompt_tokens"] for case in run["cases"]] for run in plan["runs"]]
    assert [[case.prompt_tokens for case in run.cases] for run in profile.runs] == chosen
    assert all(len(case.first_s) == 12 for run in profile.runs for case in run.cases)
    assert [path.name for path in folder.iterdir()] == ["profile.json"]


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_placement_is_searched_with_a_planned_profile(tmp_path: Path, model: ModelSpec) -> None:
    path = tmp_path / "profile.json"
    path.write_bytes(msgspec.json.encode(measure(tmp_path, model, KnownTimes(model))))
    (tmp_path / model.name).mkdir()
    (tmp_path / model.name / "config.json").write_text(model.config_json)
    problem = {
        "gpus": 2, "models": [{"name": "a", "model": f"{model.name}/config.json"}], "workload": "requests.csv",
    }  # fmt: skip
    (tmp_path / "problem.json").write_text(json.dumps(problem))
    (tmp_path / "requests.csv").write_text("arrival_s,model,slo_s\n0.5,a,1\n")
    placed = load_problem(tmp_path / "problem.json", load_any_profile(str(path))).problem
    assert placed.memory_bytes == 4 * 2**30
    stage = placed.models[0].profile.shapes[GroupShape(1, 1)]
    service = truth().service(model, PLAIN, prompt_tokens=512, output_tokens=128, batch=1)
    assert stage.slowest_stage_s == pytest.approx(service.latency_s, rel=0.3)
