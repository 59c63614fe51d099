"""The scheduler of vLLM does what vLLM's own classes did, and every rule matters to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from corner_cases import CORNER_CASES, expanded, notation, recorded

from maveriq.engine import replay_scenario
from maveriq.errors import InputError

VERSIONS = ("0.15.1", "0.23.0")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", CORNER_CASES)
def test_a_corner_case(name: str, version: str) -> None:
    case = CORNER_CASES[name]
    calls = case.calls_of_0_23 if version == "0.23.0" and case.calls_of_0_23 else case.calls
    assert notation(replay_scenario(case.scenario(), version)) == expanded(calls)


@pytest.mark.data
@pytest.mark.heavy
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("file", ["vllm_corner.json.gz", "vllm_random.json.gz"])
def test_recorded_scenarios_are_replayed_call_by_call(measured_data: Path, file: str, version: str) -> None:
    scenarios = recorded(measured_data, file)
    assert scenarios
    wrong = [name for name, scenario in scenarios.items() if differs(scenario, version)]
    assert not wrong


def differs(scenario: dict[str, Any], version: str) -> bool:
    return replay_scenario(scenario, version) != scenario["steps"][version]


def test_a_scenario_that_lacks_a_key_is_refused() -> None:
    with pytest.raises(InputError, match="scenario: 'max_num_seqs' is missing"):
        replay_scenario({"config": {"block_size": 4}, "requests": []}, "0.23.0")


def test_the_engine_before_v1_is_refused() -> None:
    with pytest.raises(InputError, match=r"before 0\.10 \(engine V0\) are not modelled"):
        replay_scenario(next(iter(CORNER_CASES.values())).scenario(), "0.6.3")
