"""Compiled engines are used where they apply and are worth their start; nothing else depends on it."""

from dataclasses import replace

import numpy as np
import pytest
from clocked_engines import SmallEngines
from fixtures import arrivals
from test_compiled_runs import SCARCE, Engines

from maveriq.control.engine_recorder import EngineRecorder
from maveriq.control.engine_series import TokenGaps
from maveriq.scenario.clocked_engine import MIN_REQUESTS, clocked_engine
from maveriq.scenario.compiled_engine import CompiledEngine


def is_compiled(engines, requests) -> bool:
    recorder = EngineRecorder(1_000_000, TokenGaps())
    return isinstance(
        clocked_engine(engines.parts(None, None), 1, 1, recorder=recorder, arrivals=requests), CompiledEngine
    )


def load(count: int):
    return arrivals([0] * count, [1] * count, [1] * count)


def test_large_workloads_have_compiled_engines_and_small_ones_do_not():
    assert is_compiled(Engines(SCARCE), load(MIN_REQUESTS))
    assert not is_compiled(Engines(SCARCE), load(MIN_REQUESTS - 1))


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "sglang"},
        {"kind": "trtllm"},
        {**SCARCE, "scheduling_policy": "priority"},
        {**SCARCE, "max_num_seqs": 1_025, "max_num_batched_tokens": 2_048},
    ],
    ids=str,
)
def test_what_is_not_compiled_stays_in_python(settings):
    assert not is_compiled(Engines(settings, blocks=2_000), load(MIN_REQUESTS))


def test_step_times_and_delays_of_another_kind_stay_in_python():
    assert not is_compiled(SmallEngines(SCARCE, blocks=300), load(MIN_REQUESTS))


def test_shared_prompts_need_the_prefix_cache_of_python():
    shared = replace(load(MIN_REQUESTS), prompt_id=np.ones(MIN_REQUESTS, dtype=np.int64))
    assert not is_compiled(Engines(SCARCE), shared)
    assert is_compiled(Engines({**SCARCE, "enable_prefix_caching": False}), shared)
