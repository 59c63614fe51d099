"""Recorded engines: co-located busy engines, and fits of contention."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from maveriq.calibration.online import contended_s, fit_contention, read_recorded, uncontended_medians
from maveriq.errors import InputError
from maveriq.estimate.calibration_file import ContentionCosts
from maveriq.testbed.engines import RecordedEngine, read_engines

ENGINES = (
    "run,model_id,model,deploy_s,deployed,registered_s,tp,pp,layer_split,weight_dtype,int8_kv,gpus,est_gib_per_gpu,"
    "used_gib_after\n"
    "one,1,llama-2-7b,0,1,,1,1,32,int4,1,0,4,\n"
    "one,2,gptj-6b,0,1,,1,1,28,int4,0,1,4,\n"
    "one,3,llama-2-7b,0,1,,2,1,32,int4,1,2 3,4 4,\n"
    "one,4,falcon-7b,0,0,,,,,,,,,\n"
    "two,1,gptj-6b,0,1,,1,1,28,int4,0,1,4,\n"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four engines; the first is busy from 10 to 14 s, the others at the same time, the last in another run."""
    requests = {("one", 1): (10, 14), ("one", 2): (11, 12), ("one", 3): (9, 20), ("two", 1): (10, 14)}
    scheduled = ["run,req_id,model_id,scheduled_s,prompt_chars", "one,1,4,8,999"]  # dropped: its model never started
    completed = ["run,req_id,model_id,arrival_s,latency_s,service_s"]
    admitted = {"one": 0, "two": 0}
    for number, ((run, model_id), (start_s, finish_s)) in enumerate(requests.items(), start=2):
        admitted[run] += 1
        scheduled.append(f"{run},{number},{model_id},{start_s - 1},{40 * model_id}")
        completed.append(
            f"{run},{admitted[run]},{model_id},{start_s - 1},{finish_s - start_s + 1},{finish_s - start_s}"
        )
    (tmp_path / "deployments.csv").write_text(ENGINES)
    for name, lines in (("scheduled", scheduled), ("completed", completed)):
        (tmp_path / f"{name}.csv.gz").write_bytes(gzip.compress("\n".join([*lines, ""]).encode()))
    return tmp_path


def test_co_located_engines_are_those_on_one_gpu_in_the_same_run(folder: Path) -> None:
    first, second, several, elsewhere = read_engines(folder)
    assert first.busy_shares[0, :3].tolist() == pytest.approx([0.75, 0.25, 0])
    assert second.busy_shares[0, :3].tolist() == pytest.approx([0, 1, 0])
    for lonely in (several, elsewhere):
        assert lonely.busy_shares[0].tolist() == pytest.approx([1] + 7 * [0])
    assert (first.prompt_tokens.tolist(), several.prompt_tokens.tolist()) == ([10], [30])
    assert [engine.uncontended.tolist() for engine in (first, second, several)] == [[False], [False], [True]]


def test_an_invalid_table_is_refused(folder: Path) -> None:
    (folder / "deployments.csv").write_text("run,model_id\n")
    with pytest.raises(InputError, match="recorded deployments"):
        read_engines(folder)


def engine(model: str, busy_shares: np.ndarray, service_s: np.ndarray, folder: Path) -> RecordedEngine:
    like = next(engine for engine in read_engines(folder) if engine.model.name == model)
    return RecordedEngine(
        run=like.run,
        model=like.model,
        configuration=like.configuration,
        gpu_ids=like.gpu_ids,
        prompt_tokens=np.linspace(10, 100, len(service_s)),
        output_tokens=np.full(len(service_s), 20.0),
        service_s=service_s,
        busy_shares=busy_shares,
    )


def test_a_fit_recovers_the_contention(folder: Path) -> None:
    truth, random = ContentionCosts(layer_us=30.0, turn_us=4000.0), np.random.default_rng(1)
    engines = []
    for model in ("llama-2-7b", "gptj-6b"):
        busy_shares = random.dirichlet(np.full(8, 0.3), 400)
        busy_shares[:100] = np.eye(8)[0]
        shape = engine(model, busy_shares, np.ones(400), folder).model
        counts = np.arange(8)
        waits_s = 1e-6 * (shape.layers * truth.layer_us * (counts > 0) + truth.turn_us * np.maximum(counts - 1, 0))
        alone_s = np.full(400, 0.2)
        # It takes a tenth longer even alone, which is not due to contention.
        taken_s = contended_s(1.1 * alone_s, busy_shares, waits_s, np.full(400, 20.0)) * np.exp(
            0.01 * random.standard_normal(400)
        )
        engines.append((engine(model, busy_shares, taken_s, folder), alone_s))
    found = fit_contention(engines)
    assert found.layer_us == pytest.approx(truth.layer_us, rel=0.1)
    assert found.turn_us == pytest.approx(truth.turn_us, rel=0.02)


def test_engines_without_contention_do_not_affect_its_fit(folder: Path) -> None:
    lonely = engine("gptj-6b", np.eye(8)[np.zeros(20, dtype=int)], np.ones(20), folder)
    assert fit_contention([(lonely, np.ones(20))]) == ContentionCosts(layer_us=0.0, turn_us=0.0)


def test_medians_use_uncontended_requests_by_prompt_length(folder: Path) -> None:
    busy_shares = np.eye(8)[np.array([0] * 48 + [3] * 10)]
    service_s = np.append(np.linspace(1, 2, 48), np.full(10, 9.0))
    found = list(uncontended_medians(engine("gptj-6b", busy_shares, service_s, folder), bands=4))
    assert [execution.service_s for execution in found] == pytest.approx([1.117, 1.372, 1.628, 1.883], abs=1e-3)
    assert [execution.prompt_tokens for execution in found] == sorted(execution.prompt_tokens for execution in found)
    assert not list(uncontended_medians(engine("gptj-6b", busy_shares[40:], service_s[40:], folder), bands=4))
    # One contended request per engine is too few.
    assert [execution.configuration.gpus for execution in read_recorded(folder)] == [2, 1]
