"""What SLOs are multiples of: measured latencies, else estimates."""

from __future__ import annotations

import pytest

from maveriq.domain.gpu_kinds import gpu_sheet
from maveriq.domain.models import load_model
from maveriq.estimate.hardware_profile import load_profile
from maveriq.estimate.physics import PhysicsEstimator
from maveriq.estimate.sheet_profile import sheet_profile
from maveriq.scenario.slo_bases import slo_bases


def test_measured_bases_stay() -> None:
    profile = load_profile("a6000-short")
    bases = slo_bases(profile, [load_model("llama-2-7b")])
    assert bases("llama-2-7b", 20) == profile.slo_s("llama-2-7b", 20)


@pytest.mark.parametrize(("name", "gpus"), [("llama-3.1-8b", 1), ("mixtral-8x7b", 2), ("gpt-oss-120b", 1)])
def test_others_are_those_of_a_request_alone_on_the_fewest_gpus(name: str, gpus: int) -> None:
    profile, model = sheet_profile(gpu_sheet("H100")), load_model(name)
    base_s = slo_bases(profile, [model])(name, 20)
    estimator = PhysicsEstimator(profile)
    fitting = [
        at
        for at in estimator.configurations(model, gpus=8, batch_size=1)
        if (at.pp, at.ep, at.weights) == (1, 1, model.unconverted)
        and estimator.memory(model, at) <= at.gpus * (profile.capacity_bytes - profile.idle_bytes)
    ]
    assert fitting[0].gpus == gpus
    alone = estimator.service(model, fitting[0], prompt_tokens=profile.prompt_tokens, output_tokens=20, batch=1)
    assert base_s == pytest.approx(alone.latency_s)


def test_what_no_estimate_knows_has_no_base() -> None:
    profile = sheet_profile(gpu_sheet("L4"))
    assert slo_bases(profile, [])("unknown", 20) is None
    deep = load_model("deepseek-v3")
    assert slo_bases(sheet_profile(gpu_sheet("A100")), [deep])("deepseek-v3", 20) is None  # no fp8 there
