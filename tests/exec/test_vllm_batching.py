"""vLLM as an engine that batches continuously: its arguments, and its steps against a stand-in.

`test_real_vllm_batching.py` runs the real one.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from engine_specs import spec

from maveriq.engine.reading import read_engine_settings
from maveriq.engine.settings import EngineHost
from maveriq.errors import InputError
from maveriq.estimate.observations import Batch
from maveriq.exec.batching_spec import batching_spec, check_batching
from maveriq.exec.engines import vllm_batching
from maveriq.exec.engines.engine import EngineError, FailureKind
from maveriq.exec.engines.vllm import VllmEngine
from maveriq.exec.engines.vllm_batching import ContinuousVllmEngine, translate_batching
from maveriq.exec.messages import BatchingSpec, EngineSpec, Loaded, PromptSequence
from maveriq.profiling.measure_steps import steps_of

HOST = EngineHost(context_tokens=4_096)


def arguments_of(**settings: Any) -> dict[str, Any]:
    """Return the arguments that settings of a model set become."""
    read = read_engine_settings({"kind": "vllm", **settings})
    return dict(batching_spec(read, read.resolve(HOST)).arguments)  # type: ignore[arg-type, union-attr]


def continuous(device: str = "cuda:0", **settings: Any) -> EngineSpec:
    return spec(devices=(device,), batching=BatchingSpec(kind="vllm", arguments=arguments_of(**settings)))


# From a model set to vLLM's arguments


def test_defaults_are_those_that_are_simulated() -> None:
    assert arguments_of(version="0.15.1") == {
        "max_num_seqs": 1024, "max_num_batched_tokens": 8192, "max_model_len": 4096,
        "gpu_memory_utilization": 0.9, "enable_prefix_caching": True, "enable_chunked_prefill": True,
    }  # fmt: skip


def test_what_is_set_reaches_vllm_by_its_own_names() -> None:
    arguments = arguments_of(
        max_num_seqs=7, max_num_batched_tokens=512, max_model_len=500, block_size=32, num_gpu_blocks=40,
        enable_prefix_caching=False, scheduling_policy="priority", long_prefill_token_threshold=100,
        gpu_memory_utilization=0.5,
    )  # fmt: skip
    assert arguments == {
        "max_num_seqs": 7, "max_num_batched_tokens": 512, "max_model_len": 500, "block_size": 32,
        "num_gpu_blocks_override": 40, "enable_prefix_caching": False, "enable_chunked_prefill": True,
        "scheduling_policy": "priority", "long_prefill_token_threshold": 100, "gpu_memory_utilization": 0.5,
    }  # fmt: skip
    assert {"tensor_parallel_size", "quantization", "version"}.isdisjoint(arguments_of(quantization="fp8"))


def test_the_engine_starts_with_these_arguments() -> None:
    arguments = translate_batching(continuous(num_gpu_blocks=40, block_size=32, max_num_seqs=7), "/m").arguments
    assert arguments["max_num_seqs"] == 7
    assert arguments["num_gpu_blocks_override"] == 40
    # keys and values of 4 layers with 2 KV heads of 32 numbers of 2 bytes
    assert arguments["kv_cache_memory_bytes"] == 40 * 32 * 2 * 4 * 2 * 32 * 2
    assert (arguments["load_format"], arguments["tensor_parallel_size"]) == ("dummy", 1)
    measured = translate_batching(spec(batching=steps_of([Batch(64, 512, 20), Batch(1, 4096, 20)])), "/m").arguments
    assert measured["max_num_batched_tokens"] == 64 * 513
    assert measured["kv_cache_memory_bytes"] > 0  # of a batch, where no argument is about memory
    assert measured["enable_prefix_caching"] is False
    free = translate_batching(continuous(gpu_memory_utilization=0.4), "/m").arguments
    assert "kv_cache_memory_bytes" not in free  # vLLM takes what its share of the GPU leaves
    assert free["gpu_memory_utilization"] == 0.4


def test_blocks_that_a_cpu_cannot_have_are_refused() -> None:
    with pytest.raises(EngineError, match="block_size must be a multiple of 32, not 16; set it") as refused:
        translate_batching(continuous("cpu", num_gpu_blocks=40), "/m")
    assert refused.value.kind is FailureKind.UNSUPPORTED
    translate_batching(continuous("cpu", block_size=64), "/m")
    assert "block_size" not in translate_batching(continuous("cpu"), "/m").arguments  # vLLM's own


@pytest.mark.parametrize("backend", ["torch", "trtllm"])
def test_backends_that_take_one_execution_at_a_time_are_refused_by_name(backend: str) -> None:
    engines = SimpleNamespace(settings={1: read_engine_settings({"kind": "vllm"})})
    with pytest.raises(InputError, match=f"runs {backend} engines one execution at a time; use --backend emulated"):
        check_batching(engines, backend)  # type: ignore[arg-type]


def test_engines_of_another_kind_are_refused() -> None:
    engines = SimpleNamespace(settings={1: read_engine_settings({"kind": "sglang"})})
    with pytest.raises(InputError, match="--backend vllm does not run engines of kind 'sglang'; --backend emulated em"):
        check_batching(engines, "vllm")  # type: ignore[arg-type]
    check_batching(engines, "emulated")  # type: ignore[arg-type]


# The engine, against a stand-in


class Scheduler:
    """Runs two requests at a time, and preempts the second where it is told to."""

    def __init__(self) -> None:
        self.running: list[str] = []
        self.waiting: list[str] = []
        self.preempt = False
        self.kv_cache_manager = SimpleNamespace(usage=0.25)

    def schedule(self) -> Any:
        new = []
        preempted = set()
        if self.preempt and len(self.running) == 2:
            preempted = {self.running.pop()}
            self.waiting[:0] = preempted
        else:
            while self.waiting and len(self.running) < 2:
                self.running.append(self.waiting.pop(0))
                new.append(SimpleNamespace(req_id=self.running[-1], num_computed_tokens=32))
        tokens = dict.fromkeys(self.running, 1)
        return SimpleNamespace(
            scheduled_new_reqs=new, preempted_req_ids=preempted or None, num_scheduled_tokens=tokens,
            total_num_scheduled_tokens=len(tokens),
        )  # fmt: skip


class Llm:
    """vLLM's `LLMEngine`: appends a random part to each ID, as it does."""

    def __init__(self) -> None:
        self.scheduler = Scheduler()
        self.engine_core = SimpleNamespace(engine_core=SimpleNamespace(scheduler=self.scheduler))
        self.vllm_config = SimpleNamespace(
            cache_config=SimpleNamespace(num_gpu_blocks=41, block_size=32, kv_cache_memory_bytes=1_000)
        )
        self.left: dict[str, int] = {}
        self.priorities: dict[str, int] = {}

    def add_request(self, name: str, prompt: Any, sampling: PromptSequence, *, priority: int) -> None:
        if len(prompt["prompt_token_ids"]) == 13:
            raise ValueError("no such prompt")
        self.left[name] = sampling.output_tokens
        self.priorities[name] = priority
        self.scheduler.waiting.append(f"{name}-5ec2e7")

    def abort_request(self, names: list[str]) -> None:
        for name in names:
            del self.left[name]
            for queue in (self.scheduler.running, self.scheduler.waiting):
                queue[:] = [internal for internal in queue if internal.partition("-")[0] != name]

    def step(self) -> list[Any]:
        scheduled = self.scheduler.schedule()
        results = []
        for internal in list(scheduled.num_scheduled_tokens):
            name = internal.partition("-")[0]
            self.left[name] -= 1
            if not self.left[name]:
                self.scheduler.running.remove(internal)
            results.append(
                SimpleNamespace(request_id=name, finished=not self.left[name], outputs=[SimpleNamespace(token_ids=[7])])
            )
        return results


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> tuple[ContinuousVllmEngine, Llm]:
    """Return an engine on a stand-in for vLLM."""
    engine, llm = ContinuousVllmEngine(), Llm()

    def load(self: VllmEngine, given: EngineSpec) -> Loaded:
        self._engine, self._max_tokens = llm, 100
        return Loaded(backend="vllm", version="0.32.0")

    monkeypatch.setattr(VllmEngine, "load", load)
    monkeypatch.setattr(vllm_batching, "sampling_params", lambda sequence: sequence)
    report = engine.load(continuous(num_gpu_blocks=41, block_size=32))
    assert (report.kv_tokens, report.kv_cache_bytes) == (40 * 32, 1_000)  # a block stays empty
    return engine, llm


