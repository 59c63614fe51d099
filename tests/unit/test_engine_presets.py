"""Engine presets: which generation a name means, and what it adds to kernels."""

from __future__ import annotations

import msgspec
import pytest

from maveriq.domain.gpu_kinds import gpu_sheet
from maveriq.engine.reading import read_engine_settings
from maveriq.engine.settings import EngineHost
from maveriq.errors import InputError, UnknownNameError
from maveriq.estimate.engine_presets import engine_preset, engine_presets


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("vllm", "vllm-2026"),
        ("vLLM-0.23.0", "vllm-2026"),
        ("vllm-0.15.0rc1", "vllm-2026"),
        ("vllm-0.14.1", "vllm-2025"),
        ("vllm-0.4.3", "vllm-2024"),
        ("vllm-0.2.7", "vllm-2023"),
        ("vllm-2025", "vllm-2025"),
        ("tensorrt-llm-0.9", "trtllm-0.9"),
        ("tensorrt-llm-0.12.1", "trtllm-2024"),
        ("trtllm-1.2.0rc6.post3", "trtllm-2026"),
        ("TensorRT-LLM", "trtllm-2026"),
        ("sglang-0.5.9", "sglang-2026"),
    ],
)
def test_a_name_means_one_generation(name: str, preset: str) -> None:
    assert engine_preset(name).name == preset


@pytest.mark.parametrize("version", ["0.1", "0.9.99", "0.10.0", "0.14", "0.15", "0.33.1", "7.0"])
@pytest.mark.parametrize("engine", ["vllm", "trtllm", "sglang"])
def test_generations_of_an_engine_neither_overlap_nor_leave_a_gap(engine: str, version: str) -> None:
    generations = [preset for preset in engine_presets().values() if preset.engine == engine]
    assert sum(preset.covers(version) for preset in generations) == 1


def test_unknown_engines_and_versions_are_refused() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown engine 'tgi'.*vllm-2026"):
        engine_preset("tgi")
    with pytest.raises(InputError, match=r"'nightly' is not a version; write vllm-0\.23\.0"):
        engine_preset("vllm-nightly")


def test_host_time_grows_by_step_and_sequence() -> None:
    preset = engine_preset("vllm-2025")
    one, many = (preset.step_time_us(1000.0, sequences=number, has_prefill=False) for number in (1, 101))
    assert many - one == pytest.approx(100 * preset.sequence_us)
    assert one == pytest.approx(1000.0 * preset.kernel_factor + preset.step_us + preset.sequence_us)
    assert preset.step_time_us(1000.0, sequences=1, has_prefill=True) > one


@pytest.mark.parametrize("gpu", ["A10", "L40S", "A100", "H100", "B200"])
@pytest.mark.parametrize(
    ("kind", "version"),
    [("vllm", "0.10.0"), ("vllm", "0.19.1"), ("vllm", "0.20"), ("vllm", "0.23.0"), ("vllm", "0.32.0"),
     ("sglang", "0.5.23"), ("trtllm", "1.2")],
)  # fmt: skip
@pytest.mark.parametrize("tp", [1, 4])
def test_an_engine_is_estimated_with_the_settings_that_its_model_runs_with(
    kind: str, version: str, gpu: str, tp: int
) -> None:
    """What `plan --engine` assumes of memory and steps is what a simulated engine of that version has."""
    sheet = gpu_sheet(gpu)
    planned = engine_preset(f"{kind}-{version}").settings(sheet, tp=tp, kv_value_bytes=2)
    host = EngineHost(context_tokens=131_072, gpu_name=sheet.name, gpu_memory_gib=sheet.usable_gib)
    run = read_engine_settings({"kind": kind, "version": version, "tensor_parallel_size": tp}).resolve(host)
    assert planned.max_num_batched_tokens == run.max_num_batched_tokens
    assert planned.gpu_memory_utilization == run.memory_share
    assert planned.is_share_of_free == run.is_share_of_free


def test_an_engine_without_a_version_has_the_share_of_the_newest_that_was_checked() -> None:
    shares = {
        name: engine_preset(name).settings(gpu_sheet("H100"), tp=1, kv_value_bytes=2).gpu_memory_utilization
        for name in ("vllm", "vllm-2026", "vllm-2025", "vllm-0.15.1", "vllm-2023")
    }
    assert shares == {"vllm": 0.92, "vllm-2026": 0.92, "vllm-2025": 0.9, "vllm-0.15.1": 0.9, "vllm-2023": 0.9}


def test_a_request_waits_for_the_server_that_sends_the_tokens_of_others() -> None:
    preset = msgspec.structs.replace(engine_preset("vllm"), api_us=5000.0, api_token_us=2.0, api_sequence_us=30.0)
    assert preset.first_token_delay_us(100, running=0) == 5200.0
    assert preset.first_token_delay_us(100, running=50) == 6700.0
