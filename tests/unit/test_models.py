"""Built-in models, and models read from a Hugging Face configuration."""

import json
from pathlib import Path

import pytest

from maveriq.domain.models import known_models, load_model
from maveriq.errors import InputError, UnknownNameError

LLAMA = {
    "_name_or_path": "meta-llama/Tiny-Llama",
    "model_type": "llama",
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 172,
    "vocab_size": 1000,
}


def write(folder: Path, config: object) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "config.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("name", "layers", "hidden", "heads", "kv_heads"),
    [
        ("falcon-7b", 32, 4544, 71, 1),
        ("falcon-40b", 60, 8192, 128, 8),
        ("gptj-6b", 28, 4096, 16, 16),
        ("llama-2-7b", 32, 4096, 32, 32),
        ("llama-2-13b", 40, 5120, 40, 40),
        ("llama-2-70b", 80, 8192, 64, 8),
    ],
)
def test_the_six_models_have_their_published_shapes(
    name: str, layers: int, hidden: int, heads: int, kv_heads: int
) -> None:
    model = load_model(name)
    assert (model.name, model.layers, model.hidden_size) == (name, layers, hidden)
    assert (model.attention_heads, model.kv_heads) == (heads, kv_heads)
    assert hidden % heads == 0
    assert name in known_models()


def test_a_configuration_is_read_from_its_file_or_folder(tmp_path: Path) -> None:
    path = write(tmp_path / "somewhere", LLAMA)
    for text in (str(path), str(path.parent)):
        model = load_model(text)
        assert (model.name, model.layers, model.kv_heads, model.architecture) == ("Tiny-Llama", 4, 2, "llama")


@pytest.mark.parametrize("origin", [None, "", ".", "./"])
def test_a_configuration_without_a_name_is_named_after_its_folder(tmp_path: Path, origin: str | None) -> None:
    path = write(tmp_path / "my-model", {**LLAMA, "_name_or_path": origin})
    assert load_model(str(path)).name == "my-model"


def test_old_and_new_falcon_differ_in_kv_heads(tmp_path: Path) -> None:
    old = {"model_type": "falcon", "n_layer": 2, "n_embd": 64, "n_head": 8, "vocab_size": 10, "multi_query": True}
    new = {**old, "new_decoder_architecture": True, "num_kv_heads": 4}
    assert load_model(str(write(tmp_path / "old", old))).kv_heads == 1
    without_key = {key: value for key, value in old.items() if key != "multi_query"}
    assert load_model(str(write(tmp_path / "falcon", {**without_key, "model_type": "falcon"}))).kv_heads == 1
    assert load_model(str(write(tmp_path / "gptj", {**without_key, "model_type": "gptj"}))).kv_heads == 8
    model = load_model(str(write(tmp_path / "new", new)))
    assert (model.kv_heads, model.intermediate_size) == (4, 256)


def test_names_are_known_in_any_case_and_as_on_the_hub_only_by_a_hint() -> None:
    assert load_model("Llama-3.1-8B") is load_model("llama-3.1-8b")
    with pytest.raises(InputError, match=r"nothing is downloaded; give the path.*; did you mean 'llama-3.1-8b'\?$"):
        load_model("meta-llama/Llama-3.1-8B-Instruct")
    with pytest.raises(InputError, match=r"'nowhere/config.json' does not exist"):
        load_model("nowhere/config.json")


def test_an_unknown_name_suggests_a_similar_name() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown model 'llama-2-7'; did you mean 'llama-2-7b'.*config\.json"):
        load_model("llama-2-7")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("[1]", "must hold a JSON object, not list"),
        ({key: value for key, value in LLAMA.items() if key != "vocab_size"}, "no vocab_size"),
        ({**LLAMA, "num_hidden_layers": "four"}, "layers must be a positive whole number, not 'four'"),
        ({**LLAMA, "hidden_size": -1}, "hidden_size must be a positive whole number"),
    ],
    ids=["half", "deep", "list", "no vocabulary", "text", "negative"],
)
def test_a_broken_configuration_is_refused(tmp_path: Path, config: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_model(str(write(tmp_path / "broken", config)))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        load_model(str(tmp_path / "none" / "config.json"))
