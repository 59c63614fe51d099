"""Prompts of replays: as long as the workload says, and alike where it says that they are."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from maveriq.domain.requests import Request
from maveriq.exec.random_prompts import RandomPrompts

PROMPTS = RandomPrompts(seed=42)


def prompt(request_id: int, prompt_tokens: int, **more: Any) -> tuple[int, ...]:
    request = Request(
        request_id=request_id, endpoint_id=1, arrival_us=0, prompt_tokens=prompt_tokens, output_tokens=1, **more
    )
    return PROMPTS.prompt(request, 50)


@given(st.integers(1, 40), st.lists(st.integers(1, 5), max_size=6), st.integers(0, 3))
def test_prompts_are_as_long_as_they_should_be(tokens: int, hashes: list[int], prompt_id: int) -> None:
    drawn = prompt(1, tokens, prefix_hashes=hashes, prefix_hash_tokens=7, prompt_id=prompt_id)
    assert len(drawn) == tokens
    assert all(0 <= token < 50 for token in drawn)


def test_equal_prompts_are_equal_and_others_are_not() -> None:
    assert prompt(1, 30, prompt_id=5) == prompt(2, 30, prompt_id=5)
    assert prompt(1, 30) == prompt(1, 30)
    assert prompt(1, 30) != prompt(2, 30)
    assert prompt(1, 30, prompt_id=5) != prompt(1, 30, prompt_id=6)


def test_prompts_begin_alike_as_far_as_their_hashes_do() -> None:
    first = prompt(1, 30, prefix_hashes=(3, 4, 9), prefix_hash_tokens=10)
    second = prompt(2, 25, prefix_hashes=(3, 4, 8), prefix_hash_tokens=10)
    assert first[:20] == second[:20]
    assert first[20:25] != second[20:25]
    longer = prompt(3, 40, prefix_hashes=(3, 4, 9), prefix_hash_tokens=10)
    assert longer[:30] == first
