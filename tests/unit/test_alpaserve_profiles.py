"""Profiles for the search, and forecasts of demand."""

import numpy as np
import pytest
from fixtures import MODEL, TokenSeconds, arrivals

from maveriq.errors import InputError, UnknownNameError
from maveriq.estimate.estimator import ServiceEstimate
from maveriq.policy.alpaserve.problem import GroupShape, StageProfile
from maveriq.policy.alpaserve.profiles import profiles_from_estimator, published_profiles, published_profiles_of
from maveriq.workload.forecast import forecast_of, published_forecast
from maveriq.workload.model_sets import load_model_set


class Refusing(TokenSeconds):
    """An estimator: 8 s for each request, no TP 2 x PP 2, and a negative time at TP 8."""

    def why_not(self, model, configuration):
        return "measured to fail" if (configuration.tp, configuration.pp) == (2, 2) else None

    def service(self, model, configuration, *, prompt_tokens, output_tokens, batch):
        return ServiceEstimate(ttft_s=-9.0 if configuration.tp == 8 else 8.0, tpot_s=0.0, output_tokens=output_tokens)

    def memory(self, model, configuration):
        return 800


def test_stages_share_latency_and_memory_by_their_layers() -> None:
    """Eight layers over three stages are 3, 3 and 2."""
    [profile] = profiles_from_estimator([MODEL], Refusing(), gpus=8, prompt_tokens=1, output_tokens=1)
    three = profile.shapes[GroupShape(1, 3)]
    assert three.stage_latency_s == pytest.approx((3.0, 3.0, 2.0))
    assert three.stage_weight_bytes == (300, 300, 200)
    assert profile.shapes[GroupShape(2, 1)].stage_weight_bytes == (400,)


def test_shapes_without_estimates_are_missing() -> None:
    [profile] = profiles_from_estimator([MODEL], Refusing(), gpus=8, prompt_tokens=1, output_tokens=1)
    stages = {tp: [pp for pp in range(1, 9) if (tp, pp) in profile.shapes] for tp in (1, 2, 4, 8)}
    assert stages == {1: [1, 2, 3, 4, 5, 6, 7, 8], 2: [1, 3, 4], 4: [1, 2], 8: []}


def test_the_published_table_is_embedded() -> None:
    profiles = published_profiles()
    assert profiles["falcon-40b"].shapes[GroupShape(1, 2)] == StageProfile(
        stage_latency_s=(0.310721230506897,) * 2, stage_weight_bytes=(42793631744.0,) * 2
    )
    assert GroupShape(1, 1) not in profiles["falcon-40b"].shapes
    with pytest.raises(UnknownNameError, match="did you mean 'gptj-6b'"):
        published_profiles_of(["gptj-6"])


def test_a_workload_becomes_a_forecast() -> None:
    forecast = forecast_of(arrivals([0, 1_500_000], [2, 1], [1, 1], slo_us=0), 2)
    assert (forecast.arrival_s.tolist(), forecast.model_index.tolist()) == ([0.0, 1.5], [1, 0])
    assert np.isinf(forecast.slo_s).all()
    assert forecast_of(arrivals([0], [1], [1], slo_us=2_500_000), 1).slo_s.tolist() == [2.5]


def test_the_published_names_shift_every_request_by_one_model() -> None:
    """The SLO is that of the intended model; requests of the last model have no model."""
    models = load_model_set("large")
    slos = {entry.model.name: float(number) for number, entry in enumerate(models.entries, start=1)}
    repaired, published = (
        published_forecast(np.full(20, 9), models, scale=0.5, slo_s=slos.__getitem__, name_offset=offset)
        for offset in (0, 1)
    )
    assert len(repaired) == 2 * 20 * 4
    assert set(repaired.model_index.tolist()) == {0, 1, 2, 3}
    meant = repaired.model_index
    assert published.model_index.tolist() == np.where(meant == 3, -1, meant + 1).tolist()
    assert published.slo_s.tolist() == repaired.slo_s.tolist()
    with pytest.raises(InputError, match="name offset"):
        published_forecast(np.full(20, 9), models, scale=0.5, slo_s=slos.__getitem__, name_offset=2)
