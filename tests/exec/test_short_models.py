"""Short models of a profile: the right layers, with the model's own weights."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from fixtures import MODEL

from maveriq.domain.models import ModelSpec, WeightType, config_path, load_model
from maveriq.domain.parallel import ParallelConfig
from maveriq.exec.engines import trtllm, vllm
from maveriq.exec.engines.external import Translation
from maveriq.exec.model_files import hf_config_json
from maveriq.profiling.plan import short_models
from maveriq.profiling.short_models import ShortModels

HYBRID = {
    "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "num_hidden_layers": 12, "hidden_size": 64,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 128, "vocab_size": 300,
    "sliding_window": 32, "sliding_window_pattern": 6, "max_position_embeddings": 512,
}  # fmt: skip


def model_in(folder: Path, config: str) -> ModelSpec:
    folder.mkdir()
    (folder / "config.json").write_text(config)
    return load_model(str(folder))


def test_a_model_of_equal_layers_keeps_its_own_weights(tmp_path: Path) -> None:
    model = model_in(tmp_path / "own", hf_config_json(MODEL))
    (tmp_path / "own" / "model.safetensors").write_bytes(b"weights")
    path = config_path(tmp_path / "own")
    short, files = ShortModels({model: path}, "torch", tmp_path).make(model, (0, 1))
    assert (short.layers, short.decoder.layers) == (2, 2)
    assert json.loads(files.config_json(short))["num_hidden_layers"] == 2
    assert files.weights_folder(short) == str(tmp_path / "own")


@pytest.mark.parametrize(("backend", "translate"), [("vllm", vllm.translate), ("trtllm", trtllm.translate)])
@pytest.mark.parametrize("layers", [1, 2])
def test_engines_of_others_load_short_models_with_random_weights(
    tmp_path: Path, backend: str, translate: Callable[..., Translation], layers: int
) -> None:
    config = {**json.loads(hf_config_json(MODEL)), "max_position_embeddings": 512}
    model = model_in(tmp_path / "own", json.dumps(config))
    makes = ShortModels({model: config_path(tmp_path / "own")}, backend, tmp_path)
    short, files = makes.make(model, tuple(range(layers)))
    spec = files.engine_spec(
        short, ParallelConfig(tp=1, pp=1, weights=WeightType.FLOAT16), batch_size=2, devices=("cuda:0",)
    )
    translated = translate(spec, str(tmp_path))
    assert translated.arguments["load_format"] == "dummy"
    assert json.loads(translated.files["config.json"])["num_hidden_layers"] == layers


@pytest.mark.heavy
@pytest.mark.skipif(find_spec("transformers") is None, reason="needs transformers")
def test_short_models_of_a_hybrid_have_the_planned_kinds_of_layers(tmp_path: Path) -> None:
    model = model_in(tmp_path / "hybrid", json.dumps(HYBRID))
    makes = ShortModels({model: config_path(tmp_path / "hybrid")}, "torch", tmp_path)
    for layers in short_models(model.decoder):
        short, files = makes.make(model, layers)
        (tmp_path / "config.json").write_text(files.config_json(short))
        read = load_model(str(tmp_path / "config.json")).decoder
        kinds = [read.layer_kinds[kind] for kind in read.layer_pattern]
        assert kinds == [model.decoder.layer_kinds[model.decoder.layer_pattern[layer]] for layer in layers]
