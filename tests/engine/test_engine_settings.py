"""Settings of engines: defaults by version and GPU, tables, command lines, and what is wrong with them."""

from __future__ import annotations

from typing import Any

import pytest

from maveriq.engine import EngineRequest
from maveriq.engine.reading import read_engine_settings
from maveriq.engine.settings import EngineHost
from maveriq.engine.vllm_command import read_vllm_command
from maveriq.engine.vllm_settings import VllmSettings
from maveriq.errors import InputError, UnknownNameError

HOST = EngineHost(context_tokens=40_960)


@pytest.mark.parametrize(
    ("version", "gpu", "memory_gib", "tokens", "seqs"),
    [
        ("0.23.0", "H100-SXM", 79.18, 8192, 1024),
        ("0.23.0", "A100-80GB-SXM", 79.2, 2048, 256),
        ("0.23.0", "L40S", 44.4, 2048, 256),
        ("0.23.0", "B200", 178.3, 8192, 1024),
        ("0.32.0", "B200", 178.3, 16_384, 1024),
    ],
)
def test_limits_depend_on_version_and_gpu(version: str, gpu: str, memory_gib: float, tokens: int, seqs: int) -> None:
    host = EngineHost(context_tokens=40_960, gpu_name=gpu, gpu_memory_gib=memory_gib)
    resolved = VllmSettings(version=version).resolve(host)
    assert (resolved.max_num_batched_tokens, resolved.max_num_seqs) == (tokens, seqs)


def test_defaults_follow_what_is_given() -> None:
    def limits(**given: Any) -> tuple[int, int]:
        resolved = VllmSettings(**given).resolve(HOST)
        return resolved.max_num_seqs, resolved.max_num_batched_tokens

    assert limits(max_num_batched_tokens=512) == (512, 512)
    assert limits(max_num_seqs=2, max_model_len=1000) == (2, 2000)
    assert limits(enable_chunked_prefill=False) == (1024, 40_960)
    assert limits(offline=True) == (1024, 16_384)
    assert limits(performance_mode="throughput") == (2048, 16_384)


def test_the_share_of_memory_grew_with_0_20() -> None:
    assert VllmSettings(version="0.19.1").resolve(HOST).memory_share == 0.90
    assert VllmSettings(version="0.20.0").resolve(HOST).memory_share == 0.92
    assert VllmSettings(version="0.20.0", gpu_memory_utilization=0.5).resolve(HOST).memory_share == 0.5


def test_scheduling_is_asynchronous_from_0_15_on() -> None:
    def steps_ahead(**given: Any) -> int:
        engine = VllmSettings(**given).resolve(HOST).make_engine(20_000)
        engine.submit(EngineRequest(request_id=1, prompt_tokens=10, output_tokens=10))
        steps = 0
        while engine.next_step() is not None:
            steps += 1
        return steps

    assert steps_ahead(version="0.14.0") == 1
    assert steps_ahead(version="0.15.1") == 2
    assert steps_ahead(version="0.15.1", async_scheduling=False) == 1


def test_partial_prefills_set_the_threshold() -> None:
    def first_chunk(**given: Any) -> int:
        engine = VllmSettings(max_model_len=10_000, **given).resolve(HOST).make_engine(20_000)
        engine.submit(EngineRequest(request_id=1, prompt_tokens=5000, output_tokens=10))
        step = engine.next_step()
        assert step is not None
        return step.tokens

    assert first_chunk() == 5000
    assert first_chunk(max_num_partial_prefills=2) == 400
    assert first_chunk(max_num_partial_prefills=2, long_prefill_token_threshold=300) == 300


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "vlm"}, r"unknown kind of engine 'vlm'; did you mean 'vllm'\?"),
        ({"max_num_sequences": 3}, r"engine: unknown key `max_num_sequences`; did you mean 'max_num_seqs'\?"),
        ({"max_num_seqs": 0}, "engine: max_num_seqs must be"),
        ({"version": "newest"}, "engine version 'newest' is not a version; write it as 0.23.0"),
        ({"version": "0.6.3"}, r"vLLM 0.6.3: schedulers before 0.10 \(engine V0\) are not modelled"),
        ({"max_num_batched_tokens": 8, "max_num_seqs": 16}, "max_num_batched_tokens 8 is less than max_num_seqs 16"),
        (
            {"max_num_batched_tokens": 512, "enable_chunked_prefill": False},
            "max_num_batched_tokens 512 is less than max_model_len 40960",
        ),
        ({"kind": "trtllm", "pipeline_parallel_size": 2}, "pipelines of TensorRT-LLM are not modelled"),
        (
            {"kind": "sglang", "schedule_conservativeness": -1.0},
            "schedule_conservativeness is -1.0; it must be at least 0",
        ),
    ],
)
def test_wrong_settings_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_engine_settings(given).resolve(HOST)


