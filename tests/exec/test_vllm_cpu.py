"""vLLM on a CPU; run with MAVERIQ_VLLM=1 in an environment with vLLM (docs/engines.md)."""

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from engine_fixtures import EngineCase, alive_in_group, run_async, started_engine, until
from engine_specs import TINY, spec

from maveriq.domain.models import WeightType
from maveriq.exec.capabilities import Status, check_spec, engine_facts
from maveriq.exec.device import Device
from maveriq.exec.engine_protocol import BROKEN
from maveriq.exec.engines.engine import EngineError, FailureKind
from maveriq.exec.engines.external import write_files
from maveriq.exec.engines.vllm import VllmEngine, translate
from maveriq.exec.messages import EngineSpec, Failed, Generate, PromptSequence

if os.environ.get("MAVERIQ_VLLM") != "1":
    pytest.skip("set MAVERIQ_VLLM=1 to run vLLM", allow_module_level=True)
pytest.importorskip("vllm")

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's own

# Mistral, Qwen 2 and Qwen 3 differ from llama in biases and norms, which vLLM knows by their names.
CONFIGS: dict[str, dict[str, Any]] = TINY | {
    family: TINY["llama"]
    | {"model_type": family, "architectures": [architecture], "sliding_window": None, "head_dim": 32}
    for family, architecture in (
        ("mistral", "MistralForCausalLM"),
        ("qwen2", "Qwen2ForCausalLM"),
        ("qwen3", "Qwen3ForCausalLM"),
    )
}
RAN = [row for row in engine_facts("vllm").can if row.status is Status.RAN]
RAN_ON_A_CPU = [
    (family, weights) for row in RAN for family, weights in product(row.architectures, row.weights)
]  # fmt: skip
PROMPTS = ((3, 17, 42, 99, 7), (11, 250, 4), tuple(range(20, 60)))
LENGTHS = (12, 5, 8)


def cpu_spec(family: str = "llama", **changes: Any) -> EngineSpec:
    """Return the spec of a tiny model on CPUs."""
    config = json.dumps(CONFIGS[family])
    fields = {"config_json": config, "devices": ("cpu",) * changes.get("tp", 1), "batch_size": 3} | changes
    made = spec("llama", **fields)
    check_spec("vllm", made)
    return made


def generate_work(stop_token_ids: tuple[int, ...] = (), lengths: tuple[int, ...] = LENGTHS) -> Generate:
    return Generate(
        execution_id=1,
        sequences=tuple(
            PromptSequence(request_id=number, prompt=prompt, output_tokens=maximum, stop_token_ids=stop_token_ids)
            for number, (prompt, maximum) in enumerate(zip(PROMPTS, lengths, strict=True))
        ),
    )


