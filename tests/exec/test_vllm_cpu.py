"""vLLM on a CPU; run with MAVERIQ_VLLM=1 in an environment with vLLM (docs/engines.md)."""

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_specs import TINY, spec

from maveriq.exec.engines.engine import EngineError, FailureKind
from maveriq.exec.engines.external import write_files
from maveriq.exec.engines.vllm import VllmEngine, translate
from maveriq.exec.messages import Generate, PromptSequence

if os.environ.get("MAVERIQ_VLLM") != "1":
    pytest.skip("set MAVERIQ_VLLM=1 to run vLLM", allow_module_level=True)
pytest.importorskip("vllm")

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's own

PROMPTS = ((3, 17, 42, 99, 7), (11, 250, 4), tuple(range(20, 60)))
LENGTHS = (12, 5, 8)


def generate_work(stop_token_ids: tuple[int, ...] = ()) -> Generate:
    return Generate(
        execution_id=1,
        sequences=tuple(
            PromptSequence(request_id=number, prompt=prompt, output_tokens=maximum, stop_token_ids=stop_token_ids)
            for number, (prompt, maximum) in enumerate(zip(PROMPTS, LENGTHS, strict=True))
        ),
    )


def save_random(family: str, folder: Path) -> Any:
    """Save a model with random weights and return it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(TINY[family]), encoding="utf-8")
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)  # so that the most likely token changes from step to step
    model.save_pretrained(folder)
    return model


def greedy(model: Any, prompt: tuple[int, ...], maximum: int) -> list[int]:
    """Return the tokens that transformers gives."""
    import torch

    ids = torch.tensor([prompt])
    with torch.inference_mode():
        for _ in range(maximum):
            ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return [int(token) for token in ids[0, len(prompt) :]]


@pytest.fixture
def engine() -> Iterator[VllmEngine]:
    engine = VllmEngine()
    yield engine
    engine.close()
    engine.close()


@pytest.mark.parametrize("family", sorted(TINY))
def test_tokens_are_those_of_transformers(engine: VllmEngine, tmp_path: Path, family: str) -> None:
    model = save_random(family, tmp_path / "model")
    expected = [greedy(model, prompt, maximum) for prompt, maximum in zip(PROMPTS, LENGTHS, strict=True)]
    loaded = engine.load(spec(family, devices=("cpu",), batch_size=3, weights_folder=str(tmp_path / "model")))
    assert (loaded.backend, bool(loaded.version)) == ("vllm", True)
    steps = list(engine.generate(generate_work()))
    assert len(steps) == max(LENGTHS)
    got = [[step[k] for step in steps if step[k] != -1] for k in range(len(PROMPTS))]
    assert got == expected
    # A stop token ends a sequence and is returned; an abandoned execution does not affect the next.
    stop = expected[0][3]
    cancelled = engine.generate(generate_work())
    next(cancelled)
    cancelled.close()
    stopped = [step[0] for step in engine.generate(generate_work((stop,))) if step[0] != -1]
    assert stopped == expected[0][: expected[0].index(stop) + 1]


def test_two_shards_give_the_tokens_of_one(engine: VllmEngine, tmp_path: Path) -> None:
    model = save_random("llama", tmp_path / "model")
    expected = [greedy(model, prompt, maximum) for prompt, maximum in zip(PROMPTS, LENGTHS, strict=True)]
    engine.load(
        spec(devices=("cpu", "cpu"), tp=2, layer_split=(4,), batch_size=3, weights_folder=str(tmp_path / "model"))
    )
    steps = list(engine.generate(generate_work()))
    assert [[step[k] for step in steps if step[k] != -1] for k in range(len(PROMPTS))] == expected


def test_it_runs_outside_the_main_thread(engine: VllmEngine) -> None:
    steps: list[Any] = []

    def run() -> None:
        engine.load(spec(devices=("cpu",), batch_size=3))
        steps.extend(engine.generate(generate_work()))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(timeout=300)
    assert len(steps) == max(LENGTHS)
    assert all(0 <= token < 512 for token in steps[0])


def test_out_of_memory_is_recognized(engine: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maveriq.exec.engines.vllm._BLOCK_TOKENS", 1 << 32)
    with pytest.raises(EngineError) as refused:
        engine.load(spec(devices=("cpu",)))
    assert refused.value.kind is FailureKind.OUT_OF_MEMORY


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"weights": "int8"},
        {"kv": "int8"},
        {"weights": "int4"},
        {"weights": "int4_gptq", "tp": 2},
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
    # Platform checks here are those of a CPU, which has fewer KV types and no half precision.
    here = {**translation.arguments, "kv_cache_dtype": "auto", "dtype": "bfloat16"}
    config = EngineArgs(**here).create_engine_config()
    assert config.parallel_config.pipeline_parallel_size == changes.get("pp", 1)
