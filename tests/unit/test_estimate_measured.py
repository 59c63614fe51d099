"""The estimator of measurements, with a small profile."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from profile_fixtures import write_profile

from maveriq.domain.models import KvType, ModelSpec, WeightType
from maveriq.domain.parallel import ParallelConfig
from maveriq.errors import InputError
from maveriq.estimate.hardware_profile import HardwareProfile, load_profile
from maveriq.estimate.measured import MeasuredEstimator
from maveriq.estimate.registry import make_estimator
from maveriq.scenario.build import build_system
from maveriq.scenario.options import Options
from maveriq.sim.simulator import simulate
from maveriq.units import bytes_from_gib

TINY = ModelSpec(
    name="tiny", architecture="llama", layers=4, hidden_size=64, attention_heads=4, kv_heads=4, intermediate_size=128,
    vocab_size=256,
)  # fmt: skip
TP2 = ParallelConfig(tp=2, pp=1, weights=WeightType.FLOAT16)
ROWS = """\
tiny,float16,native,2,1,1,16,0.010,0.002,0.25
tiny,float16,native,2,1,1,64,0.022,0.002,0.25
tiny,float16,native,2,1,1,128,0.038,0.003,0.26
tiny,float16,native,2,1,4,16,0.040,0.005,0.50
tiny,int8,int8,1,3,1,16,0.030,0.008,0.10
"""


@pytest.fixture
def profile(tmp_path: Path) -> HardwareProfile:
    return load_profile(str(write_profile(tmp_path, ROWS)))


def service(estimator: MeasuredEstimator, *, prompt: int, batch: int = 1, output: int = 10) -> float:
    return estimator.service(TINY, TP2, prompt_tokens=prompt, output_tokens=output, batch=batch).latency_s


def test_measured_points_are_exact_and_others_interpolated(profile: HardwareProfile) -> None:
    measured = MeasuredEstimator(profile)
    assert service(measured, prompt=16) == pytest.approx(0.010 + 10 * 0.002)
    assert service(measured, prompt=128) == pytest.approx(0.038 + 10 * 0.003)
    assert service(measured, prompt=40) == pytest.approx(0.016 + 10 * 0.002)
    assert service(measured, prompt=192) == pytest.approx(0.054 + 10 * 0.004)  # extrapolated from the last segment
    assert service(measured, prompt=16, batch=4) == pytest.approx(0.040 + 10 * 0.005)
    assert service(measured, prompt=16, batch=2) == pytest.approx(0.020 + 10 * 0.003)
    assert measured.memory(TINY, TP2) == bytes_from_gib(0.26)
    assert measured.memory(TINY, replace(TP2, batch_size=2)) == bytes_from_gib(0.50)


def test_noise_is_not_extrapolated(tmp_path: Path) -> None:
    rows = "tiny,float16,native,2,1,1,8,0.010,0.016,0.25\ntiny,float16,native,2,1,1,32,0.030,0.013,0.25\n"
    measured = MeasuredEstimator(load_profile(str(write_profile(tmp_path, rows))))
    far, near = (measured.service(TINY, TP2, prompt_tokens=prompt, output_tokens=10, batch=1) for prompt in (2_000, 1))
    assert (far.tpot_s, near.tpot_s) == (
        0.013,
        0.016,
    )  # noise: the measured TPOT falls, but extrapolation does not continue that
    assert far.ttft_s == pytest.approx(0.030 + 1968 / 24 * 0.020)
    assert near.ttft_s == pytest.approx(0.010 - 7 / 24 * 0.020)


def test_extrapolated_times_are_not_negative(tmp_path: Path) -> None:
    rows = "tiny,float16,native,2,1,1,256,0.010,0.001,0.25\ntiny,float16,native,2,1,1,300,0.030,0.013,0.25\n"
    measured = MeasuredEstimator(load_profile(str(write_profile(tmp_path, rows))))
    near = measured.service(TINY, TP2, prompt_tokens=1, output_tokens=10, batch=1)
    assert (near.ttft_s, near.tpot_s) == (0, 0)


@given(prompt=st.integers(16, 128), output=st.integers(1, 100))
def test_estimates_lie_between_measured_points(
    prompt: int, output: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = write_profile(tmp_path_factory.mktemp("profile"), ROWS)
    measured = MeasuredEstimator(load_profile(str(path)))
    shortest, longest = (service(measured, prompt=end, output=output) for end in (16, 128))
    assert shortest - 1e-9 <= service(measured, prompt=prompt, output=output) <= longest + 1e-9


@pytest.mark.parametrize(
    ("configuration", "message"),
    [
        (replace(TP2, tp=1), "2 other configurations of it were, such as TP 2 x PP 1 float16"),
        (replace(TP2, batch_size=8), "never measured with batches of 8 or more"),
        (replace(TP2, kv=KvType.INT8), "never measured"),
    ],
)
def test_unmeasured_configurations_are_refused(
    profile: HardwareProfile, configuration: ParallelConfig, message: str
) -> None:
    measured = MeasuredEstimator(profile)
    assert message in str(measured.why_not(TINY, configuration))
    with pytest.raises(InputError, match="cannot be estimated"):
        measured.memory(TINY, configuration)
    assert "has measurements of tiny" in str(measured.why_not(replace(TINY, name="huge"), TP2))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("tiny,float16,native,2,1,1,16,0.010,0.002,0.25", "says again"),
        ("tiny,float16,native,2,1,1,0,0.010,0.002,0.25", "prompt_tokens must be a whole number"),
        ("tiny,float16,native,2,1,1,17,nan,0.002,0.25", "ttft_s must be a finite number"),
        ("tiny,fp16,native,2,1,1,17,1,0.002,0.25", "weights must be one of"),
    ],
)
def test_a_wrong_table_is_refused(tmp_path: Path, row: str, message: str) -> None:
    profile = load_profile(str(write_profile(tmp_path, ROWS + row + "\n")))
    with pytest.raises(InputError, match=message):
        MeasuredEstimator(profile)


def test_a_profile_without_measurements_names_what_is_missing() -> None:
    with pytest.raises(InputError, match="no table of measurements"):
        make_estimator("measured", load_profile("a6000-short"))


def test_a_custom_model_is_simulated_from_its_measurements(tmp_path: Path) -> None:
    profile = write_profile(tmp_path, ROWS)
    shape = {"model_type": "llama", "num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4}
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(shape | {"vocab_size": 256, "intermediate_size": 128}))
    models = tmp_path / "set.toml"
    models.write_text('name = "mine"\n[[models]]\nmodel = "tiny/config.json"\nload_at = 0\n')
    (tmp_path / "s.csv").write_text("arrival_s,endpoint,prompt_tokens,output_tokens\n5,1,16,10\n6,1,64,10\n")
    options = Options(
        trace=str(tmp_path / "s.csv"), models=str(models), gpus="3xcpu", profile=str(profile), intent="min-latency",
        estimator="measured", service_times="measured",
    )  # fmt: skip
    run = simulate(build_system(options))
    assert str(run.deployments[0].plan and run.deployments[0].plan.configuration) == "TP 2 x PP 1 float16"
    services = (run.requests.finish_us - run.requests.start_us).tolist()
    assert services == [30_000, 42_000]
