"""Parts of computed times and memory: positive, adding up, and those of layers in proportion to their number."""

from dataclasses import replace

import pytest
from fixtures import MODEL
from profile_engines import PLAIN, parts

from maveriq.domain.models import WeightType, known_models
from maveriq.estimate.blending import Computed
from maveriq.estimate.computed_parts import ATTENTION, CACHE, HAND_OVER, LAYERS, REST, SHARING, ComputedParts
from maveriq.estimate.hardware_profile import load_profile
from maveriq.estimate.observations import Batch, with_layers
from maveriq.estimate.physics import PhysicsEstimator

BATCH = Batch(4, 256, 20)


def of_part(computed: Computed, part: str) -> float:
    return sum(term.value for term in computed.terms if term.part == part)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 4), (4, 2)])
@pytest.mark.parametrize("name", ["llama-2-7b", "mixtral-8x7b"])
def test_parts_are_positive_and_add_up_to_the_estimate(name: str, tp: int, pp: int) -> None:
    physics, model = PhysicsEstimator(load_profile("a6000-long")), known_models()[name]
    configuration = replace(PLAIN, tp=tp, pp=pp, weights=WeightType.INT8)
    lengths = {"prompt_tokens": BATCH.prompt_tokens, "output_tokens": BATCH.output_tokens}
    service = physics.service(model, configuration, batch=BATCH.size, **lengths)
    first, token = ComputedParts(physics).times(model, configuration, BATCH)
    assert first.total == pytest.approx(service.first_token_s)
    assert token.total == pytest.approx(service.tpot_s)
    memory = ComputedParts(physics).memory(model, configuration, BATCH)
    assert memory.total == pytest.approx(
        physics.memory_with(model, replace(configuration, batch_size=BATCH.size), **lengths)
    )
    assert all(term.value > 0 for computed in (first, token, memory) for term in computed.terms)
    assert {term.part for term in first.terms} - {SHARING, HAND_OVER} == {LAYERS, ATTENTION, REST}
    assert (SHARING in {term.part for term in first.terms}) == (tp > 1)
    assert (HAND_OVER in {term.part for term in first.terms}) == (pp > 1)


def test_layers_take_time_and_memory_in_proportion_to_their_number() -> None:
    computed = parts()
    short = with_layers(MODEL, (0, 1))
    for phase in (0, 1):
        whole, less = (of_part(computed.times(model, PLAIN, BATCH)[phase], LAYERS) for model in (MODEL, short))
        assert whole / less == pytest.approx(MODEL.layers / 2, rel=0.01)
    for part in (LAYERS, CACHE):
        whole, less = (of_part(computed.memory(model, PLAIN, BATCH), part) for model in (MODEL, short))
        assert whole / less == pytest.approx(MODEL.layers / 2, rel=0.1)


def test_a_hybrid_has_layers_of_each_kind() -> None:
    model = next(model for model in known_models().values() if len(model.decoder.layer_kinds) == 2)
    physics = PhysicsEstimator(load_profile("a6000-long"))
    if physics.why_not(model, PLAIN) is not None:
        pytest.skip(f"{model.name} is not estimated")
    first, _ = ComputedParts(physics).times(model, PLAIN, BATCH)
    assert len({term.features.kind for term in first.terms if term.part == LAYERS}) == 2


def test_a_configuration_that_does_not_run_whole_is_taken_apart_all_the_same() -> None:
    model, profile = known_models()["llama-2-70b"], load_profile("a6000-long")
    assert PhysicsEstimator(profile).why_not(model, PLAIN) == "known not to run on A6000"
    first, _ = ComputedParts(PhysicsEstimator(profile)).times(with_layers(model, (0,)), PLAIN, BATCH)
    assert first.total > 0
