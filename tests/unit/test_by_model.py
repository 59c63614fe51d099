"""Sets of measured and unmeasured models: each has the best estimator that is known of it."""

from __future__ import annotations

from pathlib import Path

import pytest

import maveriq
from maveriq.domain.models import load_model
from maveriq.domain.requests import RequestStatus
from maveriq.errors import UnknownNameError
from maveriq.estimate.estimator import own_estimator
from maveriq.estimate.hardware_profile import load_profile
from maveriq.estimate.registry import default_estimator, make_estimator, note_on_default
from maveriq.planning import PlanOptions, rank_configurations

PROFILE = load_profile("a6000-short")
MEASURED, OTHER = load_model("llama-2-7b"), load_model("qwen3-8b")
LENGTHS = {"prompt_tokens": 100, "output_tokens": 20, "batch": 1}


def test_the_default_depends_on_what_was_measured() -> None:
    assert default_estimator(PROFILE, [MEASURED]) == default_estimator(PROFILE) == "calibrated"
    assert default_estimator(PROFILE, [OTHER]) == "physics"
    assert default_estimator(PROFILE, [MEASURED, OTHER]) == "calibrated/physics"
    assert note_on_default(PROFILE, [MEASURED]) is None
    note = note_on_default(PROFILE, [MEASURED, OTHER]) or ""
    assert note.startswith("nothing of qwen3-8b was measured on A6000: estimates of that rest on the data sheet")


def test_each_model_is_estimated_as_if_it_were_alone() -> None:
    both = make_estimator("calibrated/physics", PROFILE)
    assert both.name == "calibrated/physics"
    for model, name in ((MEASURED, "calibrated"), (OTHER, "physics")):
        alone = make_estimator(name, PROFILE)
        ranking = rank_configurations(model.name, PlanOptions(gpus="2xA6000")).ranking
        at = ranking.candidates[0].configuration
        assert both.service(model, at, **LENGTHS) == alone.service(model, at, **LENGTHS)
        assert both.memory(model, at) == alone.memory(model, at)
        assert own_estimator(both, model).name == name
    assert both.why_not(MEASURED, at) == make_estimator("calibrated", PROFILE).why_not(MEASURED, at)


@pytest.mark.parametrize("name", ["calibrated/fysics", "fysics/physics", "calibrated/", "a/b/c"])
def test_wrong_names_are_refused(name: str) -> None:
    with pytest.raises(UnknownNameError, match="unknown estimator"):
        make_estimator(name, PROFILE)


def test_a_set_of_both_is_simulated_without_options(tmp_path: Path) -> None:
    models = tmp_path / "both.toml"
    models.write_text(
        'name = "both"\n' + "".join(f'[[models]]\nmodel = "{model.name}"\n' for model in (MEASURED, OTHER))
    )
    run = maveriq.simulate(
        models=str(models), gpus="4xA6000", trace="poisson", rate=1.0, duration_s=20, prompt_tokens="100",
        output_tokens="20", slo_scale=5,
    )  # fmt: skip
    assert set(run.record.requests.status.tolist()) == {RequestStatus.COMPLETED}
    assert any("nothing of qwen3-8b was measured" in note for note in run.notes)
    saved = maveriq.load_run(run.save(tmp_path / "run"))
    assert saved.record.deployments == run.record.deployments
