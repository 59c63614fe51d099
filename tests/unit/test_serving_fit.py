"""Fits to recorded requests find the times that made them, and say what the requests do not tell."""

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from maveriq.calibration.deployment import Deployment
from maveriq.calibration.recorded_requests import read_recorded, recorded_requests
from maveriq.calibration.serving_fit import FIELDS, PRIORS, RecordedRequests, fit_times
from maveriq.domain.gpu_kinds import gpu_sheet
from maveriq.domain.models import WeightType, load_model
from maveriq.domain.parallel import ParallelConfig
from maveriq.domain.requests import Request
from maveriq.engine.vllm_settings import VllmSettings
from maveriq.errors import InputError
from maveriq.estimate.cluster_profiles import profiles_for
from maveriq.estimate.engine_presets import EngineTimes, engine_preset
from maveriq.estimate.fitted_profile import fitted_profile_toml, load_any_profile
from maveriq.estimate.physics import PhysicsEstimator
from maveriq.estimate.sheet_profile import sheet_profile

DEPLOYMENT = Deployment(
    model=load_model("llama-3.1-8b"),
    configuration=ParallelConfig(tp=1, pp=1, weights=WeightType.FLOAT16),
    settings=VllmSettings(
        version="0.23.0", max_num_seqs=64, max_num_batched_tokens=2048, max_model_len=8192, num_gpu_blocks=8192
    ),
    profile=sheet_profile(gpu_sheet("H100-SXM")),
)
START = engine_preset("vllm-2026").times
TRUE = msgspec.structs.replace(START, step_us=START.step_us + 400, prefill_factor=1.2, api_us=9000.0)


def recorded(times: EngineTimes, requests: list[Request]) -> RecordedRequests:
    found = DEPLOYMENT.replay(requests, times)
    return RecordedRequests(
        name="made", group="8b", deployment=DEPLOYMENT, requests=requests, ttft_s=found.ttft_s, e2e_s=found.e2e_s,
        warm_up=5,
    )  # fmt: skip


def load(count: int, *, seed: int = 3) -> list[Request]:
    """Requests of many lengths, at a rate that grows."""
    random = np.random.default_rng(seed)
    gaps_us = random.exponential(120_000, count) / np.linspace(0.5, 2.5, count)
    return [
        Request(
            request_id=number, endpoint_id=1, arrival_us=int(at), prompt_tokens=int(random.integers(50, 2500)),
            output_tokens=int(random.integers(5, 90)),
        )
        for number, at in enumerate(np.cumsum(gaps_us), start=1)
    ]  # fmt: skip


def test_a_fit_finds_the_times_that_made_the_requests():
    fitted = fit_times([recorded(TRUE, load(150))], START, ("step_us", "prefill_factor", "api_us"))
    for name in fitted.free:
        off, uncertainty = (
            abs(getattr(fitted.times, name) - getattr(TRUE, name)),
            getattr(fitted.times.uncertainty, name),
        )
        assert off < 0.4 * abs(getattr(START, name) - getattr(TRUE, name))
        assert off < 2.5 * uncertainty
        assert 0 < uncertainty < PRIORS[name].deviation
    assert set(fitted.identified) == set(fitted.free)
    assert np.mean(np.abs(list(fitted.errors["made"].values()))) < 0.02


def test_what_was_not_fitted_stays_and_has_no_uncertainty():
    fitted = fit_times([recorded(START, load(40))], START, ("api_us",))
    for name in set(FIELDS) - {"api_us"}:
        assert getattr(fitted.times, name) == getattr(START, name)
        assert getattr(fitted.times.uncertainty, name) == 0


def test_lone_requests_of_one_length_do_not_tell_a_step_from_its_sequence():
    requests = [
        Request(request_id=number, endpoint_id=1, arrival_us=3_000_000 * number, prompt_tokens=500, output_tokens=40)
        for number in range(1, 13)
    ]
    fitted = fit_times([recorded(START, requests)], START, ("step_us", "sequence_us", "kernel_factor"))
    assert "sequence_us" not in fitted.identified
    assert abs(fitted.times.sequence_us - START.sequence_us) < PRIORS["sequence_us"].deviation


