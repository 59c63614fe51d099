"""Plans of profiles: few measurements, the same for the same options, within the budget."""

from dataclasses import replace

import pytest
from fixtures import MODEL
from profile_engines import parts, wanted

from maveriq.domain.models import KvType, WeightType, known_models
from maveriq.errors import InputError
from maveriq.profiling.plan import plan_profile, short_models

BOTH = [(WeightType.FLOAT16, KvType.NATIVE), (WeightType.INT8, KvType.NATIVE)]


def test_equal_options_give_equal_plans() -> None:
    assert plan_profile(wanted(MODEL), parts()) == plan_profile(wanted(MODEL), parts())


def test_a_plan_measures_a_few_layers_of_at_least_two_numbers_and_never_the_whole_model() -> None:
    plan = plan_profile(wanted(MODEL), parts())
    layers = {run.layers for run in plan.runs}
    assert len(layers) > 1
    assert layers <= {(0,), (0, 1), (0, 1, 2, 3)}
    two = plan_profile(wanted(MODEL, layers=(1, 2)), parts())
    assert {run.layers for run in two.runs} == {(0,), (0, 1)}
    assert plan.error_after < plan.error_before / 5


def test_a_smaller_budget_costs_accuracy_and_is_kept() -> None:
    whole = plan_profile(wanted(MODEL, max_gpus=2, formats=BOTH), parts())
    cut = plan_profile(wanted(MODEL, max_gpus=2, formats=BOTH), parts(), budget_s=whole.expected_s / 2)
    assert cut.expected_s <= whole.expected_s / 2
    assert whole.error_after < cut.error_after < cut.error_before
    assert cut.ends == "the budget ends"


def test_a_budget_too_small_for_anything_is_refused() -> None:
    with pytest.raises(InputError, match=r"--budget-s 1 is too little: the shortest measurement takes longer"):
        plan_profile(wanted(MODEL), parts(), budget_s=1)


def test_formats_and_degrees_that_are_wanted_are_measured() -> None:
    plan = plan_profile(wanted(MODEL, max_gpus=2, formats=BOTH), parts())
    assert {run.weights for run in plan.runs} == {WeightType.FLOAT16, WeightType.INT8}
    assert {run.tp for run in plan.runs} == {1, 2}


def test_prompts_beyond_the_models_context_are_left_out() -> None:
    short = replace(MODEL, context_tokens=100)
    plan = plan_profile(wanted(short), parts())
    assert {case.prompt_tokens for run in plan.runs for case in run.cases} == {16}
    with pytest.raises(InputError, match="prompts and outputs of at most 30 tokens together"):
        plan_profile(wanted(replace(MODEL, context_tokens=30)), parts())


def test_what_the_engine_cannot_run_is_not_planned() -> None:
    plan = plan_profile(wanted(MODEL, formats=BOTH, can_run=lambda cfg: cfg.weights is WeightType.INT8), parts())
    assert {run.weights for run in plan.runs} == {WeightType.INT8}
    with pytest.raises(InputError, match="torch can run tiny on 1 GPUs with none of float16, int8"):
        plan_profile(wanted(MODEL, formats=BOTH, can_run=lambda _: False), parts())


def test_hybrids_have_a_layer_of_each_kind_and_one_more_of_each() -> None:
    decoders = [model.decoder for model in known_models().values()]
    two_kinds = [each for each in decoders if len(each.layer_kinds) == 2]
    decoder = next(each for each in two_kinds if min(number for _, number in each.kinds()) > 1)
    shorts = short_models(decoder)
    kinds = [sorted(decoder.layer_pattern[layer] for layer in layers) for layers in shorts]
    assert kinds[0] == [0, 1]
    assert sorted(kinds[1:]) == [[0, 0, 1], [0, 1, 1]]


def test_noise_costs_accuracy_and_asks_for_deeper_models() -> None:
    sure, noisy = (plan_profile(wanted(MODEL, noise=noise), parts()) for noise in (0.01, 0.1))
    assert noisy.error_after > 1.2 * sure.error_after
    deepest = [max(len(run.layers) for run in plan.runs) for plan in (sure, noisy)]
    assert deepest[0] <= deepest[1]


def test_repeats_are_in_the_expected_time() -> None:
    few, many = (plan_profile(wanted(MODEL, layers=(1, 2), repeats=repeats), parts(), most=1) for repeats in (5, 17))
    samples_s = [plan.runs[0].cases[0].expected_s for plan in (few, many)]
    assert samples_s[1] == pytest.approx(3 * samples_s[0], rel=0.01)


def test_models_of_more_layers_than_fit_a_gpu_are_not_planned() -> None:
    noisy = plan_profile(wanted(MODEL, noise=0.1), parts())
    deepest = max(len(run.layers) for run in noisy.runs)
    assert deepest > 2
    small = plan_profile(wanted(MODEL, noise=0.1, fits=lambda layers: len(layers) < deepest), parts())
    assert max(len(run.layers) for run in small.runs) < deepest
