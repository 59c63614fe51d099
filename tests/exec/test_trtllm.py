"""TensorRT-LLM's arguments, and its engine against a stand-in; the package itself needs an NVIDIA machine."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from engine_specs import TINY, spec
from external_engine_checks import (
    batch_of,
    check_that_a_sequence_without_room_fails_alone,
    check_that_close_may_come_twice_and_at_any_time,
    check_that_the_folder_goes_even_if_the_engine_will_not,
    class_with,
)

from maveriq.exec.capabilities import check_spec
from maveriq.exec.engines.engine import EngineError, FailureKind
from maveriq.exec.engines.trtllm import TrtLlmEngine, translate
from maveriq.exec.messages import EngineSpec, Inspected

# Fields of `TorchLlmArgs` in 1.2, which refuses all others.
FIELDS = {
    "model", "skip_tokenizer_init", "load_format", "dtype", "tensor_parallel_size", "pipeline_parallel_size",
    "pp_partition", "max_batch_size", "max_seq_len", "max_input_len", "max_num_tokens", "kv_cache_config",
    "cuda_graph_config",
}  # fmt: skip


def test_uneven_stages_and_random_weights() -> None:
    translation = translate(spec(tp=2, pp=2, layer_split=(3, 1), batch_size=4), "/models/a")
    assert translation.arguments == {
        "model": "/models/a",
        "skip_tokenizer_init": True,
        "load_format": "dummy",
        "dtype": "float16",
        "tensor_parallel_size": 2,
        "pipeline_parallel_size": 2,
        "pp_partition": [3, 1],
        "max_batch_size": 4,
        "max_seq_len": 256,
        "max_input_len": 256,
        "max_num_tokens": 8192,
        "kv_cache_config": {"dtype": "auto", "enable_block_reuse": False, "max_tokens": 4 * (256 + 32)},
        "cuda_graph_config": {"max_batch_size": 4, "enable_padding": True},
    }
    assert set(translation.arguments) <= FIELDS
    assert json.loads(translation.files["config.json"]) == {**TINY["llama"], "torch_dtype": "float16"}
    assert translation.environment["TLLM_NUMA_AWARE_WORKER_AFFINITY"] == "0"
    assert "TLLM_WORKER_USE_SINGLE_PROCESS" not in translation.environment


def test_one_gpu_runs_in_one_process_and_needs_no_partition() -> None:
    translation = translate(spec(), "/models/a")
    assert translation.environment["TLLM_WORKER_USE_SINGLE_PROCESS"] == "1"
    assert "pp_partition" not in translation.arguments


@pytest.mark.parametrize(
    ("weights", "algorithm"), [("float16", None), ("int8", "W8A16"), ("int4", "W4A16"), ("fp8", "FP8")]
)
def test_forms_of_weights(weights: str, algorithm: str | None) -> None:
    files = translate(spec(weights=weights), "/m").files
    if algorithm is None:
        assert set(files) == {"config.json"}
        return
    assert json.loads(files["hf_quant_config.json"])["quantization"] == {
        "quant_algo": algorithm,
        "kv_cache_quant_algo": None,
        "exclude_modules": ["lm_head"],
    }


@pytest.mark.parametrize("weights", ["float16", "int8", "int4"])
@pytest.mark.parametrize("own", [{}, {"torch_dtype": "bfloat16"}, {"dtype": "float32"}])
def test_layers_of_random_weights_are_float16(weights: str, own: dict[str, str]) -> None:
    translation = translate(spec(weights=weights, config_json=json.dumps(TINY["llama"] | own)), "/m")
    written = json.loads(translation.files["config.json"])
    assert translation.arguments["dtype"] == "float16"
    assert {name: value for name, value in written.items() if "dtype" in name} == {"torch_dtype": "float16"}


def checkpoint(folder: Path, *, torch_dtype: str | None, key: str = "torch_dtype", **stored: str) -> EngineSpec:
    """Write a safetensors file with a header of these types, and return the spec of a model with it."""
    header = {name: {"dtype": dtype, "shape": [4, 4], "data_offsets": [0, 32]} for name, dtype in stored.items()}
    header |= {"norm": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, "__metadata__": {"format": "pt"}}
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    config = TINY["llama"] | ({key: torch_dtype} if torch_dtype else {})
    return spec(config_json=json.dumps(config), weights_folder=str(folder))


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
@pytest.mark.parametrize(("torch_dtype", "stored"), [("float16", "F16"), ("bfloat16", "BF16")])
def test_given_weights_of_16_bits_are_loaded_as_they_are(
    tmp_path: Path, key: str, torch_dtype: str, stored: str
) -> None:
    translation = translate(checkpoint(tmp_path, torch_dtype=torch_dtype, key=key, q=stored, k=stored), "/m")
    assert translation.arguments["dtype"] == torch_dtype
    assert translation.files == {}


@pytest.mark.parametrize(
    ("torch_dtype", "stored", "message"),
    [
        (None, "F16", "has no torch_dtype, so they would be float32; convert the weights to float16 or bfloat16"),
        ("float32", "F32", "has torch_dtype float32; convert"),
        ("float16", "F32", "not float16 as their config.json says: k is stored as F32"),
        ("bfloat16", "F16", "not bfloat16 as their config.json says: k is stored as F16"),
        ("float16", "F8_E4M3", "not float16 as their config.json says: k is stored as F8_E4M3"),
    ],
)
def test_given_weights_of_another_type_are_refused(
    tmp_path: Path, torch_dtype: str | None, stored: str, message: str
) -> None:
    first = {"float16": "F16", "bfloat16": "BF16"}.get(torch_dtype or "", stored)
    with pytest.raises(EngineError, match=message) as refused:
        translate(checkpoint(tmp_path, torch_dtype=torch_dtype, q=first, k=stored), "/m")
    assert refused.value.kind is FailureKind.UNSUPPORTED


@pytest.mark.parametrize("header", ["", "[]", '{"a": null}', '{"a": {"dtype": "F16", "shape": 4}}', '{"a'])
@pytest.mark.parametrize("length", [None, 0, 2**64 - 1])
def test_broken_weights_are_refused(tmp_path: Path, header: str, length: int | None) -> None:
    made = checkpoint(tmp_path, torch_dtype="float16")
    size = len(header) if length is None else length
    (tmp_path / "model.safetensors").write_bytes(size.to_bytes(8, "little") + header.encode())
    with pytest.raises(EngineError, match="not a safetensors file") as refused:
        translate(made, "/m")
    assert refused.value.kind is FailureKind.UNSUPPORTED


def quantised(algorithm: str) -> dict[str, Any]:
    return {"quantization": {"quant_algo": algorithm}}


def test_given_weights_must_already_be_quantized(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"no hf_quant_config\.json"):
        translate(spec(weights="int8", weights_folder=str(tmp_path)), "/m")
    quant_config = tmp_path / "hf_quant_config.json"
    for content, message in (("{}", "cannot be read"), (json.dumps(quantised("W4A16")), "by W4A16, not int8")):
        quant_config.write_text(content, encoding="utf-8")
        with pytest.raises(EngineError, match=message):
            translate(spec(weights="int8", weights_folder=str(tmp_path)), "/m")
    with pytest.raises(EngineError, match="by W4A16, not float16") as refused:
        translate(spec(weights_folder=str(tmp_path)), "/m")
    assert refused.value.kind is FailureKind.UNSUPPORTED
    quant_config.write_text(json.dumps(quantised("W8A16")), encoding="utf-8")
    config_json = json.dumps(TINY["llama"] | {"torch_dtype": "float16"})
    translation = translate(spec(weights="int8", weights_folder=str(tmp_path), config_json=config_json), "/m")
    assert (translation.arguments["model"], translation.arguments["load_format"]) == (str(tmp_path), "auto")
    assert translation.files == {}


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        (
            "falcon",
            {},
            "it runs llama, mistral, qwen2, qwen3 or mixtral models, not falcon; it supports no similar configuration",
        ),
        ("gptj", {}, "models, not gptj"),
        ("llama", {"kv": "int8"}, "the nearest it can run: TP 1 x PP 1 float16"),
        ("llama", {"weights": "int4_gptq"}, "the nearest it can run: TP 1 x PP 1 int4"),
        ("llama", {"devices": ("cpu",)}, "not on a CPU"),
    ],
)
def test_unsupported_configurations_are_refused_before_the_start(
    family: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(EngineError, match=message) as refused:
        check_spec("trtllm", spec(family, **changes))
    assert refused.value.kind is FailureKind.UNSUPPORTED


# The engine, against a stand-in for the package


class FakeResult:
    """Streams the numbers after the last prompt token, cumulatively, and sometimes two at once."""

    def __init__(self, llm: FakeLlm, prompt: list[int], sampling: Any) -> None:
        assert not hasattr(sampling, "ignore_eos"), "newer versions lose the stop tokens with it"
        self.llm, self.prompt, self.sampling = llm, prompt, sampling

    async def __aiter__(self) -> AsyncIterator[Any]:
        tokens: list[int] = []
        while len(tokens) < self.sampling.max_tokens:
            await asyncio.sleep(0)
            if self.llm.broken and len(tokens) >= 1:
                raise RuntimeError(self.llm.broken)
            for _ in range(2 if self.prompt[-1] >= 50 else 1):
                tokens.append(self.prompt[-1] + len(tokens) + 1)
            tokens = tokens[: self.sampling.max_tokens]
            stops = [k for k, token in enumerate(tokens) if token in (self.sampling.stop_token_ids or ())]
            tokens = tokens[: stops[0] + 1] if stops else tokens
            yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=list(tokens))])
            if stops:
                return

    def abort(self) -> None:
        self.llm.aborted.append(self.prompt)


class FakeLlm:
    made: list[FakeLlm]

    def __init__(self, **arguments: Any) -> None:
        assert set(arguments) <= FIELDS
        self.arguments, self.aborted, self.down, self.broken = arguments, [], False, ""
        self.made.append(self)

    def generate_async(self, prompt: list[int], sampling: Any, *, streaming: bool) -> FakeResult:
        asyncio.get_running_loop()  # results can be iterated only with an event loop
        assert streaming
        return FakeResult(self, prompt, sampling)

    def shutdown(self) -> None:
        self.down = True


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeLlm]]:
    """Replace TensorRT-LLM with a stand-in; return the list of its engines."""
    FakeLlm.made = []
    module = ModuleType("tensorrt_llm")
    vars(module).update(LLM=FakeLlm, SamplingParams=SimpleNamespace, __version__="1.2.1")
    monkeypatch.setitem(sys.modules, "tensorrt_llm", module)
    for name in ("TLLM_WORKER_USE_SINGLE_PROCESS", "TLLM_NUMA_AWARE_WORKER_AFFINITY", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "")  # restores what the engine sets
    return FakeLlm.made


def test_arguments_that_tensorrt_llm_does_not_know_are_named(
    fakes: list[FakeLlm], monkeypatch: pytest.MonkeyPatch
) -> None:
    llmapi = ModuleType("tensorrt_llm.llmapi")
    vars(llmapi).update(
        TorchLlmArgs=class_with(*FIELDS),
        KvCacheConfig=class_with("dtype", "enable_block_reuse", "max_tokens"),
        CudaGraphConfig=class_with("max_batch_size", "enable_padding"),
    )
    monkeypatch.setitem(sys.modules, "tensorrt_llm.llmapi", llmapi)
    sampling = (
        "max_tokens", "temperature", "top_k", "end_id", "pad_id", "stop_token_ids", "include_stop_str_in_output",
        "detokenize",
    )  # fmt: skip
    vars(sys.modules["tensorrt_llm"]).update(llmapi=llmapi, SamplingParams=class_with(*sampling))
    asked = spec(tp=2, pp=2, layer_split=(3, 1))
    assert TrtLlmEngine().inspect(asked) == Inspected(version="1.2.1")

    vars(llmapi).update(
        TorchLlmArgs=class_with(*FIELDS - {"pp_partition"}), KvCacheConfig=class_with("dtype", "max_tokens")
    )
    del llmapi.CudaGraphConfig
    assert TrtLlmEngine().inspect(asked).unknown_arguments == (
        "CudaGraphConfig", "kv_cache_config.enable_block_reuse", "pp_partition",
    )  # fmt: skip
    assert fakes == [], "nothing is loaded"


def test_load_serve_and_close(fakes: list[FakeLlm]) -> None:
    engine = TrtLlmEngine()
    loaded = engine.load(spec(weights="int8"))
    [fake] = fakes
    assert (loaded.backend, loaded.version) == ("trtllm", "1.2.1")
    folder = Path(fake.arguments["model"])
    assert {path.name for path in folder.iterdir()} == {"config.json", "hf_quant_config.json"}
    assert list(engine.generate(batch_of((10, 4), (50, 3)))) == [(11, 51), (12, 52), (13, 53), (14, -1)]
    assert list(engine.generate(batch_of((10, 4), (50, 9), stops=(12, 55)))) == [
        (11, 51), (12, 52), (-1, 53), (-1, 54), (-1, 55),
    ]  # fmt: skip
    engine.close()
    engine.close()
    assert fake.down
    assert not folder.exists()


def test_an_abandoned_execution_is_cancelled(fakes: list[FakeLlm]) -> None:
    engine = TrtLlmEngine()
    engine.load(spec())
    steps = engine.generate(batch_of((10, 99), (50, 99)))
    assert next(steps) == (11, 51)
    steps.close()  # type: ignore[attr-defined]
    assert sorted(fakes[0].aborted) == [[10], [50]]
    assert list(engine.generate(batch_of((1, 2)))) == [(2,), (3,)]
    engine.close()


def test_failures_are_engine_errors(fakes: list[FakeLlm], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = TrtLlmEngine()
    engine.load(spec())
    fakes[0].broken = "CUDA out of memory"
    with pytest.raises(EngineError) as failed:
        list(engine.generate(batch_of((10, 4), (50, 3))))
    assert failed.value.kind is FailureKind.OUT_OF_MEMORY
    fakes[0].broken = ""
    assert list(engine.generate(batch_of((1, 2)))) == [(2,), (3,)]
    engine.close()
    with pytest.raises(EngineError, match="nothing is loaded"):
        list(engine.generate(batch_of((1, 2))))
    with pytest.raises(EngineError, match="nothing is loaded"):
        list(TrtLlmEngine().generate(batch_of((1, 2))))
    monkeypatch.setitem(sys.modules, "tensorrt_llm", None)
    with pytest.raises(EngineError, match="cannot be imported: import of tensorrt_llm halted") as failed:
        TrtLlmEngine().load(spec())
    assert failed.value.kind is FailureKind.UNSUPPORTED


def test_close_may_be_called_at_any_time_and_twice(fakes: list[FakeLlm]) -> None:
    check_that_close_may_come_twice_and_at_any_time(TrtLlmEngine())


def test_a_sequence_without_kv_cache_space_fails_alone(fakes: list[FakeLlm]) -> None:
    check_that_a_sequence_without_room_fails_alone(TrtLlmEngine())


def test_the_folder_is_removed_even_if_the_engine_does_not_close(fakes: list[FakeLlm]) -> None:
    engine = TrtLlmEngine()
    engine.load(spec())
    check_that_the_folder_goes_even_if_the_engine_will_not(engine, Path(fakes[0].arguments["model"]))