def save_random(family: str, folder: Path) -> Any:
    """Save a model with random weights and return it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[family]), encoding="utf-8")
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)  # so that the most likely token changes from step to step
    model.save_pretrained(folder)
    return model


NEAR = 0.1
"""How far below the best score a token may be that 16 bits choose, in standard deviations of the scores."""


def assert_best_by_transformers(model: Any, prompt: tuple[int, ...], tokens: list[int]) -> None:
    """Assert that each token has the best score of transformers in 32 bits, behind the tokens before it, or nearly."""
    import torch

    ids = torch.tensor([[*prompt, *tokens]])
    with torch.inference_mode():
        scores = model(ids).logits[0, len(prompt) - 1 : -1]
    chosen = scores.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    below = (scores.max(1).values - chosen) / scores.std(1)
    assert below.max() < NEAR
    assert (below == 0).float().mean() > 0.5  # and most are the best


def outputs(steps: list[Any]) -> list[list[int]]:
    return [[step[k] for step in steps if step[k] != -1] for k in range(len(PROMPTS))]


def stored_matrices(engine: VllmEngine) -> dict[str, tuple[str, float]]:
    """Return the type and the bytes per weight of each loaded linear layer's matrix, by the layer's name."""

    def look(model: Any) -> dict[str, tuple[str, float]]:
        from vllm.model_executor.layers.linear import LinearBase

        found = {}
        for name, layer in model.named_modules():
            if isinstance(layer, LinearBase):
                [matrix] = [
                    stored
                    for what, stored in layer.named_parameters(recurse=False)
                    if what in ("weight", "weight_packed", "qweight")
                ]
                weights = layer.input_size_per_partition * layer.output_size_per_partition
                found[name] = (str(matrix.dtype), matrix.numel() * matrix.element_size() / weights)
        return found

    [matrices] = engine._engine.apply_model(look)
    assert len(matrices) >= 4 * 4  # four layers with at least four matrices each
    return matrices


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[VllmEngine]:
    from vllm.model_executor.layers import utils

    # Some processors pack matrices for their kernels; the tests look at those that were packed.
    dispatch = utils.dispatch_cpu_unquantized_gemm
    monkeypatch.setattr(
        utils, "dispatch_cpu_unquantized_gemm", lambda layer, remove_weight: dispatch(layer, remove_weight=False)
    )
    engine = VllmEngine()
    yield engine
    engine.close()
    engine.close()


def test_scores_are_those_of_transformers(engine: VllmEngine, tmp_path: Path) -> None:
    import torch

    model = save_random("llama", tmp_path / "scored")
    engine.load(cpu_spec(weights_folder=str(tmp_path / "scored")))
    wanted = (5, 100, 511)
    found = engine.log_probabilities([(*prompt, token) for prompt in PROMPTS for token in wanted])
    with torch.inference_mode():
        logits = [model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1) for prompt in PROMPTS]
    expected = [float(scores[token]) for scores in logits for token in wanted]
    assert found == pytest.approx(expected, abs=0.2)  # 16 bits against 32
    with pytest.raises(EngineError, match="too long"):
        engine.log_probabilities([(1,) * 5000])


def test_what_ran_is_on_a_cpu() -> None:
    assert {device for row in RAN for device in row.devices} == {Device.CPU}
    assert {row.file for row in RAN} == {"tests/exec/test_vllm_cpu.py"}


@pytest.mark.parametrize("family", [family for family, weights in RAN_ON_A_CPU if weights is WeightType.FLOAT16])
def test_tokens_are_those_of_transformers(engine: VllmEngine, tmp_path: Path, family: str) -> None:
    model = save_random(family, tmp_path / "model")
    loaded = engine.load(cpu_spec(family, weights_folder=str(tmp_path / "model")))
    assert (loaded.backend, bool(loaded.version)) == ("vllm", True)
    assert set(stored_matrices(engine).values()) == {("torch.float16", 2.0)}
    steps = list(engine.generate(generate_work()))
    assert len(steps) == max(LENGTHS)
    got = outputs(steps)
    for prompt, tokens, length in zip(PROMPTS, got, LENGTHS, strict=True):
        assert len(tokens) == length
        assert_best_by_transformers(model, prompt, tokens)
    # A stop token ends a sequence and is returned; an abandoned execution does not affect the next.
    stop = got[0][3]
    cancelled = engine.generate(generate_work())
    next(cancelled)
    cancelled.close()
    stopped = [step[0] for step in engine.generate(generate_work((stop,))) if step[0] != -1]
    assert stopped == got[0][: got[0].index(stop) + 1]


STORED = {WeightType.FLOAT16: ("torch.float16", 2.0), WeightType.FP8: ("torch.float8_e4m3fn", 1.0)}


@pytest.mark.parametrize(("family", "weights"), RAN_ON_A_CPU)
def test_layers_store_what_was_asked_for(engine: VllmEngine, family: str, weights: WeightType) -> None:
    engine.load(cpu_spec(family, weights=weights.value))
    assert set(stored_matrices(engine).values()) == {STORED[weights]}
    steps = list(engine.generate(generate_work()))
    assert [len(tokens) for tokens in outputs(steps)] == list(LENGTHS)
    assert all(-1 <= token < 512 for step in steps for token in step)


def test_a_whole_batch_of_the_longest_sequences_is_served(engine: VllmEngine) -> None:
    engine.load(cpu_spec())
    lengths = tuple(256 - len(prompt) for prompt in PROMPTS)
    steps = list(engine.generate(generate_work(lengths=lengths)))
    assert [len(tokens) for tokens in outputs(steps)] == list(lengths)
    assert len(steps) == max(lengths)


@pytest.mark.parametrize(
    ("weights", "stored_as", "bytes_per_weight"),
    [("int8", "torch.int32", 1.0), ("int4", "torch.int32", 0.5), ("int4_gptq", "torch.int32", 0.5)],
)
def test_layers_of_gpu_formats_store_what_was_asked_for(
    tmp_path: Path, weights: str, stored_as: str, bytes_per_weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layers that vLLM makes of our arguments for GPUs; their kernel, which no CPU has, is left out."""
    from vllm import EngineArgs
    from vllm.model_executor.layers.quantization import auto_gptq
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import compressed_tensors_wNa16
    from vllm.v1.engine.llm_engine import LLMEngine

    class NoKernel:
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def process_weights_after_loading(self, layer: Any) -> None:
            pass

        def apply_weights(self, layer: Any, x: Any, bias: Any = None) -> Any:
            return x.new_zeros(*x.shape[:-1], layer.output_size_per_partition)

    for module in (auto_gptq, compressed_tensors_wNa16):
        monkeypatch.setattr(module, "choose_mp_linear_kernel", lambda _: NoKernel)
    translation = translate(spec(weights=weights), str(tmp_path))
    write_files(translation.files, tmp_path)
    for name, value in translation.environment.items():
        monkeypatch.setenv(name, value)
    engine = VllmEngine()
    engine._engine = LLMEngine.from_engine_args(EngineArgs(**{**translation.arguments, "enforce_eager": True}))
    try:
        assert set(stored_matrices(engine).values()) == {(stored_as, bytes_per_weight)}
    finally:
        engine.close()