def test_the_number_of_blocks_is_checked() -> None:
    resolved = VllmSettings(max_model_len=1000).resolve(HOST)
    with pytest.raises(InputError, match="the number of KV blocks is unknown; set num_gpu_blocks"):
        resolved.make_engine()
    with pytest.raises(
        InputError, match="63 KV blocks of 16 tokens do not hold one sequence of max_model_len 1000, which takes 64"
    ):
        resolved.make_engine(63)
    assert resolved.make_engine(64).counters.blocks == 63  # one is never used


@pytest.mark.parametrize("kind", ["vllm", "trtllm", "sglang", "exclusive"])
def test_every_kind_serves_a_request(kind: str) -> None:
    engine = read_engine_settings({"kind": kind}).resolve(HOST).make_engine(50_000)
    engine.submit(EngineRequest(request_id="a", prompt_tokens=100, output_tokens=3))
    tokens = []
    while engine.counters.running + engine.counters.waiting:
        while engine.next_step() is not None:
            pass
        tokens += [(token.output_tokens, token.finish_reason) for token in engine.finish_step()]
    assert tokens[0] == (1, None)
    assert tokens[-1] == (3, "length")
    assert engine.counters.used_blocks == 0


@pytest.mark.parametrize("kind", ["vllm", "trtllm"])
def test_an_id_stands_for_one_request(kind: str) -> None:
    engine = read_engine_settings({"kind": kind}).resolve(HOST).make_engine(50_000)
    engine.submit(EngineRequest(request_id=7, prompt_tokens=100, output_tokens=3))
    with pytest.raises(InputError, match="request 7 is in the engine already"):
        engine.submit(EngineRequest(request_id=7, prompt_tokens=100, output_tokens=3))


def test_a_token_says_what_was_cached() -> None:
    engine = VllmSettings(async_scheduling=False).resolve(HOST).make_engine(50_000)
    for request_id in (1, 2):
        engine.submit(EngineRequest(request_id=request_id, prompt_tokens=100, output_tokens=1, prompt_id="same"))
    assert engine.next_step() is not None
    assert [(token.request_id, token.cached_tokens) for token in engine.finish_step()] == [(1, 0), (2, 96)]


def test_a_command_line_is_read() -> None:
    command = read_vllm_command(
        "vllm serve Qwen/Qwen3-14B --max-num-seqs 64 --max-model-len=32k -tp 2 --no-enable-prefix-caching "
        "--scheduling-policy priority --gpu-memory-utilization 0.85 --num-gpu-blocks-override 5000 --port 8000 "
        "--trust-remote-code --max_num_batched_tokens 4K --async-scheduling"
    )
    assert command.model == "Qwen/Qwen3-14B"
    assert command.without == ("--port 8000", "--trust-remote-code")
    assert command.settings == VllmSettings(
        max_num_seqs=64, max_model_len=32_000, tensor_parallel_size=2, enable_prefix_caching=False,
        scheduling_policy="priority", gpu_memory_utilization=0.85, num_gpu_blocks=5000, max_num_batched_tokens=4096,
        async_scheduling=True,
    )  # fmt: skip


def test_the_older_command_is_read_too() -> None:
    command = read_vllm_command("python3 -m vllm.entrypoints.openai.api_server --model m --max-num-seqs 8")
    assert (command.model, command.settings.max_num_seqs) == ("m", 8)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("vllm serve m --max-num-seq 3", r"unknown argument --max-num-seq; did you mean 'max-num-seqs'\?"),
        ("vllm serve m --xyzzy 3", "unknown argument --xyzzy; leave it out if it changes no schedule"),
        ("vllm serve m --max-num-seqs", "--max-num-seqs has no value"),
        ("vllm serve m --max-num-seqs many", "engine command: max_num_seqs must be"),
        ("vllm serve m --enable-lora", "--enable-lora: LoRA adapters are not modelled"),
        (
            "vllm serve m --enable-prefix-caching=perhaps",
            "--enable-prefix-caching is 'perhaps'; it must be true or false",
        ),
        ("vllm serve m n", "'n' belongs to no argument; the model is 'm' already"),
        ("vllm bench m", "is none of vLLM's; write: vllm serve MODEL"),
        ('vllm serve "m', "cannot be read: No closing quotation"),
    ],
)
def test_wrong_commands_are_named(command: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_engine_settings(command)


def test_an_engine_is_named_with_its_version() -> None:
    assert read_engine_settings("vllm-0.15.1") == VllmSettings(version="0.15.1")
    assert read_engine_settings("vllm") == VllmSettings()
    with pytest.raises(UnknownNameError, match="unknown kind of engine 'tgi'"):
        read_engine_settings("tgi")
