"""vLLM's arguments, and its engine against a stand-in; test_vllm_cpu.py runs the real one."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from inspect import signature
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
from maveriq.exec.engines.vllm import VllmEngine, translate
from maveriq.exec.messages import Inspected, RankShard

LLAMA_7B = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}


def test_uneven_stages_and_random_weights() -> None:
    translation = translate(spec(tp=2, pp=2, layer_split=(3, 1), batch_size=4, seed=7), "/models/a")
    arguments = dict(translation.arguments)
    kv_bytes = arguments.pop("kv_cache_memory_bytes")
    assert arguments == {
        "model": "/models/a",
        "skip_tokenizer_init": True,
        "load_format": "dummy",
        "dtype": "float16",
        "seed": 7,
        "tensor_parallel_size": 2,
        "pipeline_parallel_size": 2,
        "distributed_executor_backend": "mp",
        "max_num_seqs": 4,
        "max_num_batched_tokens": 8192,
        "max_model_len": 256,
        "kv_cache_dtype": "auto",
        "gpu_memory_utilization": 0.01,
        "enable_prefix_caching": False,
        "enforce_eager": False,
    }
    # Keys and values of 3 layers, 1 of 2 KV heads with 32 numbers of 2 bytes; 4 sequences of 2 blocks and a spare one,
    # plus 1 block.
    assert kv_bytes == 2 * 3 * 1 * 32 * 2 * (4 * 3 + 1) * 128
    assert translation.environment["VLLM_PP_LAYER_PARTITION"] == "3,1"
    assert translation.environment["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
    assert json.loads(translation.files["config.json"]) == TINY["llama"]


def test_one_stage_has_no_partition_and_one_gpu_has_no_workers() -> None:
    translation = translate(spec(), "/models/a")
    assert "VLLM_PP_LAYER_PARTITION" not in translation.environment
    assert "distributed_executor_backend" not in translation.arguments


@pytest.mark.parametrize(
    ("weights", "method", "bits"),
    [("float16", None, None), ("int8", "compressed-tensors", 8), ("int4", "compressed-tensors", 4),
     ("int4_gptq", "gptq", 4), ("fp8", None, None)],
)  # fmt: skip
def test_forms_of_weights(weights: str, method: str | None, bits: int | None) -> None:
    translation = translate(spec(config_json=json.dumps(LLAMA_7B), layer_split=(32,), weights=weights), "/m")
    # int8_per_channel_weight_only would leave dense layers at 16 bits.
    assert translation.arguments.get("quantization") == ("fp8_per_channel" if weights == "fp8" else None)
    written = json.loads(translation.files["config.json"])
    quantization = written.pop("quantization_config", {})
    assert written == LLAMA_7B
    assert quantization.get("quant_method") == method
    [stored_bits] = [group["weights"]["num_bits"] for group in quantization.get("config_groups", {}).values()] or [
        quantization.get("bits")
    ]
    assert stored_bits == bits


def test_an_int8_cache_takes_a_byte_per_number_and_a_scale_per_head() -> None:
    native, int8 = (translate(spec(kv=kv), "/m").arguments for kv in ("native", "int8"))
    assert int8["kv_cache_dtype"] == "int8_per_token_head"
    assert int8["kv_cache_memory_bytes"] / native["kv_cache_memory_bytes"] == (32 + 4) / (2 * 32)


def test_given_weights_are_used_unchanged(tmp_path: Path) -> None:
    translation = translate(spec(weights_folder=str(tmp_path)), "/unused")
    assert (translation.arguments["model"], translation.arguments["load_format"]) == (str(tmp_path), "safetensors")
    assert translation.files == {}
    for weights in ("int8", "int4"):
        given = spec(config_json=json.dumps(LLAMA_7B), layer_split=(32,), weights=weights, weights_folder="/w")
        with pytest.raises(EngineError, match=f"to {weights} .* are not quantised") as refused:
            translate(given, "/m")
        assert refused.value.kind is FailureKind.UNSUPPORTED
    quantised = {**LLAMA_7B, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    assert (
        translate(
            spec(config_json=json.dumps(quantised), layer_split=(32,), weights="int4_gptq", weights_folder="/w"), "/m"
        ).arguments["model"]
        == "/w"
    )


@pytest.mark.parametrize(
    ("weights", "method"), [("float16", "gptq"), ("int8", "awq"), ("int4", "gptq"), ("int4_gptq", "awq")]
)
def test_weights_of_another_quantization_are_refused(weights: str, method: str) -> None:
    config = json.dumps({**LLAMA_7B, "quantization_config": {"quant_method": method, "bits": 4}})
    stored = {"gptq": "int4_gptq", "awq": "int4"}[method]
    with pytest.raises(EngineError, match=f"its checkpoint holds {stored} weights .*, not {weights};") as refused:
        check_spec("vllm", spec(config_json=config, layer_split=(32,), weights=weights, weights_folder="/w"))
    assert refused.value.kind is FailureKind.UNSUPPORTED


def test_fp8_is_made_while_loading_unless_the_checkpoint_has_it() -> None:
    given = {"layer_split": (32,), "weights": "fp8", "weights_folder": "/w"}
    plain = translate(spec(config_json=json.dumps(LLAMA_7B), **given), "/m")
    assert plain.arguments["quantization"] == "fp8_per_channel"
    config = json.dumps({**LLAMA_7B, "quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}})
    assert "quantization" not in translate(spec(config_json=config, **given), "/m").arguments


def test_a_step_has_room_for_the_longest_prompt_and_for_a_token_of_each_sequence() -> None:
    batch = 10_000
    assert translate(spec(batch_size=batch), "/m").arguments["max_num_batched_tokens"] == batch


@pytest.mark.parametrize(
    ("method", "stated", "dtype"),
    [
        (None, "bfloat16", "bfloat16"),
        (None, "float16", "float16"),
        (None, "float32", "float16"),
        ("fp8", "bfloat16", "bfloat16"),
        ("awq", "bfloat16", "float16"),
        ("gptq", "bfloat16", "float16"),
    ],
)
def test_a_checkpoint_keeps_its_type_where_kernels_can(method: str | None, stated: str, dtype: str) -> None:
    quantised = {} if method is None else {"quantization_config": {"quant_method": method, "bits": 4}}
    config = json.dumps(LLAMA_7B | {"torch_dtype": stated} | quantised)
    weights = {None: "float16", "fp8": "fp8", "awq": "int4", "gptq": "int4_gptq"}[method]
    given = spec(config_json=config, layer_split=(32,), weights=weights, weights_folder="/w")
    assert translate(given, "/m").arguments["dtype"] == dtype


def test_any_seed_is_valid_for_numpy() -> None:
    assert translate(spec(seed=2**53), "/m").arguments["seed"] < 2**32


def test_on_a_cpu() -> None:
    translation = translate(spec(tp=2, devices=("cpu", "cpu")), "/m", cpus=(0, 1, 2, 5, 6))
    assert (translation.arguments["dtype"], translation.arguments["enforce_eager"]) == ("float16", True)
    assert translation.environment["VLLM_CPU_OMP_THREADS_BIND"] == "0,1|2,5"
    assert "VLLM_CPU_OMP_THREADS_BIND" not in translate(spec(devices=("cpu",)), "/m", cpus=(0, 1)).environment


def test_a_model_without_a_context_length_gets_the_default() -> None:
    assert translate(spec("falcon"), "/m").arguments["max_model_len"] == 2048
    assert translate(spec("gptj"), "/m").arguments["max_model_len"] == 256
    long = {**TINY["llama"], "max_position_embeddings": 1 << 20}
    assert translate(spec(config_json=json.dumps(long)), "/m").arguments["max_model_len"] == 4096


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tp": 3}, "the nearest it can run: TP 1 x PP 3 float16"),
        ({"pp": 2, "layer_split": (2, 2), "devices": ("cpu", "cpu")}, "PP 2 is more than its 1"),
        ({"weights": "int8", "devices": ("cpu",)}, "on a CPU it stores llama weights as float16 or fp8, not int8"),
        ({"layer_split": (5,)}, "must add up to 4 layers"),
        ({"weights": "int3"}, "int3"),
        ({"devices": ("tpu:0",)}, "tpu"),
        ({"devices": ()}, "device"),
        ({"tp": 2, "devices": ("cuda:0", "cuda:0")}, "one per rank"),
        ({"tp": 2, "devices": ("cuda:1", "cuda:0")}, "per rank in order"),
        ({"config_json": "{"}, "vllm"),
        ({"config_json": "[1]"}, "vllm"),
        ({"config_json": "{}"}, "no model_type, and architectures names no known family"),
        ({"config_json": "[" * 100_000}, "vllm"),
        ({"config_json": json.dumps({**TINY["llama"], "head_dim": -32})}, "head_dim must be a positive whole number"),
        ({"config_json": json.dumps({**TINY["llama"], "head_dim": "x"})}, "head_dim must be a positive whole number"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_unsupported_configurations_are_refused_before_the_start(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError) as refused:
        check_spec("vllm", spec(**changes))
    assert refused.value.kind is FailureKind.UNSUPPORTED
    assert message in str(refused.value)


# The engine, against a stand-in for the package


class ModuleList(list[Any]):
    """torch's, by its name."""


