"""Blended estimates: laws of what measurements do to computed times."""

import math
from dataclasses import replace

import numpy as np
import pytest
from fixtures import MODEL
from profile_engines import PLAIN, empty_profile, parts, truth, wanted

from maveriq.domain.models import WeightType
from maveriq.estimate.blended import BlendedEstimator
from maveriq.estimate.computed_parts import ATTENTION, LAYERS, REST
from maveriq.estimate.estimator import Basis
from maveriq.estimate.observations import Batch, Observation, with_layers
from maveriq.estimate.physics import PhysicsEstimator
from maveriq.profiling.plan import plan_profile

LENGTHS = [(1, 16), (1, 256), (4, 64), (4, 256), (2, 100)]


def observed(layers: int, batch: Batch, *, factor: float = 1.0) -> Observation:
    """Return what the true machine would show, without noise."""
    model = MODEL if layers == MODEL.layers else with_layers(MODEL, tuple(range(layers)))
    service = truth().service(
        model, PLAIN, prompt_tokens=batch.prompt_tokens, output_tokens=batch.output_tokens, batch=batch.size
    )
    return Observation(
        model=model,
        configuration=PLAIN,
        batch=batch,
        first_token_s=factor * service.first_token_s,
        tpot_s=factor * service.tpot_s,
        first_token_noise=0.005,
        tpot_noise=0.005,
    )


def planned_observations() -> list[Observation]:
    plan = plan_profile(wanted(MODEL), parts())
    return [
        observed(len(run.layers), Batch(case.batch, case.prompt_tokens, case.output_tokens))
        for run in plan.runs
        for case in run.cases
    ]


def blended(*seen: Observation) -> BlendedEstimator:
    return BlendedEstimator(replace(empty_profile(), observed=seen, models={MODEL.name: MODEL}))


def log_errors(estimator: BlendedEstimator) -> list[float]:
    true = truth()
    found = []
    for batch, prompt in LENGTHS:
        lengths = {"prompt_tokens": prompt, "output_tokens": 20, "batch": batch}
        estimate, right = (each.service(MODEL, PLAIN, **lengths) for each in (estimator, true))
        found += [math.log(estimate.first_token_s / right.first_token_s), math.log(estimate.tpot_s / right.tpot_s)]
    return found


def test_without_measurements_it_is_the_physics_estimate_exactly() -> None:
    physics, estimator = PhysicsEstimator(empty_profile()), blended()
    lengths = {"prompt_tokens": 100, "output_tokens": 20}
    assert estimator.service(MODEL, PLAIN, batch=2, **lengths) == physics.service(MODEL, PLAIN, batch=2, **lengths)
    assert estimator.memory_with(MODEL, PLAIN, **lengths) == physics.memory_with(MODEL, PLAIN, **lengths)


@pytest.mark.parametrize("factor", [0.4, 1.0, 3.0])
def test_at_a_measured_point_it_returns_the_measurement(factor: float) -> None:
    seen = observed(MODEL.layers, Batch(4, 64, 20), factor=factor)
    estimate = blended(seen).service(MODEL, PLAIN, prompt_tokens=64, output_tokens=20, batch=4)
    assert estimate.first_token_s == pytest.approx(seen.first_token_s, rel=0.01)
    assert estimate.tpot_s == pytest.approx(seen.tpot_s, rel=0.01)
    assert estimate.basis is Basis.MEASURED


def test_one_and_two_layers_tell_what_the_whole_model_takes() -> None:
    errors = np.abs(log_errors(blended(*planned_observations())))
    assert np.median(errors) < 0.03
    assert errors.max() < 0.1


def test_errors_and_intervals_fall_with_every_four_times_as_many_measurements() -> None:
    seen = planned_observations()
    estimators = [blended(*seen[:count]) for count in (0, 1, len(seen))]
    errors = [float(np.median(np.abs(log_errors(estimator)))) for estimator in estimators]
    assert errors == sorted(errors, reverse=True)
    lengths = {"prompt_tokens": 100, "output_tokens": 20, "batch": 2}
    widths = [estimator.service(MODEL, PLAIN, **lengths).interval for estimator in estimators[1:]]
    assert widths[0] is not None
    assert widths[1] is not None
    assert widths[1].high < widths[0].high


