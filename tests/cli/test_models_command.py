"""`maveriq models`: the catalogue, and what is read of one model."""

import json
from pathlib import Path

from command_results import Maveriq, put

MOE = {
    "model_type": "mixtral", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 100, "num_local_experts": 4,
    "num_experts_per_tok": 2, "vision_config": {"depth": 3},
}  # fmt: skip


def test_the_catalogue(maveriq: Maveriq) -> None:
    ended = maveriq("models")
    assert ended.code == 0
    assert "llama-2-7b" in ended.out
    assert "deepseek-v3" in ended.out
    listed = json.loads(maveriq("models --json").out)
    assert listed["qwen3-32b"]["parameters"] == listed["qwen3-32b"]["published_parameters"] == 32_762_123_264
    assert listed["gpt-oss-120b"]["stored_as"] == "mxfp4"
    assert listed["qwen3-32b"]["source"] == "https://huggingface.co/Qwen/Qwen3-32B"


def test_one_model(maveriq: Maveriq, tmp_path: Path) -> None:
    put(tmp_path, {"mine/config.json": json.dumps(MOE)})
    shown = maveriq("models ./mine")
    assert shown.code == 0
    for words in (
        "parameters",
        "4 experts in 2 layers",
        "the parts for other inputs (vision_config)",
        "256 bytes a token",
    ):
        assert words in shown.out
    found = json.loads(maveriq("models ./mine --json").out)
    assert found["kv_bytes_per_token"] == 2 * 2 * 2 * 16 * 2
    assert found["decoder"]["layer_kinds"][0]["feed_forward"]["experts"] == 4
    assert found["weight_bytes"]["float16"] == found["stored_bytes"] == 2 * found["parameters"]


def test_unknown_names_and_unreadable_files(maveriq: Maveriq, tmp_path: Path) -> None:
    assert "did you mean 'qwen3-32b'" in maveriq("models qwen3-32").err
    put(tmp_path, {"mine/config.json": json.dumps({**MOE, "num_local_experts": 0})})
    ended = maveriq("models ./mine")
    assert (ended.code, ended.out) == (2, "")
    assert "mixtral has experts, but no num_local_experts" in ended.err