class PPMissingLayer:
    """vLLM's place holder for a layer of another stage."""


PACKED = SimpleNamespace(
    input_size_per_partition=10,
    output_size_per_partition=5,
    weight=SimpleNamespace(numel=lambda: 0, element_size=lambda: 2, nbytes=0),
)
"""A layer whose matrix a kernel has packed: 100 bytes that are no parameter."""


class FakeModel:
    """The model of one rank: stage 0 has three of four layers, others one; and a list of experts."""

    def __init__(self, stage: int) -> None:
        held = 3 if stage == 0 else 1
        self._layers = ModuleList([object()] * held + [PPMissingLayer()] * (4 - held))

    def modules(self) -> Iterator[Any]:
        yield from (self, ModuleList([object(), object()]), self._layers, PACKED)

    def parameters(self) -> Iterator[Any]:
        yield from (SimpleNamespace(nbytes=900), SimpleNamespace(nbytes=24))


class FakeLlm:
    """Counts up from the last prompt token; the second request gets its tokens in pairs."""

    broken: str | None = None
    aborted: list[str]

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments, self.aborted, self.open = arguments, [], {}
        self.environment = dict(os.environ)
        self.engine_core = SimpleNamespace(shutdown=lambda: setattr(self, "down", True))
        self.model_config = SimpleNamespace(dtype="torch.float16")

    def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[Any]:
        """Run a function on the model of each rank."""
        assert method == "apply_model"
        return [args[0](FakeModel(stage)) for stage in range(self.arguments["pipeline_parallel_size"])]

    def add_request(self, name: str, prompt: dict[str, list[int]], sampling: Any) -> None:
        self.open[name] = [prompt["prompt_token_ids"][-1], 0, sampling]

    def has_unfinished_requests(self) -> bool:
        return bool(self.open)

    def abort_request(self, names: Sequence[str]) -> None:
        self.aborted += [name for name in names if self.open.pop(name, None)]

    def step(self) -> list[Any]:
        if FakeLlm.broken:
            raise RuntimeError(FakeLlm.broken)
        outputs = []
        for name, (last, given, sampling) in list(self.open.items()):
            count = min(2 if name.endswith("-1") else 1, sampling.max_tokens - given)
            tokens = [last + given + k + 1 for k in range(count)]
            stops = [k for k, token in enumerate(tokens) if token in sampling.stop_token_ids]
            tokens = tokens[: stops[0] + 1] if stops else tokens
            self.open[name][1] += len(tokens)
            finished = bool(stops) or self.open[name][1] >= sampling.max_tokens
            if finished:
                del self.open[name]
            outputs.append(
                SimpleNamespace(request_id=name, finished=finished, outputs=[SimpleNamespace(token_ids=tokens)])
            )
        return outputs