@pytest.mark.parametrize("family", [family for row in RAN if row.max_tp == 2 for family in row.architectures])
def test_tokens_of_two_shards_are_those_of_transformers(engine: VllmEngine, tmp_path: Path, family: str) -> None:
    model = save_random(family, tmp_path / "model")
    engine.load(cpu_spec(family, tp=2, weights_folder=str(tmp_path / "model")))
    workers = [type(worker).__name__ for worker in multiprocessing.active_children()]
    assert workers == ["SpawnProcess"] * 2
    for prompt, tokens in zip(PROMPTS, outputs(list(engine.generate(generate_work()))), strict=True):
        assert_best_by_transformers(model, prompt, tokens)


def test_it_runs_outside_the_main_thread(engine: VllmEngine) -> None:
    steps: list[Any] = []

    def run() -> None:
        engine.load(cpu_spec())
        steps.extend(engine.generate(generate_work()))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(timeout=300)
    assert len(steps) == max(LENGTHS)
    assert all(0 <= token < 512 for token in steps[0])


def test_out_of_memory_is_recognized(engine: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maveriq.exec.engines.vllm._BLOCK_TOKENS", 1 << 32)
    with pytest.raises(EngineError) as refused:
        engine.load(cpu_spec())
    assert refused.value.kind is FailureKind.OUT_OF_MEMORY


# In a process of its own, behind the launcher

VLLM = EngineCase(backend="vllm")


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for minutes: three processes import vLLM, and the machine may be busy."""
    monkeypatch.setattr("engine_fixtures.TIMEOUT_S", 900.0)


@pytest.mark.usefixtures("patient")
def test_a_worker_out_of_memory_is_recognized_by_its_log(tmp_path: Path) -> None:
    """The weights do not fit a worker's memory; the exception that reaches the engine says only that it failed."""
    huge = CONFIGS["llama"] | {"vocab_size": 90_000_000, "hidden_size": 65_536, "num_attention_heads": 512}

    async def scenario() -> Failed:
        changes = {"tp": 2, "config_json": json.dumps(huge), "layer_split": (4,), "batch_size": 1}
        async with started_engine(VLLM, tmp_path, load=False, **changes) as engine:
            engine.send_load()
            return await engine.receive(Failed)

    failed = run_async(scenario)
    log = next(tmp_path.glob("*.log")).read_text(encoding="utf-8", errors="replace")
    assert "WorkerProc initialization failed" in log
    assert failed.kind == FailureKind.OUT_OF_MEMORY
    assert "needs " in failed.message


@pytest.mark.usefixtures("patient")
def test_a_killed_worker_ends_the_engine(tmp_path: Path) -> None:
    async def scenario() -> tuple[int, list[int]]:
        changes = {"tp": 2, "config_json": json.dumps(CONFIGS["llama"]), "layer_split": (4,)}
        async with started_engine(VLLM, tmp_path, **changes) as engine:
            leader = engine.connection.pid
            workers = [pid for pid in alive_in_group(leader) if "Worker" in command_of(pid)]
            assert len(workers) == 2
            os.kill(workers[1], signal.SIGKILL)
            code = await engine.exit_code()
            await until(lambda: not alive_in_group(leader))
            return code, alive_in_group(leader)

    assert run_async(scenario) == (BROKEN, [])


def command_of(pid: int) -> str:
    """Return the command line of a process, which vLLM's workers replace by their title."""
    return Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"weights": "int8"},
        {"kv": "int8"},
        {"weights": "int4"},
        {"weights": "int4_gptq", "tp": 2},
        {"weights": "fp8"},
        {"tp": 2, "pp": 2, "layer_split": (3, 1)},
    ],
    ids=str,
)
def test_the_parser_of_vllm_accepts_our_arguments(
    tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm import EngineArgs

    wide = {**TINY["llama"], "hidden_size": 256, "num_attention_heads": 8, "intermediate_size": 512}
    translation = translate(spec(config_json=json.dumps(wide), **changes), str(tmp_path))
    write_files(translation.files, tmp_path)
    for name, value in translation.environment.items():
        monkeypatch.setenv(name, value)
    # Platform checks here are those of a CPU, which has fewer KV types.
    config = EngineArgs(**{**translation.arguments, "kv_cache_dtype": "auto"}).create_engine_config()
    assert config.parallel_config.pipeline_parallel_size == changes.get("pp", 1)
    assert config.scheduler_config.max_num_batched_tokens == 8192