def test_a_fit_needs_requests_and_known_times():
    with pytest.raises(InputError, match="nothing was measured"):
        fit_times([], START)
    with pytest.raises(InputError, match="no time 'speed'"):
        fit_times([recorded(START, load(20))], START, ("speed",))
    with pytest.raises(InputError, match="a fit needs more"):
        replace(recorded(START, load(10)), warm_up=8)


def test_a_profile_of_fitted_times_comes_back_and_stands_for_its_preset(tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_text(fitted_profile_toml("mine", "H100-SXM", {"vllm-2026": TRUE}, source="a test"))
    profile = load_any_profile(str(path))
    assert (profile.name, profile.gpu_kind) == ("mine", "H100-SXM")
    assert profile.engine_times["vllm-2026"].step_us == pytest.approx(TRUE.step_us, rel=1e-3)
    profiles = profiles_for(str(path), "1xH100-SXM")
    assert PhysicsEstimator(profiles.main, engine_preset("vllm-0.23.0")).engine.api_us == 9000
    other = engine_preset("vllm-0.11.0")
    assert PhysicsEstimator(profiles.main, other).engine == other


@pytest.mark.parametrize(
    ("preset", "gpu", "says"), [("vllm-1999", "H100-SXM", "vllm-1999"), ("vllm-2026", "Z80", "Z80")]
)
def test_a_profile_of_an_unknown_preset_or_gpu_is_refused(tmp_path: Path, preset: str, gpu: str, says: str):
    path = tmp_path / "x.toml"
    path.write_text(fitted_profile_toml("x", gpu, {preset: TRUE}, source="a test"))
    with pytest.raises(InputError, match=says):
        load_any_profile(str(path))


def test_a_profile_of_fitted_times_without_one_of_them_is_refused(tmp_path: Path):
    path = tmp_path / "x.toml"
    path.write_text('name = "x"\ngpu = "H100-SXM"\n[engine_times.vllm-2026]\nstep_us = 1\n')
    with pytest.raises(InputError, match="missing key"):
        load_any_profile(str(path))


HEADER = "arrival_s,prompt_tokens,output_tokens,ttft_s,e2e_s,note\n"


def test_recorded_requests_are_read_by_either_name_and_in_order(tmp_path: Path):
    path = tmp_path / "r.csv"
    path.write_text("send_s,input_tokens,output_tokens,ttft_s,latency_s,prompt_id\n2,30,4,.2,.5,b\n1,20,3,.1,.4,a\n")
    found = read_recorded(path)
    assert found.arrival_s.tolist() == [1, 2]
    assert (found.prompt_tokens.tolist(), found.output_tokens.tolist()) == ([20, 30], [3, 4])
    assert (found.ttft_s.tolist(), found.e2e_s.tolist()) == ([0.1, 0.2], [0.4, 0.5])
    assert len(set(found.prompt_id.tolist())) == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("arrival_s,prompt_tokens,output_tokens,ttft_s\n0,1,1,1\n", "no column e2e_s or latency_s"),
        (f"{HEADER}0,10,2,0.5,0.4,\n", "line 2: e2e_s is less than ttft_s"),
        (f"{HEADER}0,10,2,0.1,0.4,\n1,0,2,0.1,0.4,\n", "line 3"),
        (f"{HEADER}0,10,2,zero,0.4,\n", "line 2"),
    ],
)
def test_wrong_recorded_requests_are_refused_with_their_place(tmp_path: Path, text: str, says: str):
    path = tmp_path / "r.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=says):
        read_recorded(path)


def test_a_tenth_of_recorded_requests_warms_up(tmp_path: Path):
    path = tmp_path / "r.csv"
    path.write_text(HEADER + "".join(f"{number},10,2,0.1,0.4,\n" for number in range(50)))
    assert recorded_requests(path, DEPLOYMENT).warm_up == 5
    assert recorded_requests(path, DEPLOYMENT, warm_up=0).warm_up == 0
