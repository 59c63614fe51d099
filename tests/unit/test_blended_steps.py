"""Step times of continuous engines, blended with measurements: what was measured wins, the rest follows."""

from dataclasses import replace

import msgspec
import numpy as np
import pytest
from fixtures import MODEL
from profile_engines import PLAIN, SLOWER, empty_profile

from maveriq.estimate.blended_steps import continuous_estimator
from maveriq.estimate.compiled_timer import POINTS
from maveriq.estimate.engine_presets import engine_preset
from maveriq.estimate.estimator import Basis, ServiceEstimate
from maveriq.estimate.hardware_profile import HardwareProfile
from maveriq.estimate.observations import Batch, Observation, with_layers
from maveriq.estimate.physics import PhysicsEstimator
from maveriq.estimate.profile_file import times_without_server
from maveriq.estimate.step_timer import StepTimer

VLLM = engine_preset("vllm-0.32.0")
BATCHES = [Batch(1, 16, 20), Batch(1, 256, 20), Batch(4, 64, 20), Batch(16, 64, 20), Batch(16, 256, 20)]


def vllm_profile(**changes: object) -> HardwareProfile:
    times = times_without_server("vllm-0.32.0", float(changes.get("admission_s", 0.0)))  # type: ignore[arg-type]
    return replace(
        empty_profile(),
        engine="vllm-0.32.0",
        engine_times=times,
        models={MODEL.name: MODEL},
        **changes,  # type: ignore[arg-type]
    )


def true_timer(layers: int | None = None) -> StepTimer:
    """Return the steps of the machine, which is slower than the profile's sheet, and whose host is, too."""
    profile = replace(vllm_profile(sheet=SLOWER), engine_times={})
    preset = msgspec.structs.replace(VLLM, step_us=900.0, kernel_factor=1.2, prefill_factor=1.2)
    model = MODEL if layers is None else with_layers(MODEL, tuple(range(layers)))
    return PhysicsEstimator(profile, preset, continuous=True).step_timer(model, PLAIN)


def observed(layers: int | None, batch: Batch) -> Observation:
    timer = true_timer(layers)
    context = batch.prompt_tokens + batch.output_tokens / 2
    first = timer.step(0, 0, [(batch.prompt_tokens, 0)] * batch.size)
    token = timer.step(batch.size, round(batch.size * context))
    return Observation(
        model=MODEL if layers is None else with_layers(MODEL, tuple(range(layers))),
        configuration=PLAIN, batch=batch, first_token_s=seconds(first), tpot_s=seconds(token),
        first_token_noise=0.003, tpot_noise=0.003,
        mixed_s=seconds(timer.step(batch.size, round(batch.size * context), [(batch.prompt_tokens, 0)])),
    )  # fmt: skip


def seconds(ticks: int) -> float:
    return ticks / 2**32 / 1e6


def blended_timer(*seen: Observation, admission_s: float = 0.0) -> StepTimer:
    profile = vllm_profile(observed=seen, admission_s=admission_s)
    return continuous_estimator(profile, VLLM, node_gpus=None).step_timer(MODEL, PLAIN)


def test_without_measurements_steps_are_those_of_physics() -> None:
    physics = PhysicsEstimator(vllm_profile(), VLLM, continuous=True).step_timer(MODEL, PLAIN)
    timer = blended_timer()
    for step in ((1, 100, ()), (8, 3000, [(40, 0)]), (0, 0, [(512, 0)])):
        assert timer.step(*step) == physics.step(*step)


@pytest.mark.parametrize("batch", BATCHES)
def test_measured_steps_of_the_whole_model_take_what_was_measured(batch: Batch) -> None:
    seen = [observed(None, each) for each in BATCHES]
    timer = blended_timer(*seen)
    at = BATCHES.index(batch)
    decode = timer.step(batch.size, batch.size * (batch.prompt_tokens + batch.output_tokens // 2))
    assert seconds(decode) == pytest.approx(seen[at].tpot_s, rel=0.01)
    prefill = timer.step(0, 0, [(batch.prompt_tokens, 0)] * batch.size)
    assert seconds(prefill) == pytest.approx(seen[at].first_token_s, rel=0.06)


@pytest.mark.parametrize(
    "step",
    [(1, 130, ()), (6, 700, ()), (12, 3000, ()), (0, 0, [(120, 0)]), (8, 1500, [(100, 0)]), (3, 300, [(30, 64)])],
)
def test_short_models_tell_the_steps_of_the_whole_model(step: tuple) -> None:  # type: ignore[type-arg]
    timer = blended_timer(*(observed(layers, batch) for layers in (1, 4) for batch in BATCHES))
    assert seconds(timer.step(*step)) == pytest.approx(seconds(true_timer().step(*step)), rel=0.15)


def test_compiled_engines_answer_as_the_others_do() -> None:
    from maveriq.estimate.compiled_step import step_us

    steps = blended_timer(*(observed(4, batch) for batch in BATCHES)).steps
    assert len(steps.contexts) <= POINTS
    for decodes, context, tokens in ((3, 500, 40), (16, 4000, 256), (1, 30, 1)):
        compiled = step_us(steps.packed, decodes, context, np.asarray([tokens], dtype=float), np.zeros(1), 1)
        assert compiled == pytest.approx(
            steps.gpu_us(decodes=decodes, context_tokens=context, chunks=[(tokens, 0)]), rel=1e-12
        )


def test_other_generations_of_an_engine_are_not_corrected() -> None:
    profile = vllm_profile(observed=(observed(None, BATCHES[0]),))
    older = engine_preset("vllm-0.9")
    blended, physics = (
        continuous_estimator(profile, older, node_gpus=None, blended=is_blended) for is_blended in (True, False)
    )
    assert blended.step_timer(MODEL, PLAIN).step(1, 100) == physics.step_timer(MODEL, PLAIN).step(1, 100)


def test_the_interval_says_how_sure_a_request_is_and_admission_delays_its_first_token() -> None:
    def service(batches: list[Batch], admission_s: float) -> ServiceEstimate:
        steps = [observed(None, batch) for batch in batches]
        seen = tuple(replace(each, first_token_s=each.first_token_s + admission_s) for each in steps)
        profile = vllm_profile(observed=seen, admission_s=admission_s)
        estimator = continuous_estimator(profile, VLLM, node_gpus=None)
        return estimator.service(MODEL, PLAIN, prompt_tokens=64, output_tokens=20, batch=4)

    few, many, later = service(BATCHES[:1], 0.0), service(BATCHES, 0.0), service(BATCHES, 0.004)
    assert few.interval is not None
    assert many.interval is not None
    assert 1.0 < many.interval.high < few.interval.high
    assert many.basis is Basis.MEASURED
    assert later.first_token_s - many.first_token_s == pytest.approx(0.004, rel=0.05)


def test_stages_of_a_pipeline_take_together_what_one_stage_takes() -> None:
    profile = vllm_profile(observed=tuple(observed(None, batch) for batch in BATCHES))
    estimator = continuous_estimator(profile, VLLM, node_gpus=2)
    split = replace(PLAIN, pp=2, layer_split=(5, 3))
    for step in ((4, 300, ()), (4, 300, [(40, 0)])):
        whole = estimator.step_timer(MODEL, PLAIN).step(*step)
        stages = estimator.pipeline_timer(MODEL, split).step(*step)
        assert len(stages) == 3  # the host comes first
        assert sum(stages) == pytest.approx(whole, rel=0.15)