def test_the_interval_of_a_planned_profile_holds_the_truth() -> None:
    estimator, true = blended(*planned_observations()), truth()
    for batch, prompt in LENGTHS:
        lengths = {"prompt_tokens": prompt, "output_tokens": 20, "batch": batch}
        estimate, right = (each.service(MODEL, PLAIN, **lengths) for each in (estimator, true))
        assert estimate.interval is not None
        assert estimate.interval.holds(estimate.latency_s, right.latency_s)


def test_a_noisy_measurement_moves_an_estimate_less() -> None:
    seen = observed(MODEL.layers, Batch(4, 64, 20), factor=3.0)
    noisy = replace(seen, first_token_noise=0.5, tpot_noise=0.5)
    lengths = {"prompt_tokens": 64, "output_tokens": 20, "batch": 4}
    sure, unsure = (blended(each).service(MODEL, PLAIN, **lengths) for each in (seen, noisy))
    assert PhysicsEstimator(empty_profile()).service(MODEL, PLAIN, **lengths).tpot_s < unsure.tpot_s < sure.tpot_s


def test_what_was_measured_of_one_model_sharpens_another() -> None:
    other = replace(MODEL, name="other", hidden_size=128, intermediate_size=512)
    estimator, physics, true = blended(*planned_observations()), PhysicsEstimator(empty_profile()), truth()
    lengths = {"prompt_tokens": 64, "output_tokens": 20, "batch": 4}
    right = true.service(other, PLAIN, **lengths).tpot_s
    sharpened, computed = (
        abs(each.service(other, PLAIN, **lengths).tpot_s / right - 1) for each in (estimator, physics)
    )
    assert sharpened < computed


def test_a_measured_format_sharpens_another_and_leaves_a_wider_interval() -> None:
    estimator = blended(*planned_observations())
    int8 = replace(PLAIN, weights=WeightType.INT8)
    lengths = {"prompt_tokens": 64, "output_tokens": 20, "batch": 4}
    known, unknown = (estimator.service(MODEL, each, **lengths).interval for each in (PLAIN, int8))
    assert known is not None
    assert unknown is not None
    assert known.high < unknown.high


def test_memory_of_short_models_tells_that_of_the_whole_one() -> None:
    batch = Batch(4, 256, 20)

    def held(layers: int) -> Observation:
        model = with_layers(MODEL, tuple(range(layers)))
        true_bytes = 500_000_000 + layers * 40_000
        return replace(observed(layers, batch), model=model, memory_bytes=true_bytes)

    estimator = blended(held(1), held(2))
    memory = estimator.memory_with(MODEL, replace(PLAIN, batch_size=4), prompt_tokens=256, output_tokens=20)
    assert memory == pytest.approx(500_000_000 + 8 * 40_000, rel=0.02)


def test_engines_of_larger_batches_and_other_outputs_share_what_was_measured() -> None:
    seen = observed(MODEL.layers, Batch(4, 64, 20), factor=2.0)
    estimator = blended(seen)
    larger = replace(PLAIN, batch_size=8)
    estimate = estimator.service(MODEL, larger, prompt_tokens=64, output_tokens=20, batch=4)
    assert estimate.first_token_s == pytest.approx(seen.first_token_s, rel=0.01)
    assert estimate.tpot_s == pytest.approx(seen.tpot_s, rel=0.01)
    longer = estimator.service(MODEL, PLAIN, prompt_tokens=64, output_tokens=200, batch=4)
    assert longer.first_token_s == pytest.approx(seen.first_token_s, rel=0.01)
    assert longer.tpot_s == pytest.approx(estimate.tpot_s, rel=0.1)


def test_products_of_equal_rows_are_corrected_alike_however_long_the_sequences_are() -> None:
    short, long = (parts().times(MODEL, PLAIN, Batch(size, 256 // size, 20))[0] for size in (4, 1))
    features = [{term.part: term.features for term in computed.terms} for computed in (short, long)]
    assert features[0][LAYERS] == features[1][LAYERS]
    assert features[0][ATTENTION] != features[1][ATTENTION]


def test_the_output_matrix_has_a_row_for_each_sequence_in_both_phases() -> None:
    prefill, decode = parts().times(MODEL, PLAIN, Batch(4, 64, 20))
    rows = [next(term for term in each.terms if term.part == REST).features.log_rows for each in (prefill, decode)]
    assert rows == pytest.approx([math.log(4)] * 2)