def sequence(request_id: int, prompt_tokens: int = 4, output_tokens: int = 2) -> PromptSequence:
    return PromptSequence(request_id=request_id, prompt=(1,) * prompt_tokens, output_tokens=output_tokens)


def test_steps_say_what_the_scheduler_did(loaded: tuple[ContinuousVllmEngine, Llm]) -> None:
    engine, llm = loaded
    for number in (1, 2, 3):
        engine.submit(sequence(number), is_urgent=number == 3)
    assert llm.priorities == {"1": 1, "2": 1, "3": 0}  # vLLM's smaller one goes first
    first = engine.step()
    assert first.tokens == [(1, (7,)), (2, (7,))]
    assert (first.admitted, first.computed, first.batch_tokens) == ([(1, 32), (2, 32)], [1, 2], 2)
    assert (first.running, first.waiting, first.kv_tokens) == (2, 1, 320)
    llm.scheduler.preempt = True
    second = engine.step()
    assert (second.preempted, second.ended, second.admitted) == ([2], [1], [])
    llm.scheduler.preempt = False
    third = engine.step()
    assert third.admitted == [(3, 32)]  # 2 was admitted before
    assert third.ended == [2]
    engine.abort(3)
    assert (llm.left, llm.scheduler.running) == ({"1": 0, "2": 0}, [])


def test_a_request_that_vllm_refuses_fails_alone(loaded: tuple[ContinuousVllmEngine, Llm]) -> None:
    engine, _ = loaded
    with pytest.raises(EngineError, match="a sequence of 102 tokens is too long"):
        engine.submit(sequence(1, 100), is_urgent=False)
    with pytest.raises(EngineError, match="no such prompt"):
        engine.submit(sequence(2, 13), is_urgent=False)


def test_a_step_that_fails_is_an_engine_error(
    loaded: tuple[ContinuousVllmEngine, Llm], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, llm = loaded

    def fail() -> None:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(llm, "step", fail)
    with pytest.raises(EngineError) as failed:
        engine.step()
    assert failed.value.kind is FailureKind.OUT_OF_MEMORY


def test_nothing_runs_before_it_is_loaded() -> None:
    engine = ContinuousVllmEngine()
    for call in (engine.step, lambda: engine.abort(1), lambda: engine.submit(sequence(1, 1), is_urgent=False)):
        with pytest.raises(EngineError):
            call()
