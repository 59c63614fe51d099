"""The routing with which tables of experts were measured."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maveriq.calibration.expert_routing import measured_routing

DISTRIBUTIONS = ("balanced", "power_law_1.01", "power_law_1.2")


@given(st.sampled_from(DISTRIBUTIONS), st.sampled_from([8, 64, 160]), st.data(), st.integers(1, 3000))
def test_one_gpu_gets_all_rows(distribution: str, experts: int, data: st.DataObject, tokens: int) -> None:
    per_token = data.draw(st.integers(1, 8))
    rows, hit = measured_routing(distribution, experts=experts, per_token=per_token, tokens=tokens, groups=1)
    # An expert gets a token once at most: what a power law deals it beyond is lost.
    assert 0.3 * tokens * per_token < rows <= tokens * per_token
    assert 0 < hit <= min(experts, tokens * per_token)
    if distribution == "balanced":
        assert rows == tokens * per_token


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_gpu_with_most_rows_is_measured(distribution: str) -> None:
    rows, hit = measured_routing(distribution, experts=128, per_token=8, tokens=4096, groups=16)
    mean = 8 * 4096 / 16
    assert rows == pytest.approx(mean) if distribution == "balanced" else rows > 1.5 * mean
    assert hit <= 8


def test_balanced_routing_hits_as_many_experts_as_it_can() -> None:
    for tokens, expected in ((1, 8), (4, 32), (16, 128), (4096, 128)):
        assert measured_routing("balanced", experts=128, per_token=8, tokens=tokens, groups=1)[1] == expected