class EngineArgs(dict[str, Any]):
    """vLLM's, with the arguments that it has in 0.32."""

    __signature__ = signature(
        class_with(
            "model", "skip_tokenizer_init", "load_format", "dtype", "seed", "tensor_parallel_size",
            "pipeline_parallel_size", "max_num_seqs", "max_num_batched_tokens", "max_model_len", "kv_cache_dtype",
            "kv_cache_memory_bytes", "gpu_memory_utilization", "enable_prefix_caching", "enforce_eager",
            "distributed_executor_backend", "quantization",
        )
    )  # fmt: skip


KNOWN_VARIABLES = [
    "VLLM_PP_LAYER_PARTITION", "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_NO_USAGE_STATS",
    "VLLM_WORKER_MULTIPROC_METHOD", "VLLM_CPU_OMP_THREADS_BIND",
]  # fmt: skip


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeLlm]]:
    """Replace vLLM with a stand-in; return the list of its engines."""
    made: list[FakeLlm] = []

    def from_engine_args(arguments: dict[str, Any]) -> FakeLlm:
        made.append(FakeLlm(arguments))
        return made[-1]

    modules: dict[str, dict[str, Any]] = {
        "vllm": {"EngineArgs": EngineArgs, "SamplingParams": SimpleNamespace, "__version__": "0.33.0"},
        "vllm.sampling_params": {"RequestOutputKind": SimpleNamespace(DELTA="delta")},
        "vllm.envs": {"environment_variables": dict.fromkeys(KNOWN_VARIABLES)},
        "vllm.v1": {},
        "vllm.v1.engine": {},
        "vllm.v1.engine.llm_engine": {"LLMEngine": SimpleNamespace(from_engine_args=from_engine_args)},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    for name in ("VLLM_PP_LAYER_PARTITION", "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_NO_USAGE_STATS", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "")  # restores what the engine sets
    yield made
    FakeLlm.broken = None


def test_arguments_that_vllm_does_not_know_are_named(fakes: list[FakeLlm], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = spec(pp=2, layer_split=(3, 1))
    sampling = ("temperature", "max_tokens", "ignore_eos", "stop_token_ids", "detokenize", "top_p")
    monkeypatch.setattr("vllm.SamplingParams", class_with(*sampling))
    assert VllmEngine().inspect(asked) == Inspected(version="0.33.0")
    monkeypatch.setattr("vllm.SamplingParams", class_with(*sampling[:4]))
    monkeypatch.delitem(sys.modules["vllm.envs"].environment_variables, "VLLM_PP_LAYER_PARTITION")
    assert VllmEngine().inspect(asked).unknown_arguments == ("VLLM_PP_LAYER_PARTITION", "detokenize")
    monkeypatch.setattr("vllm.EngineArgs", class_with("model", "dtype"))
    unknown = VllmEngine().inspect(asked).unknown_arguments
    assert {"seed", "max_model_len"} < set(unknown)
    assert "model" not in unknown
    assert fakes == [], "nothing is loaded"


def test_load_serve_and_close(fakes: list[FakeLlm]) -> None:
    engine = VllmEngine()
    loaded = engine.load(spec(pp=2, layer_split=(3, 1)))
    [fake] = fakes
    assert (loaded.backend, loaded.version) == ("vllm", "0.33.0")
    assert loaded.shards == tuple(
        RankShard(layers=n, weights_bytes=1024, dtype="float16", pid=os.getpid()) for n in (3, 1)
    )
    assert loaded.weights_bytes == 2048
    assert loaded.kv_cache_bytes == 2 * fake.arguments["kv_cache_memory_bytes"]
    assert fake.environment["VLLM_PP_LAYER_PARTITION"] == "3,1"
    folder = Path(fake.arguments["model"])
    assert json.loads((folder / "config.json").read_text(encoding="utf-8")) == TINY["llama"]
    assert list(engine.generate(batch_of((10, 4), (50, 3)))) == [(11, 51), (12, 52), (13, 53), (14, -1)]
    assert list(engine.generate(batch_of((10, 4), (50, 9), stops=(12, 55)))) == [
        (11, 51), (12, 52), (-1, 53), (-1, 54), (-1, 55),
    ]  # fmt: skip
    engine.close()
    engine.close()
    assert fake.down
    assert not folder.exists()


def test_an_abandoned_execution_is_cancelled(fakes: list[FakeLlm]) -> None:
    engine = VllmEngine()
    engine.load(spec())
    steps = engine.generate(batch_of((10, 4), (50, 3)))
    assert next(steps) == (11, 51)
    steps.close()  # type: ignore[attr-defined]
    assert fakes[0].aborted
    assert list(engine.generate(batch_of((1, 2)))) == [(2,), (3,)]


def test_failures_are_engine_errors(fakes: list[FakeLlm], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = VllmEngine()
    engine.load(spec())
    FakeLlm.broken = "CUDA out of memory"
    with pytest.raises(EngineError) as failed:
        list(engine.generate(batch_of((1, 2))))
    assert failed.value.kind is FailureKind.OUT_OF_MEMORY
    FakeLlm.broken = None
    assert list(engine.generate(batch_of((1, 2)))) == [(2,), (3,)]
    engine.close()
    with pytest.raises(EngineError, match="nothing is loaded"):
        list(engine.generate(batch_of((1, 2))))
    with pytest.raises(EngineError, match="nothing is loaded"):
        list(VllmEngine().generate(batch_of((1, 2))))
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(EngineError, match="cannot be imported") as failed:
        VllmEngine().load(spec())
    assert failed.value.kind is FailureKind.UNSUPPORTED


def test_close_may_be_called_at_any_time_and_twice(fakes: list[FakeLlm]) -> None:
    check_that_close_may_come_twice_and_at_any_time(VllmEngine())


def test_a_sequence_without_kv_cache_space_fails_alone(fakes: list[FakeLlm]) -> None:
    check_that_a_sequence_without_room_fails_alone(VllmEngine())


def test_the_folder_is_removed_even_if_the_engine_does_not_close(fakes: list[FakeLlm]) -> None:
    engine = VllmEngine()
    engine.load(spec())
    check_that_the_folder_goes_even_if_the_engine_will_not(engine, Path(fakes[0].arguments["model"]))
