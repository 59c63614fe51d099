"""Intervals of step times widen where less is known."""

from __future__ import annotations

import math

import pytest

from maveriq.domain.models import load_model
from maveriq.estimate.engine_presets import engine_preset, engine_presets
from maveriq.estimate.intervals import Family, Interval, family_of, interval_of, within


def test_models_belong_to_families() -> None:
    names = {"llama-3.1-8b": Family.DENSE, "mixtral-8x7b": Family.EXPERTS, "deepseek-v3": Family.LATENT}
    assert {name: family_of(load_model(name).decoder) for name in names} == names


@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("engine", engine_presets())
def test_every_engine_and_family_has_an_interval_around_the_estimate(engine: str, family: Family) -> None:
    for measured in (True, False):
        found = interval_of(engine_preset(engine), family, measured=measured)
        assert 0.05 < found.low <= 1 <= found.high < 20
        assert found.low < found.high


@pytest.mark.parametrize("family", Family)
def test_less_knowledge_is_a_wider_interval(family: Family) -> None:
    known, unknown = engine_preset("vllm-0.23.0"), engine_preset("vllm")
    tables = interval_of(known, family, measured=True)
    for wider in (interval_of(known, family, measured=False), interval_of(unknown, family, measured=True)):
        assert wider.low <= tables.low
        assert wider.high >= tables.high
    assert math.log(interval_of(unknown, family, measured=True).low) == pytest.approx(1.5 * math.log(tables.low))


def test_an_interval_holds_values_between_its_ends() -> None:
    interval = Interval(0.5, 3.0)
    assert [interval.holds(2.0, value) for value in (0.9, 1.0, 6.0, 6.1)] == [False, True, True, False]
    assert within(0.25) == (0.8, 1.25)
