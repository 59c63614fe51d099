"""Fits of the online calibration to recorded engines: left-out runs, sockets, and contention."""

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from maveriq.calibration.fitting import start_calibration
from maveriq.calibration.online import RecordedService, _Predictions, cross_fit_online, errors_without
from maveriq.domain.models import ModelSpec, WeightType, load_model
from maveriq.domain.parallel import ParallelConfig
from maveriq.errors import InputError
from maveriq.estimate.calibration_file import Calibration, OnlineCalibration, OnlineTp, online_csv, read_online
from maveriq.scenario.build import build_system
from maveriq.scenario.options import Options
from maveriq.sim.simulator import simulate
from maveriq.testbed.engines import MAX_CO_LOCATED, RecordedEngine, engines_of

MODELS = ("llama-2-7b", "gptj-6b", "falcon-7b")


def as_benchmarked(_model: ModelSpec, _weights: WeightType) -> float:
    return 1.0


def live() -> tuple[Calibration, list[RecordedEngine]]:
    """Return a calibration with known online figures, and recorded engines that follow it."""
    tps = {
        "2": OnlineTp(all_reduce_us=7.0, ring_gb_s=20.0, across_us=25.0),
        "4": OnlineTp(all_reduce_us=20.0, ring_gb_s=15.0, across_us=40.0),
    }
    truth = msgspec.structs.replace(
        start_calibration(), online=OnlineCalibration(request_ms=30.0, gpus_per_socket=2, tp=tps)
    )
    requested = [
        RecordedService(
            run=f"run-{place % 3}",
            model=load_model(name),
            configuration=ParallelConfig(tp=len(gpu_ids), pp=1, weights=WeightType.INT8),
            gpu_ids=gpu_ids,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            service_s=1.0,
        )
        for place, (name, gpu_ids) in enumerate(
            (name, gpus) for name in MODELS for gpus in ((0,), (0, 1), (1, 2), (0, 1, 2, 3), (3, 2, 1, 0), (3,), (2, 3))
        )
        for prompt_tokens in (30, 600)
        for output_tokens in (20, 100)
    ]
    seconds = _Predictions(as_benchmarked, requested, gpus_per_socket=2).predict_s(truth)
    engines = []
    for first in range(0, len(requested), 4):  # four lengths, a dozen requests of each
        of_engine = requested[first : first + 4]
        engine = of_engine[0]
        engines.append(
            RecordedEngine(
                run=engine.run,
                model=engine.model,
                configuration=engine.configuration,
                gpu_ids=engine.gpu_ids,
                prompt_tokens=np.repeat([float(each.prompt_tokens) for each in of_engine], 12),
                output_tokens=np.repeat([float(each.output_tokens) for each in of_engine], 12),
                service_s=np.repeat(seconds[first : first + 4], 12),
                busy_shares=np.eye(MAX_CO_LOCATED + 1)[np.zeros(48, dtype=int)],
            )
        )
    return truth, engines


def test_online_figures_are_recovered_and_cross_validated() -> None:
    truth, recorded = live()
    benchmark = msgspec.structs.replace(truth, online=None)
    online, without = cross_fit_online(as_benchmarked, benchmark, recorded, gpus_per_socket=2)
    assert online.request_ms == pytest.approx(30, rel=0.01)
    assert online.tp["2"].across_us == pytest.approx(25, rel=0.05)
    assert set(online.tp) == {"2", "4"}  # there are no recordings of TP 8
    assert set(without) == {"run-0", "run-1", "run-2"}
    # A median over four lengths is not quite the time at the median lengths.
    assert max(errors_without(as_benchmarked, benchmark, recorded, without)) < 1


def with_contention(engine: RecordedEngine, longer: float = 1.0) -> RecordedEngine:
    """Return the engine with one busy co-located engine during all requests, and longer service times."""
    always = np.eye(MAX_CO_LOCATED + 1)[np.ones(len(engine.service_s), dtype=int)]
    return replace(engine, busy_shares=always, service_s=longer * engine.service_s)


def test_runs_without_tensor_parallelism_are_cross_validated(tmp_path: Path) -> None:
    truth, recorded = live()
    single_gpu = [engine for engine in recorded if engine.configuration.tp == 1]
    _, without = cross_fit_online(as_benchmarked, msgspec.structs.replace(truth, online=None), single_gpu, 2)
    assert [online.tp for online in without.values()] == [{}, {}, {}]
    (tmp_path / "served.csv").write_text(online_csv(without))
    assert read_online(tmp_path / "served.csv") == without


def test_contended_runs_determine_only_the_contention() -> None:
    truth, recorded = live()
    benchmark = msgspec.structs.replace(truth, online=None)
    single_gpu = [engine for engine in recorded if engine.configuration.tp == 1]
    contended = [with_contention(engine, 1.2) if engine.run == "run-0" else engine for engine in single_gpu]
    online, without = cross_fit_online(as_benchmarked, benchmark, contended, 2)
    assert online.request_ms == pytest.approx(30, rel=0.01)
    assert online.contention.layer_us > 10
    assert online.contention.turn_us == 0  # no engine has two co-located engines
    assert without["run-0"].contention.layer_us == 0
    assert len(errors_without(as_benchmarked, benchmark, contended, without)) == sum(
        engine.run != "run-0" for engine in single_gpu
    )
    with pytest.raises(InputError, match="requests without contention"):
        cross_fit_online(as_benchmarked, benchmark, [with_contention(engine) for engine in single_gpu], 2)


def test_engines_of_a_run_folder() -> None:
    record = simulate(build_system(Options(scale=0.05)))
    found = engines_of("mine", record)
    assert [engine.model.name for engine in found] == ["llama-2-70b", "falcon-40b", "llama-2-7b", "falcon-40b"]
    assert {(engine.run, *engine.output_tokens.tolist()[:1]) for engine in found} == {("mine", 20)}
    assert [len(engine.gpu_ids) for engine in found] == [4, 4, 1, 4]
    assert all(0.1 < service_s < 1 for engine in found for service_s in engine.service_s.tolist())
    assert all(engine.uncontended.all() for engine in found)  # a single-GPU engine has no co-located engine here
